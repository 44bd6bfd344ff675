/**
 * Intel's endorsements for a TDX quote: parse them, and judge signatures, times and versions at an explicit time.
 *
 * TCB info v3 and QE identity v2 as signed JSON text, two issuer chains in PEM, root CA CRL and PCK CRL in DER (Intel
 * PCS API v4; Intel SGX DCAP QVL design, 4.1.2 to 4.1.4). Not checked here: the TCB level, QE measurements (`tcb`), and
 * the PCK chain's link to the quote (`tdx`).
 */

import { type Bytes, equal, fromHex, hex, rfc3339, utf8 } from "./bytes.js";
import { malformed, refused } from "./errors.js";
import { type JsonObject, load } from "./json.js";
import { DAY_S, type Policy } from "./policy.js";
import { type QeIdentity, type TcbInfo, bad, integer, moment, parseQeIdentity, parseTcbInfo } from "./tcbinfo.js";
import * as x509 from "./x509.js";

const MAX_BYTES = 1024 * 1024;
const TEXTS = ["pck_crl_issuer_chain", "tcb_info_issuer_chain", "tcb_info", "qe_identity_issuer_chain", "qe_identity"];
const PCK_CHAIN = "pck_certificate_chain"; // optional
const MAX_NUMBER = 2 ** 31;
const TCB_SIGNER = "SGX TCB Signing";
const HEX = ["root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature"];

export interface SignedJson {
  readonly text: Bytes;
  readonly signature: Bytes;
  readonly chain: readonly x509.Certificate[];
  readonly issued: number;
  readonly nextUpdate: number;
  readonly evaluation: number;
}

export interface Endorsements {
  readonly tcbInfo: SignedJson;
  readonly qeIdentity: SignedJson;
  readonly tcb: TcbInfo;
  readonly qe: QeIdentity;
  /** The PCK chain the writer added, empty without one; all it does is that it must be the quote's own. */
  readonly pckChain: readonly x509.Certificate[];
  readonly pckCrlChain: readonly x509.Certificate[];
  readonly rootCrl: x509.Crl;
  readonly pckCrl: x509.Crl;
}

function object(data: Bytes, what: string): JsonObject {
  const value = load(data, "endorsements", MAX_BYTES);
  if (!(value instanceof Map)) throw bad(`${what}: expected a JSON object`);
  return value;
}

/** Parse the JSON object of nine fields, or ten with the PCK chain; refuses `endorsements.*`. */
export function parseEndorsements(data: Bytes): Endorsements {
  const texts = textsOf(data);
  const text = (name: string): string => texts.get(name)!;
  const blobs = new Map<string, Bytes>();
  for (const name of HEX) {
    const found = fromHex(text(name));
    if (found === null) throw bad(`${name}: expected hex`);
    blobs.set(name, found);
  }
  for (const [name, value] of texts) {
    if (/\p{Cs}/u.test(value)) throw bad(`${name}: expected text without lone surrogates`);
  }
  const chain = (name: string) => x509.parsePemChain(utf8(text(name)), "endorsements");
  const signed = (what: string, identity: string): [SignedJson, JsonObject] => {
    const body = object(utf8(text(what)), what);
    if (body.get("id") !== identity) throw bad(`${what}.id: expected ${identity}`);
    const signature = blobs.get(`${what}_signature`)!;
    if (signature.length !== 64) throw bad(`${what}_signature: expected 64 bytes, got ${signature.length}`);
    const value = {
      text: utf8(text(what)),
      signature,
      chain: chain(`${what}_issuer_chain`),
      issued: moment(body, "issueDate", what),
      nextUpdate: moment(body, "nextUpdate", what),
      evaluation: integer(body, "tcbEvaluationDataNumber", what, MAX_NUMBER),
    };
    return [value, body];
  };
  const [tcbInfo, tcbBody] = signed("tcb_info", "TDX");
  const [qeIdentity, qeBody] = signed("qe_identity", "TD_QE");
  const pckChain = texts.has(PCK_CHAIN) ? chain(PCK_CHAIN) : [];
  return {
    tcbInfo,
    qeIdentity,
    tcb: parseTcbInfo(tcbBody),
    qe: parseQeIdentity(qeBody),
    pckChain,
    pckCrlChain: chain("pck_crl_issuer_chain"),
    rootCrl: x509.parseCrl(blobs.get("root_ca_crl")!, "endorsements"),
    pckCrl: x509.parseCrl(blobs.get("pck_crl")!, "endorsements"),
  };
}

function textsOf(data: Bytes): Map<string, string> {
  const values = object(data, "json");
  for (const name of ["root_ca_crl", "pck_crl"]) {
    const value = values.get(name);
    const empty = (Array.isArray(value) && !value.length) || (value instanceof Map && !value.size);
    if (!value || empty) {
      throw malformed("endorsements.crl_missing", `endorsements.${name}: expected a CRL, got none`);
    }
  }
  if (values.get(PCK_CHAIN) === null) values.delete(PCK_CHAIN); // how some writers say that there is none
  const names = [...TEXTS, ...HEX];
  const strange = [...values.keys()].some((name) => name !== PCK_CHAIN && !names.includes(name));
  if (strange || names.some((name) => !values.has(name))) {
    throw bad(`json: expected exactly the fields ${names.sort().join(", ")}`);
  }
  const texts = new Map<string, string>();
  for (const [name, value] of values) {
    if (typeof value !== "string") throw bad(`${name}: expected text`);
    texts.set(name, value);
  }
  return texts;
}

/** Run a check of `x509`; its reason becomes our code, below `prefix`. */
export function chained(prefix: string, what: string, check: () => void): void {
  try {
    check();
  } catch (error) {
    if (!(error instanceof x509.ChainError)) throw error;
    const reason = error.reason === "signature" ? "chain_signature" : error.reason;
    throw refused(`${prefix}.${reason}`, `${what}: ${error.message}`);
  }
}

/** Step 2: signed under the policy's root, valid at `now`, young enough, version not rolled back. */
export function verifyEndorsements(endorsements: Endorsements, policy: Policy, now: number): string {
  const signed = [
    ["TCB info", endorsements.tcbInfo],
    ["QE identity", endorsements.qeIdentity],
  ] as const;
  const root = endorsements.pckCrlChain.at(-1)!;
  if (!equal(x509.digest(root), policy.tdxRoot)) {
    const got = `${hex(x509.digest(root))} (${root.name})`;
    const message = `PCK CRL issuer chain: root: expected SHA-256 ${hex(policy.tdxRoot)}, got ${got}`;
    throw refused("endorsements.root", message);
  }
  chained("endorsements", "root CA CRL", () => x509.verifyCrl(endorsements.rootCrl, root, now));
  for (const [what, item] of signed) verifySigned(item, what, endorsements, policy, now);
  verifyPckCrl(endorsements, root, now);
  for (const [what, crl] of [["root CA CRL", endorsements.rootCrl], ["PCK CRL", endorsements.pckCrl]] as const) {
    if (!crl.numbered) throw refused("endorsements.crl_number", `${what}: expected a CRL number, got none`);
  }
  const dates: (readonly [string, number, number])[] = [
    ...signed.map(([what, item]) => [what, item.issued, item.nextUpdate] as const),
    ["PCK CRL", endorsements.pckCrl.start, now],
  ];
  for (const [what, issued, until] of dates) {
    if (now < issued) {
      const message = `${what}: issued ${rfc3339(issued)}, time is ${rfc3339(now)}`;
      throw refused("endorsements.not_yet_valid", message);
    }
    if (now > until) {
      throw refused("endorsements.expired", `${what}: next update ${rfc3339(until)}, time is ${rfc3339(now)}`);
    }
    if (now - issued > policy.endorsementMaxAgeDays * DAY_S) {
      const age = ((now - issued) / DAY_S).toFixed(1);
      const message = `${what}: expected at most ${policy.endorsementMaxAgeDays} days old, got ${age}`;
      throw refused("endorsements.too_old", message);
    }
  }
  for (const [what, item] of signed) {
    if (item.evaluation < policy.minTcbEvaluationDataNumber) {
      const wanted = `expected at least ${policy.minTcbEvaluationDataNumber}, got ${item.evaluation}`;
      throw refused("endorsements.rolled_back", `${what}.tcbEvaluationDataNumber: ${wanted}`);
    }
  }
  const age = Math.max(...signed.map(([, item]) => now - item.issued)) / DAY_S;
  const number = Math.min(...signed.map(([, item]) => item.evaluation));
  return `${root.name}; tcbEvaluationDataNumber ${number}; at most ${age.toFixed(1)} days old`;
}

function verifySigned(item: SignedJson, what: string, all: Endorsements, policy: Policy, now: number): void {
  chained("endorsements", `${what} issuer chain`, () => x509.verifyChain(item.chain, policy.tdxRoot, now));
  const signer = item.chain[0]!;
  // Intel's rule: the signer stands directly below the root and is named for TCB signing. A PCK key must not do.
  if (item.chain.length !== 2 || !signer.commonName.includes(TCB_SIGNER)) {
    const message = `${what}: expected a TCB signing certificate directly below the root, got ${signer.name}`;
    throw refused("endorsements.signer", message);
  }
  if (x509.isRevoked(signer, all.rootCrl)) {
    throw refused("endorsements.signer_revoked", `${what}: its signer is revoked`);
  }
  if (!x509.p256Verifies(signer, item.signature, item.text)) {
    throw refused("endorsements.signature", `${what}: signature does not verify`);
  }
}

function verifyPckCrl(endorsements: Endorsements, root: x509.Certificate, now: number): void {
  const chain = endorsements.pckCrlChain;
  if (chain.length !== 2) {
    throw refused("endorsements.short", `PCK CRL issuer chain: expected 2, got ${chain.length}`);
  }
  const issuer = chain[0]!;
  chained("endorsements", "PCK CRL issuer", () => x509.verifyIssued(issuer, root));
  chained("endorsements", "PCK CRL issuer", () => x509.verifyTime(issuer, now));
  chained("endorsements", "PCK CRL", () => x509.verifyCrl(endorsements.pckCrl, issuer, now));
}
