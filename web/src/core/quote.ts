/**
 * Intel TDX DCAP quotes, version 4 and 5 (TD 1.0 and 1.5 bodies), after Intel's TDX DCAP Quoting Library API, appendix
 * A.3 and A.4. Every byte accounted for; only certification data type 6 around a type 5 PEM chain.
 *
 * Not checked here: signatures, attribute values, measurements.
 */

import { type Bytes, Reader, fromHex, isZero, sha256, zeros } from "./bytes.js";
import { malformed } from "./errors.js";

const MAX_QUOTE_BYTES = 64 * 1024;
const ENCLAVE_REPORT_BYTES = 384;
const INTEL_QE_VENDOR_ID = fromHex("939a7233f79c4ca9940a0db3957f0607")!;
const BODY_SIZES: Record<number, number> = { 2: 584, 3: 648 };
const CHAIN_TYPES: Record<number, string> = {
  1: "the platform's id in plain text",
  2: "the platform's id encrypted with RSA-2048",
  3: "the platform's id encrypted with RSA-3072",
  4: "a PCK certificate without its chain",
  7: "a platform manifest",
};
const TD_FIELDS = [
  ["tee_tcb_svn", 16],
  ["mrseam", 48],
  ["mrsignerseam", 48],
  ["seam_attributes", 8],
  ["td_attributes", 8],
  ["xfam", 8],
  ["mrtd", 48],
  ["mrconfigid", 48],
  ["mrowner", 48],
  ["mrownerconfig", 48],
  ["rtmr0", 48],
  ["rtmr1", 48],
  ["rtmr2", 48],
  ["rtmr3", 48],
  ["report_data", 64],
] as const;

export type TdField = (typeof TD_FIELDS)[number][0];
export type TdReport = Readonly<Record<TdField, Bytes>> & {
  readonly tee_tcb_svn2: Bytes | null;
  readonly mrservicetd: Bytes | null;
};

/** The quoting enclave's own report, as far as it is judged; `encoded` is what the PCK key signs. */
export interface EnclaveReport {
  readonly encoded: Bytes;
  readonly misc_select: Bytes;
  readonly attributes: Bytes;
  readonly mrsigner: Bytes;
  readonly isv_prod_id: number;
  readonly isv_svn: number;
  readonly report_data: Bytes;
}

export interface Quote {
  readonly version: number;
  readonly body: TdReport;
  readonly signed: Bytes; // header and body
  readonly signature: Bytes;
  readonly attestationKey: Bytes;
  readonly qeReport: EnclaveReport;
  readonly qeReportSignature: Bytes;
  readonly qeAuthData: Bytes;
  readonly pckChainPem: Bytes;
}

/** Parse a quote; refuses `quote.*`. */
export function parseQuote(data: Bytes): Quote {
  if (data.length > MAX_QUOTE_BYTES) {
    throw malformed("quote.too_long", `quote: expected at most ${MAX_QUOTE_BYTES} bytes, got ${data.length}`);
  }
  const reader = new Reader(data, "quote");
  const version = parseHeader(reader);
  const body = parseBody(reader, version);
  const signed = data.subarray(0, reader.offset);
  const area = new Reader(reader.take(reader.uint(4, "signature_size"), "signature_data"), "quote");
  const signature = area.take(64, "signature");
  const attestationKey = area.take(64, "attestation_key");
  area.expect(6, 2, "certification_type");
  const certification = new Reader(area.take(area.uint(4, "certification_size"), "certification"), "quote");
  area.end();
  const qeReport = parseEnclaveReport(certification.take(ENCLAVE_REPORT_BYTES, "qe_report"));
  const qeReportSignature = certification.take(64, "qe_report_signature");
  const qeAuthData = certification.take(certification.uint(2, "qe_auth_size"), "qe_auth_data");
  const kind = certification.uint(2, "chain_type");
  if (kind !== 5) {
    const got = CHAIN_TYPES[kind] ? `${kind} (${CHAIN_TYPES[kind]})` : `${kind}`;
    const message = `quote.chain_type: expected 5 (the PCK certificate chain in PEM), got ${got}`;
    throw malformed("quote.chain_type", message);
  }
  const pckChainPem = certification.take(certification.uint(4, "chain_size"), "chain");
  certification.end();
  if (!isZero(reader.take(reader.left, "trailing"))) {
    throw malformed("quote.trailing", "quote: expected only zero bytes after the signature data");
  }
  return { version, body, signed, signature, attestationKey, qeReport, qeReportSignature, qeAuthData, pckChainPem };
}

/** How records name a quote: SHA-256 over header and body. */
export const quoteDigest = (quote: Quote): Bytes => sha256(quote.signed);

function parseHeader(reader: Reader): number {
  const version = reader.uint(2, "version");
  if (version !== 4 && version !== 5) {
    throw malformed("quote.version", `quote.version: expected 4 or 5, got ${version}`);
  }
  reader.expect(2, 2, "key_type");
  reader.expect(0x81, 4, "tee_type");
  reader.expect(0, 4, "reserved");
  reader.expect(INTEL_QE_VENDOR_ID, 16, "qe_vendor_id");
  reader.take(20, "user_data");
  return version;
}

function parseBody(reader: Reader, version: number): TdReport {
  let size = 584;
  if (version === 5) {
    const kind = reader.uint(2, "body_type");
    const known = BODY_SIZES[kind];
    if (known === undefined) {
      throw malformed("quote.body_type", `quote.body_type: expected 2 (TD 1.0) or 3 (TD 1.5), got ${kind}`);
    }
    size = known;
    reader.expect(size, 4, "body_size");
  }
  const values = Object.fromEntries(TD_FIELDS.map(([name, width]) => [name, reader.take(width, name)]));
  const later = size === 648;
  return {
    ...(values as Record<TdField, Bytes>),
    tee_tcb_svn2: later ? reader.take(16, "tee_tcb_svn2") : null,
    mrservicetd: later ? reader.take(48, "mrservicetd") : null,
  };
}

function parseEnclaveReport(data: Bytes): EnclaveReport {
  const reader = new Reader(data, "quote");
  reader.take(16, "qe_cpu_svn");
  const misc_select = reader.take(4, "qe_misc_select");
  reader.expect(zeros(12), 12, "qe_reserved");
  reader.take(16, "qe_isv_ext_prod_id");
  const attributes = reader.take(16, "qe_attributes");
  reader.take(32, "qe_mrenclave");
  reader.expect(zeros(32), 32, "qe_reserved");
  const mrsigner = reader.take(32, "qe_mrsigner");
  reader.expect(zeros(32), 32, "qe_reserved");
  reader.take(64, "qe_config_id");
  const isv_prod_id = reader.uint(2, "qe_isv_prod_id");
  const isv_svn = reader.uint(2, "qe_isv_svn");
  reader.uint(2, "qe_config_svn");
  reader.expect(zeros(42), 42, "qe_reserved");
  reader.take(16, "qe_isv_family_id");
  const report_data = reader.take(64, "qe_report_data");
  reader.end();
  return { encoded: data, misc_select, attributes, mrsigner, isv_prod_id, isv_svn, report_data };
}
