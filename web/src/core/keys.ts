/**
 * The five public keys of an appliance as COSE_Keys, one strict form for each algorithm, and one `verify` for all four.
 *
 * RFC 9052 section 7, RFC 9053 7.1 and 7.2, RFC 9964 (ML-DSA). ES256 is r || s with the low s; ML-DSA has the empty
 * context. Not checked here: what a key is for.
 */

import { ed25519 } from "@noble/curves/ed25519.js";
import { p256 } from "@noble/curves/nist.js";
import { ml_dsa44, ml_dsa65 } from "@noble/post-quantum/ml-dsa.js";
import { type Bytes, bigBe, concat, equal, fromHex, sha256 } from "./bytes.js";
import * as cbor from "./cbor.js";
import { malformed } from "./errors.js";

export const P256_ORDER = p256.Point.Fn.ORDER;

export type Algorithm = "ES256" | "EDDSA" | "ML_DSA_44" | "ML_DSA_65";
interface Kind {
  readonly alg: bigint;
  readonly size: number;
}
const KINDS: Record<Algorithm, Kind> = {
  ES256: { alg: -7n, size: 64 },
  EDDSA: { alg: -8n, size: 32 },
  ML_DSA_44: { alg: -48n, size: 1312 },
  ML_DSA_65: { alg: -49n, size: 1952 },
};
const P256_SPKI = fromHex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")!;

export interface CoseKey {
  readonly algorithm: Algorithm;
  readonly public: Bytes;
}

export const coseNumber = (algorithm: Algorithm): bigint => KINDS[algorithm].alg;

function asMap({ algorithm, public: key }: CoseKey): cbor.CborMap {
  const alg = KINDS[algorithm].alg;
  const entries: [bigint, cbor.Value][] =
    algorithm === "ES256"
      ? [[1n, 2n], [3n, alg], [-1n, 1n], [-2n, key.subarray(0, 32)], [-3n, key.subarray(32)]]
      : algorithm === "EDDSA"
        ? [[1n, 1n], [3n, alg], [-1n, 6n], [-2n, key]]
        : [[1n, 7n], [3n, alg], [-1n, key]];
  return new Map(entries);
}

export const encodeCoseKey = (key: CoseKey): Bytes => cbor.encode(asMap(key));

/** A decoded COSE_Key map of exactly our form; refuses `cose_key.*`. */
export function keyFromMap(value: cbor.Value): CoseKey {
  if (!(value instanceof Map)) throw malformed("cose_key.form", `cose_key: expected a map, got ${cbor.typeOf(value)}`);
  const found = (Object.keys(KINDS) as Algorithm[]).find((name) => KINDS[name].alg === value.get(3n));
  if (!found) throw malformed("cose_key.alg", "cose_key.alg: expected a known algorithm");
  const labels = found === "ES256" ? [-2n, -3n] : found === "EDDSA" ? [-2n] : [-1n];
  const parts = labels.map((label) => value.get(label)).filter((part) => part instanceof Uint8Array);
  const key: CoseKey = { algorithm: found, public: concat(new Uint8Array(), ...parts) };
  if (key.public.length !== KINDS[found].size) {
    const message = `cose_key.public: expected ${KINDS[found].size} bytes, got ${key.public.length}`;
    throw malformed("cose_key.public", message);
  }
  if (!equal(cbor.encode(value), encodeCoseKey(key))) {
    throw malformed("cose_key.form", "cose_key: expected exactly the members of its key type");
  }
  return key;
}

export const parseCoseKey = (data: Bytes): CoseKey => keyFromMap(cbor.decode(data, 4096));

/** RFC 9679: SHA-256 over the required members only, which for AKP include alg. */
export function thumbprint(key: CoseKey): Bytes {
  const required = asMap(key);
  if (key.algorithm === "ES256" || key.algorithm === "EDDSA") required.delete(3n);
  return sha256(cbor.encode(required));
}

/** Refuses `cose_key.public` for a P-256 point off its curve. */
export function checkPoint(key: CoseKey): void {
  if (key.algorithm !== "ES256") return;
  try {
    p256.Point.fromBytes(concat(Uint8Array.of(4), key.public)).assertValidity();
  } catch {
    throw malformed("cose_key.public", "cose_key.public: expected an ES256 public key");
  }
}

/** SHA-256 of the DER SubjectPublicKeyInfo of an ES256 key. */
export const es256SpkiDigest = (key: CoseKey): Bytes => sha256(P256_SPKI, key.public);

/** Whether `signature` over `message` is this key's. */
export function verifySignature(key: CoseKey, signature: Bytes, message: Bytes): boolean {
  try {
    switch (key.algorithm) {
      case "ES256":
        if (signature.length !== 64 || bigBe(signature.subarray(32)) > P256_ORDER / 2n) return false;
        return p256.verify(signature, sha256(message), concat(Uint8Array.of(4), key.public), { prehash: false });
      case "EDDSA":
        return ed25519.verify(signature, message, key.public, { zip215: false });
      case "ML_DSA_44":
        return ml_dsa44.verify(signature, message, key.public);
      case "ML_DSA_65":
        return ml_dsa65.verify(signature, message, key.public);
    }
  } catch {
    return false;
  }
}
