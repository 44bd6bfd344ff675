/**
 * X.509 chains and CRLs as endorsements use them: pinned root, explicit time, one exact path (RFC 5280 6.1 and 6.3).
 *
 * Certificates are read by @peculiar/asn1-x509, after a check that they are strict DER; signatures are verified with
 * @noble/curves. Leaf first, the last certificate is the pinned root itself, every other is issued by the next. ECDSA
 * on P-256 and P-384 is all that vendors' device chains use; an issuer with another key verifies nothing.
 * A critical extension that nobody here reads is refused, in CRLs any. Not checked here: policies, name constraints,
 * path building.
 */

import { p256, p384 } from "@noble/curves/nist.js";
import { sha256 as hash256, sha384 as hash384, sha512 as hash512 } from "@noble/hashes/sha2.js";
import { AsnConvert } from "@peculiar/asn1-schema";
import { BasicConstraints, Certificate as AsnCertificate, CertificateList, type Extension, KeyUsage, Name } from "@peculiar/asn1-x509";
import { type Bytes, compare, equal, fromBase64, fromUtf8, hex, rfc3339, sha256 } from "./bytes.js";
import { type Element, INTEGER, OID, isStrict, parseElements } from "./der.js";
import { malformed } from "./errors.js";

const MAX_CERTIFICATES = 8;
const MAX_CHAIN_BYTES = 64 * 1024;
const MAX_CRL_BYTES = 4 * 1024 * 1024;
const EC_KEY = "1.2.840.10045.2.1";
const CURVES = { "1.2.840.10045.3.1.7": p256, "1.3.132.0.34": p384 } as const;
const OTHER_CURVES = ["1.3.132.0.35", "1.3.132.0.33", "1.3.132.0.10", "1.2.840.10045.3.1.1"];
const OTHER_KEYS = ["1.2.840.113549.1.1.1", "1.3.101.110", "1.3.101.111", "1.3.101.112", "1.3.101.113"];
const HASHES: Record<string, (data: Bytes) => Bytes> = {
  "1.2.840.10045.4.3.2": hash256,
  "1.2.840.10045.4.3.3": hash384,
  "1.2.840.10045.4.3.4": hash512,
};
const OTHER_SIGNATURES = /^1\.2\.840\.113549\.1\.1\.(4|5|10|11|12|13|14)$|^1\.2\.840\.10045\.4\.(1|3\.1)$|^1\.3\.101\.11[23]$/;
const BASIC_CONSTRAINTS = "2.5.29.19";
const KEY_USAGE = "2.5.29.15";
const KEY_CERT_SIGN = 0x20;
const CRL_SIGN = 0x40;
const CRL_NUMBER = "2.5.29.20";
/** The firmware of a GPU's device certificate, in Hopper's form and in Blackwell's. */
export const DICE = ["2.23.133.5.4.1", "2.23.133.5.4.1.1"];
const READ = [BASIC_CONSTRAINTS, KEY_USAGE, ...DICE]; // critical extensions that are judged here or by callers
const COMMON_NAME = "2.5.4.3";
const ATTRIBUTES: Record<string, string> = {
  [COMMON_NAME]: "CN",
  "2.5.4.6": "C",
  "2.5.4.7": "L",
  "2.5.4.8": "ST",
  "2.5.4.10": "O",
  "2.5.4.11": "OU",
};

export type Curve = typeof p256 | typeof p384;

/** An elliptic-curve key: its curve and encoded point; null for a key of another kind. */
export interface EcKey {
  readonly curve: Curve;
  readonly point: Bytes;
}

interface Signed {
  readonly tbs: Bytes;
  readonly algorithm: string;
  readonly sameAlgorithm: boolean;
  readonly signature: Bytes;
  readonly issuer: Bytes;
}

export interface Certificate extends Signed {
  readonly der: Bytes;
  readonly subject: Bytes;
  readonly name: string;
  readonly commonName: string; // empty unless there is exactly one
  readonly serial: Bytes;
  readonly start: number;
  readonly end: number;
  readonly spki: Bytes;
  readonly key: EcKey | null;
  readonly constraints: { ca: boolean; pathLength: number | null } | null;
  readonly usage: number | null;
  readonly extensions: ReadonlyMap<string, Bytes>;
  readonly critical: readonly string[];
}

export interface Crl extends Signed {
  readonly issuerName: string;
  readonly start: number;
  readonly end: number | null;
  readonly revoked: readonly Bytes[];
  readonly numbered: boolean;
  readonly critical: readonly string[];
}

/** Why a chain or CRL was refused; `reason` is a short stable word that the caller turns into its own code. */
export class ChainError extends Error {
  constructor(
    readonly reason: string,
    message: string,
  ) {
    super(message);
  }
}

export const digest = (certificate: Certificate): Bytes => sha256(certificate.der);
export const spkiDigest = (certificate: Certificate): Bytes => sha256(certificate.spki);

const PEM = /-----BEGIN CERTIFICATE-----\r?\n([A-Za-z0-9+/=\r\n]{1,16384}?)-----END CERTIFICATE-----[\r\n]*/y;

/** PEM certificates, leaf first, nothing between them; refuses `<what>.pem` and `<what>.chain`. */
export function parsePemChain(data: Bytes, what: string): Certificate[] {
  if (data.length > MAX_CHAIN_BYTES) {
    throw malformed(`${what}.chain`, `${what}: expected at most ${MAX_CHAIN_BYTES} bytes of PEM, got ${data.length}`);
  }
  const bad = (message: string) => malformed(`${what}.pem`, `${what}: expected ${message}`);
  const text = fromUtf8(data.at(-1) === 0 ? data.subarray(0, -1) : data);
  if (text === null) throw bad("PEM certificates and nothing else");
  const items: Bytes[] = [];
  for (let offset = 0; offset < text.length; offset = PEM.lastIndex) {
    PEM.lastIndex = offset;
    const found = PEM.exec(text);
    if (!found || items.length === MAX_CERTIFICATES) {
      throw bad(`at most ${MAX_CERTIFICATES} PEM certificates and nothing else at offset ${offset}`);
    }
    const der = fromBase64(found[1]!.replace(/[\r\n]/g, ""));
    if (der === null) throw bad(`base64 at offset ${offset}`);
    items.push(der);
  }
  if (!items.length) throw bad("at least one PEM certificate");
  return parseDerChain(items, what);
}

/** DER certificates, leaf first; refuses `<what>.chain`. */
export function parseDerChain(items: readonly Bytes[], what: string): Certificate[] {
  const total = items.reduce((sum, item) => sum + item.length, 0);
  if (!items.length || items.length > MAX_CERTIFICATES || total > MAX_CHAIN_BYTES) {
    throw malformed(`${what}.chain`, `${what}: expected 1 to ${MAX_CERTIFICATES} certificates`);
  }
  try {
    return items.map(parseCertificate);
  } catch (error) {
    throw malformed(`${what}.chain`, `${what}: expected X.509 certificates: ${String((error as Error).message)}`);
  }
}

function parseCertificate(der: Bytes): Certificate {
  const [signed, parts] = parseSigned(der, (first) => (first.tag === 0xa0 ? 2 : 1));
  const parsed = AsnConvert.parse(exact(der), AsnCertificate).tbsCertificate;
  if (parsed.version !== 0 && parsed.version !== 2) throw new Error("version: expected 1 or 3");
  const at = parts[0]!.tag === 0xa0 ? 1 : 0;
  const [extensions, critical] = extensionsOf(parsed.extensions ?? []);
  const constraints = extensions.get(BASIC_CONSTRAINTS);
  const usage = extensions.get(KEY_USAGE);
  const basic = constraints && AsnConvert.parse(exact(constraints), BasicConstraints);
  const spki = parts[at + 5]!.encoded;
  return {
    ...signed,
    der,
    issuer: parts[at + 2]!.encoded,
    subject: parts[at + 4]!.encoded,
    ...namesOf(parts[at + 4]!.encoded),
    serial: parts[at]!.value,
    start: seconds(parsed.validity.notBefore.getTime()),
    end: seconds(parsed.validity.notAfter.getTime()),
    spki,
    key: ecKey(spki),
    constraints: basic ? { ca: basic.cA, pathLength: basic.pathLenConstraint ?? null } : null,
    usage: usage ? AsnConvert.parse(exact(usage), KeyUsage).toNumber() : null,
    extensions,
    critical,
  };
}

function extensionsOf(items: Iterable<Extension>): [Map<string, Bytes>, string[]] {
  const found = new Map<string, Bytes>();
  const critical: string[] = [];
  for (const item of items) {
    if (found.has(item.extnID)) throw new Error(`extension ${item.extnID}: expected once`);
    found.set(item.extnID, new Uint8Array(item.extnValue.buffer));
    if (item.critical) critical.push(item.extnID);
  }
  return [found, critical];
}

/** A DER CRL; refuses `<what>.crl`. */
export function parseCrl(data: Bytes, what: string): Crl {
  if (data.length > MAX_CRL_BYTES) throw malformed(`${what}.crl`, `${what}: expected at most ${MAX_CRL_BYTES} bytes`);
  try {
    const [signed, parts] = parseSigned(data, (first) => (first.tag === INTEGER ? 1 : 0));
    const parsed = AsnConvert.parse(exact(data), CertificateList).tbsCertList;
    const at = parts[0]!.tag === INTEGER ? 1 : 0;
    const issuer = parts[at + 1]!.encoded;
    const [extensions, critical] = extensionsOf(parsed.crlExtensions ?? []);
    return {
      ...signed,
      issuer,
      issuerName: namesOf(issuer).name,
      start: seconds(parsed.thisUpdate.getTime()),
      end: parsed.nextUpdate ? seconds(parsed.nextUpdate.getTime()) : null,
      revoked: (parsed.revokedCertificates ?? []).map((item) => new Uint8Array(item.userCertificate)),
      numbered: extensions.has(CRL_NUMBER),
      critical,
    };
  } catch (error) {
    const why = String((error as Error).message);
    throw malformed(`${what}.crl`, `${what}: expected a DER certificate revocation list: ${why}`);
  }
}

/**
 * The signed part, algorithm and signature that certificates and CRLs share, and the elements of the signed part.
 * `inner`: where among them the algorithm stands once more.
 */
function parseSigned(der: Bytes, inner: (first: Element) => number): [Omit<Signed, "issuer">, Element[]] {
  if (!isStrict(der)) throw new Error("expected strict DER");
  const outer = parseElements(parseElements(der, "der", 1, 4)[0]!.value, "der", 3, 4);
  const [tbs, algorithm, bitString] = outer;
  if (!tbs || !algorithm || !bitString) throw new Error("expected signed part, algorithm and signature");
  if (bitString.value[0] !== 0) throw new Error("signature: expected no unused bits");
  const parts = parseElements(tbs.value, "der", Number.POSITIVE_INFINITY, 4);
  const oid = oidText(parseElements(algorithm.value, "der")[0]!.value);
  if (!(oid in HASHES) && !OTHER_SIGNATURES.test(oid)) throw new Error(`signature algorithm ${oid}: not known`);
  const repeated = parts[inner(parts[0]!)];
  const sameAlgorithm = repeated !== undefined && equal(repeated.encoded, algorithm.encoded);
  return [{ tbs: tbs.encoded, algorithm: oid, sameAlgorithm, signature: bitString.value.subarray(1) }, parts];
}

function ecKey(spki: Bytes): EcKey | null {
  const [algorithm, bitString] = parseElements(parseElements(spki, "der", 1, 4)[0]!.value, "der", 2, 4);
  const [kind, parameters] = parseElements(algorithm!.value, "der");
  const oid = oidText(kind!.value);
  if (oid !== EC_KEY) {
    if (!OTHER_KEYS.includes(oid)) throw new Error(`public key algorithm ${oid}: not known`);
    return null;
  }
  const name = parameters && parameters.tag === OID ? oidText(parameters.value) : "";
  if (OTHER_CURVES.includes(name)) return null;
  const curve = CURVES[name as keyof typeof CURVES];
  if (!curve) throw new Error(`curve ${name || "without a name"}: not known`);
  const point = bitString!.value.subarray(1);
  curve.Point.fromBytes(point).assertValidity();
  return { curve, point };
}

function exact(data: Bytes): ArrayBuffer {
  return Uint8Array.from(data).buffer;
}

function seconds(date: Date): number {
  const value = date.getTime();
  if (Number.isNaN(value)) throw new Error("time: expected a date");
  return Math.floor(value / 1000);
}

function oidText(value: Bytes): string {
  const arcs: number[] = [];
  let current = 0;
  for (const byte of value) {
    current = current * 128 + (byte & 0x7f);
    if (byte & 0x80) continue;
    arcs.push(current);
    current = 0;
  }
  const [first = 0, ...rest] = arcs;
  const top = Math.min(2, Math.floor(first / 40));
  return [top, first - 40 * top, ...rest].join(".");
}

/** A name as in RFC 4514, the last part first, and its common name. */
function namesOf(encoded: Bytes): { name: string; commonName: string } {
  const sets = [...AsnConvert.parse(exact(encoded), Name)].map((set) => [...set]);
  const text = (type: string, value: string) => `${ATTRIBUTES[type] ?? type}=${value}`;
  const parts = sets.map((set) => set.map((item) => text(item.type, item.value.toString())).join("+"));
  const common = sets.flat().filter((item) => item.type === COMMON_NAME);
  return { name: parts.reverse().join(","), commonName: common.length === 1 ? common[0]!.value.toString() : "" };
}

export const isCa = (certificate: Certificate): boolean => certificate.constraints?.ca ?? false;

/** Leaf first, root last, up to the root with this SHA-256, at time `now`. */
export function verifyChain(chain: readonly Certificate[], root: Bytes, now: number): void {
  const last = chain.at(-1)!;
  if (!equal(digest(last), root)) {
    throw new ChainError("root", `root: expected SHA-256 ${hex(root)}, got ${hex(digest(last))} (${last.name})`);
  }
  if (chain.length < 2) {
    throw new ChainError("short", `chain: expected a certificate below the root, got ${last.name} alone`);
  }
  if (isCa(chain[0]!)) throw new ChainError("ca", `${chain[0]!.name}: expected an end entity, got a CA`);
  verifyTime(last, now); // pinned by its digest, so its signature over itself adds nothing
  for (let below = 0; below < chain.length - 1; below++) {
    verifyIssuer(chain[below + 1]!, below);
    verifyIssued(chain[below]!, chain[below + 1]!);
    verifyCritical(chain[below]!);
    verifyTime(chain[below]!, now);
  }
}

function verifyCritical(certificate: Certificate): void {
  const strange = certificate.critical.find((oid) => !READ.includes(oid));
  if (strange) throw new ChainError("extension", `${certificate.name}: expected no critical extension ${strange}`);
}

function verifyIssuer(issuer: Certificate, below: number): void {
  if (!isCa(issuer)) throw new ChainError("ca", `${issuer.name}: expected a CA certificate`);
  const most = issuer.constraints!.pathLength;
  if (most !== null && below > most) {
    throw new ChainError("ca", `${issuer.name}: expected at most ${most} CA below it, got ${below}`);
  }
  if (issuer.usage !== null && !(issuer.usage & KEY_CERT_SIGN)) {
    throw new ChainError("ca", `${issuer.name}: expected a key that may sign certificates`);
  }
}

export function verifyIssued(certificate: Certificate, issuer: Certificate): void {
  if (!equal(certificate.issuer, issuer.subject) || !isSignedBy(certificate, issuer)) {
    throw new ChainError("signature", `${certificate.name}: expected to be issued by ${issuer.name}`);
  }
}

export function verifyTime(certificate: Certificate, now: number): void {
  const { name, start, end } = certificate;
  if (now < start) {
    throw new ChainError("not_yet_valid", `${name}: valid from ${rfc3339(start)}, time is ${rfc3339(now)}`);
  }
  if (now > end) throw new ChainError("expired", `${name}: valid until ${rfc3339(end)}, time is ${rfc3339(now)}`);
}

/** `issuer` signed the list and it is current at `now`. */
export function verifyCrl(crl: Crl, issuer: Certificate, now: number): void {
  if (!equal(crl.issuer, issuer.subject)) {
    throw new ChainError("crl_issuer", `CRL: expected issuer ${issuer.name}, got ${crl.issuerName}`);
  }
  if (issuer.usage !== null && !(issuer.usage & CRL_SIGN)) {
    throw new ChainError("crl_issuer", `${issuer.name}: expected a key that may sign CRLs`);
  }
  if (!isSignedBy(crl, issuer)) {
    throw new ChainError("crl_signature", `CRL of ${issuer.name}: signature does not verify`);
  }
  if (crl.critical.length) {
    const message = `CRL of ${issuer.name}: expected no critical extension, got ${crl.critical.join(", ")}`;
    throw new ChainError("crl_extension", message);
  }
  if (now < crl.start) {
    const start = rfc3339(crl.start);
    throw new ChainError("not_yet_valid", `CRL of ${issuer.name}: valid from ${start}, time is ${rfc3339(now)}`);
  }
  // The second of nextUpdate is the first in which the list is old.
  if (crl.end === null || now >= crl.end) {
    const until = crl.end === null ? "absent" : rfc3339(crl.end);
    throw new ChainError("expired", `CRL of ${issuer.name}: nextUpdate ${until}, time is ${rfc3339(now)}`);
  }
}

/** Whether the list (already verified, same issuer as the certificate) has the certificate's serial number. */
export const isRevoked = (certificate: Certificate, crl: Crl): boolean =>
  crl.revoked.some((serial) => compare(serial, certificate.serial) === 0);

function isSignedBy(signed: Signed, issuer: Certificate): boolean {
  const hash = HASHES[signed.algorithm];
  if (!hash || !signed.sameAlgorithm || issuer.key === null) return false;
  return ecdsaVerifies(issuer.key, signed.signature, hash(signed.tbs), "der");
}

/** ECDSA over a digest; `form`: DER, or the two integers at fixed length. High s is fine: it is how vendors sign. */
export function ecdsaVerifies(key: EcKey, signature: Bytes, digestToSign: Bytes, form: "der" | "compact"): boolean {
  try {
    return key.curve.verify(signature, digestToSign, key.point, { prehash: false, lowS: false, format: form });
  } catch {
    return false;
  }
}

/** Whether the certificate's P-256 key made the raw 64-byte ECDSA-SHA256 signature over the message. */
export function p256Verifies(certificate: Certificate, signature: Bytes, message: Bytes): boolean {
  const { key } = certificate;
  return key !== null && key.curve === p256 && ecdsaVerifies(key, signature, sha256(message), "compact");
}

