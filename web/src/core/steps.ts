/** The numbered steps of a verification: their names, the checks they leave behind, and what an appraisal found. */

import type { Bytes } from "./bytes.js";
import type { Claims, Keys } from "./claims.js";
import { Refusal } from "./errors.js";
import type { BootEvents } from "./eventlog.js";
import type { Gpu } from "./gpu.js";
import type { Platform } from "./tdx.js";

/** Number and name of every step, as the command line has them; step 0 is the file itself. */
export const STEPS = {
  "0": "every byte of the file is accounted for",
  "1": "every byte parses",
  "2": "endorsements are signed, current and not rolled back",
  "3": "quote signatures and TCB level",
  "4": "TD attributes and TDX module",
  "5": "registers equal the reference values",
  "6": "event logs replay to the registers",
  "7b": "report_data is the carried claims (connection asserted, not verified)",
  "8": "GPUs",
  "9": "hardware allow-list",
  "10": "weights, numerics and configuration",
  "11": "channel",
  "12": "the request was committed to, on this connection's evidence",
  "13": "appraised stack, settings as asked",
  "14": "INTENT in the log before the first token",
  "15": "receipt signed by both attested keys",
  "16": "the accepted INTENT and its OUTCOME",
  "17": "the answer that was streamed",
  "18": "one log, grown from the attested head",
  "19": "measurement manifest signed by the policy's signers",
  "20": "log witnesses",
  "21": "the log had this answer by a time others vouch for",
} as const;

export type StepNumber = keyof typeof STEPS;
export type Status = "PASS" | "FAIL" | "SKIP";

/** One line of a verification. `beyond`: this page cannot make the check, the command line can. */
export interface Check {
  readonly step: string;
  readonly name: string;
  readonly status: Status;
  readonly detail: string;
  readonly code: string;
  readonly beyond: boolean;
}

/**
 * Run one step; what it hands to `detail` is kept. A refusal is recorded and goes on to the caller. `without`: what the
 * step cannot look at, because it was left out; it then ends as SKIP or FAIL, never as PASS.
 */
export type Step = <T>(
  number: StepNumber,
  run: (detail: (text: string) => void) => T,
  without?: string,
  name?: string,
) => T;

export class Steps {
  readonly checks: Check[] = [];

  readonly step: Step = (number, run, without = "", name = STEPS[number]) => {
    const details: string[] = without ? [`not looked at, since left out: ${without}`] : [];
    try {
      const value = run((text) => void details.push(text));
      this.push(number, name, without ? "SKIP" : "PASS", details.join("; "));
      return value;
    } catch (error) {
      if (error instanceof Refusal) {
        const failed = (error.step ?? number) as StepNumber;
        this.push(failed, failed === number ? name : STEPS[failed], "FAIL", error.message, error.code);
      }
      throw error;
    }
  };

  /** A step that scope or policy does not ask for, or that was not possible; it never counts as a pass. */
  skip(number: StepNumber, detail: string, beyond = false, name: string = STEPS[number]): void {
    this.checks.push({ step: number, name, status: "SKIP", detail, code: "", beyond });
  }

  private push(step: StepNumber, name: string, status: Status, detail: string, code = ""): void {
    this.checks.push({ step, name, status, detail, code, beyond: false });
  }
}

/** Everything the verified evidence says. */
export interface Verdict {
  readonly simulated: boolean;
  readonly platform: string;
  readonly imageId: Bytes;
  readonly imageVersion: number;
  readonly shape: string;
  readonly claims: Claims;
  readonly boot: BootEvents;
  readonly keys: Keys;
  readonly quoteDigest: Bytes;
  readonly tdx: Platform;
  readonly gpus: readonly Gpu[];
}
