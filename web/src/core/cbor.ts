/**
 * Deterministic CBOR (RFC 8949 section 4.2.1), both directions: decode, encode again, compare.
 *
 * Ours, as in the Python client, because a general decoder gives JavaScript one number type: it cannot tell the float
 * 1.0 from the integer 1, which our records do. Here an integer is a `bigint`, a float a `number`. Limits and the order
 * of refusals are those of `countermark.formats.cbor`. Not checked here: what a value means.
 */

import { type Bytes, compare, equal, fromUtf8, utf8 } from "./bytes.js";
import { malformed } from "./errors.js";

export class Tag {
  constructor(
    readonly tag: bigint,
    readonly value: Value,
  ) {}
}

export type Key = string | bigint;
export type CborMap = Map<Key, Value>;
export type Value = null | boolean | bigint | number | string | Bytes | Value[] | CborMap | Tag;

const MAX_BYTES = 64 * 1024 * 1024;
const MAX_DEPTH = 16;
const MAX_ITEMS = (1 << 20) + 4096;

const tooDeep = () => malformed("cbor.malformed", `cbor: nested deeper than ${MAX_DEPTH}`);
const badType = (message: string) => malformed("cbor.type", `cbor: ${message}`);

/** Encode deterministically. */
export function encode(value: Value): Bytes {
  const out = new Writer();
  write(out, value, 0);
  return out.bytes();
}

/** Decode one deterministic item that fills `data`. Refuses `cbor.*`. */
export function decode(data: Bytes, maxBytes = MAX_BYTES): Value {
  if (data.length > maxBytes) {
    throw malformed("cbor.too_long", `cbor: expected at most ${maxBytes} bytes, got ${data.length}`);
  }
  checkItems(data);
  const value = read({ data, at: 0 }, 0);
  if (!equal(encode(value), data)) {
    throw malformed("cbor.not_deterministic", "cbor: expected the deterministic encoding (RFC 8949 4.2.1)");
  }
  return value;
}

class Writer {
  private buffer = new Uint8Array(256);
  private length = 0;

  push(data: Bytes): void {
    this.room(data.length);
    this.buffer.set(data, this.length);
    this.length += data.length;
  }

  byte(value: number): void {
    this.room(1);
    this.buffer[this.length++] = value;
  }

  bytes(): Bytes {
    return this.buffer.slice(0, this.length);
  }

  private room(more: number): void {
    if (this.length + more <= this.buffer.length) return;
    const next = new Uint8Array(Math.max(2 * this.buffer.length, this.length + more));
    next.set(this.buffer);
    this.buffer = next;
  }
}

function head(out: Writer, major: number, number: bigint): void {
  if (number < 24n) {
    out.byte((major << 5) | Number(number));
    return;
  }
  for (const [info, size] of [[24, 1], [25, 2], [26, 4], [27, 8]] as const) {
    if (number < 1n << BigInt(8 * size)) {
      out.byte((major << 5) | info);
      for (let i = size - 1; i >= 0; i--) out.byte(Number((number >> BigInt(8 * i)) & 0xffn));
      return;
    }
  }
  throw badType("expected an integer of at most 64 bits");
}

function writeFloat(out: Writer, value: number): void {
  if (!Number.isFinite(value)) throw badType("expected a finite number");
  const half = toHalf(value);
  const view = new DataView(new ArrayBuffer(9));
  if (half !== null) {
    view.setUint8(0, 0xf9);
    view.setUint16(1, half);
    out.push(new Uint8Array(view.buffer, 0, 3));
  } else if (Math.fround(value) === value) {
    view.setUint8(0, 0xfa);
    view.setFloat32(1, value);
    out.push(new Uint8Array(view.buffer, 0, 5));
  } else {
    view.setUint8(0, 0xfb);
    view.setFloat64(1, value);
    out.push(new Uint8Array(view.buffer, 0, 9));
  }
}

/** The binary16 bits of a value that binary16 holds exactly, else null. */
function toHalf(value: number): number | null {
  if (Math.fround(value) !== value) return null;
  const view = new DataView(new ArrayBuffer(4));
  view.setFloat32(0, value);
  const bits = view.getUint32(0);
  const sign = (bits >>> 16) & 0x8000;
  const exponent = ((bits >>> 23) & 0xff) - 127;
  const fraction = bits & 0x7fffff;
  if ((bits & 0x7fffffff) === 0) return sign;
  if (exponent > 15 || exponent < -24) return null;
  const dropped = exponent < -14 ? -1 - exponent : 13; // bits of the 24-bit significand that have no place
  const whole = exponent < -14 ? fraction | 0x800000 : fraction;
  if (whole & ((1 << dropped) - 1)) return null;
  return sign | (exponent < -14 ? whole >>> dropped : ((exponent + 15) << 10) | (fraction >>> 13));
}

function fromHalf(bits: number): number {
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  const sign = bits & 0x8000 ? -1 : 1;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
}

function write(out: Writer, value: Value, depth: number): void {
  if (depth > MAX_DEPTH) throw tooDeep();
  if (value === null) out.byte(0xf6);
  else if (typeof value === "boolean") out.byte(value ? 0xf5 : 0xf4);
  else if (typeof value === "bigint") value >= 0n ? head(out, 0, value) : head(out, 1, -1n - value);
  else if (typeof value === "number") writeFloat(out, value);
  else if (typeof value === "string") {
    const text = utf8(value);
    head(out, 3, BigInt(text.length));
    out.push(text);
  } else if (value instanceof Uint8Array) {
    head(out, 2, BigInt(value.length));
    out.push(value);
  } else if (Array.isArray(value)) {
    head(out, 4, BigInt(value.length));
    for (const item of value) write(out, item, depth + 1);
  } else if (value instanceof Tag) {
    head(out, 6, value.tag);
    write(out, value.value, depth + 1);
  } else {
    head(out, 5, BigInt(value.size));
    const entries = [...value].map(([key, item]) => [encode(key), item] as const);
    for (const [key, item] of entries.sort((left, right) => compare(left[0], right[0]))) {
      out.push(key);
      write(out, item, depth + 1);
    }
  }
}

/** Count the items before any is built; a walk over the heads needs no nesting. */
function checkItems(data: Bytes): void {
  let offset = 0;
  for (let items = 1; offset < data.length; items++) {
    if (items > MAX_ITEMS) throw malformed("cbor.too_many", `cbor: expected at most ${MAX_ITEMS} items`);
    const major = data[offset]! >> 5;
    const info = data[offset]! & 31;
    if (info > 27) return;
    const start = offset + 1;
    offset = info < 24 ? start : start + (1 << (info - 24));
    if (major === 2 || major === 3) {
      let length = info;
      if (info >= 24) length = data.subarray(start, offset).reduce((sum, byte) => sum * 256 + byte, 0);
      offset += length;
    }
  }
}

interface Cursor {
  readonly data: Bytes;
  at: number;
}

function take(cursor: Cursor, count: number | bigint): Bytes {
  const left = cursor.data.length - cursor.at;
  if (count > left) {
    throw malformed("cbor.malformed", `cbor: expected ${count} bytes at offset ${cursor.at}, got ${left}`);
  }
  const part = cursor.data.subarray(cursor.at, cursor.at + Number(count));
  cursor.at += Number(count);
  return part;
}

function read(cursor: Cursor, depth: number): Value {
  if (depth > MAX_DEPTH) throw tooDeep();
  const first = take(cursor, 1)[0]!;
  const major = first >> 5;
  const info = first & 31;
  if (info === 31 && major >= 2 && major <= 5) {
    throw malformed("cbor.not_deterministic", "cbor: expected a definite length");
  }
  if (info > 27) throw malformed("cbor.malformed", `cbor: expected no reserved head, got ${info}`);
  if (major === 7) return readSimple(cursor, info);
  let number = BigInt(info);
  if (info >= 24) number = take(cursor, 1 << (info - 24)).reduce((sum, byte) => (sum << 8n) | BigInt(byte), 0n);
  if (major === 0) return number;
  if (major === 1) return -1n - number;
  if (major === 2) return take(cursor, number);
  if (major === 3) {
    const text = fromUtf8(take(cursor, number));
    if (text === null) throw malformed("cbor.malformed", "cbor: expected UTF-8");
    return text;
  }
  if (major === 6) return new Tag(number, read(cursor, depth + 1));
  const start = cursor.at;
  take(cursor, number); // an item has at least one byte: no count can ask for more than came
  cursor.at = start;
  const items: Value[] = [];
  const count = Number(number) * (major === 4 ? 1 : 2);
  for (let i = 0; i < count; i++) items.push(read(cursor, depth + 1));
  if (major === 4) return items;
  const map: CborMap = new Map();
  if (items.some((key, i) => i % 2 === 0 && typeof key !== "string" && typeof key !== "bigint")) {
    throw badType("expected map keys of type text or integer");
  }
  for (let i = 0; i < items.length; i += 2) map.set(items[i] as Key, items[i + 1]!);
  return map;
}

function readSimple(cursor: Cursor, info: number): Value {
  if (info === 20 || info === 21) return info === 21;
  if (info === 22) return null;
  if (info < 25) throw badType(`expected false, true, null or a float, got ${info}`);
  const data = take(cursor, 2 << (info - 25));
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  return info === 25 ? fromHalf(view.getUint16(0)) : info === 26 ? view.getFloat32(0) : view.getFloat64(0);
}

export type Type = "int" | "float" | "bytes" | "text" | "bool" | "list" | "map" | "null";

export function typeOf(value: Value): Type | "tag" {
  if (value === null) return "null";
  if (typeof value === "bigint") return "int";
  if (typeof value === "number") return "float";
  if (typeof value === "string") return "text";
  if (typeof value === "boolean") return "bool";
  if (value instanceof Uint8Array) return "bytes";
  if (Array.isArray(value)) return "list";
  return value instanceof Map ? "map" : "tag";
}

export interface Fields {
  int(name: string): bigint;
  bytes(name: string): Bytes;
  text(name: string): string;
  list(name: string): Value[];
  map(name: string): CborMap;
  get(name: string): Value;
}

/** A map with exactly these text keys, each of one of these types; refuses `<what>.field`. */
export function fields(value: Value, what: string, types: Record<string, Type | Type[]>): Fields {
  const wrong = (message: string) => malformed(`${what}.field`, `${what}: ${message}`);
  if (!(value instanceof Map)) throw wrong(`expected a map, got ${typeOf(value)}`);
  const missing = Object.keys(types).filter((key) => !value.has(key));
  const unknown = [...value.keys()].filter((key) => typeof key !== "string" || !Object.hasOwn(types, key));
  if (missing.length || unknown.length) {
    throw wrong(`missing fields [${missing.join(", ")}], unknown fields [${unknown.map(String).join(", ")}]`);
  }
  for (const [key, kind] of Object.entries(types)) {
    const got = typeOf(value.get(key)!);
    const kinds: (Type | "tag")[] = Array.isArray(kind) ? kind : [kind];
    if (!kinds.includes(got)) throw wrong(`${key}: expected ${kinds.join(" or ")}, got ${got}`);
  }
  const get = (name: string): Value => value.get(name)!;
  return {
    get,
    int: (name) => get(name) as bigint,
    bytes: (name) => get(name) as Bytes,
    text: (name) => get(name) as string,
    list: (name) => get(name) as Value[],
    map: (name) => get(name) as CborMap,
  };
}

/** A CBOR map of text keys from an object. */
export const mapOf = (entries: Record<string, Value>): CborMap => new Map(Object.entries(entries));

