/**
 * Verify a bundle under a policy at a time: the one call of this page and of the tests.
 *
 * No network and no clock: the time is an argument. The verdict is `accept` when everything held, `partial` when
 * everything that can be checked here held and the command line could check more, `reject` when something is wrong, and
 * `undecidable` when something needed is missing or the policy cannot be used. A result is never better than its checks.
 */

import { appraise } from "./appraise.js";
import { parseBundle, redactedParts } from "./bundle.js";
import { type Bytes, equal, hex, rfc3339 } from "./bytes.js";
import { Refusal, refused, unusable } from "./errors.js";
import { verifyManifest } from "./manifest.js";
import { refuseRetired } from "./numerics.js";
import { type Policy, isSimulated, parsePolicy } from "./policy.js";
import { type Accepted, type Answer, type CheckedReceipt, verifyAccepted, verifyReceipt } from "./receipt.js";
import { verifyReceiptWitness, verifyWitnessed, witnessedBy } from "./witness.js";
import { type Check, Steps, type Verdict } from "./steps.js";

const ANCHORS_BEYOND =
  "time stamps came along and are not checked here; `countermark verify` checks them, and takes its time from them";

export type Outcome = "accept" | "partial" | "reject" | "undecidable";
export type Fact = readonly [name: string, value: string];

export interface Result {
  readonly verdict: Outcome;
  /** The stable code of the first failing check, empty when none failed. */
  readonly code: string;
  readonly step: string;
  readonly message: string;
  /** A simulated root or platform vouches for any of it: then it proves nothing about hardware. */
  readonly simulated: boolean;
  readonly redacted: readonly string[];
  readonly checks: readonly Check[];
  /** Only of a verified bundle. */
  readonly shown: Shown | null;
}

/** What the answer was; null where it was left out. */
export interface Shown {
  readonly turns: readonly (readonly [role: string, content: string])[] | null;
  readonly answer: string | null;
  readonly facts: readonly (readonly [heading: string, facts: readonly Fact[]])[];
}

/** `at`: unix seconds. */
export function verifyBundle(data: Bytes, policyText: string, at: number): Result {
  const steps = new Steps();
  let simulated = false;
  let redacted: string[] = [];
  try {
    const policy = parsePolicy(policyText);
    simulated = isSimulated(policy);
    const bundle = steps.step("0", (detail) => {
      const bundle = parseBundle(data);
      detail(`${data.length} bytes`);
      return bundle;
    });
    redacted = redactedParts(bundle);
    if (at > policy.notAfter) {
      const message = `policy.not_after: expected a time until ${rfc3339(policy.notAfter)}, got ${rfc3339(at)}`;
      throw unusable("policy.expired", message);
    }
    const verdict = appraise(bundle.evidence, policy, at, steps);
    const accepted = verifyAccepted(bundle.acceptance, verdict, bundle.request, steps.step);
    const receipt = verifyReceipt(bundle.receipt, verdict, accepted, bundle.answer, steps.step);
    verifyCarried(bundle.manifest, verdict, policy, at, steps);
    const witnesses = verifyWitnessed(bundle.epoch, verdict, policy, steps);
    verifyReceiptWitness(bundle.witness, verdict, receipt.checkpoint, policy, steps);
    if (bundle.anchors !== null) steps.skip("21", ANCHORS_BEYOND, true);
    refuseRetired(verdict.boot.profile);
    const partial = steps.checks.some(({ beyond }) => beyond);
    return {
      verdict: partial ? "partial" : "accept",
      code: "",
      step: "",
      message: "",
      simulated: verdict.simulated,
      redacted,
      checks: steps.checks,
      shown: shownOf(verdict, accepted, bundle.answer, receipt, witnesses, at),
    };
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    const failed = steps.checks.at(-1);
    return {
      verdict: error.kind === "undecided" || error.kind === "policy" ? "undecidable" : "reject",
      code: error.code,
      step: failed?.status === "FAIL" ? failed.step : "",
      message: error.message,
      simulated,
      redacted,
      checks: steps.checks,
      shown: null,
    };
  }
}

function verifyCarried(manifest: Bytes | null, verdict: Verdict, policy: Policy, at: number, steps: Steps): void {
  if (manifest === null) {
    steps.skip("19", "none in the bundle; the policy's own reference values were used");
    return;
  }
  steps.step("19", (detail) => {
    const image = verifyManifest(manifest, policy.manifestSigners, at);
    if (!equal(image.image_id, verdict.imageId)) {
      const message = `image id: expected ${hex(verdict.imageId)}, got ${hex(image.image_id)}`;
      throw refused("manifest.image", message);
    }
    detail(`image ${hex(image.image_id)}, version ${image.version}`);
  });
}

const time = (microseconds: bigint | null): string =>
  microseconds === null ? "none" : rfc3339(Number(microseconds / 1_000_000n));

/** A share in units of 2^-20, to as many digits as that gives. */
const share = (units: bigint): string => String(Number((Number(units) / 2 ** 20).toFixed(6)));

function shownOf(
  verdict: Verdict,
  accepted: Accepted,
  answer: Answer | null,
  receipt: CheckedReceipt,
  witnesses: readonly string[],
  at: number,
): Shown {
  const { intent, asked } = accepted;
  const { outcome, checkpoint } = receipt;
  const { stack, sampling } = intent;
  const biases = sampling.logit_bias.map(([token, bias]) => `${token}: ${bias}`).join(", ");
  return {
    turns: asked && (asked.turns?.map(({ role, content }) => [role, content]) ?? [["prompt", asked.prompt ?? ""]]),
    answer: answer && answer.text,
    facts: [
      [
        "What computed the answer",
        [
          ["Model", stack.model],
          ["Weights", hex(stack.weights_root)],
          ["Quantisation", stack.quantisation],
          ["Numerics profile", `${stack.profile} (no bit depends on: ${stack.claims.join(", ")})`],
          ["Engine", `${stack.engine}, ${stack.backend}, torch ${stack.torch}`],
          ["GPUs", stack.gpus.join(", ") || "none"],
        ],
      ],
      [
        "The machine",
        [
          ["Platform", verdict.platform],
          ["Image", `${hex(verdict.imageId)}, version ${verdict.imageVersion}, ${verdict.shape}`],
          ["Intel's rating", [verdict.tdx.tcbStatus, ...verdict.tdx.advisories].join(", ")],
          ["PPID (names the CPU)", hex(verdict.tdx.ppid)],
          ["Configuration", hex(verdict.boot.config)],
          ["This start of it", hex(verdict.claims.boot_id)],
        ],
      ],
      [
        "Settings of this answer",
        [
          ["Temperature", `${sampling.temperature}${sampling.temperature === 0 ? " (greedy)" : ""}`],
          ["Seed", `${sampling.seed}, chosen by the ${sampling.seed_origin}`],
          ["Top-k", sampling.top_k === 0n ? "off" : String(sampling.top_k)],
          ["Top-p", share(sampling.top_p_20bit)],
          ["Min-p", share(sampling.min_p_20bit)],
          [
            "Penalties",
            `repetition ${sampling.repetition_penalty}, presence ${sampling.presence_penalty}, ` +
              `frequency ${sampling.frequency_penalty}`,
          ],
          ["Token biases", biases || "none"],
          ["Longest answer", `${intent.max_tokens} tokens`],
          ["Stop texts", intent.stop.map((text) => JSON.stringify(text)).join(", ") || "none"],
        ],
      ],
      [
        "When, and where it is recorded",
        [
          ["Accepted", `${time(intent.accepted_us)} (the machine's clock)`],
          ["First token", time(outcome.first_token_us)],
          ["Ended", `${time(outcome.ended_us)}: ${outcome.finish_reason}`],
          ["Tokens", `${outcome.prompt_count} in (${outcome.cached_count} cached), ${outcome.output_count} out`],
          ["Request", hex(intent.request_id)],
          ["Log", `${checkpoint.origin}, ${checkpoint.size} leaves, ${witnessedBy(witnesses)}`],
          ["Judged as of", rfc3339(at)],
        ],
      ],
    ],
  };
}
