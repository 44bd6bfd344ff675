/**
 * A TDX quote's own signatures and the platform that made it (step 3), the TD's attributes (4), its registers against
 * reference values (5), and the firmware's event log (6).
 *
 * Intel SGX DCAP quote verification; Intel TDX Module 1.5 ABI; TCG PC Client Platform Firmware Profile, section 10. The
 * TCB level is rated in `tcb`. Not checked here: the endorsements' own signatures and times.
 */

import { p256 } from "@noble/curves/nist.js";
import { type Bytes, compare, concat, equal, hex, includes, isZero, rfc3339, sha256, sha384, uintLe, zeros } from "./bytes.js";
import { ENUMERATED, INTEGER, OCTET_STRING, OID, SEQUENCE, parseElements, parseSequence } from "./der.js";
import { type Endorsements, chained } from "./endorsements.js";
import { malformed, refused, undecided } from "./errors.js";
import { EV_NO_ACTION, type Event, type EventLog, replay } from "./eventlog.js";
import type { Manifest, Shape } from "./manifest.js";
import { INTEL_SGX_ROOT, type Policy } from "./policy.js";
import type { Quote, TdReport } from "./quote.js";
import { type Rating, UP_TO_DATE, rate } from "./tcb.js";
import * as x509 from "./x509.js";

const SGX_EXTENSION = "1.2.840.113741.1.13.1";
const SGX_OID = "2a864886f84d010d01"; // in DER; what follows is the member's number
const PCK_NAMES = ["SGX PCK Certificate"];
const PCK_CA_NAMES = ["SGX PCK Platform CA", "SGX PCK Processor CA"];

export interface Platform {
  readonly tcbStatus: string;
  readonly advisories: readonly string[];
  readonly ppid: Bytes;
  readonly fmspc: Bytes;
}

/** The quote's PCK chain ends in the policy's root; refuses `quote.root`, `quote.pem`, `quote.chain`. */
export function verifyRoot(quote: Quote, policy: Policy): void {
  const root = x509.parsePemChain(quote.pckChainPem, "quote").at(-1)!;
  if (equal(x509.digest(root), policy.tdxRoot)) return;
  const whose = equal(policy.tdxRoot, INTEL_SGX_ROOT) ? "Intel's SGX root" : `the simulated ${hex(policy.tdxRoot)}`;
  const message = `quote root: expected ${whose}, got ${root.name} (${hex(x509.digest(root))})`;
  throw refused("quote.root", message, "2");
}

/** Step 3: PCK chain, revocation, QE report, quote signature, FMSPC, TCB level, status. */
export function verifyQuote(quote: Quote, endorsements: Endorsements, policy: Policy, now: number): Platform {
  const chain = x509.parsePemChain(quote.pckChainPem, "quote");
  const other = endorsements.pckChain;
  if (other.length && (other.length !== chain.length || other.some((item, i) => !equal(item.der, chain[i]!.der)))) {
    throw refused("quote.pck_chain", "pck_certificate_chain: expected the quote's own chain, got another");
  }
  verifyPckChain(chain, endorsements, policy, now);
  verifySignatures(quote, chain[0]!);
  const pck = parsePckExtension(chain[0]!);
  const families = [
    ["fmspc", endorsements.tcb.fmspc, pck.fmspc],
    ["pce_id", endorsements.tcb.pceId, pck.pceId],
  ] as const;
  for (const [name, wanted, got] of families) {
    if (!equal(wanted, got)) {
      const message = `${name}: expected ${hex(wanted)} as in the TCB info, got ${hex(got)} in the PCK certificate`;
      throw refused(`tcb.${name}`, message);
    }
  }
  const rating = rate(quote.body, quote.qeReport, pck, endorsements.tcb, endorsements.qe);
  verifyStatus(rating, policy, now);
  return { tcbStatus: rating.status, advisories: rating.advisories, ppid: pck.ppid, fmspc: pck.fmspc };
}

function verifyPckChain(chain: x509.Certificate[], endorsements: Endorsements, policy: Policy, now: number): void {
  if (chain.length !== 3) {
    throw refused("quote.short", `PCK chain: expected 3 certificates, got ${chain.length}`);
  }
  const [pck, ca] = chain as [x509.Certificate, x509.Certificate];
  chained("quote", "PCK chain", () => {
    x509.verifyChain(chain, policy.tdxRoot, now);
    x509.verifyCrl(endorsements.pckCrl, ca, now);
  });
  for (const [certificate, known] of [[pck, PCK_NAMES], [ca, PCK_CA_NAMES]] as const) {
    if (!known.some((words) => certificate.commonName.includes(words))) {
      throw refused("quote.pck_name", `PCK chain: expected ${known.join(" or ")}, got ${certificate.name}`);
    }
  }
  if (x509.isRevoked(pck, endorsements.pckCrl)) {
    throw refused("quote.pck_revoked", `PCK certificate ${hex(pck.serial)}: revoked by its CA`);
  }
  if (x509.isRevoked(ca, endorsements.rootCrl)) {
    throw refused("quote.ca_revoked", `${ca.name}: revoked by the root`);
  }
}

function verifySignatures(quote: Quote, pck: x509.Certificate): void {
  if (!x509.p256Verifies(pck, quote.qeReportSignature, quote.qeReport.encoded)) {
    throw refused("quote.qe_signature", "QE report: its signature does not verify");
  }
  const bound = concat(sha256(quote.attestationKey, quote.qeAuthData), zeros(32));
  if (!equal(quote.qeReport.report_data, bound)) {
    const message = `QE report_data: expected ${hex(bound)}, got ${hex(quote.qeReport.report_data)}`;
    throw refused("quote.qe_binding", message);
  }
  const key = { curve: p256, point: concat(Uint8Array.of(4), quote.attestationKey) };
  if (!x509.ecdsaVerifies(key, quote.signature, sha256(quote.signed), "compact")) {
    throw refused("quote.signature", "quote: its signature does not verify");
  }
}

interface Pck {
  readonly ppid: Bytes;
  readonly cpuSvn: Bytes;
  readonly pceSvn: number;
  readonly pceId: Bytes;
  readonly fmspc: Bytes;
}

/** Intel's SGX extension of a PCK certificate; refuses `quote.pck_extension`. */
function parsePckExtension(pck: x509.Certificate): Pck {
  try {
    const members = sgxMembers(pck.extensions.get(SGX_EXTENSION) ?? new Uint8Array());
    const tcb = sgxMembers(one(members, "02", SEQUENCE).encoded, "02");
    one(members, "05", ENUMERATED);
    const sized = (found: { value: Bytes }, size: number): Bytes => {
      if (found.value.length !== size) throw new Error(`expected ${size} bytes, got ${found.value.length}`);
      return found.value;
    };
    const pceSvn = uintLe(Uint8Array.from(one(tcb, "11", INTEGER).value).reverse());
    return {
      ppid: sized(one(members, "01", OCTET_STRING), 16),
      cpuSvn: sized(one(tcb, "12", OCTET_STRING), 16),
      pceSvn,
      pceId: sized(one(members, "03", OCTET_STRING), 2),
      fmspc: sized(one(members, "04", OCTET_STRING), 6),
    };
  } catch (error) {
    throw malformed("quote.pck_extension", `PCK certificate: ${String((error as Error).message)}`);
  }
}

function sgxMembers(data: Bytes, below = ""): Map<string, { tag: number; value: Bytes; encoded: Bytes }> {
  const members = new Map<string, { tag: number; value: Bytes; encoded: Bytes }>();
  for (const item of parseSequence(data, "pck")) {
    const [oid, value] = parseElements(item.value, "pck");
    const name = oid?.tag === OID ? hex(oid.value) : "";
    if (!value || !name.startsWith(SGX_OID + below)) throw new Error("expected [identifier, value] pairs");
    members.set(name.slice(SGX_OID.length + below.length), value);
  }
  return members;
}

function one<T extends { tag: number }>(members: ReadonlyMap<string, T>, name: string, tag: number): T {
  const found = members.get(name);
  if (found?.tag !== tag) throw new Error(`expected the member ${name}`);
  return found;
}

function verifyStatus(rating: Rating, policy: Policy, now: number): void {
  const open = (items: Policy["acceptedStatuses"]) => items.filter((item) => now <= item.until).map((item) => item.name);
  const statuses = [UP_TO_DATE, ...open(policy.acceptedStatuses).sort()];
  if (!statuses.includes(rating.status)) {
    throw refused("tcb.status", `tcb status: expected ${statuses.join(", ")}, got ${rating.status}`);
  }
  const accepted = open(policy.acceptedAdvisories);
  const left = rating.advisories.filter((item) => !accepted.includes(item)).sort();
  if (left.length) {
    const known = accepted.sort().join(", ") || "none";
    throw refused("tcb.advisory", `tcb advisories: expected none but ${known}, got ${left.join(", ")}`);
  }
}

const SEPT_VE_DISABLE = 1n << 28n;
const FORBIDDEN = [
  [4n, "HGS_PLUS_PROF", "tdx.profiling", "the host can profile it"],
  [5n, "PERF_PROF", "tdx.profiling", "the host can profile it"],
  [6n, "PMT_PROF", "tdx.profiling", "the host can profile it"],
  [29n, "MIGRATABLE", "tdx.migratable", "the TD can be moved to another machine"],
  [30n, "PKS", "tdx.pks", "supervisor protection keys"],
  [31n, "KL", "tdx.key_locker", "key locker"],
  [63n, "PERFMON", "tdx.perfmon", "performance monitoring"],
  [17n, "SERVTD_EXT", "tdx.attribute", "service TDs may be bound to it later"],
  [16n, "ICSSD", "tdx.attribute", "not one this image is launched with"],
  [27n, "LASS", "tdx.attribute", "not one this image is launched with"],
  [62n, "TPA", "tdx.attribute", "not one this image is launched with"],
] as const;
const XFAM_FIXED_1 = 0x3n;
const XFAM_ALLOWED = 0x0006dbe7n;

const bits64 = (data: Bytes): bigint => BigInt(`0x${hex(Uint8Array.from(data).reverse())}`);

/** Step 4. Returns one line for the check's detail. */
export function verifyTd(body: TdReport, policy: Policy): string {
  const no = (code: string, message: string) => refused(code, message, "4");
  const attributes = bits64(body.td_attributes);
  if (attributes & 1n) {
    const why = "the host can read and change its memory";
    throw no("tdx.debug", `td_attributes.DEBUG: expected 0, got 1 (${why})`);
  }
  if (!(attributes & SEPT_VE_DISABLE)) {
    throw no("tdx.sept_ve_disable", "td_attributes.SEPT_VE_DISABLE: expected 1, got 0");
  }
  for (const [bit, name, code, why] of FORBIDDEN) {
    if (attributes & (1n << bit)) throw no(code, `td_attributes.${name}: expected 0, got 1 (${why})`);
  }
  const rest = attributes & ~SEPT_VE_DISABLE;
  if (rest) throw no("tdx.reserved", `td_attributes: expected no other bit set, got 0x${rest.toString(16)}`);
  const xfam = bits64(body.xfam);
  if ((xfam & XFAM_FIXED_1) !== XFAM_FIXED_1 || xfam & ~XFAM_ALLOWED) {
    throw no("tdx.xfam", `xfam: expected 0x3 set within 0x${XFAM_ALLOWED.toString(16)}, got 0x${xfam.toString(16)}`);
  }
  if (!isZero(body.mrsignerseam)) {
    throw no("tdx.mrsignerseam", `mrsignerseam: expected zero (Intel), got ${hex(body.mrsignerseam)}`);
  }
  if (!isZero(body.seam_attributes)) {
    throw no("tdx.seam_attributes", `seam_attributes: expected zero, got ${hex(body.seam_attributes)}`);
  }
  if (!includes(policy.mrseam, body.mrseam)) {
    const wanted = `one of the ${policy.mrseam.length} modules in the policy`;
    throw no("tdx.mrseam", `mrseam: expected ${wanted}, got ${hex(body.mrseam)}`);
  }
  // TD 1.5 only: the module may be updated under a running TD; bytes 1 and 0 are its major version and its SVN.
  const later = body.tee_tcb_svn2;
  const order = (svn: Bytes): Bytes => Uint8Array.of(svn[1]!, svn[0]!);
  if (later !== null && compare(order(later), order(body.tee_tcb_svn)) < 0) {
    const message = `tee_tcb_svn2: expected at least ${hex(body.tee_tcb_svn)}, got ${hex(later)}`;
    throw no("tdx.tee_tcb_svn2", message);
  }
  if (body.mrservicetd !== null && !isZero(body.mrservicetd)) {
    throw no("tdx.mrservicetd", `mrservicetd: expected zero, got ${hex(body.mrservicetd)}`);
  }
  return `SEPT_VE_DISABLE alone; xfam 0x${xfam.toString(16)}; TDX module ${hex(body.mrseam).slice(0, 16)}`;
}

const REGISTERS = ["mrtd", "rtmr0", "rtmr1", "rtmr2", "mrconfigid", "mrowner", "mrownerconfig", "td_attributes", "xfam"] as const;

/** Step 5: the one pinned image and launch shape whose every register this is. */
export function verifyRegisters(
  body: TdReport,
  policy: Policy,
  platform: string,
  claimed: Bytes,
  ccel: EventLog,
  now: number,
): [Manifest, Shape] {
  if (!policy.images.length) {
    const message = "reference values: expected a pinned measurement manifest in the policy, got none";
    throw undecided("measurement.no_reference", message);
  }
  const candidates = policy.images
    .filter((image) => image.platform === platform)
    .flatMap((image) => image.shapes.map((shape) => [image, shape] as const));
  if (!candidates.length) {
    const known = [...new Set(policy.images.map((image) => image.platform))].sort().join(", ");
    throw refused("measurement.platform", `platform: expected one of ${known} as pinned, got ${platform}`);
  }
  const differing = candidates.map(([image, shape]) => {
    const wanted = { ...image, ...shape };
    return { image, shape, wanted, names: REGISTERS.filter((name) => !equal(wanted[name], body[name])) };
  });
  const match = differing.find(({ names }) => !names.length);
  if (match) {
    verifyValidity(match.image, now);
    return [match.image, match.shape];
  }
  const strange = ({ image }: { image: Manifest }) => (equal(image.image_id, claimed) ? 0 : 1);
  const best = differing.reduce((left, right) => {
    const order = strange(right) - strange(left) || right.names.length - left.names.length;
    return order < 0 ? right : left;
  });
  const name = best.names[0]!;
  const where = `image ${hex(best.image.image_id)}, ${best.shape.name}`;
  let message = `${name}: expected ${hex(best.wanted[name])}, got ${hex(body[name])} (${where})`;
  if (name.startsWith("rtmr")) {
    message += `; ${firstDifference(best.image, best.shape, ccel, Number(name[4]), body[name])}`;
  }
  throw refused(`measurement.${name}`, message);
}

function verifyValidity(image: Manifest, now: number): void {
  const what = `manifest of image ${hex(image.image_id)}`;
  if (now < image.notBefore) {
    const message = `${what}: valid from ${rfc3339(image.notBefore)}, time is ${rfc3339(now)}`;
    throw refused("manifest.not_yet_valid", message);
  }
  if (now > image.notAfter) {
    throw refused("manifest.expired", `${what}: valid until ${rfc3339(image.notAfter)}, time is ${rfc3339(now)}`);
  }
}

function firstDifference(image: Manifest, shape: Shape, ccel: EventLog, rtmr: number, found: Bytes): string {
  if (!equal(replay(ccel.events)[rtmr]!, found)) {
    return "the event log does not replay to it, so it cannot say which event differs";
  }
  const wanted = image.events.filter((event) => event.register === rtmr + 1 && ["", shape.name].includes(event.shape));
  const logged = ccel.events.filter((event) => event.register === rtmr + 1 && event.type !== EV_NO_ACTION);
  const position = wanted.findIndex((event, i) => logged[i] && !equal(event.digest, logged[i].digest));
  if (position < 0) return `expected ${wanted.length} events, got ${logged.length}`;
  const { note, source, digest } = wanted[position]!;
  const got = hex(logged[position]!.digest);
  return `first differing event ${position} (${note || source}): expected ${hex(digest)}, got ${got}`;
}

/** Step 6, first log: the firmware's events replay to RTMR0-2, touch nothing else, and are what they say. */
export function verifyEventLog(body: TdReport, ccel: EventLog): string {
  replay(ccel.events).forEach((value, i) => {
    const expected = i === 3 ? zeros(48) : body[`rtmr${i as 0 | 1 | 2}`];
    if (!equal(value, expected)) {
      const message = `event log: expected to replay to rtmr${i} = ${hex(expected)}, got ${hex(value)}`;
      throw refused(`eventlog.rtmr${i}`, message);
    }
  });
  let recomputed = 0;
  ccel.events.forEach((event, at) => {
    if (event.register === 0 || event.type === EV_NO_ACTION || !event.data.length) return;
    if (hashed(event).some((data) => equal(sha384(data), event.digest))) recomputed++;
    else if (FIXED.has(event.type)) {
      const what = `event ${at} of type 0x${event.type.toString(16)}`;
      throw refused("eventlog.digest", `event log, ${what}: expected a digest of its data, got ${hex(event.digest)}`);
    }
  });
  return `${ccel.events.length} firmware events replay to RTMR0-2; ${recomputed} digests recomputed from their data`;
}

const EV_SEPARATOR = 0x04;
const EV_EVENT_TAG = 0x06;
const EV_IPL = 0x0d;
const EV_EFI_VARIABLE_BOOT = 0x80000002;
const EV_EFI_VARIABLE_AUTHORITY = 0x800000e0;
/** The types whose digest is the hash of the event's data: separators, actions, variables, partition tables, ours. */
const FIXED = new Set([
  EV_SEPARATOR, 0x05, 0x08, 0x80000001, EV_EFI_VARIABLE_BOOT, 0x80000006, 0x80000007, 0x8000000c, 0x8000000d,
  EV_EFI_VARIABLE_AUTHORITY, 0x08000001, 0x434d0001,
]);
const VARIABLE_HEADER = 32; // GUID, then two 64-bit lengths: of the name in characters, of the data in bytes

/** What the digest of an event of this type may be the hash of. */
function hashed({ type, data }: Event): Bytes[] {
  const all = [data];
  if (type === EV_SEPARATOR) all.push(Uint8Array.of(1, 0, 0, 0)); // after an error
  if (type === EV_EFI_VARIABLE_BOOT && data.length >= VARIABLE_HEADER) {
    const name = 2 * uintLe(data.subarray(16, 24));
    const size = uintLe(data.subarray(24, 32));
    if (VARIABLE_HEADER + name + size === data.length) all.push(data.subarray(VARIABLE_HEADER + name));
  }
  if (type === EV_EFI_VARIABLE_AUTHORITY) all.push(data.subarray(0, -1));
  if (type === EV_EVENT_TAG) all.push(data.subarray(8, 8 + uintLe(data.subarray(4, 8))));
  if (type === EV_IPL) all.push(trimmed(data));
  return all;
}

function trimmed(data: Bytes): Bytes {
  let end = data.length;
  while (end > 0 && data[end - 1] === 0) end--;
  return data.subarray(0, end);
}
