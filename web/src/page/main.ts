/**
 * The page: takes two files and a time, shows the result. `verifyBundle(bytes, policyText, at)` is the interface for
 * tests, and all there is where there is no document (`web/cli.mjs`).
 */

import { type Bytes, fromUtf8 } from "../core/bytes.js";
import { verifyBundle } from "../core/verify.js";
import { type Given, element, render } from "./view.js";

declare global {
  var verifyBundle: typeof import("../core/verify.js").verifyBundle;
}
globalThis.verifyBundle = verifyBundle;
if (typeof document !== "undefined") start();

function start(): void {
  const find = <T extends HTMLElement>(id: string): T => document.getElementById(id) as T;
  const status = find("status");
  const inputs = { bundle: find<HTMLInputElement>("bundle"), policy: find<HTMLInputElement>("policy") };
  const at = find<HTMLInputElement>("at");
  const assumed = find<HTMLInputElement>("assumed");
  const result = find("result");

  const say = (words: string, error = false): void => {
    status.textContent = words;
    status.classList.toggle("error", error);
  };
  const missing = (): string | null => {
    if (!inputs.bundle.files?.length) return "Choose the bundle, a .cmk file.";
    if (!inputs.policy.files?.length) return "Choose the policy, a .toml file.";
    if (assumed.checked && Number.isNaN(chosen())) return "Choose the time, or take the computer's clock.";
    return null;
  };
  const chosen = (): number => Math.floor(Date.parse(`${at.value}Z`) / 1000);

  const verify = async (): Promise<void> => {
    result.replaceChildren();
    document.title = "countermark verifier";
    const lacking = missing();
    if (lacking) {
      say(lacking, true);
      return;
    }
    say("Checking\u2026");
    try {
      const [bundle, policy] = await Promise.all([read(inputs.bundle), read(inputs.policy)]);
      const text = fromUtf8(policy.data);
      if (text === null) {
        say("The policy is not a text file.", true);
        return;
      }
      await painted();
      const time = assumed.checked ? chosen() : Math.floor(Date.now() / 1000);
      const found = verifyBundle(bundle.data, text, time);
      const basis = assumed.checked ? "assumed" : "now";
      const [nodes, heading] = render(found, { bundle, policy, at: time, basis });
      const print = element("button", { type: "button", class: "no-print" }, "Print");
      print.addEventListener("click", () => window.print());
      result.replaceChildren(...nodes, element("p", {}, print));
      say("Done. The result is below.");
      document.title = `${found.simulated ? "SIMULATED, " : ""}${found.verdict}: ${bundle.name}`;
      heading.focus();
    } catch (error) {
      say(`This page failed, and nothing was decided: ${String(error)}`, true);
    }
  };

  find<HTMLFormElement>("form").addEventListener("submit", (event) => {
    event.preventDefault();
    void verify();
  });
  at.addEventListener("input", () => (assumed.checked = true));
  dropTarget(async (files) => {
    for (const file of files) {
      const list = new DataTransfer();
      list.items.add(file);
      (await isBundle(file) ? inputs.bundle : inputs.policy).files = list.files;
    }
    if (missing()) say(missing()!);
    else void verify();
  });
}

async function read(input: HTMLInputElement): Promise<Given> {
  const file = input.files![0]!;
  const data: Bytes = new Uint8Array(await file.arrayBuffer());
  return { name: file.name, data };
}

/** A ZIP is a bundle, whatever its name. */
async function isBundle(file: File): Promise<boolean> {
  const start = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  return (start[0] === 0x50 && start[1] === 0x4b) || file.name.endsWith(".cmk");
}

/** Lets the browser show what was said before a long computation. */
const painted = (): Promise<void> => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

function dropTarget(take: (files: File[]) => Promise<void>): void {
  const mark = (event: DragEvent, on: boolean): void => {
    event.preventDefault();
    document.body.classList.toggle("dragging", on);
  };
  document.addEventListener("dragover", (event) => mark(event, true));
  document.addEventListener("dragleave", (event) => mark(event, false));
  document.addEventListener("drop", (event) => {
    mark(event, false);
    void take([...(event.dataTransfer?.files ?? [])]);
  });
}
