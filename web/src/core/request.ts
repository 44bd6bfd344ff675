/**
 * What a client asked for, read from the exact bytes it sent: protobuf `countermark.v1.GenerateRequest`.
 *
 * A reader for this one message: unknown fields are refused, of a field given twice the last counts, messages given
 * twice are merged, as protobuf has it. Every setting is then compared with the one recorded as applied; what was not
 * given has the protocol's default. The node's to choose are a seed and a `max_tokens` that were left open.
 */

import { type Bytes, fromUtf8, points, utf8 } from "./bytes.js";
import * as cbor from "./cbor.js";
import { malformed, refused } from "./errors.js";
import { type Intent, RETRIEVAL_FIELDS } from "./records.js";

const MAX_REQUEST_BYTES = 4 * 1024 * 1024;
const NONCE_BYTES = 32;
const MAX_MESSAGES = 1024;
const MAX_STOPS = 64;
const MAX_VALUES = 16;
const MAX_NAME = 64;
const MAX_VALUE = 256;
const DIGEST_BYTES = 32;
const MAX_PARAMETERS_BYTES = 4096;
const MAX_CHUNKS = 1024;
const MAX_ID = 256;
const MAX_GRAMMAR_BYTES = { json_schema: 64 * 1024, regex: 8 * 1024 };
const ROLES = ["system", "user", "assistant"];
const ONE_20BIT = 1 << 20;

export interface Turn {
  readonly role: string;
  readonly content: string;
}

export type Setting = bigint | number | string | boolean | string[] | ReadonlyMap<bigint, number>;

export interface Asked {
  readonly nonce: Bytes;
  readonly model: string;
  readonly prompt: string | null;
  readonly turns: readonly Turn[] | null;
  readonly input: Bytes;
  /** Of each part of `retrieval`, what the INTENT commits to. */
  readonly retrieval: Record<(typeof RETRIEVAL_FIELDS)[number], Bytes> | null;
  /** What the whole answer must fit. */
  readonly grammar: Grammar | null;
  readonly settings: ReadonlyMap<string, Setting>;
}

export interface Grammar {
  readonly kind: "json_schema" | "regex";
  readonly text: string;
}

const bad = (code: string, message: string) => malformed(`request.${code}`, message);
const notOurs = () => bad("malformed", "request: expected a GenerateRequest");

type Wire = { field: number; type: number; number: bigint; data: Bytes };

const MAX_GROUPS = 100;

/** The fields of one message in order. A group's contents are passed over: no message of ours has one. */
function* wire(data: Bytes): Generator<Wire> {
  let at = 0;
  const take = (count: number | bigint): Bytes => {
    if (count > data.length - at) throw notOurs();
    at += Number(count);
    return data.subarray(at - Number(count), at);
  };
  const varint = (): bigint => {
    let value = 0n;
    for (let i = 0n; i < 10n; i++) {
      const byte = take(1)[0]!;
      value |= BigInt(byte & 0x7f) << (7n * i);
      if (byte < 0x80) return BigInt.asUintN(64, value);
    }
    throw notOurs();
  };
  const next = (depth: number): Wire => {
    const key = varint();
    const [field, type] = [Number(key >> 3n), Number(key & 7n)];
    if (field < 1 || field > 0x1fffffff || depth > MAX_GROUPS) throw notOurs();
    const found: Wire = { field, type, number: 0n, data: new Uint8Array() };
    if (type === 0) found.number = varint();
    else if (type === 1) found.data = take(8);
    else if (type === 2) found.data = take(varint());
    else if (type === 5) found.data = take(4);
    else if (type === 3) {
      let inner = next(depth + 1);
      while (inner.type !== 4) inner = next(depth + 1);
      if (inner.field !== field) throw notOurs();
    } else if (type !== 4 || depth === 0) throw notOurs();
    return found;
  };
  while (at < data.length) yield next(0);
}

type Readers = Record<number, [type: number, read: (item: Wire) => void]>;

/** Read the fields that `readers` knows; `unknown` is called when there is another. */
function readMessage(data: Bytes, unknown: () => void, readers: Readers): void {
  for (const item of wire(data)) {
    const reader = readers[item.field];
    if (reader?.[0] === item.type) reader[1](item);
    else unknown();
  }
}

const text = (item: Wire): string => {
  const found = fromUtf8(item.data);
  if (found === null) throw notOurs();
  return found;
};
const u32 = (item: Wire): bigint => BigInt.asUintN(32, item.number);
const view = (item: Wire) => new DataView(item.data.buffer, item.data.byteOffset, item.data.byteLength);
const f32 = (item: Wire): number => view(item).getFloat32(0, true);
const f64 = (item: Wire): number => view(item).getFloat64(0, true);

/** Parse the bytes of a GenerateRequest; refuses `request.*`. */
export function parseRequest(data: Bytes): Asked {
  if (data.length > MAX_REQUEST_BYTES) {
    throw bad("too_long", `request: expected at most ${MAX_REQUEST_BYTES} bytes, got ${data.length}`);
  }
  let nonce: Bytes = new Uint8Array();
  let model = "";
  let prompt: string | null = null;
  let turns: Turn[] | null = null;
  const stop: string[] = [];
  const given = new Map<string, Setting>();
  const bias = new Map<bigint, number>();
  const values = new Map<string, string>();
  let found: Found | null = null;
  let grammar: Grammar | null = null;
  let strange = false; // asked at the end: what does not parse at all is refused as that
  const unknown = (): void => void (strange = true);
  const set = (name: string, read: (item: Wire) => Setting) => (item: Wire) => void given.set(name, read(item));
  const turn = (item: Wire): Turn => {
    const found = { role: "", content: "" };
    readMessage(item.data, unknown, {
      1: [2, (part) => (found.role = text(part))],
      2: [2, (part) => (found.content = text(part))],
    });
    return found;
  };
  const valueEntry = (item: Wire): void => {
    let [name, value] = ["", ""];
    readMessage(item.data, () => {}, { 1: [2, (part) => (name = text(part))], 2: [2, (part) => (value = text(part))] });
    values.set(name, value);
  };
  const chat = (item: Wire): void => {
    prompt = null;
    const list = (turns ??= []);
    readMessage(item.data, unknown, { 1: [2, (part) => list.push(turn(part))], 2: [2, valueEntry] });
  };
  const entry = (item: Wire): void => {
    let [token, value] = [0n, 0];
    const ignored = () => {}; // protobuf itself keeps no unknown fields of a map's entry
    const parts: Readers = { 1: [0, (part) => (token = u32(part))], 2: [5, (part) => (value = f32(part))] };
    readMessage(item.data, ignored, parts);
    bias.set(token, value);
  };
  const sampling = (item: Wire): void =>
    readMessage(item.data, unknown, {
      1: [5, set("temperature", f32)],
      2: [0, set("top_k", u32)],
      3: [1, set("top_p", f64)],
      4: [1, set("min_p", f64)],
      5: [5, set("repetition_penalty", f32)],
      6: [5, set("presence_penalty", f32)],
      7: [5, set("frequency_penalty", f32)],
      8: [0, set("seed", (part) => part.number)],
      9: [2, entry],
    });
  readMessage(data, unknown, {
    1: [2, (item) => (nonce = item.data)],
    2: [2, (item) => (model = text(item))],
    3: [2, chat],
    4: [2, (item) => (([prompt, turns] = [text(item), null]), values.clear())],
    5: [0, set("max_tokens", u32)],
    6: [2, (item) => stop.push(text(item))],
    7: [2, sampling],
    8: [0, set("ignore_eos", (item) => item.number !== 0n)],
    9: [0, set("logprobs", u32)],
    10: [2, (item) => readRetrieval(item.data, unknown, (found ??= nothingFound()))],
    11: [2, (item) => (grammar = { kind: "json_schema", text: text(item) })],
    12: [2, (item) => (grammar = { kind: "regex", text: text(item) })],
  });
  if (strange) throw bad("unknown_field", "request: a field that GenerateRequest does not have");
  if (nonce.length !== NONCE_BYTES) {
    throw bad("nonce", `nonce: expected ${NONCE_BYTES} bytes, got ${nonce.length}`);
  }
  const list = turns as Turn[] | null; // assigned in closures
  const raw = prompt as string | null;
  if (raw === null && list === null) throw bad("input", "input: expected messages or a prompt, got neither");
  if (list && list.length > MAX_MESSAGES) {
    throw bad("messages", `messages: expected at most ${MAX_MESSAGES}, got ${list.length}`);
  }
  const stranger = list?.find(({ role }) => !ROLES.includes(role));
  if (stranger) throw bad("role", `role: expected one of ${ROLES.join(", ")}`);
  if (values.size > MAX_VALUES) throw bad("values", `values: expected at most ${MAX_VALUES}, got ${values.size}`);
  for (const [name, value] of values) {
    if (!/^[A-Za-z_][A-Za-z0-9_]*$/.test(name) || name.length > MAX_NAME || points(value) > MAX_VALUE) {
      const wanted = `names of up to ${MAX_NAME} letters and texts of up to ${MAX_VALUE} characters`;
      throw bad("values", `values: expected ${wanted}`);
    }
  }
  const retrieval = found && retrievalValues(found);
  checkGrammar(grammar);
  if (stop.length > MAX_STOPS) throw bad("stop", `stop: expected at most ${MAX_STOPS}, got ${stop.length}`);
  const value: cbor.Value = list
    ? cbor.mapOf({
        messages: list.map(({ role, content }) => [role, content]),
        ...(values.size ? { values: cbor.mapOf(Object.fromEntries(values)) } : {}),
      })
    : cbor.mapOf({ prompt: raw });
  const settings = settingsOf(given, bias, stop);
  return { nonce, model, prompt: raw, turns: list, input: cbor.encode(value), retrieval, grammar, settings };
}

/** Refuses `request.grammar_too_long`. */
function checkGrammar(grammar: Grammar | null): void {
  const [length, most] = grammar ? [utf8(grammar.text).length, MAX_GRAMMAR_BYTES[grammar.kind]] : [0, 0];
  if (length > most) throw bad("grammar_too_long", `grammar: expected at most ${most} bytes, got ${length}`);
}

interface Found {
  corpus_root: Bytes;
  index_parameters: Bytes;
  embedder: Bytes;
  query: Bytes;
  chunks: { id: string; start: bigint; end: bigint; score: number }[];
}
const nothingFound = (): Found => {
  const none = new Uint8Array();
  return { corpus_root: none, index_parameters: none, embedder: none, query: none, chunks: [] };
};

function readRetrieval(data: Bytes, unknown: () => void, found: Found): void {
  readMessage(data, unknown, {
    1: [2, (item) => (found.corpus_root = item.data)],
    2: [2, (item) => (found.index_parameters = item.data)],
    3: [2, (item) => (found.embedder = item.data)],
    4: [2, (item) => (found.query = item.data)],
    5: [
      2,
      (item) => {
        const chunk = { id: "", start: 0n, end: 0n, score: 0 };
        readMessage(item.data, unknown, {
          1: [2, (part) => (chunk.id = text(part))],
          2: [0, (part) => (chunk.start = part.number)],
          3: [0, (part) => (chunk.end = part.number)],
          4: [1, (part) => (chunk.score = f64(part))],
        });
        found.chunks.push(chunk);
      },
    ],
  });
}

/** Refuses `request.retrieval`. */
function retrievalValues(found: Found): NonNullable<Asked["retrieval"]> {
  const wrong = (name: string, expected: string) => bad("retrieval", `retrieval.${name}: expected ${expected}`);
  for (const name of ["corpus_root", "embedder", "query"] as const) {
    if (found[name].length !== DIGEST_BYTES) throw wrong(name, `${DIGEST_BYTES} bytes, got ${found[name].length}`);
  }
  if (found.index_parameters.length > MAX_PARAMETERS_BYTES) {
    throw wrong("index_parameters", `at most ${MAX_PARAMETERS_BYTES} bytes, got ${found.index_parameters.length}`);
  }
  if (found.chunks.length > MAX_CHUNKS) throw wrong("chunks", `at most ${MAX_CHUNKS}, got ${found.chunks.length}`);
  for (const { id, start, end, score } of found.chunks) {
    if (!id || points(id) > MAX_ID || start > end || end >= 1n << 63n) {
      throw wrong("chunks", `ids of 1 to ${MAX_ID} characters, and start up to end`);
    }
    if (!Number.isFinite(score)) throw wrong("chunks", "finite scores");
  }
  const { chunks, ...rest } = found;
  return { ...rest, chunks: cbor.encode(chunks.map(({ id, start, end, score }) => [id, start, end, score])) };
}

/** What was given or has a default, by the name it has in a record, in the order the command line looks at it. */
function settingsOf(given: ReadonlyMap<string, Setting>, bias: Map<bigint, number>, stop: string[]) {
  const settings = new Map<string, Setting>([
    ["temperature", 0],
    ["top_k", 0n],
    ["top_p_20bit", BigInt(ONE_20BIT)],
    ["min_p_20bit", 0n],
    ["repetition_penalty", 1],
    ["presence_penalty", 0],
    ["frequency_penalty", 0],
    ["ignore_eos", false],
    ["logprobs", false],
  ]);
  const plain = ["temperature", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"];
  for (const name of plain) if (given.has(name)) settings.set(name, given.get(name)!);
  // The sampler's unit; profile exact-v1 rounds half to even and never to nothing.
  if (given.has("top_p")) {
    const units = in20bit(given.get("top_p") as number);
    settings.set("top_p_20bit", units > 1n ? units : 1n);
  }
  if (given.has("min_p")) settings.set("min_p_20bit", in20bit(given.get("min_p") as number));
  settings.set("logit_bias", bias);
  if (given.has("max_tokens")) settings.set("max_tokens", given.get("max_tokens")!);
  settings.set("stop", stop);
  if (given.has("ignore_eos")) settings.set("ignore_eos", given.get("ignore_eos")!);
  if (given.has("logprobs")) settings.set("logprobs", (given.get("logprobs") as bigint) > 0n);
  return settings;
}

function in20bit(value: number): bigint {
  if (!(value >= 0 && value <= 1)) throw bad("malformed", `request: expected 0 to 1, got ${value}`);
  const scaled = value * ONE_20BIT;
  const below = Math.floor(scaled);
  const up = scaled - below > 0.5 || (scaled - below === 0.5 && below % 2 === 1);
  return BigInt(below + (up ? 1 : 0));
}

/** Every setting is recorded as given, or as its default; refuses `receipt.setting.<name>`. */
export function checkSettings(asked: Asked, intent: Intent): void {
  const { sampling } = intent;
  const applied: Record<string, Setting> = {
    temperature: sampling.temperature,
    top_k: sampling.top_k,
    repetition_penalty: sampling.repetition_penalty,
    presence_penalty: sampling.presence_penalty,
    frequency_penalty: sampling.frequency_penalty,
    seed: sampling.seed,
    top_p_20bit: sampling.top_p_20bit,
    min_p_20bit: sampling.min_p_20bit,
    logit_bias: new Map(sampling.logit_bias),
    max_tokens: intent.max_tokens,
    stop: intent.stop,
    ignore_eos: intent.ignore_eos,
    logprobs: intent.logprobs,
    model: intent.stack.model,
  };
  const wanted = new Map(asked.settings);
  if (asked.model) wanted.set("model", asked.model);
  for (const [name, value] of wanted) {
    if (!same(value, applied[name]!)) {
      const message = `${name}: expected ${show(value)}, as asked or by default, got ${show(applied[name]!)} recorded`;
      throw refused(`receipt.setting.${name}`, message);
    }
  }
  const origin = wanted.has("seed") ? "client" : "server";
  if (sampling.seed_origin !== origin) {
    const message = `seed_origin: expected ${origin}, got ${sampling.seed_origin}`;
    throw refused("receipt.setting.seed_origin", message);
  }
}

function same(left: Setting, right: Setting): boolean {
  if (left instanceof Map && right instanceof Map) {
    return left.size === right.size && [...left].every(([token, value]) => right.get(token) === value);
  }
  if (Array.isArray(left) && Array.isArray(right)) {
    return left.length === right.length && left.every((item, i) => item === right[i]);
  }
  return left === right;
}

export function show(value: Setting): string {
  if (value instanceof Map) return [...value].map(([token, bias]) => `${token}: ${bias}`).join(", ") || "none";
  if (Array.isArray(value)) return value.map((item) => JSON.stringify(item)).join(", ") || "none";
  return String(value);
}
