/** Evidence: everything the appliance hands over, in one deterministic CBOR map. Framing only (docs/formats.md, 4). */

import type { Bytes } from "./bytes.js";
import * as cbor from "./cbor.js";
import { type Keys, MAX_CLAIMS_BYTES, parseKeys } from "./claims.js";
import { malformed } from "./errors.js";

export const MAX_EVIDENCE_BYTES = 8 * 1024 * 1024;
const MAX_GPUS = 16;
const MAX_CERTS = 8;
const MAX_RIMS = 2 * MAX_GPUS;
const MAX_CRLS = 16;
const MAX_OCSP = 8 * MAX_GPUS;
const MAX: Record<string, number> = {
  quote: 64 * 1024,
  ccel: 1024 * 1024,
  rtmr3_log: 64 * 1024,
  claims: MAX_CLAIMS_BYTES,
  report: 64 * 1024,
  cert: 8 * 1024,
  tdx: 1024 * 1024,
  rim: 256 * 1024,
  crl: 256 * 1024,
  ocsp: 16 * 1024,
};

export interface GpuEvidence {
  readonly report: Bytes;
  readonly certs: readonly Bytes[];
}

export interface Evidence {
  readonly platform: string;
  readonly quote: Bytes;
  readonly ccel: Bytes;
  readonly rtmr3Log: Bytes;
  readonly gpu: readonly GpuEvidence[];
  readonly claims: Bytes;
  readonly keysArray: cbor.Value;
  readonly keys: Keys;
  readonly tdx: Bytes;
  readonly rims: readonly Bytes[];
  readonly crls: readonly Bytes[];
  readonly ocsp: readonly Bytes[];
}

/** Parse the evidence; refuses `evidence.*`, `keys.*`, `cose_key.*`, `cbor.*`. */
export function parseEvidence(data: Bytes): Evidence {
  const value = cbor.fields(cbor.decode(data, MAX_EVIDENCE_BYTES), "evidence", {
    v: "int",
    platform: "text",
    quote: "bytes",
    ccel: "bytes",
    rtmr3_log: "bytes",
    gpu: "list",
    claims: "bytes",
    keys: "list",
    endorsements: "map",
  });
  if (value.int("v") !== 1n) throw malformed("evidence.version", `evidence.v: expected 1, got ${value.int("v")}`);
  const platform = value.text("platform");
  if (!["sim", "tdx", "vtpm"].includes(platform)) {
    throw malformed("evidence.platform", "evidence.platform: expected sim, tdx or vtpm");
  }
  const endorsements = cbor.fields(value.get("endorsements"), "evidence", { tdx: "bytes", gpu: "map" });
  const carried = cbor.fields(endorsements.get("gpu"), "evidence", { rims: "list", crls: "list", ocsp: "list" });
  return {
    platform,
    quote: blob(value.get("quote"), "quote"),
    ccel: blob(value.get("ccel"), "ccel"),
    rtmr3Log: blob(value.get("rtmr3_log"), "rtmr3_log"),
    gpu: list(value.list("gpu"), "gpu", MAX_GPUS).map(gpu),
    claims: blob(value.get("claims"), "claims"),
    keysArray: value.get("keys"),
    keys: parseKeys(value.list("keys")),
    tdx: blob(endorsements.get("tdx"), "tdx"),
    rims: list(carried.list("rims"), "rims", MAX_RIMS).map((item) => blob(item, "rim")),
    crls: list(carried.list("crls"), "crls", MAX_CRLS).map((item) => blob(item, "crl")),
    ocsp: list(carried.list("ocsp"), "ocsp", MAX_OCSP).map((item) => blob(item, "ocsp")),
  };
}

function blob(value: cbor.Value, name: string): Bytes {
  if (!(value instanceof Uint8Array)) {
    throw malformed("evidence.field", `evidence.${name}: expected bytes, got ${cbor.typeOf(value)}`);
  }
  if (value.length > MAX[name]!) {
    const message = `evidence.${name}: expected at most ${MAX[name]} bytes, got ${value.length}`;
    throw malformed("evidence.too_long", message);
  }
  return value;
}

function list(value: cbor.Value[], name: string, most: number): cbor.Value[] {
  if (value.length > most) {
    throw malformed("evidence.too_many", `evidence.${name}: expected at most ${most} items, got ${value.length}`);
  }
  return value;
}

function gpu(item: cbor.Value): GpuEvidence {
  const value = cbor.fields(item, "evidence", { report: "bytes", certs: "list" });
  const certs = list(value.list("certs"), "certs", MAX_CERTS).map((cert) => blob(cert, "cert"));
  return { report: blob(value.get("report"), "report"), certs };
}
