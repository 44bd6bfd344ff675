/** Bytes and text: hex, base64, UTF-8, integers, the few things Python has built in. No meaning here. */

import { sha256 as sha256Hash, sha384 as sha384Hash, sha512 as sha512Hash } from "@noble/hashes/sha2.js";
import { malformed } from "./errors.js";

export type Bytes = Uint8Array;

const ENCODER = new TextEncoder();
const DECODER = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

export const sha256 = (...parts: Bytes[]): Bytes => sha256Hash(concat(...parts));
export const sha384 = (...parts: Bytes[]): Bytes => sha384Hash(concat(...parts));
export const sha512 = (...parts: Bytes[]): Bytes => sha512Hash(concat(...parts));

export const utf8 = (text: string): Bytes => ENCODER.encode(text);

/** The text of strict UTF-8, or null. A byte-order mark is a character like any other. */
export function fromUtf8(data: Bytes): string | null {
  try {
    return DECODER.decode(data);
  } catch {
    return null;
  }
}

export const zeros = (length: number): Bytes => new Uint8Array(length);

export function concat(...parts: Bytes[]): Bytes {
  if (parts.length === 1) return parts[0]!;
  const out = new Uint8Array(parts.reduce((total, part) => total + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

export function equal(left: Bytes, right: Bytes): boolean {
  return left.length === right.length && left.every((byte, i) => byte === right[i]);
}

export const sameTexts = (left: readonly string[], right: readonly string[]): boolean =>
  left.length === right.length && left.every((text, i) => text === right[i]);

/** Byte order, as Python compares bytes. */
export function compare(left: Bytes, right: Bytes): number {
  for (let i = 0; i < Math.min(left.length, right.length); i++) {
    const difference = left[i]! - right[i]!;
    if (difference !== 0) return difference;
  }
  return left.length - right.length;
}

export const includes = (items: readonly Bytes[], item: Bytes): boolean => items.some((other) => equal(other, item));

export const isZero = (data: Bytes): boolean => data.every((byte) => byte === 0);

export function hex(data: Bytes): string {
  let out = "";
  for (const byte of data) out += byte.toString(16).padStart(2, "0");
  return out;
}

/** The bytes of hex digits, or null. White space may stand between two bytes, as in Python's `bytes.fromhex`. */
export function fromHex(text: string): Bytes | null {
  if (!/^[ \t\n\r\f\v]*(?:[0-9a-fA-F]{2}[ \t\n\r\f\v]*)*$/.test(text)) return null;
  const digits = text.replace(/[ \t\n\r\f\v]/g, "");
  const out = new Uint8Array(digits.length / 2);
  for (let i = 0; i < out.length; i++) out[i] = Number.parseInt(digits.slice(2 * i, 2 * i + 2), 16);
  return out;
}

const BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const BASE64_VALUE = new Map([...BASE64].map((char, value) => [char, value]));

export function base64(data: Bytes): string {
  let out = "";
  for (let i = 0; i < data.length; i += 3) {
    const left = Math.min(3, data.length - i);
    const bits = (data[i]! << 16) | ((data[i + 1] ?? 0) << 8) | (data[i + 2] ?? 0);
    for (let j = 0; j < 4; j++) out += j <= left ? BASE64[(bits >> (18 - 6 * j)) & 63] : "=";
  }
  return out;
}

/** The bytes of padded base64 with nothing else in it, or null. Bits left over are not looked at, as in Python. */
export function fromBase64(text: string): Bytes | null {
  if (text.length % 4 !== 0 || !/^[A-Za-z0-9+/]*={0,2}$/.test(text)) return null;
  const digits = text.replace(/=+$/, "");
  if (digits.length % 4 === 1) return null;
  const out = new Uint8Array(Math.floor((digits.length * 3) / 4));
  let bits = 0;
  let held = 0;
  let at = 0;
  for (const char of digits) {
    bits = ((bits << 6) | BASE64_VALUE.get(char)!) & 0xffff;
    held += 6;
    if (held >= 8) {
      held -= 8;
      out[at++] = (bits >> held) & 0xff;
    }
  }
  return out;
}

export function uintLe(data: Bytes): number {
  let value = 0;
  for (let i = data.length - 1; i >= 0; i--) value = value * 256 + data[i]!;
  return value;
}

export function bigBe(data: Bytes): bigint {
  return data.length ? BigInt(`0x${hex(data)}`) : 0n;
}

export function bigLe(data: Bytes): bigint {
  return bigBe(Uint8Array.from(data).reverse());
}

export function le(value: number, size: number): Bytes {
  const out = new Uint8Array(size);
  let rest = value;
  for (let i = 0; i < size; i++) {
    out[i] = rest % 256;
    rest = Math.floor(rest / 256);
  }
  return out;
}

export function u64be(value: bigint): Bytes {
  const out = new Uint8Array(8);
  new DataView(out.buffer).setBigUint64(0, value);
  return out;
}

/** Whether every character is one that a terminal or a page shows (letters, marks, digits, signs, the plain space). */
export const isPrintable = (text: string): boolean => /^(?:[^\p{C}\p{Z}]| )*$/u.test(text);

export const isAscii = (text: string): boolean => /^[\0-\x7f]*$/.test(text);

/** Length in code points, as Python counts. */
export function points(text: string): number {
  let count = 0;
  for (const _ of text) count++;
  return count;
}

const NO_CALENDAR = 253_402_300_800;

/** Unix seconds as a time people can read. */
export function rfc3339(seconds: number): string {
  if (!Number.isFinite(seconds) || seconds >= NO_CALENDAR || seconds < -62_135_596_800) return `${seconds} s`;
  return new Date(Math.floor(seconds) * 1000).toISOString().replace(/\.\d+Z$/, "Z");
}

/** A bounded cursor: every read is checked, `end` refuses what is left. Fixed-width integers are little-endian. */
export class Reader {
  offset = 0;

  constructor(
    readonly data: Bytes,
    readonly what: string,
  ) {}

  get left(): number {
    return this.data.length - this.offset;
  }

  take(count: number, name: string): Bytes {
    if (count > this.left) {
      const message = `${this.what}.${name}: expected ${count} bytes at offset ${this.offset}, got ${this.left}`;
      throw malformed(`${this.what}.truncated`, message);
    }
    this.offset += count;
    return this.data.subarray(this.offset - count, this.offset);
  }

  uint(size: number, name: string): number {
    return uintLe(this.take(size, name));
  }

  expect(wanted: Bytes | number, size: number, name: string): void {
    const constant = typeof wanted === "number" ? le(wanted, size) : wanted;
    const got = this.take(size, name);
    if (!equal(got, constant)) {
      throw malformed(`${this.what}.${name}`, `${this.what}.${name}: expected ${hex(constant)}, got ${hex(got)}`);
    }
  }

  end(): void {
    if (this.left) {
      const message = `${this.what}: expected the end at offset ${this.offset}, got ${this.left} more bytes`;
      throw malformed(`${this.what}.trailing`, message);
    }
  }
}
