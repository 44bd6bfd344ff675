/**
 * The records a log commits to, read strictly, and the leaves it publishes (docs/formats.md, sections 10 and 11).
 *
 * An integer is a `bigint` and a float a `number`, as `cbor` reads them. Not checked here: whether any of it is true.
 */

import { type Bytes, points, sha256, utf8 } from "./bytes.js";
import * as cbor from "./cbor.js";
import { malformed } from "./errors.js";
import { leafHash } from "./merkle.js";

export const MAX_RECORD_BYTES = 256 * 1024;
export const MAX_TOKENS = 1 << 20;
export const FINGERPRINT_BYTES = 16;
export const INTENT_FIELDS = ["prompt", "prompt_tokens", "raw_request"] as const;
export const GRAMMAR_FIELD = "grammar.text";
export const RETRIEVAL_FIELDS = ["chunks", "corpus_root", "embedder", "index_parameters", "query"] as const;
export const OUTCOME_FIELDS = ["fingerprints", "output_text", "output_tokens"] as const;
const SALT_BYTES = 32;
const MAX_TEXT = 4096;
const MAX_ITEMS = 1024;
const LEAF = utf8("countermark/leaf/v1");
const FIELD = utf8("countermark/field/v1");
const I63 = (1n << 63n) - 1n;
const BIT20 = 1n << 20n;

/** How one field of a record is read; refuses `record.field`. */
type Read<T> = (value: cbor.Value, name: string) => T;
type Shape = Record<string, Read<unknown>>;
type Of<S extends Shape> = { readonly [K in keyof S]: ReturnType<S[K]> };

const wrong = (name: string, expected: string) => malformed("record.field", `record.${name}: expected ${expected}`);

const bytes = (length = 32): Read<Bytes> => (value, name) => {
  if (!(value instanceof Uint8Array) || value.length !== length) throw wrong(name, `${length} bytes`);
  return value;
};
const isInt = (value: cbor.Value, most: bigint): value is bigint =>
  typeof value === "bigint" && value >= 0n && value <= most;
const int = (most = I63): Read<bigint> => (value, name) => {
  if (!isInt(value, most)) throw wrong(name, "an unsigned integer in range");
  return value;
};
const bool: Read<boolean> = (value, name) => {
  if (typeof value !== "boolean") throw wrong(name, "true or false");
  return value;
};
const float: Read<number> = (value, name) => {
  if (typeof value !== "number") throw wrong(name, "a number");
  return value;
};
const isText = (value: cbor.Value): value is string => typeof value === "string" && points(value) <= MAX_TEXT;
const text = (...choices: string[]): Read<string> => (value, name) => {
  if (!isText(value) || (choices.length > 0 && !choices.includes(value))) {
    throw wrong(name, choices.length ? `one of ${choices.join(", ")}` : "text");
  }
  return value;
};
const items = (value: cbor.Value, name: string): cbor.Value[] => {
  if (!Array.isArray(value) || value.length > MAX_ITEMS) throw wrong(name, `at most ${MAX_ITEMS} items`);
  return value;
};
const texts: Read<string[]> = (value, name) => {
  const list = items(value, name);
  if (!list.every(isText)) throw wrong(name, "a list of texts");
  return list as string[];
};
const ints: Read<bigint[]> = (value, name) => {
  const list = items(value, name);
  if (!list.every((item) => isInt(item, BIT20))) throw wrong(name, "a list of unsigned integers");
  return list as bigint[];
};
const biases: Read<[bigint, number][]> = (value, name) => {
  const list = items(value, name) as [bigint, number][];
  const shaped = list.every(
    (pair) => Array.isArray(pair) && pair.length === 2 && isInt(pair[0], BIT20) && typeof pair[1] === "number",
  );
  if (!shaped || list.some((pair, i) => i > 0 && list[i - 1]![0] >= pair[0])) {
    throw wrong(name, "(integer, number) pairs by ascending integer");
  }
  return list;
};
const optional = <T>(inner: Read<T>): Read<T | null> => (value, name) => (value === null ? null : inner(value, name));
const nested = <S extends Shape>(shape: S): Read<Of<S>> => (value) => fromMap(value, shape);

const mayBeAbsent = new Set<Read<unknown>>();

/** A field that is left out where there is none of it, and never null. */
const absent = <T>(inner: Read<T>): Read<T | undefined> => {
  const read: Read<T | undefined> = (value, name) => inner(value, name);
  mayBeAbsent.add(read);
  return read;
};

function fromMap<S extends Shape>(value: cbor.Value, shape: S): Of<S> {
  const names = Object.keys(shape).filter(
    (name) => !(mayBeAbsent.has(shape[name]!) && value instanceof Map && !value.has(name)),
  );
  if (!(value instanceof Map) || value.size !== names.length || names.some((name) => !value.has(name))) {
    throw malformed("record.field", `record: expected exactly the fields ${names.join(", ")}`);
  }
  return Object.fromEntries(names.map((name) => [name, shape[name]!(value.get(name)!, name)])) as Of<S>;
}

const STACK = {
  platform: text("sim", "tdx", "vtpm"),
  image_id: bytes(),
  config_digest: bytes(),
  model: text(),
  weights_root: bytes(),
  manifest_digest: bytes(),
  quantisation: text(),
  adapters: texts,
  tokenizer_digest: bytes(),
  chat_template_digest: bytes(),
  profile: text(),
  kernel_digest: bytes(),
  engine: text(),
  backend: text(),
  torch: text(),
  triton: optional(text()),
  cuda: optional(text()),
  driver: optional(text()),
  vbios: optional(text()),
  gpus: texts,
  cpu: text(),
  determinism: text(),
  claims: texts,
};
const SAMPLING = {
  temperature: float,
  top_k: int(),
  top_p_20bit: int(BIT20),
  min_p_20bit: int(BIT20),
  repetition_penalty: float,
  presence_penalty: float,
  frequency_penalty: float,
  logit_bias: biases,
  seed: int((1n << 64n) - 1n),
  seed_origin: text("client", "server"),
};
const RETRIEVAL = {
  corpus_root: bytes(),
  index_parameters: bytes(),
  embedder: bytes(),
  query: bytes(),
  chunks: bytes(),
};
const GRAMMAR = {
  kind: text("json_schema", "regex"),
  text: bytes(),
  library: text(),
  version: text(),
  rules: int(),
};
const INTENT = {
  boot_id: bytes(),
  request_id: bytes(16),
  nonce: bytes(),
  accepted_us: int(),
  quote_digest: bytes(),
  raw_request: bytes(),
  prompt: bytes(),
  prompt_tokens: bytes(),
  stack: nested(STACK),
  sampling: nested(SAMPLING),
  max_tokens: int(),
  stop: texts,
  stop_tokens: ints,
  ignore_eos: bool,
  logprobs: bool,
  deployer_id: optional(text()),
  retention_until: optional(text()),
  retrieval: optional(nested(RETRIEVAL)),
  grammar: absent(nested(GRAMMAR)),
};
const OUTCOME = {
  boot_id: bytes(),
  intent_leaf: bytes(),
  output_tokens: bytes(),
  output_text: bytes(),
  fingerprints: bytes(),
  prompt_count: int(),
  cached_count: int(),
  output_count: int(),
  finish_reason: text("stop", "eos", "length"),
  first_token_us: optional(int()),
  ended_us: int(),
};

const PREVIOUS = {
  boot_id: bytes(),
  size: int(),
  root: bytes(),
  epoch_leaf: bytes(),
  crashed: int(),
  torn_bytes: int(),
};
const EPOCH = {
  boot_id: bytes(),
  origin: text(),
  epoch: int(),
  started_us: int(),
  evidence_digest: bytes(),
  keys_digest: bytes(),
  stack: nested(STACK),
  previous: optional(nested(PREVIOUS)),
};

export type Epoch = Of<typeof EPOCH>;
export type Intent = Of<typeof INTENT>;
export type Outcome = Of<typeof OUTCOME>;
export type Kind = "epoch" | "intent" | "outcome";

function parseRecord<S extends Shape>(data: Bytes, kind: Kind, shape: S): Of<S> {
  const value = cbor.decode(data, MAX_RECORD_BYTES);
  if (!(value instanceof Map) || value.get("v") !== 1n || value.get("type") !== kind) {
    throw malformed("record.type", `record: expected version 1 and type ${kind}`);
  }
  value.delete("v");
  value.delete("type");
  return fromMap(value, shape);
}

/** Refuses `cbor.*`, `record.field`, `record.type`. */
export const parseEpoch = (data: Bytes): Epoch => parseRecord(data, "epoch", EPOCH);
export const parseIntent = (data: Bytes): Intent => parseRecord(data, "intent", INTENT);
export const parseOutcome = (data: Bytes): Outcome => parseRecord(data, "outcome", OUTCOME);

/** What a record says of one field that can be disclosed alone. */
export function fieldCommitment(name: string, salt: Bytes, value: Bytes): Bytes {
  const label = utf8(name);
  return sha256(FIELD, Uint8Array.of(label.length), label, checkedSalt(salt), value);
}

/** The hash of the leaf that publishes a record, whose encoding is `data`, at index `sequence`. */
export function leafDigest(
  kind: Kind,
  bootId: Bytes,
  intentLeaf: Bytes | null,
  data: Bytes,
  salt: Bytes,
  sequence: bigint,
): Bytes {
  const commitment = sha256(LEAF, utf8(kind), checkedSalt(salt), data);
  const leaf = { v: 1n, type: kind, boot_id: bootId, sequence, intent_leaf: intentLeaf, commitment };
  return leafHash(cbor.encode(cbor.mapOf(leaf)));
}

/** The salts of exactly these fields; refuses `cbor.*`, `salts.field`. */
export function parseSalts(data: Bytes, names: readonly string[]): Map<string, Bytes> {
  const types = Object.fromEntries(names.map((name) => [name, "bytes" as const]));
  const value = cbor.fields(cbor.decode(data, 4096), "salts", types);
  return new Map(names.map((name) => [name, checkedSalt(value.bytes(name))]));
}

function checkedSalt(salt: Bytes): Bytes {
  if (salt.length !== SALT_BYTES) {
    throw malformed("salts.field", `salt: expected ${SALT_BYTES} bytes, got ${salt.length}`);
  }
  return salt;
}
