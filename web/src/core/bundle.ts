/**
 * The bundle: one file with everything it takes to verify an answer offline, a ZIP of stored entries in a fixed order
 * (docs/formats.md, section 14). Names and contents are taken from the local headers, encoded again and compared, so
 * that every byte of the file is accounted for. The digests in it find damage, not forgery.
 */

import { MAX_ANCHORS_BYTES, parseAnchors } from "./anchors.js";
import { type Bytes, concat, equal, le, sameTexts, sha256, uintLe, utf8 } from "./bytes.js";
import * as cbor from "./cbor.js";
import { Refusal, refused } from "./errors.js";
import { MAX_EVIDENCE_BYTES } from "./evidence.js";
import { MAX_MANIFEST_BYTES } from "./manifest.js";
import { OUTCOME_FIELDS, parseSalts } from "./records.js";
import { type Acceptance, type Answer, MAX_RECEIPT_BYTES, parseAcceptance, parseAnswer } from "./receipt.js";
import { MAX_RECEIPT_WITNESS_BYTES, MAX_WITNESSED_BYTES, parseReceiptWitness, parseWitnessed } from "./witness.js";

const MIB = 1024 * 1024;
const MAX_BUNDLE_BYTES = 64 * MIB;
const MANIFEST = "manifest.cbor";
const ENTRIES: readonly (readonly [name: string, most: number, optional: boolean])[] = [
  ["request.bin", 16 * MIB, true],
  ["accepted.cbor", 8 * MIB, false],
  ["answer.cbor", 32 * MIB, false],
  ["receipt.cose", MAX_RECEIPT_BYTES, false],
  ["evidence.cbor", MAX_EVIDENCE_BYTES, false],
  ["measurements.json", MAX_MANIFEST_BYTES, true],
  ["epoch.cbor", MAX_WITNESSED_BYTES, true],
  ["witness.cbor", MAX_RECEIPT_WITNESS_BYTES, true],
  ["anchors.cbor", MAX_ANCHORS_BYTES, true],
];
const REPLY_FIELDS = OUTCOME_FIELDS.filter((name) => name !== "fingerprints");
const LOCAL_BYTES = 30;

/** `request` and `answer` are null when they were left out. Each of the last four if it came along. */
export interface Bundle {
  readonly request: Bytes | null;
  readonly acceptance: Acceptance;
  readonly answer: Answer | null;
  readonly receipt: Bytes;
  readonly evidence: Bytes;
  readonly manifest: Bytes | null;
  readonly epoch: Bytes | null;
  readonly witness: Bytes | null;
  readonly anchors: Bytes | null;
}

/** What was left out of a bundle, with its salts. */
export const redactedParts = (bundle: Bundle): string[] => [
  ...(bundle.request === null ? ["prompt"] : []),
  ...(bundle.answer === null ? ["output"] : []),
];

type Entries = Map<string, Bytes>;
const bad = (code: string, message: string): Refusal => refused(`bundle.${code}`, message);

/** Parse a bundle, accounting for every byte; refuses `bundle.*`, and what does not parse in an entry. */
export function parseBundle(data: Bytes): Bundle {
  if (data.length > MAX_BUNDLE_BYTES) {
    throw bad("size", `bundle: expected at most ${MAX_BUNDLE_BYTES} bytes, got ${data.length}`);
  }
  const entries = readEntries(data);
  if (!entries.size) throw bad("container", "bundle: expected a file as `chat --bundle` writes it, got another");
  const wanted = ENTRIES.filter(([name, , optional]) => !optional || entries.has(name)).map(([name]) => name);
  if (!sameTexts([...entries.keys()], [MANIFEST, ...wanted])) {
    const got = [...entries.keys()].join(", ").slice(0, 200);
    throw bad("container", `bundle: expected its fixed entries in order, got ${got}`);
  }
  if (!equal(encodeZip(entries), data)) {
    const where = changed(entries, data);
    throw bad("container", `bundle: expected the bytes as they were written; changed, cut or added ${where}`);
  }
  const manifest = entries.get(MANIFEST)!;
  entries.delete(MANIFEST);
  for (const [name, most] of ENTRIES) {
    if ((entries.get(name)?.length ?? 0) > most) throw bad("size", `${name}: expected at most ${most} bytes`);
  }
  if (!equal(manifest, manifestOf(entries))) {
    throw bad("digest", "bundle: the entries are not the ones its manifest lists");
  }
  const bundle = {
    request: entries.get("request.bin") ?? null,
    acceptance: parseAcceptance(entries.get("accepted.cbor")!),
    answer: parseAnswer(entries.get("answer.cbor")!),
    receipt: entries.get("receipt.cose")!,
    evidence: entries.get("evidence.cbor")!,
    manifest: entries.get("measurements.json") ?? null,
    epoch: entries.get("epoch.cbor") ?? null,
    witness: entries.get("witness.cbor") ?? null,
    anchors: entries.get("anchors.cbor") ?? null,
  };
  refuseHalfRedacted(bundle);
  // Judged or not, no byte of them is unaccounted for.
  if (bundle.epoch) parseWitnessed(bundle.epoch);
  if (bundle.witness) parseReceiptWitness(bundle.witness);
  if (bundle.anchors) parseAnchors(bundle.anchors);
  return bundle;
}

/** A value or a salt that is left of what was left out would make guesses at it checkable. */
function refuseHalfRedacted({ request, acceptance, answer }: Bundle): void {
  const whole = request !== null;
  const held = [["accepted.cbor", acceptance.opened !== null]] as [string, boolean][];
  if (answer) held.push(["answer.cbor", answer.fingerprints !== null]);
  for (const [name, there] of held) {
    if (there !== whole) {
      const wanted = whole ? "whole, as request.bin is" : "without its prompt, as request.bin is left out";
      throw bad("redaction", `${name}: expected ${wanted}`);
    }
  }
  if (whole || !answer) return;
  try {
    parseSalts(answer.fieldSalts, REPLY_FIELDS);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    throw bad("redaction", `answer.cbor: expected the salts of ${REPLY_FIELDS.join(", ")} alone`);
  }
}

function manifestOf(entries: Entries): Bytes {
  const files = [...entries].map(([name, data]): cbor.Value => [name, BigInt(data.length), sha256(data)]);
  return cbor.encode(cbor.mapOf({ v: 1n, type: "countermark/bundle/v1", files }));
}

/** Names and contents by the local headers, up to the central directory; everything else is compared later. */
function readEntries(data: Bytes): Entries {
  const entries: Entries = new Map();
  let at = 0;
  while (equal(data.subarray(at, at + 4), utf8("PK\x03\x04")) && entries.size <= ENTRIES.length) {
    if (data.length - at < LOCAL_BYTES) throw bad("container", "bundle: ends inside a header");
    const size = uintLe(data.subarray(at + 22, at + 26));
    const start = at + LOCAL_BYTES + uintLe(data.subarray(at + 26, at + 28));
    const name = String.fromCharCode(...data.subarray(at + LOCAL_BYTES, start).subarray(0, 256));
    at = start + size;
    if (at > data.length || entries.has(name)) {
      throw bad("container", "bundle: expected whole entries, got one that is cut short or named twice");
    }
    entries.set(name, data.subarray(start, at));
  }
  return entries;
}

/** The file that has these entries: no times, no comments, no extra fields, mode 0600. */
function encodeZip(entries: Entries): Bytes {
  const body: Bytes[] = [];
  const directory: Bytes[] = [];
  let offset = 0;
  const head = concat(le(20, 2), le(0, 2), le(0, 2), le(0, 2), le(0x21, 2));
  for (const [name, data] of entries) {
    const encoded = Uint8Array.from(name, (char) => char.charCodeAt(0));
    const about = concat(le(crc32(data), 4), le(data.length, 4), le(data.length, 4), le(encoded.length, 2), le(0, 2));
    body.push(utf8("PK\x03\x04"), head, about, encoded, data);
    const tail = concat(le(0, 2), le(0, 2), le(0, 2), le(0o600 * 65536, 4), le(offset, 4));
    directory.push(utf8("PK\x01\x02"), le((3 << 8) | 20, 2), head, about, tail, encoded);
    offset += LOCAL_BYTES + encoded.length + data.length;
  }
  const listed = concat(...directory, new Uint8Array());
  const counts = concat(le(0, 2), le(0, 2), le(entries.size, 2), le(entries.size, 2));
  const end = concat(utf8("PK\x05\x06"), counts, le(listed.length, 4), le(offset, 4), le(0, 2));
  return concat(...body, listed, end);
}

/** For people: the first entry whose content has not the CRC-32 of its local header, else what is left. */
function changed(entries: Entries, data: Bytes): string {
  let at = 0;
  for (const [name, content] of entries) {
    if (crc32(content) !== uintLe(data.subarray(at + 14, at + 18))) return `in ${name.slice(0, 60)}`;
    at += LOCAL_BYTES + name.length + content.length;
  }
  return "outside its entries";
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let i = 0; i < 8; i++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

function crc32(data: Bytes): number {
  let value = 0xffffffff;
  for (const byte of data) value = CRC_TABLE[(value ^ byte) & 0xff]! ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}
