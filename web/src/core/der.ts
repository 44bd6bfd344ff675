/**
 * DER (ITU-T X.690 section 10), strict: definite lengths in their shortest form, tag numbers below 31.
 *
 * Used for the few small structures in certificate extensions, and on whole certificates before the X.509 library reads
 * them, because that library also takes BER. Not checked here: the content of primitive elements.
 */

import { type Bytes, bigBe, hex } from "./bytes.js";
import { type Refusal, malformed } from "./errors.js";

export const INTEGER = 0x02;
export const BIT_STRING = 0x03;
export const OCTET_STRING = 0x04;
export const OID = 0x06;
export const ENUMERATED = 0x0a;
export const SEQUENCE = 0x30;
const CONSTRUCTED = 0x20;
const MAX_BYTES = 64 * 1024;
const MAX_ELEMENTS = 64;
const MAX_DEPTH = 32;

export interface Element {
  readonly tag: number;
  readonly value: Bytes;
  readonly encoded: Bytes;
}

/** The elements that fill `data`; refuses `<what>.der`. `most`: how many of them, `lengths`: octets of a length. */
export function parseElements(data: Bytes, what: string, most = MAX_ELEMENTS, lengths = 2): Element[] {
  const elements: Element[] = [];
  for (let offset = 0; offset < data.length; offset += elements.at(-1)!.encoded.length) {
    if (elements.length === most) throw wrong(what, `at most ${most} elements`, "more");
    elements.push(element(data, offset, what, lengths));
  }
  return elements;
}

/** The elements of the one SEQUENCE that fills `data`; refuses `<what>.der`. */
export function parseSequence(data: Bytes, what: string): Element[] {
  if (data.length > MAX_BYTES) throw wrong(what, `at most ${MAX_BYTES} bytes`, String(data.length));
  const outer = parseElements(data, what);
  if (outer.length !== 1 || outer[0]!.tag !== SEQUENCE) throw wrong(what, "one SEQUENCE", `${outer.length} elements`);
  return parseElements(outer[0]!.value, what);
}

/** Whether `data` is one element whose constructed parts are strict DER all the way down. */
export function isStrict(data: Bytes): boolean {
  try {
    return parseElements(data, "der", 1, 4).length === 1 && walk(data, 0);
  } catch {
    return false;
  }
}

function walk(data: Bytes, depth: number): boolean {
  if (depth > MAX_DEPTH) return false;
  return parseElements(data, "der", Number.POSITIVE_INFINITY, 4).every(
    (item) => !(item.tag & CONSTRUCTED) || walk(item.value, depth + 1),
  );
}

function element(data: Bytes, offset: number, what: string, lengths: number): Element {
  const tag = data[offset]!;
  const first = data[offset + 1];
  if ((tag & 0x1f) === 0x1f || first === undefined) {
    throw wrong(what, `a tag below 31 and a length at offset ${offset}`, hex(data.subarray(offset, offset + 2)));
  }
  const octets = first & 0x80 ? first & 0x7f : 0;
  const rest = data.subarray(offset + 2, offset + 2 + Math.min(octets, 6));
  const size = octets ? Number(bigBe(rest)) : first;
  const shortest = octets ? size >= 0x80 && rest[0] !== 0 : true;
  const start = offset + 2 + octets;
  if (octets > lengths || first === 0x80 || !shortest || start + size > data.length) {
    throw wrong(what, `a shortest length within the data at offset ${offset}`, hex(data.subarray(offset + 1, start)));
  }
  return { tag, value: data.subarray(start, start + size), encoded: data.subarray(offset, start + size) };
}

function wrong(what: string, expected: string, got: string): Refusal {
  return malformed(`${what}.der`, `${what}: expected ${expected}, got ${got}`);
}
