/**
 * The receipt of one answer as COSE_Sign (RFC 9052), the two messages beside it, and steps 12 to 18.
 *
 * Exactly two signers in this order, ES256 then ML-DSA-65 (RFC 9964, empty context), each over its Sig_structure. The
 * steps continue the appraisal's numbers. What a redacted bundle leaves out is not opened, and said so.
 * Not checked here: that prompt and text are what their tokens spell, and that the tokens are what the model gives.
 */

import { type Bytes, bigBe, equal, hex, points, sameTexts, utf8 } from "./bytes.js";
import * as cbor from "./cbor.js";
import { type Checkpoint, MAX_NOTE_BYTES, verifyCheckpoint } from "./checkpoint.js";
import { type Refusal, malformed, refused } from "./errors.js";
import { type CoseKey, P256_ORDER, coseNumber, thumbprint, verifySignature } from "./keys.js";
import { EMPTY_ROOT, HASH_BYTES, MAX_PROOF, verifyConsistency, verifyInclusion } from "./merkle.js";
import { PROFILES } from "./numerics.js";
import {
  FINGERPRINT_BYTES,
  GRAMMAR_FIELD,
  INTENT_FIELDS,
  RETRIEVAL_FIELDS,
  type Intent,
  MAX_RECORD_BYTES,
  MAX_TOKENS,
  OUTCOME_FIELDS,
  type Outcome,
  fieldCommitment,
  leafDigest,
  parseIntent,
  parseOutcome,
  parseSalts,
} from "./records.js";
import { type Asked, checkSettings, parseRequest } from "./request.js";
import type { Step, Verdict } from "./steps.js";

const EXTERNAL_AAD = utf8("countermark/receipt/v1");
const CONTENT_TYPE = "application/vnd.countermark.receipt+cbor";
const SIGNERS = [
  { algorithm: "ES256", role: "receipt-es256", size: 64, code: "es256" },
  { algorithm: "ML_DSA_65", role: "receipt-ml-dsa-65", size: 3309, code: "ml_dsa_65" },
] as const;
export const MAX_RECEIPT_BYTES = 2 * MAX_RECORD_BYTES + MAX_NOTE_BYTES + 32 * 1024;
const MAX_TEXT = 16 * 1024 * 1024;
const I63 = 1n << 63n;

interface Proven {
  readonly record: Bytes;
  readonly salt: Bytes;
  readonly index: bigint;
  readonly proof: readonly Bytes[];
}

interface Receipt {
  readonly intent: Proven;
  readonly outcome: Proven;
  readonly checkpoint: Bytes;
  readonly fromAttested: readonly Bytes[];
  readonly fromAccepted: readonly Bytes[];
  readonly kids: readonly Bytes[];
  readonly signatures: readonly Bytes[];
  readonly signed: readonly Bytes[];
}

/** The first message of a stream: the INTENT and its place in the log, before any token. */
export interface Acceptance {
  readonly record: Bytes;
  readonly leafSalt: Bytes;
  readonly leafIndex: bigint;
  readonly proof: readonly Bytes[];
  readonly checkpoint: Bytes;
  /** What opens its commitments to the prompt; null when the prompt was left out. */
  readonly opened: { readonly fieldSalts: Bytes; readonly promptTokens: readonly bigint[] } | null;
}

/** What was streamed. `fingerprints` follow from the prompt, and are left out with it. */
export interface Answer {
  readonly tokens: readonly bigint[];
  readonly text: string;
  readonly fingerprints: Bytes | null;
  readonly fieldSalts: Bytes;
}

/** Parse `accepted.cbor`; refuses `cbor.*`, `accepted.field`, `bundle.redaction`. */
export function parseAcceptance(data: Bytes): Acceptance {
  const value = cbor.fields(cbor.decode(data), "accepted", {
    v: "int",
    record: "bytes",
    leaf_salt: "bytes",
    field_salts: ["bytes", "null"],
    leaf_index: "int",
    proof: "list",
    checkpoint: "bytes",
    prompt_tokens: ["list", "null"],
  });
  checkVersion(value.int("v"), "accepted");
  const placed = {
    record: value.bytes("record"),
    leafSalt: value.bytes("leaf_salt"),
    leafIndex: indexOf(value.int("leaf_index"), "accepted"),
    proof: hashesOf(value.list("proof"), "accepted"),
    checkpoint: value.bytes("checkpoint"),
  };
  if (leftOut(value, "accepted", "prompt_tokens", "field_salts")) return { ...placed, opened: null };
  const promptTokens = tokensOf(value.list("prompt_tokens"), "accepted");
  return { ...placed, opened: { fieldSalts: value.bytes("field_salts"), promptTokens } };
}

/** Parse `answer.cbor`, null when the output was left out; refuses `cbor.*`, `answer.field`, `bundle.redaction`. */
export function parseAnswer(data: Bytes): Answer | null {
  const value = cbor.fields(cbor.decode(data), "answer", {
    v: "int",
    tokens: ["list", "null"],
    text: ["text", "null"],
    fingerprints: ["bytes", "null"],
    field_salts: ["bytes", "null"],
  });
  checkVersion(value.int("v"), "answer");
  if (leftOut(value, "answer", "tokens", "text", "field_salts")) {
    leftOut(value, "answer", "tokens", "fingerprints");
    return null;
  }
  const tokens = tokensOf(value.list("tokens"), "answer");
  const text = value.text("text");
  if (points(text) > MAX_TEXT) throw malformed("answer.field", `answer.text: expected at most ${MAX_TEXT} characters`);
  const fingerprints = value.get("fingerprints") as Bytes | null;
  if (fingerprints && fingerprints.length !== FINGERPRINT_BYTES * tokens.length) {
    throw malformed("answer.field", "answer: expected one 16-byte fingerprint for each token");
  }
  return { tokens, text, fingerprints, fieldSalts: value.bytes("field_salts") };
}

/** Whether all of these were left out; refuses `bundle.redaction` where only some were. */
function leftOut(value: cbor.Fields, what: string, ...names: string[]): boolean {
  const absent = names.filter((name) => value.get(name) === null);
  if (absent.length && absent.length !== names.length) {
    const message = `expected ${names.join(", ")} all there or all left out, got ${absent.join(", ")} left out`;
    throw malformed("bundle.redaction", `${what}: ${message}`);
  }
  return absent.length > 0;
}

const badReceipt = (code: string, message: string): Refusal => malformed(`receipt.${code}`, `receipt: ${message}`);

/** Parse `receipt.cose`; refuses `cbor.*`, `receipt.*`. */
function parseReceipt(data: Bytes): Receipt {
  if (data[0] !== 0xd8 || data[1] !== 0x62) throw badReceipt("form", "expected a COSE_Sign (tag 98)");
  const body = typedList(cbor.decode(data.subarray(2), MAX_RECEIPT_BYTES), "bytes", "map", "bytes", "list");
  const blocks = (body[3] as cbor.Value[]).map((block) => typedList(block, "bytes", "map", "bytes"));
  const isEmpty = (value: cbor.Value | undefined) => value instanceof Map && value.size === 0;
  if (!isEmpty(body[1]) || blocks.some((block) => !isEmpty(block[1]))) {
    throw badReceipt("header", "expected empty unprotected headers");
  }
  if (blocks.length !== SIGNERS.length) {
    throw badReceipt("signers", `expected ${SIGNERS.length} signatures, got ${blocks.length}`);
  }
  const signatures = blocks.map((block) => block[2] as Bytes);
  const kids = SIGNERS.map((signer, i) => kidOf(blocks[i]![0] as Bytes, signer, signatures[i]!));
  const payload = body[2] as Bytes;
  const header = bodyHeader(kids);
  if (!equal(body[0] as Bytes, header)) {
    throw badReceipt("header", "expected our protected header, requiring both signers");
  }
  checkLowS(signatures[0]!);
  const signed = SIGNERS.map(({ algorithm }, i) =>
    cbor.encode(["Signature", header, signerHeader(coseNumber(algorithm), kids[i]!), EXTERNAL_AAD, payload]),
  );
  return { ...parsePayload(payload), kids, signatures, signed };
}

const signerHeader = (alg: bigint, kid: Bytes): Bytes => cbor.encode(new Map<bigint, cbor.Value>([[1n, alg], [4n, kid]]));

function bodyHeader(kids: readonly Bytes[]): Bytes {
  const pairs = SIGNERS.map(({ algorithm }, i): cbor.Value => [coseNumber(algorithm), kids[i]!]);
  return cbor.encode(new Map<cbor.Key, cbor.Value>([[2n, ["required"]], [3n, CONTENT_TYPE], ["required", pairs]]));
}

function kidOf(protectedHeader: Bytes, signer: (typeof SIGNERS)[number], signature: Bytes): Bytes {
  const header = cbor.decode(protectedHeader, 256);
  const form = header instanceof Map && header.size === 2 && header.has(4n);
  if (!form || header.get(1n) !== coseNumber(signer.algorithm)) {
    throw badReceipt("signers", `expected ${signer.algorithm} in its place`);
  }
  const kid = header.get(4n);
  if (!(kid instanceof Uint8Array) || kid.length !== 32) throw badReceipt("header", "kid: expected 32 bytes");
  if (signature.length !== signer.size) {
    throw badReceipt("signature_form", `expected ${signer.size} signature bytes, got ${signature.length}`);
  }
  return kid;
}

function checkLowS(signature: Bytes): void {
  const [r, s] = [bigBe(signature.subarray(0, 32)), bigBe(signature.subarray(32))];
  if (r <= 0n || r >= P256_ORDER || s <= 0n || s >= P256_ORDER) {
    throw badReceipt("signature_form", "ES256 r and s: expected 1 to n - 1");
  }
  if (s > P256_ORDER / 2n) throw badReceipt("high_s", "ES256 s: expected at most n / 2");
}

function parsePayload(data: Bytes): Omit<Receipt, "kids" | "signatures" | "signed"> {
  const value = cbor.fields(cbor.decode(data, MAX_RECEIPT_BYTES), "receipt", {
    v: "int",
    intent: "map",
    outcome: "map",
    checkpoint: "bytes",
    from_attested: "list",
    from_accepted: "list",
  });
  checkVersion(value.int("v"), "receipt");
  return {
    intent: proven(value.get("intent")),
    outcome: proven(value.get("outcome")),
    checkpoint: value.bytes("checkpoint"),
    fromAttested: hashesOf(value.list("from_attested"), "receipt"),
    fromAccepted: hashesOf(value.list("from_accepted"), "receipt"),
  };
}

function proven(item: cbor.Value): Proven {
  const value = cbor.fields(item, "receipt", { record: "bytes", salt: "bytes", index: "int", proof: "list" });
  return {
    record: value.bytes("record"),
    salt: value.bytes("salt"),
    index: indexOf(value.int("index"), "receipt"),
    proof: hashesOf(value.list("proof"), "receipt"),
  };
}

function typedList(value: cbor.Value, ...kinds: cbor.Type[]): cbor.Value[] {
  if (!Array.isArray(value) || value.length !== kinds.length) {
    throw badReceipt("form", `expected an array of ${kinds.length}`);
  }
  if (value.some((item, i) => cbor.typeOf(item) !== kinds[i])) throw badReceipt("form", `expected ${kinds.join(", ")}`);
  return value;
}

function checkVersion(value: bigint, what: string): void {
  if (value !== 1n) throw malformed(`${what}.field`, `${what}.v: expected 1, got ${value}`);
}

function indexOf(value: bigint, what: string): bigint {
  if (value < 0n || value >= I63) throw malformed(`${what}.field`, `${what}: expected a leaf index`);
  return value;
}

function hashesOf(items: cbor.Value[], what: string): Bytes[] {
  const good = items.every((item) => item instanceof Uint8Array && item.length === HASH_BYTES);
  if (items.length > MAX_PROOF || !good) {
    throw malformed(`${what}.field`, `${what}: expected at most ${MAX_PROOF} hashes of ${HASH_BYTES} bytes`);
  }
  return items as Bytes[];
}

function tokensOf(items: cbor.Value[], what: string): bigint[] {
  const good = items.every((item) => typeof item === "bigint" && item >= 0n && item < 1n << 32n);
  if (items.length > MAX_TOKENS || !good) {
    throw malformed(`${what}.field`, `${what}: expected at most ${MAX_TOKENS} token ids`);
  }
  return items as bigint[];
}

/** A checked INTENT: the appliance had committed to the request before any token. */
export interface Accepted {
  readonly intent: Intent;
  readonly asked: Asked | null;
  readonly acceptance: Acceptance;
  readonly leaf: Bytes;
  readonly checkpoint: Checkpoint;
}

export interface CheckedReceipt {
  readonly outcome: Outcome;
  readonly checkpoint: Checkpoint;
}

function same(what: string, expected: Bytes, got: Bytes, code: string): void {
  if (!equal(expected, got)) throw refused(code, `${what}: expected ${hex(expected)}, got ${hex(got)}`);
}

/** Steps 12 to 14. `request` is null exactly when the acceptance is not opened. */
export function verifyAccepted(acceptance: Acceptance, verdict: Verdict, request: Bytes | null, step: Step): Accepted {
  const left = (what: string) => (request === null ? what : "");
  const [intent, asked] = step("12", (detail) => {
    const intent = parseIntent(acceptance.record);
    const asked = request === null ? null : parseRequest(request);
    same("boot id", verdict.claims.boot_id, intent.boot_id, "receipt.boot");
    same("quote digest", verdict.quoteDigest, intent.quote_digest, "receipt.quote");
    detail(`request ${hex(intent.request_id)}`);
    if (asked && request && acceptance.opened) {
      checkRequest(intent, asked, acceptance.opened, request);
      detail(`${acceptance.opened.promptTokens.length} prompt tokens`);
    }
    return [intent, asked] as const;
  }, left("request and prompt tokens"));
  step("13", (detail) => {
    checkStack(intent, verdict);
    const { sampling, stack } = intent;
    detail(`${stack.model}, ${stack.profile}; temperature ${sampling.temperature}`);
    detail(`seed ${sampling.seed} (${sampling.seed_origin})`);
    if (asked) {
      checkSettings(asked, intent);
      detail(`${asked.settings.size} settings as given or by default`);
    }
  }, left("the settings as asked"));
  return step("14", (detail) => {
    const checkpoint = openCheckpoint(acceptance.checkpoint, verdict);
    const leaf = leafDigest("intent", intent.boot_id, null, acceptance.record, acceptance.leafSalt, acceptance.leafIndex);
    verifyInclusion(acceptance.leafIndex, checkpoint.size, leaf, acceptance.proof, checkpoint.root);
    if (acceptance.leafIndex < verdict.claims.logSize) {
      const wanted = `expected at least the attested log size ${verdict.claims.logSize}`;
      throw refused("log.stale", `leaf index: ${wanted}, got ${acceptance.leafIndex}`);
    }
    detail(`leaf ${acceptance.leafIndex} of ${checkpoint.size}; ${checkpoint.origin}`);
    return { intent, asked, acceptance, leaf, checkpoint };
  });
}

function checkRequest(
  intent: Intent,
  asked: Asked,
  { fieldSalts, promptTokens }: NonNullable<Acceptance["opened"]>,
  request: Bytes,
): void {
  same("nonce", asked.nonce, intent.nonce, "receipt.nonce");
  const { retrieval } = intent;
  if ((asked.retrieval === null) !== (retrieval === null)) {
    throw refused("receipt.retrieval", "retrieval: expected in the record exactly what the request has of it");
  }
  const { grammar } = intent;
  if (asked.grammar?.kind !== grammar?.kind) {
    const shown = [asked.grammar?.kind ?? "none", grammar?.kind ?? "none"];
    throw refused("receipt.grammar", `grammar: expected ${shown[0]}, as asked, got ${shown[1]} recorded`);
  }
  const salts = parseSalts(fieldSalts, [
    ...INTENT_FIELDS,
    ...(retrieval ? RETRIEVAL_FIELDS.map((part) => `retrieval.${part}`) : []),
    ...(grammar ? [GRAMMAR_FIELD] : []),
  ]);
  const values = [
    ["raw_request", request, "receipt.request"],
    ["prompt", asked.input, "receipt.input"],
    ["prompt_tokens", cbor.encode([...promptTokens]), "receipt.prompt_tokens"],
  ] as const;
  for (const [name, value, code] of values) same(name, fieldCommitment(name, salts.get(name)!, value), intent[name], code);
  if (asked.retrieval && retrieval) {
    for (const part of RETRIEVAL_FIELDS) {
      const name = `retrieval.${part}`;
      same(name, fieldCommitment(name, salts.get(name)!, asked.retrieval[part]), retrieval[part], "receipt.retrieval");
    }
  }
  if (asked.grammar && grammar) {
    const committed = fieldCommitment(GRAMMAR_FIELD, salts.get(GRAMMAR_FIELD)!, utf8(asked.grammar.text));
    same("grammar", committed, grammar.text, "receipt.grammar");
  }
}

function checkStack(intent: Intent, verdict: Verdict): void {
  const { stack } = intent;
  const { boot } = verdict;
  if (stack.platform !== verdict.platform) {
    throw refused("receipt.platform", `platform: expected ${verdict.platform}, got ${stack.platform}`);
  }
  same("weights root", boot.weightsRoot, stack.weights_root, "receipt.weights_root");
  same("image id", verdict.imageId, stack.image_id, "receipt.image_id");
  same("config digest", verdict.claims.config, stack.config_digest, "receipt.config");
  if (stack.profile !== boot.profile) {
    throw refused("receipt.profile", `profile: expected ${boot.profile}, got ${stack.profile}`);
  }
  const promised = PROFILES.get(stack.profile);
  if (promised && (stack.determinism !== promised.determinism || !sameTexts(stack.claims, promised.claims))) {
    const wanted = `${promised.claims.join(", ")}, as ${stack.profile} promises`;
    throw refused("receipt.profile", `claims: expected ${wanted}, got ${stack.claims.join(", ").slice(0, 100)}`);
  }
  same("kernel digest", boot.kernelDigest, stack.kernel_digest, "receipt.kernel_digest");
}

/** Steps 15 to 18. */
export function verifyReceipt(
  data: Bytes,
  verdict: Verdict,
  accepted: Accepted,
  answer: Answer | null,
  step: Step,
): CheckedReceipt {
  const receipt = step("15", (detail) => {
    const receipt = parseReceipt(data);
    SIGNERS.forEach(({ algorithm, role, code }, i) => {
      const key: CoseKey = verdict.keys[role];
      const kid = receipt.kids[i]!;
      if (!equal(kid, thumbprint(key))) {
        throw refused("receipt.kid", `kid of ${algorithm}: expected the attested key's`);
      }
      if (!verifySignature(key, receipt.signatures[i]!, receipt.signed[i]!)) {
        throw refused(`receipt.${code}`, `the ${algorithm} signature does not verify`);
      }
      detail(`${algorithm} ${hex(kid).slice(0, 16)}`);
    });
    return receipt;
  });
  const outcome = step("16", () => checkLink(receipt, accepted));
  const there = [["tokens and text", answer !== null], ["fingerprints", Boolean(answer?.fingerprints)]] as const;
  const named = (held: boolean) => there.filter(([, here]) => here === held).map(([name]) => name);
  step("17", (detail) => {
    checkAnswer(outcome, answer, accepted);
    const held = named(true).join(", ") || "counts and end alone";
    detail(`${outcome.output_count} tokens: ${held}; finish reason ${outcome.finish_reason}`);
  }, named(false).join(", "));
  return step("18", (detail) => {
    const checkpoint = checkLog(receipt, outcome, accepted, verdict);
    detail(`sizes ${verdict.claims.logSize}, ${accepted.checkpoint.size}, ${checkpoint.size}`);
    return { outcome, checkpoint };
  });
}

function checkLink(receipt: Receipt, accepted: Accepted): Outcome {
  const { acceptance } = accepted;
  const { record, salt, index } = receipt.intent;
  const asAccepted = equal(record, acceptance.record) && equal(salt, acceptance.leafSalt);
  if (!asAccepted || index !== acceptance.leafIndex) {
    throw refused("receipt.intent", "intent: expected the one accepted before the first token");
  }
  const outcome = parseOutcome(receipt.outcome.record);
  same("boot id of the OUTCOME", accepted.intent.boot_id, outcome.boot_id, "receipt.boot");
  same("INTENT leaf", accepted.leaf, outcome.intent_leaf, "receipt.outcome");
  if (receipt.outcome.index <= index) {
    throw refused("receipt.order", "outcome: expected after its INTENT in the log");
  }
  return outcome;
}

function checkAnswer(outcome: Outcome, answer: Answer | null, accepted: Accepted): void {
  const values = new Map<(typeof OUTCOME_FIELDS)[number], Bytes>();
  if (answer) values.set("output_tokens", cbor.encode([...answer.tokens])).set("output_text", utf8(answer.text));
  if (answer?.fingerprints) values.set("fingerprints", answer.fingerprints);
  const salts = answer ? parseSalts(answer.fieldSalts, [...values.keys()]) : new Map<string, Bytes>();
  for (const [name, value] of values) {
    same(name, fieldCommitment(name, salts.get(name)!, value), outcome[name], `receipt.${name}`);
  }
  const badCounts = (message: string) => refused("receipt.counts", `token counts: expected ${message}`);
  const { opened } = accepted.acceptance;
  const promptFits = !opened || BigInt(opened.promptTokens.length) === outcome.prompt_count;
  const answerFits = !answer || BigInt(answer.tokens.length) === outcome.output_count;
  if (!promptFits || !answerFits) throw badCounts("those of the answer");
  if (outcome.cached_count > outcome.prompt_count || outcome.output_count > accepted.intent.max_tokens) {
    throw badCounts("within prompt and max_tokens");
  }
  checkEnd(outcome, accepted.intent, answer);
}

/**
 * As far as token ids and text show it: the answer ends where the INTENT makes it end, and not later. Without the
 * output: whether there can be such an end at all.
 */
function checkEnd(outcome: Outcome, intent: Intent, answer: Answer | null): void {
  const stops = new Set(intent.ignore_eos ? [] : intent.stop_tokens);
  const ends = (answer?.tokens ?? []).map((token) => stops.has(token));
  const last = ends.at(-1) ?? null; // null: not known
  const fits: Record<string, boolean> = {
    eos: last ?? stops.size > 0,
    stop: !last && intent.stop.length > 0,
    length: !last && outcome.output_count === intent.max_tokens,
  };
  if (!fits[outcome.finish_reason] || outcome.output_count === 0n || ends.slice(0, -1).includes(true)) {
    throw refused("receipt.finish_reason", `finish reason: ${outcome.finish_reason} does not fit the answer`);
  }
  if (answer && intent.stop.some((text) => answer.text.includes(text))) {
    throw refused("receipt.finish_reason", "text: expected to end before any stop string");
  }
}

function checkLog(receipt: Receipt, outcome: Outcome, accepted: Accepted, verdict: Verdict): Checkpoint {
  const checkpoint = openCheckpoint(receipt.checkpoint, verdict);
  const { size, root } = checkpoint;
  const { intent: first, outcome: second } = receipt;
  const intentLeaf = leafDigest("intent", accepted.intent.boot_id, null, first.record, first.salt, first.index);
  verifyInclusion(first.index, size, intentLeaf, first.proof, root);
  const { boot_id, intent_leaf } = outcome;
  const outcomeLeaf = leafDigest("outcome", boot_id, intent_leaf, second.record, second.salt, second.index);
  verifyInclusion(second.index, size, outcomeLeaf, second.proof, root);
  verifyGrowth(accepted.checkpoint.size, accepted.checkpoint.root, checkpoint, receipt.fromAccepted);
  verifyGrowth(verdict.claims.logSize, verdict.claims.log_root, checkpoint, receipt.fromAttested);
  return checkpoint;
}

function verifyGrowth(size: bigint, root: Bytes, checkpoint: Checkpoint, proof: readonly Bytes[]): void {
  if (size > 0n) {
    verifyConsistency(size, checkpoint.size, root, checkpoint.root, proof);
    return;
  }
  if (!equal(root, EMPTY_ROOT) || proof.length) {
    throw refused("log.consistency", "log head: expected the empty tree's root and no proof");
  }
}

const openCheckpoint = (data: Bytes, verdict: Verdict): Checkpoint =>
  verifyCheckpoint(data, verdict.claims.logOrigin, verdict.keys["log-ed25519"], verdict.keys["log-ml-dsa-44"]);

