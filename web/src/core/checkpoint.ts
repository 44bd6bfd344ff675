/**
 * C2SP signed-note and tlog-checkpoint: the signed head of a log, under Ed25519 (0x01) and ML-DSA-44 (0x06).
 *
 * Our logs sign with the origin as the key name and have no extension lines. Lines of unknown keys are ignored, as the
 * specification demands; cosignatures of witnesses are `witness`'s.
 */

import { type Bytes, base64, bigBe, concat, equal, fromBase64, fromUtf8, sha256, u64be, utf8 } from "./bytes.js";
import { type Refusal, malformed, refused } from "./errors.js";
import { type CoseKey, verifySignature } from "./keys.js";
import { HASH_BYTES, MAX_SIZE } from "./merkle.js";

export const MAX_NOTE_BYTES = 128 * 1024;
export const ED25519 = 0x01;
export const ML_DSA_44 = 0x06;
const ED25519_BYTES = 64;
const ML_DSA_44_BYTES = 2420;
const MAX_SIGNATURES = 32;
const MAX_NAME_BYTES = 255;
const DASH = "\u2014 ";
const LABEL = utf8("subtree/v1\n\0");
// What Python's str.isspace calls a space.
const SPACE = /[\u0009-\u000d\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]/;

export interface Checkpoint {
  readonly origin: string;
  readonly size: bigint;
  readonly root: Bytes;
}

export interface Line {
  readonly name: string;
  readonly keyId: Bytes;
  readonly blob: Bytes;
}

const badNote = (expected: string): Refusal => malformed("tlog.note", `signed note: expected ${expected}`);

/** Open a checkpoint of the log `origin`: both of the log's signatures stand in it once and hold. */
export function verifyCheckpoint(data: Bytes, origin: string, ed25519: CoseKey, mlDsa44: CoseKey): Checkpoint {
  const { text, lines } = parseNote(data);
  const checkpoint = parseText(text);
  if (checkpoint.origin !== origin) {
    throw refused("log.origin", `origin: expected ${origin}, got ${checkpoint.origin}`);
  }
  const classic = ourLine(lines, origin, ED25519, ed25519.public, ED25519_BYTES);
  const later = ourLine(lines, origin, ML_DSA_44, mlDsa44.public, 8 + ML_DSA_44_BYTES);
  if (!verifySignature(ed25519, classic, utf8(text))) {
    throw refused("log.signature", "checkpoint: the Ed25519 signature does not verify");
  }
  const timestamp = bigBe(later.subarray(0, 8));
  const message = cosignedMessage(origin, timestamp, checkpoint);
  if (timestamp >= 1n << 63n || !verifySignature(mlDsa44, later.subarray(8), message)) {
    throw refused("log.signature", "checkpoint: the ML-DSA-44 signature does not verify");
  }
  return checkpoint;
}

/** What type 0x06 signs: the `cosigned_message` of tlog-cosignature for a whole checkpoint. */
export function cosignedMessage(name: string, timestamp: bigint, checkpoint: Checkpoint): Bytes {
  const [signer, origin] = [utf8(name), utf8(checkpoint.origin)];
  return concat(
    LABEL,
    Uint8Array.of(signer.length),
    signer,
    u64be(timestamp),
    Uint8Array.of(origin.length),
    origin,
    u64be(0n),
    u64be(checkpoint.size),
    checkpoint.root,
  );
}

/** The first 4 bytes of SHA-256(name || 0x0A || type || public key). */
export const keyIdOf = (name: string, kind: number, key: Bytes): Bytes =>
  sha256(utf8(`${name}\n`), Uint8Array.of(kind), key).subarray(0, 4);

function ourLine(lines: readonly Line[], name: string, kind: number, key: Bytes, length: number): Bytes {
  const wanted = keyIdOf(name, kind, key);
  const blobs = lines.filter((line) => line.name === name && equal(line.keyId, wanted)).map((line) => line.blob);
  if (!blobs.length) {
    throw refused("log.signature_missing", `checkpoint: no signature of type ${kind} by this log`);
  }
  if (blobs.length > 1) {
    throw refused("log.signature_duplicate", `checkpoint: ${blobs.length} signatures of type ${kind}`);
  }
  if (blobs[0]!.length !== length) {
    throw refused("log.signature", `signature: expected ${length} bytes, got ${blobs[0]!.length}`);
  }
  return blobs[0]!;
}

/** The text, and its signature lines; refuses `tlog.note`. */
export function parseNote(data: Bytes): { text: string; lines: Line[] } {
  if (data.length > MAX_NOTE_BYTES) throw badNote(`at most ${MAX_NOTE_BYTES} bytes, got ${data.length}`);
  const whole = fromUtf8(data);
  if (whole === null) throw badNote("UTF-8");
  if (/[\0-\u0009\u000b-\u001f]/.test(whole)) throw badNote("no control characters");
  const split = whole.lastIndexOf("\n\n");
  const tail = split < 0 ? [] : whole.slice(split + 2).split("\n");
  if (split < 1 || tail.at(-1) !== "" || tail.length < 2 || tail.length > MAX_SIGNATURES + 1) {
    throw badNote(`text, a blank line and 1 to ${MAX_SIGNATURES} signature lines`);
  }
  const lines = tail.slice(0, -1).map(parseLine);
  const text = whole.slice(0, split + 1);
  const again = lines.map(({ name, keyId, blob }) => `${DASH}${name} ${base64(concat(keyId, blob))}\n`).join("");
  if (`${text}\n${again}` !== whole) throw badNote("canonical base64");
  return { text, lines };
}

function parseLine(line: string): Line {
  const [name = "", ...rest] = line.startsWith(DASH) ? line.slice(DASH.length).split(" ") : [];
  if (!line.startsWith(DASH) || !rest.length || !isName(name)) throw badNote("lines `\u2014 <key name> <base64>`");
  const blob = fromBase64(rest.join(" "));
  if (blob === null) throw badNote("base64 signatures");
  if (blob.length < 5) throw badNote("a key id and a signature");
  return { name, keyId: blob.subarray(0, 4), blob: blob.subarray(4) };
}

/** What may name a key or a log. */
export const isName = (name: string): boolean =>
  name.length > 0 && utf8(name).length <= MAX_NAME_BYTES && !name.includes("+") && !SPACE.test(name);

/** Refuses `tlog.checkpoint`, `tlog.extension`. */
export function parseText(text: string): Checkpoint {
  const bad = (expected: string) => malformed("tlog.checkpoint", `checkpoint: expected ${expected}`);
  const lines = text.split("\n");
  if (lines.length < 4 || lines.at(-1) !== "" || lines.slice(0, -1).some((line) => !line)) {
    throw bad("origin, size and root");
  }
  if (lines.length > 4) throw malformed("tlog.extension", "checkpoint: expected no extension lines");
  const [origin, digits, encoded] = lines as [string, string, string];
  const root = fromBase64(encoded);
  if (root === null || !/^(?:0|[1-9]\d{0,18})$/.test(digits)) throw bad("a decimal size and a base64 root");
  const size = BigInt(digits);
  if (root.length !== HASH_BYTES || size > MAX_SIZE || base64(root) !== encoded || !isName(origin)) {
    throw bad("canonical origin, size and root");
  }
  return { origin, size, root };
}
