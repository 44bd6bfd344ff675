/** The result as elements of the page. Everything from a file becomes a text node, never markup. */

import { type Bytes, hex, rfc3339, sha256 } from "../core/bytes.js";
import type { Check, StepNumber } from "../core/steps.js";
import { STEPS } from "../core/steps.js";
import type { Fact, Result } from "../core/verify.js";
import { SKIPPED, UNPROVEN, VERDICTS, WORDS } from "./words.js";

/** The numbers of the steps that every bundle goes through. */
const ORDER = Object.keys(STEPS)
  .filter((step) => step !== "21")
  .sort((left, right) => Number.parseInt(left) - Number.parseInt(right));

type Child = Node | string | null;
type Attributes = Readonly<Record<string, string>>;

export function element<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Text in which `words` between backticks are code. */
const text = (words: string): Node =>
  element("span", {}, ...words.split("`").map((part, i) => (i % 2 ? element("code", {}, part) : part)));

export interface Given {
  readonly name: string;
  readonly data: Bytes;
}

export interface Judged {
  readonly bundle: Given;
  readonly policy: Given;
  readonly at: number;
  readonly basis: "now" | "assumed";
}

/** The whole result, and the heading to read first. */
export function render(result: Result, judged: Judged): [Node[], HTMLElement] {
  const [mark, title, words] = VERDICTS[result.verdict];
  const heading = element("h2", { tabindex: "-1" }, `${mark} ${title}`);
  const { at, basis } = judged;
  const nodes = [
    result.simulated ? simulated() : null,
    element(
      "section",
      { class: `verdict ${result.verdict}`, "aria-label": "Verdict" },
      heading,
      element("p", {}, words),
      ...why(result),
      result.redacted.length ? element("p", {}, redactedWords(result.redacted)) : null,
      element("p", {}, element("small", {}, `Judged as of ${rfc3339(at)}; time: ${basis}.`)),
    ),
    ...conversation(result),
    element("h2", {}, "What was checked"),
    checks(result.checks),
    notReached(result),
    ...(result.shown?.facts.flatMap(([name, facts]) => [element("h3", {}, name), list(facts)]) ?? []),
    element("h3", {}, "The files"),
    list([
      ["Bundle", `${judged.bundle.name}, SHA-256 ${hex(sha256(judged.bundle.data))}`],
      ["Policy", `${judged.policy.name}, SHA-256 ${hex(sha256(judged.policy.data))}`],
    ]),
    ...(result.shown ? unproven() : []),
    json(result, judged),
  ];
  return [nodes.filter((node) => node !== null), heading];
}

/** Why it is not all there: the failing step in plain words, or what is left to the command line. */
function why(result: Result): Node[] {
  const beyond = result.checks.filter((check) => check.beyond).map((check) => check.name);
  if (!result.code) return beyond.length ? [element("p", {}, `Left to the command line: ${beyond.join(", ")}.`)] : [];
  const failed = result.checks.find((check) => check.status === "FAIL");
  const said = result.verdict === "reject" ? "does not hold" : "cannot be decided";
  return [
    failed ? element("p", {}, `Step ${failed.step} ${said}: ${WORDS[failed.step as StepNumber]}`) : null,
    element("p", { class: "technical" }, `${result.message} `, element("span", { class: "code" }, `(${result.code})`)),
  ].filter((node) => node !== null);
}

function simulated(): Node {
  const words = "A simulated machine, or a root made for tests, vouches for this: it proves nothing about hardware.";
  return element("section", { class: "simulated", role: "alert" }, element("strong", {}, "SIMULATED"), words);
}

function redactedWords(parts: readonly string[]): string {
  const what = parts.map((part) => (part === "prompt" ? "the prompt" : "the answer")).join(" and ");
  return `Redacted: ${what} was left out on purpose, with all that would let it be guessed. The rest was verified.`;
}

function unproven(): Node[] {
  const items = UNPROVEN.map((item) => element("li", {}, text(item)));
  return [element("h2", {}, "What this does not show"), element("ul", {}, ...items)];
}

function conversation(result: Result): Node[] {
  const { shown } = result;
  if (!shown) {
    return result.verdict === "reject"
      ? [element("p", { class: "notice" }, "The question and the answer in this file are not shown, because they are not proven.")]
      : [];
  }
  const turn = (who: string, words: string | null, kind = ""): Node =>
    element(
      "div",
      { class: `turn ${kind}` },
      element("h3", {}, who),
      words === null ? element("p", { class: "left-out" }, "left out of this file") : element("p", { dir: "auto" }, words),
    );
  const turns = shown.turns ? shown.turns.map(([role, content]) => turn(role, content)) : [turn("prompt", null)];
  return [element("h2", {}, "The question and the answer"), ...turns, turn("answer", shown.answer, "answer")];
}

function checks(items: readonly Check[]): Node {
  return element("ol", { class: "checks", role: "list" }, ...items.map(line));
}

function line(check: Check): Node {
  const step = check.step as StepNumber;
  const words = (check.status === "SKIP" ? SKIPPED[step] : undefined) ?? WORDS[step];
  const failed = check.status === "FAIL";
  const body = element("div", {}, element("p", { class: "words" }, failed ? `This does not hold: ${words}` : words));
  if (failed) {
    body.append(element("p", { class: "why" }, `${check.detail} `, element("span", { class: "code" }, `(${check.code})`)));
  }
  const detail = failed ? check.name : [check.name, check.detail].filter(Boolean).join(": ");
  body.append(element("p", { class: "detail" }, text(detail)));
  return element(
    "li",
    {},
    element("span", { class: "number" }, check.step),
    element("span", { class: `badge ${check.status}${check.beyond ? " beyond" : ""}` }, check.status),
    body,
  );
}

function notReached(result: Result): Node | null {
  if (result.shown) return null;
  const last = result.checks.at(-1)?.step;
  const left = ORDER.slice(last === undefined ? 0 : ORDER.indexOf(last) + 1);
  if (!left.length) return null;
  const range = left.length > 1 ? `Steps ${left[0]} to ${left.at(-1)}` : `Step ${left[0]}`;
  return element("p", { class: "detail" }, `${range}: not reached, because the first step that fails ends a verification.`);
}

function list(facts: readonly Fact[]): Node {
  return element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function json(result: Result, judged: Judged): Node {
  const { shown: _, ...rest } = result;
  const value = { ...rest, time: { value: judged.at, basis: judged.basis } };
  return element(
    "details",
    { class: "no-print" },
    element("summary", {}, "The result for machines (JSON)"),
    element("pre", { id: "json" }, JSON.stringify(value, null, 2)),
  );
}
