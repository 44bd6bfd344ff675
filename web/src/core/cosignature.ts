/**
 * Verifier keys and cosignatures of witnesses (C2SP signed-note, tlog-cosignature): Ed25519 of a witness 0x04, ML-DSA-44
 * 0x06; a log's own Ed25519 is 0x01.
 *
 * A witness is a name with one or two keys. It counts when each of its keys has signed, once, at a time that is not
 * zero. Lines of keys nobody named are ignored; a line of a named key that does not hold refuses the whole note.
 * Not checked here: the time against any clock.
 */

import { type Bytes, base64, bigBe, concat, equal, fromBase64, hex, utf8 } from "./bytes.js";
import { type Checkpoint, ED25519, ML_DSA_44, cosignedMessage, isName, keyIdOf, parseNote, parseText } from "./checkpoint.js";
import { type Refusal, malformed, refused } from "./errors.js";
import { type CoseKey, verifySignature } from "./keys.js";

const COSIGNATURE_ED25519 = 0x04;
export const WITNESS_TYPES: readonly number[] = [COSIGNATURE_ED25519, ML_DSA_44];
const MAX_VKEY = 4096;
const MAX_TIMESTAMP = (1n << 63n) - 1n;
const KEY_BYTES = new Map([[ED25519, 32], [COSIGNATURE_ED25519, 32], [ML_DSA_44, 1312]]);
const SIGNATURE_BYTES = new Map([[COSIGNATURE_ED25519, 64], [ML_DSA_44, 2420]]);

export interface VerifierKey {
  readonly name: string;
  readonly kind: number;
  readonly key: CoseKey;
  readonly keyId: Bytes;
  readonly text: string;
}

const badKey = (text: string): Refusal =>
  malformed("tlog.vkey", `verifier key: expected NAME+KEYID+BASE64 of type 0x01, 0x04 or 0x06, got ${text.slice(0, 80)}`);

/** Refuses `tlog.vkey`. */
export function parseVkey(text: string): VerifierKey {
  const [name = "", , ...rest] = text.split("+");
  const raw = fromBase64(rest.join("+"));
  if (text.length > MAX_VKEY || !isName(name) || !raw?.length) throw badKey(text);
  const [kind, key] = [raw[0]!, raw.slice(1)];
  const keyId = keyIdOf(name, kind, key);
  if (key.length !== KEY_BYTES.get(kind) || `${name}+${hex(keyId)}+${base64(raw)}` !== text) throw badKey(text);
  return { name, kind, key: { algorithm: kind === ML_DSA_44 ? "ML_DSA_44" : "EDDSA", public: key }, keyId, text };
}

/** Whether these are the two keys of one log. */
export function isLog(keys: readonly VerifierKey[]): boolean {
  const kinds = new Map(keys.map((key) => [key.kind, key]));
  const names = new Set([...kinds.values()].map(({ name }) => name));
  return kinds.size === 2 && kinds.has(ED25519) && kinds.has(ML_DSA_44) && names.size === 1;
}

/** The names of the witnesses that signed with every key of theirs; refuses `tlog.*`, `log.cosignature`. */
export function verifyCosignatures(data: Bytes, witnesses: readonly VerifierKey[]): string[] {
  const { text, lines } = parseNote(data);
  const checkpoint = parseText(text);
  const missing = new Set<string>();
  for (const witness of witnesses) {
    const mine = lines.filter((line) => line.name === witness.name && equal(line.keyId, witness.keyId));
    if (!mine.length) missing.add(witness.name);
    else if (mine.length > 1 || !holds(witness, mine[0]!.blob, checkpoint, text)) {
      const whose = `cosignature of ${witness.name}, type ${witness.kind}`;
      throw refused("log.cosignature", `${whose}: expected one that holds, got ${mine.length}`);
    }
  }
  return [...new Set(witnesses.map(({ name }) => name))].filter((name) => !missing.has(name));
}

function holds(witness: VerifierKey, blob: Bytes, checkpoint: Checkpoint, text: string): boolean {
  const size = SIGNATURE_BYTES.get(witness.kind);
  if (size === undefined || blob.length !== 8 + size) return false;
  const timestamp = bigBe(blob.subarray(0, 8));
  const message =
    witness.kind === ML_DSA_44
      ? cosignedMessage(witness.name, timestamp, checkpoint)
      : concat(utf8(`cosignature/v1\ntime ${timestamp}\n`), utf8(text));
  return timestamp > 0n && timestamp <= MAX_TIMESTAMP && verifySignature(witness.key, blob.subarray(8), message);
}
