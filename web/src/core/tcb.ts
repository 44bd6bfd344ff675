/**
 * The TCB level of a TDX platform: Intel's rules of quote verification (QVL design 4.1.2.4.9 to 4.1.2.4.17, 4.1.2.9).
 *
 * The quoting enclave against its identity, the TDX module against its own, the platform's levels, then how the three
 * ratings combine, and for a TD 1.5 report whether a relaunch would do. The command line rates by the same rules and
 * asks dcap-qvl for a second opinion; here there is one. Not checked here: signatures, times, which ratings pass.
 */

import { type Bytes, equal, hex, isZero } from "./bytes.js";
import { refused } from "./errors.js";
import type { EnclaveReport, TdReport } from "./quote.js";
import type { Level, ModuleIdentity, QeIdentity, SvnLevel, TcbInfo, TcbLevel } from "./tcbinfo.js";

export const UP_TO_DATE = "UpToDate";
const OUT_OF_DATE = "OutOfDate";
const REVOKED = "Revoked";
const CONFIGURATION = ["ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDateConfigurationNeeded"];
const PLATFORM = [UP_TO_DATE, "SWHardeningNeeded", ...CONFIGURATION, OUT_OF_DATE, REVOKED];
const MODULE = [UP_TO_DATE, OUT_OF_DATE, REVOKED];
const SGX_DEBUG = 0x02;

/** The SVNs a machine's PCK certificate states. */
export interface PlatformTcb {
  readonly cpuSvn: Bytes;
  readonly pceSvn: number;
}

/** Intel's word for a platform, and every advisory of the levels that led to it. */
export interface Rating {
  readonly status: string;
  readonly advisories: readonly string[];
}

/** Refuses `tcb.unknown_status`, `tcb.qe_identity`, `tcb.module`, `tcb.no_level`. */
export function rate(report: TdReport, qe: EnclaveReport, pck: PlatformTcb, info: TcbInfo, identity: QeIdentity): Rating {
  verifyStatuses(info, identity);
  verifyQe(qe, identity);
  const enclave = svnLevel(identity.levels, qe.isv_svn);
  if (!enclave) throw no("qe isvsvn", `at least ${identity.levels.at(-1)!.isvSvn}`, qe.isv_svn, "qe_identity");
  const module = moduleLevel(moduleIdentity(report, info, report.tee_tcb_svn), report.tee_tcb_svn);
  const [sgx, tdx] = platformLevels(report.tee_tcb_svn, pck, info.levels);
  let status = module ? converge(tdx.status, module.status) : tdx.status;
  const later = report.tee_tcb_svn2;
  if (later) {
    const running = moduleIdentity(report, info, later);
    moduleLevel(running, later);
    platformLevels(later, pck, info.levels);
    if (enclave.status === UP_TO_DATE && module?.status === OUT_OF_DATE) {
      status = relaunch(status, later, running, sgx, info.levels[0]!);
    }
  }
  status = converge(status, enclave.status);
  const used: (Level | null)[] = [tdx, enclave, module];
  return { status, advisories: [...new Set(used.flatMap((level) => level?.advisories ?? []))].sort() };
}

const no = (name: string, wanted: unknown, got: unknown, code: string) =>
  refused(`tcb.${code}`, `${name}: expected ${wanted}, got ${got}`);

function verifyStatuses(info: TcbInfo, identity: QeIdentity): void {
  // A word nobody knows could mean anything, so a document with one in it is not used at all.
  const kinds = [
    ["tcb info", info.levels, PLATFORM],
    ["tdx module", info.modules.flatMap((module) => module.levels), MODULE],
    ["qe identity", identity.levels, MODULE],
  ] as const;
  for (const [what, levels, known] of kinds) {
    const strange = levels.find(({ status }) => !known.includes(status));
    if (strange) throw no(`${what} tcbStatus`, `one of ${known.join(", ")}`, strange.status, "unknown_status");
  }
}

function verifyQe(qe: EnclaveReport, identity: QeIdentity): void {
  const masked = (value: Bytes, mask: Bytes) => hex(value.map((byte, i) => byte & mask[i]!));
  const pairs = [
    ["qe mrsigner", hex(identity.mrsigner), hex(qe.mrsigner)],
    ["qe isvprodid", identity.isvProdId, qe.isv_prod_id],
    ["qe miscselect", hex(identity.miscSelect), masked(qe.misc_select, identity.miscSelectMask)],
    ["qe attributes", hex(identity.attributes), masked(qe.attributes, identity.attributesMask)],
    ["qe attributes.DEBUG", 0, qe.attributes[0]! & SGX_DEBUG],
  ] as const;
  for (const [name, wanted, got] of pairs) if (wanted !== got) throw no(name, wanted, got, "qe_identity");
}

function moduleIdentity(report: TdReport, info: TcbInfo, svn: Bytes): ModuleIdentity {
  // The second byte of TEE_TCB_SVN is the module's version: 0 is the unversioned module of TDX 1.0.
  let identity = info.module;
  if (svn[1]) {
    const wanted = `TDX_${svn[1].toString(16).toUpperCase().padStart(2, "0")}`;
    const found = info.modules.find(({ name }) => name === wanted);
    if (!found) {
      const known = info.modules.map(({ name }) => name).join(", ") || "none";
      throw no("tdx module identity", wanted, `${known} in the TCB info`, "module");
    }
    identity = found;
  }
  // A report that is not zero here is not of a module of Intel's: that is step 4's to say.
  const pairs = [
    ["mrsigner", report.mrsignerseam, identity.mrsigner],
    ["attributes", report.seam_attributes, identity.attributes],
  ] as const;
  for (const [name, got, wanted] of pairs) {
    if (isZero(got) && !equal(got, wanted)) throw no(`tdx module ${name}`, hex(wanted), hex(got), "module");
  }
  return identity;
}

function moduleLevel(identity: ModuleIdentity, svn: Bytes): SvnLevel | null {
  if (!identity.name) return null; // rated by the platform's levels alone
  const level = svnLevel(identity.levels, svn[0]!);
  if (!level) throw no(`${identity.name} isvsvn`, `at least ${identity.levels.at(-1)!.isvSvn}`, svn[0], "module");
  return level;
}

const svnLevel = (levels: readonly SvnLevel[], svn: number): SvnLevel | undefined =>
  levels.find((level) => svn >= level.isvSvn);

/** The first level the SGX part meets, and the first one the TDX part meets as well. */
function platformLevels(svn: Bytes, pck: PlatformTcb, levels: readonly TcbLevel[]): [TcbLevel, TcbLevel] {
  const reaches = (svns: Bytes, wanted: readonly number[], start = 0) =>
    wanted.every((least, i) => i < start || svns[i]! >= least);
  const sgx = levels.filter((level) => reaches(pck.cpuSvn, level.sgx) && pck.pceSvn >= level.pceSvn);
  // Of a versioned module, the first two bytes are its SVN and version: its identity's levels rate those.
  const tdx = sgx.find((level) => reaches(svn, level.tdx, svn[1] ? 2 : 0));
  if (!tdx) {
    const got = `SGX ${hex(pck.cpuSvn)}, PCE ${pck.pceSvn}, TDX ${hex(svn)}`;
    throw no("platform SVNs", "at least those of the lowest level", got, "no_level");
  }
  return [sgx[0]!, tdx];
}

function converge(status: string, part: string): string {
  // A module or enclave that is revoked or out of date is the platform's flaw too.
  if (part === REVOKED) return REVOKED;
  if (part === OUT_OF_DATE && (status === UP_TO_DATE || status === "SWHardeningNeeded")) return OUT_OF_DATE;
  return part === OUT_OF_DATE && CONFIGURATION.includes(status) ? "OutOfDateConfigurationNeeded" : status;
}

function relaunch(status: string, later: Bytes, running: ModuleIdentity, sgx: TcbLevel, latest: TcbLevel): string {
  // All that is wrong is that the TD was launched under an older module than now runs.
  const outdated = [OUT_OF_DATE, "OutOfDateConfigurationNeeded"];
  if (!outdated.includes(status) || [...outdated, REVOKED].includes(sgx.status)) return status;
  const newest = running.levels[0]?.isvSvn ?? latest.tdx[0]!;
  const current = !running.levels.length || running.levels[0]!.status === UP_TO_DATE;
  if (!current || later[0]! < newest || later[2]! < latest.tdx[2]!) return status;
  const configuration = CONFIGURATION.includes(status) || CONFIGURATION.includes(sgx.status);
  return configuration ? "TDRelaunchAdvisedConfigurationNeeded" : "TDRelaunchAdvised";
}
