/**
 * GPUs (step 8), as far as this page can: report, signature, chain, nonce, firmware identifier, keys and modes as in
 * RTMR3. SPDM 1.1 (DMTF DSP0274) MEASUREMENTS in NVIDIA's form; the DICE extension after TCG.
 *
 * Not checked here: the measurements against signed reference manifests (RIMs, XML signatures), and revocation of the
 * certificates. A result without those is at most partial.
 */

import { p384 } from "@noble/curves/nist.js";
import { type Bytes, Reader, compare, equal, hex, isAscii, isPrintable, isZero, sha384, uintLe } from "./bytes.js";
import { type Claims, gpuDigest, gpuNonce } from "./claims.js";
import { INTEGER, OCTET_STRING, OID, SEQUENCE, type Element, parseElements, parseSequence } from "./der.js";
import { chained } from "./endorsements.js";
import { Refusal, malformed, refused } from "./errors.js";
import type { GpuIdentity } from "./eventlog.js";
import type { GpuEvidence } from "./evidence.js";
import type { Policy } from "./policy.js";
import * as x509 from "./x509.js";

const SIGNATURE_BYTES = 96;
const MAX_REPORT_BYTES = 64 * 1024;
const OPAQUE_MAGIC = [...new TextEncoder().encode("NVDAOD")];
const OPAQUE_HEADER_BYTES = 12;
const MAX_OPAQUE_VERSION = 1;
const DRIVER_VERSION = 3;
const VBIOS_VERSION = 6;
const FWID = 20;
const PROTECTED_PCIE_STATUS = 21;
const OPAQUE_DATA_VERSION = 34;
const FEATURE_FLAG = 36;
const STATUS_MODES: Record<string, string> = { aa: "protected-pcie", "55": "cc-on" };
const FEATURE_MODES: Record<number, string> = { 0: "cc-on", 1: "cc-on", 2: "protected-pcie" };
const SHA384_OID = "608648016503040202";
const FWID_BYTES = 48;
const FWIDS = 0xa6;
const MAX_FWIDS = 8;

export interface Report {
  readonly signed: Bytes;
  readonly signature: Bytes;
  readonly nonce: Bytes;
  readonly measurements: number;
  readonly opaque: ReadonlyMap<number, Bytes>;
}

/** A GPU whose report verified. Keys are SHA-256 of a SubjectPublicKeyInfo. */
export interface Gpu {
  readonly key: Bytes;
  readonly chip: Bytes;
  readonly name: string;
  readonly driver: string;
  readonly vbios: string;
  readonly mode: string;
}

export interface ParsedGpus {
  readonly evidence: readonly GpuEvidence[];
  readonly reports: readonly Report[];
  readonly chains: readonly (readonly x509.Certificate[])[];
}

/** Step 1's part; refuses `spdm.*`, `gpu.chain`. */
export function parseGpus(evidence: readonly GpuEvidence[]): ParsedGpus {
  return {
    evidence,
    reports: evidence.map(({ report }) => parseReport(report)),
    chains: evidence.map(({ certs }) => x509.parseDerChain(certs, "gpu")),
  };
}

function parseReport(data: Bytes): Report {
  if (data.length > MAX_REPORT_BYTES) {
    throw malformed("spdm.too_long", `spdm: expected at most ${MAX_REPORT_BYTES} bytes, got ${data.length}`);
  }
  const reader = new Reader(data, "spdm");
  reader.expect(0x11, 1, "request_version");
  reader.expect(0xe0, 1, "request_code");
  reader.expect(0x01, 1, "request_param1");
  reader.expect(0xff, 1, "request_param2");
  const nonce = reader.take(32, "nonce");
  const slot = reader.uint(1, "slot");
  if (slot > 7) throw malformed("spdm.slot", `spdm.slot: expected 0 to 7, got ${slot}`);
  reader.expect(0x11, 1, "response_version");
  reader.expect(0x60, 1, "response_code");
  reader.take(2, "response_params");
  const count = reader.uint(1, "number_of_blocks");
  const record = new Reader(reader.take(reader.uint(3, "record_size"), "record"), "spdm");
  const indices = new Set<number>();
  for (let i = 0; i < count; i++) indices.add(parseMeasurement(record));
  record.end();
  if (indices.size !== count) throw malformed("spdm.index", "spdm.index: expected each measurement index once");
  reader.take(32, "responder_nonce");
  const opaque = parseOpaque(new Reader(reader.take(reader.uint(2, "opaque_size"), "opaque"), "spdm"));
  const signature = reader.take(SIGNATURE_BYTES, "signature");
  reader.end();
  return { signed: data.subarray(0, -SIGNATURE_BYTES), signature, nonce, measurements: count, opaque };
}

function parseMeasurement(record: Reader): number {
  const index = record.uint(1, "index");
  if (index < 1 || index > 254) throw malformed("spdm.index", `spdm.index: expected 1 to 254, got ${index}`);
  record.expect(1, 1, "measurement_specification");
  const block = new Reader(record.take(record.uint(2, "measurement_size"), "measurement"), "spdm");
  block.uint(1, "value_type");
  block.take(block.uint(2, "value_size"), "value");
  block.end();
  return index;
}

function parseOpaque(reader: Reader): Map<number, Bytes> {
  const badVersion = (message: string) => malformed("spdm.opaque_version", `spdm.${message}`);
  const typed = OPAQUE_MAGIC.every((byte, i) => reader.data[i] === byte);
  if (typed) {
    const header = reader.take(OPAQUE_HEADER_BYTES, "opaque_header");
    const reserved = [header[6]!, header[7]!, header[10]!, header[11]!];
    if (header[8]! > MAX_OPAQUE_VERSION || reserved.some((byte) => byte !== 0)) {
      throw badVersion(`opaque_header: expected profile 0 of version 0 or 1, got ${hex(header)}`);
    }
  }
  const records: [number, Bytes][] = [];
  while (reader.left) {
    const kind = reader.uint(2, "opaque_type");
    if (typed) reader.uint(2, "opaque_value_type");
    records.push([kind, reader.take(reader.uint(2, "opaque_value_size"), "opaque_value")]);
  }
  const found = new Map(records);
  if (found.size !== records.length) {
    throw malformed("spdm.opaque_duplicate", "spdm.opaque: expected each opaque type once");
  }
  const version = uintLe(found.get(OPAQUE_DATA_VERSION) ?? new Uint8Array());
  if (version > MAX_OPAQUE_VERSION) {
    throw badVersion(`opaque_data_version: expected at most ${MAX_OPAQUE_VERSION}, got ${version}`);
  }
  return found;
}

const no = (code: string, message: string) => refused(`gpu.${code}`, message, "8");

/** Step 8. What RTMR3 says is in `measured`; a report made at boot answers the nonce made of the boot id. */
export function appraiseGpus(
  parsed: ParsedGpus,
  claims: Claims,
  measured: readonly GpuIdentity[],
  policy: Policy,
  now: number,
): Gpu[] {
  const { evidence } = parsed;
  if (!evidence.length) throw no("missing", `GPU evidence: expected ${policy.gpuCount}, got none`);
  if (evidence.length !== policy.gpuCount) {
    throw no("count", `GPU evidence: expected ${policy.gpuCount}, got ${evidence.length}`);
  }
  const found = gpuDigest(evidence);
  if (!equal(found, claims.gpuDigest)) {
    throw no("digest", `GPU evidence: expected digest ${hex(claims.gpuDigest)}, got ${hex(found)}`);
  }
  if (policy.gpuFreshness === "session" && claims.gpuFreshness !== "session") {
    throw no("freshness", "GPU freshness: expected session, got boot");
  }
  const nonce = gpuNonce(claims.gpuFreshness === "session" ? claims.nonce : claims.boot_id, claims.tls_spki);
  const gpus = parsed.reports.map((report, i) => verifyReport(report, parsed.chains[i]!, policy, nonce, now));
  const keys = gpus.map((gpu) => gpu.key).sort(compare);
  const distinct = (items: Bytes[]) => new Set(items.map(hex)).size === items.length;
  if (!distinct(keys) || !distinct(gpus.map((gpu) => gpu.chip))) {
    throw no("duplicate", "GPU device keys and chips: expected each once, got a repeated one");
  }
  const wanted = measured.map((gpu) => gpu.deviceKey).sort(compare);
  if (keys.length !== wanted.length || keys.some((key, i) => !equal(key, wanted[i]!))) {
    const text = `expected ${wanted.map(hex).join(", ")} as in RTMR3, got ${keys.map(hex).join(", ")}`;
    throw no("device_key", `GPU device keys: ${text}`);
  }
  for (const gpu of measured) {
    if (gpu.mode !== policy.gpuMode) throw no("mode", `GPU mode: expected ${policy.gpuMode}, got ${gpu.mode}`);
    if (gpu.devtools) throw no("devtools", "GPU developer tools: expected off, got on");
  }
  for (const gpu of gpus) {
    // RTMR3 has what the driver said at boot; this is what the GPU itself signed.
    if (gpu.mode !== policy.gpuMode) {
      throw no("mode", `GPU mode: expected ${policy.gpuMode}, as in RTMR3; its own report says ${gpu.mode}`);
    }
  }
  return gpus;
}

function verifyReport(
  report: Report,
  chain: readonly x509.Certificate[],
  policy: Policy,
  nonce: Bytes,
  now: number,
): Gpu {
  chained("gpu", "GPU certificate chain", () => x509.verifyChain(chain, policy.gpuRoot, now));
  const [leaf, issuer] = chain as [x509.Certificate, x509.Certificate];
  if (leaf.key === null || leaf.key.curve !== p384) throw no("signature", `${leaf.name}: expected a P-384 key`);
  if (!x509.ecdsaVerifies(leaf.key, report.signature, sha384(report.signed), "compact")) {
    throw no("signature", "GPU report: its signature does not verify");
  }
  if (!equal(report.nonce, nonce)) {
    throw no("nonce", `GPU nonce: expected ${hex(nonce)}, got ${hex(report.nonce)}`);
  }
  verifyFwid(report, leaf, issuer);
  const driver = driverVersion(report);
  const vbios = vbiosVersion(report);
  if (!driver || !vbios) throw no("field", "GPU report: expected driver and VBIOS versions, got none");
  const mode = readMode(report);
  if (mode === null) throw no("field", "GPU report: expected protected PCIe status or feature flag, got neither");
  return { key: x509.spkiDigest(leaf), chip: x509.spkiDigest(issuer), name: leaf.name, driver, vbios, mode };
}

/** The report's firmware identifier is the one the leaf certificate names, and the chip's key its issuer's. */
function verifyFwid(report: Report, leaf: x509.Certificate, issuer: x509.Certificate): void {
  const fwid = report.opaque.get(FWID);
  if (!fwid || isZero(fwid)) throw no("fwid_missing", "GPU report: expected a firmware identifier, got none");
  const values = x509.DICE.map((oid) => leaf.extensions.get(oid)).filter((value) => value !== undefined);
  if (values.length !== 1) {
    throw no("fwid_missing", `${leaf.name}: expected one DICE extension, got ${values.length}`);
  }
  let identity: Dice;
  try {
    identity = parseDice(values[0]!);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    throw no("fwid", `${leaf.name}: ${error.message}`);
  }
  if (!equal(identity.fwid, fwid)) {
    throw no("fwid", `GPU FWID: expected ${hex(identity.fwid)} of the leaf certificate, got ${hex(fwid)}`);
  }
  if (identity.deviceId !== null && !equal(identity.deviceId, issuer.spki)) {
    throw no("fwid", "GPU leaf certificate: expected the issuer's key as its device, got another");
  }
}

interface Dice {
  readonly fwid: Bytes;
  readonly deviceId: Bytes | null;
}

/** CompositeDeviceID (Hopper) or DiceTcbInfo (Blackwell); refuses `dice.*`. */
function parseDice(data: Bytes): Dice {
  const members = parseSequence(data, "dice");
  if (members[0]?.tag === INTEGER) {
    if (members.map(({ tag }) => tag).join() !== [INTEGER, SEQUENCE, SEQUENCE].join()) {
      throw badDice("CompositeDeviceID of version, key and FWID");
    }
    return { fwid: fwidOf(members[2]!), deviceId: members[1]!.encoded };
  }
  const numbers = members.map(({ tag }) => tag & 0x1f);
  if (members.some(({ tag }) => (tag & 0xc0) !== 0x80) || numbers.some((n, i) => i > 0 && numbers[i - 1]! >= n)) {
    throw badDice("DiceTcbInfo with its members in order, each once");
  }
  const list = members.find(({ tag }) => tag === FWIDS);
  const layers = list ? parseElements(list.value, "dice") : [];
  if (!layers.length || layers.length > MAX_FWIDS) {
    throw badDice(`DiceTcbInfo with 1 to ${MAX_FWIDS} firmware identifiers`);
  }
  layers.slice(1).forEach(hashed);
  return { fwid: fwidOf(layers[0]!), deviceId: null };
}

const badDice = (expected: string) => malformed("dice.form", `dice: expected ${expected}`);

function hashed(element: Element): [Bytes, Bytes] {
  const members = parseElements(element.value, "dice");
  const tags = members.map(({ tag }) => tag).join();
  if (element.tag !== SEQUENCE || tags !== [OID, OCTET_STRING].join()) throw badDice("FWID of hash algorithm and digest");
  return [members[0]!.value, members[1]!.value];
}

function fwidOf(element: Element): Bytes {
  const [algorithm, digest] = hashed(element);
  if (hex(algorithm) !== SHA384_OID || digest.length !== FWID_BYTES) throw badDice(`${FWID_BYTES} bytes of SHA-384`);
  return digest;
}

function driverVersion(report: Report): string {
  const value = report.opaque.get(DRIVER_VERSION) ?? new Uint8Array();
  const text = String.fromCharCode(...value).replace(/\0+$/, "");
  if (!isAscii(text) || !isPrintable(text)) throw no("field", "GPU report: expected a driver version in ASCII");
  return text;
}

function vbiosVersion(report: Report): string {
  const value = report.opaque.get(VBIOS_VERSION);
  if (!value) return "";
  if (value.length !== 8) throw no("field", `GPU report: expected 8 bytes of VBIOS version, got ${value.length}`);
  const order = [value[3]!, value[2]!, value[1]!, value[0]!, value[4]!];
  return order.map((byte) => byte.toString(16).padStart(2, "0").toUpperCase()).join(".");
}

/** The mode the GPU states by protected PCIe status, feature flag, or both alike; null when it states neither. */
function readMode(report: Report): string | null {
  const modes = new Set<string>();
  const status = report.opaque.get(PROTECTED_PCIE_STATUS);
  if (status) {
    const mode = STATUS_MODES[hex(status)];
    if (!mode) throw no("field", `GPU protected PCIe status: expected on or off, got ${hex(status)}`);
    modes.add(mode);
  }
  const flag = report.opaque.get(FEATURE_FLAG);
  if (flag) {
    const mode = flag.length >= 1 && flag.length <= 8 ? FEATURE_MODES[uintLe(flag)] : undefined;
    if (!mode) throw no("field", `GPU feature flag: expected 0, 1 or 2, got ${hex(flag)}`);
    modes.add(mode);
  }
  if (modes.size > 1) {
    throw no("field", "GPU mode: expected protected PCIe status and feature flag to agree, got both modes");
  }
  return [...modes][0] ?? null;
}
