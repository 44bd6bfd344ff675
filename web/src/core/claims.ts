/**
 * Claims and the 64 bytes of report_data that stand for them (docs/formats.md section 5), and step 7b.
 *
 * Offline, nonce, exporter and TLS key are assertions of whoever made the bundle; only the hash over them is checked.
 */

import { type Bytes, concat, equal, hex, isPrintable, sha256, sha512, utf8 } from "./bytes.js";
import * as cbor from "./cbor.js";
import { malformed, refused } from "./errors.js";
import type { BootEvents } from "./eventlog.js";
import { type Algorithm, type CoseKey, checkPoint, es256SpkiDigest, keyFromMap } from "./keys.js";

export const MAX_CLAIMS_BYTES = 4096;
const MAX_ORIGIN_BYTES = 256;
const CONTEXT = utf8("countermark/attest/v1");
const GPU_NONCE_CONTEXT = utf8("countermark/gpu/v1");
const GPU_EVIDENCE_CONTEXT = utf8("countermark/gpu-evidence/v1");

export type Role = "tls" | "receipt-es256" | "receipt-ml-dsa-65" | "log-ed25519" | "log-ml-dsa-44";
const ROLES: readonly (readonly [Role, Algorithm])[] = [
  ["tls", "ES256"],
  ["receipt-es256", "ES256"],
  ["receipt-ml-dsa-65", "ML_DSA_65"],
  ["log-ed25519", "EDDSA"],
  ["log-ml-dsa-44", "ML_DSA_44"],
];

export type Keys = Readonly<Record<Role, CoseKey>>;

const DIGESTS = ["nonce", "boot_id", "tls_spki", "keys", "log_root", "weights_root", "image_id", "config"] as const;

export type Claims = Readonly<Record<(typeof DIGESTS)[number], Bytes>> & {
  readonly purpose: string;
  readonly exporter: Bytes | null;
  readonly logOrigin: string;
  readonly logSize: bigint;
  readonly gpuDigest: Bytes;
  readonly gpuFreshness: string;
};

/** Parse the claims; refuses `claims.*`, `cbor.*`. */
export function parseClaims(data: Bytes): Claims {
  const value = cbor.decode(data, MAX_CLAIMS_BYTES);
  const session = value instanceof Map && value.get("purpose") === "session";
  const names = session ? [...DIGESTS, "exporter"] : DIGESTS;
  const fields = cbor.fields(value, "claims", {
    ...Object.fromEntries(names.map((name) => [name, "bytes" as const])),
    v: "int",
    purpose: "text",
    log_origin: "text",
    log_size: "int",
    gpu: "map",
  });
  const gpu = cbor.fields(fields.get("gpu"), "claims", { digest: "bytes", freshness: "text" });
  if (fields.int("v") !== 1n) throw malformed("claims.version", `claims.v: expected 1, got ${fields.int("v")}`);
  const logSize = fields.int("log_size");
  if (logSize < 0n || logSize >= 1n << 63n) {
    throw malformed("claims.log_size", "claims.log_size: expected 0 to 2^63 - 1");
  }
  const logOrigin = fields.text("log_origin");
  if (!logOrigin || utf8(logOrigin).length > MAX_ORIGIN_BYTES || !isPrintable(logOrigin)) {
    const message = `claims.log_origin: expected 1 to ${MAX_ORIGIN_BYTES} printable bytes`;
    throw malformed("claims.log_origin", message);
  }
  const digests: [string, Bytes][] = names.map((name) => [name, fields.bytes(name)]);
  for (const [name, digest] of [...digests, ["gpu_digest", gpu.bytes("digest")] as const]) {
    if (digest.length !== 32) {
      throw malformed("claims.length", `claims.${name}: expected 32 bytes, got ${digest.length}`);
    }
  }
  const purpose = fields.text("purpose");
  const gpuFreshness = gpu.text("freshness");
  if (!["session", "passport", "replay"].includes(purpose) || !["session", "boot"].includes(gpuFreshness)) {
    throw malformed("claims.enum", "claims: expected a known purpose and freshness");
  }
  return {
    ...(Object.fromEntries(digests) as Record<(typeof DIGESTS)[number], Bytes>),
    purpose,
    exporter: session ? fields.bytes("exporter") : null,
    logOrigin,
    logSize,
    gpuDigest: gpu.bytes("digest"),
    gpuFreshness,
  };
}

/** The keys array: every role once, in order, with its algorithm; refuses `keys.*`, `cose_key.*`. */
export function parseKeys(value: cbor.Value[]): Keys {
  if (value.length !== ROLES.length) throw malformed("keys.roles", `keys: expected an array of ${ROLES.length} keys`);
  const keys = ROLES.map(([role, algorithm], i): [Role, CoseKey] => {
    const item = value[i];
    if (!Array.isArray(item) || item.length !== 2 || item[0] !== role) {
      throw malformed("keys.roles", `keys: expected [${role}, COSE_Key]`);
    }
    const key = keyFromMap(item[1]!);
    if (key.algorithm !== algorithm) {
      throw malformed("keys.algorithm", `keys.${role}: expected ${algorithm}, got ${key.algorithm}`);
    }
    return [role, key];
  });
  return Object.fromEntries(keys) as Keys;
}

export const gpuNonce = (challenge: Bytes, tlsSpki: Bytes): Bytes => sha256(GPU_NONCE_CONTEXT, challenge, tlsSpki);

export function gpuDigest(gpus: readonly { report: Bytes; certs: readonly Bytes[] }[]): Bytes {
  return sha256(GPU_EVIDENCE_CONTEXT, cbor.encode(gpus.map(({ report, certs }) => [report, [...certs]])));
}

/** Step 7b: report_data is that of the claims, and what was also measured agrees with RTMR3. */
export function verifyBinding(encoded: Bytes, claims: Claims, quoted: Bytes, boot: BootEvents): void {
  const hashed = sha512(concat(CONTEXT, encoded));
  if (!equal(hashed, quoted)) {
    const message = `report_data: expected ${hex(hashed)} for these claims, got ${hex(quoted)}`;
    throw refused("claims.report_data", message);
  }
  if (claims.purpose !== "session") {
    throw refused("claims.purpose", `purpose: expected session, got ${claims.purpose}`);
  }
  const measured = [
    ["image_id", boot.imageId],
    ["weights_root", boot.weightsRoot],
    ["config", boot.config],
    ["keys", boot.keys],
  ] as const;
  for (const [name, value] of measured) {
    if (!equal(claims[name], value)) {
      const message = `${name}: expected ${hex(value)} as measured into RTMR3, got ${hex(claims[name])} in the claims`;
      throw refused(`claims.${name}`, message);
    }
  }
}

/** Step 7b, the keys: those handed over are the claimed ones. `array`: the keys array as it came. */
export function verifyKeys(array: cbor.Value, keys: Keys, claims: Claims): void {
  const found = sha256(cbor.encode(array));
  if (!equal(found, claims.keys)) {
    const message = `keys: expected ${hex(claims.keys)} as claimed, got ${hex(found)} for those handed over`;
    throw refused("claims.keys_differ", message);
  }
  Object.values(keys).forEach(checkPoint);
  const spki = es256SpkiDigest(keys.tls);
  if (!equal(spki, claims.tls_spki)) {
    throw refused("claims.tls_key", `tls key: expected ${hex(claims.tls_spki)}, got ${hex(spki)}`);
  }
}
