/**
 * The policy file, what this verifier accepts: the same TOML, keys and refusals as the command line's
 * (docs/formats.md, section 16). An unknown key is an error; an absent list accepts nothing.
 */

import { TomlDate, parse } from "smol-toml";
import { type Bytes, equal, fromHex, hex, includes, isAscii, isPrintable, rfc3339, utf8 } from "./bytes.js";
import { Refusal, unusable } from "./errors.js";
import { type VerifierKey, WITNESS_TYPES, isLog, parseVkey } from "./cosignature.js";
import { type Manifest, parseManifest } from "./manifest.js";

const MAX_BYTES = 8 * 1024 * 1024;
const MAX_ITEMS = 1024;
const MAX_TIME = 253_402_300_799;
const MAX_VALIDITY_DAYS = 3660;
export const DAY_S = 86_400;
const SIMULATED = "simulated:";
const root = (text: string): Bytes => fromHex(text)!;
// SHA-256 of the DER certificates: Intel SGX Root CA, NVIDIA Device Identity CA, NVIDIA CoRIM signing Root CA.
export const INTEL_SGX_ROOT = root("44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3");
const NVIDIA_DEVICE_ROOT = root("102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48");
const NVIDIA_RIM_ROOT = root("12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1");
// Revoked is not in the list: no policy can accept it.
const ACCEPTABLE_STATUSES = [
  "SWHardeningNeeded",
  "ConfigurationNeeded",
  "ConfigurationAndSWHardeningNeeded",
  "OutOfDate",
  "OutOfDateConfigurationNeeded",
  "TDRelaunchAdvised",
  "TDRelaunchAdvisedConfigurationNeeded",
];
const IMAGES_OF: Record<string, readonly string[]> = {
  production: ["production"],
  test: ["production", "test", "simulated"],
  development: ["production", "test", "development", "simulated"],
};
const KINDS = {
  int: "a whole number",
  text: "text in quotes",
  bool: "true or false",
  list: "a list",
  table: "a table",
  time: "a time such as 2026-01-31T00:00:00Z",
};

/** Something Intel advises against that is accepted all the same until a time (unix seconds). */
interface Waiver {
  readonly name: string;
  readonly until: number;
}

export interface Policy {
  readonly profile: string;
  readonly created: number;
  readonly notAfter: number;
  readonly maxValidityDays: number;
  readonly tdxRoot: Bytes;
  readonly gpuRoot: Bytes;
  readonly rimRoot: Bytes;
  readonly manifestSigners: readonly Bytes[];
  readonly manifestVersion: number;
  readonly images: readonly Manifest[];
  readonly revokedImages: readonly Bytes[];
  readonly endorsementMaxAgeDays: number;
  readonly minTcbEvaluationDataNumber: number;
  readonly mrseam: readonly Bytes[];
  readonly acceptedStatuses: readonly Waiver[];
  readonly acceptedAdvisories: readonly Waiver[];
  readonly anyHardware: boolean;
  readonly ppids: readonly Bytes[];
  readonly gpuChips: readonly Bytes[];
  readonly gpuCount: number;
  readonly gpuMode: string;
  readonly gpuFreshness: string;
  readonly gpuRevocation: string;
  readonly weightsRoots: readonly Bytes[];
  readonly numerics: readonly string[];
  readonly anyConfig: boolean;
  readonly configs: readonly Bytes[];
  /** The two verifier keys of the operator log; empty for none. */
  readonly manifestLog: readonly VerifierKey[];
  readonly operatorLog: readonly VerifierKey[];
  /** Those of one name are one witness, which counts when all of them have signed. */
  readonly witnesses: readonly VerifierKey[];
  readonly witnessesRequired: number;
  readonly witnessed: string;
  /** SHA-256 of the certificates under which time stamps would hold. */
  readonly tsaRoots: readonly Bytes[];
  readonly tsaPolicies: readonly string[];
}

/** Whether a trust root in this policy is a simulated one. */
export const isSimulated = (policy: Policy): boolean =>
  !equal(policy.tdxRoot, INTEL_SGX_ROOT) ||
  !equal(policy.gpuRoot, NVIDIA_DEVICE_ROOT) ||
  !equal(policy.rimRoot, NVIDIA_RIM_ROOT);

type Values = { [name: string]: unknown };
const bad = (code: string, message: string): Refusal => unusable(`policy.${code}`, message);

function kindOf(value: unknown): keyof typeof KINDS | "float" {
  if (typeof value === "bigint") return "int";
  if (typeof value === "string") return "text";
  if (typeof value === "boolean") return "bool";
  if (typeof value === "number") return "float";
  if (Array.isArray(value)) return "list";
  return value instanceof TomlDate ? "time" : "table";
}

/** A TOML table that is read key by key and must be empty at the end. */
class Table {
  private readonly seen = new Set<string>();

  constructor(
    readonly values: Values,
    private readonly path = "",
  ) {}

  name(key: string): string {
    return this.path ? `${this.path}.${key}` : key;
  }

  get<T>(key: string, kind: keyof typeof KINDS, absent?: T): T {
    this.seen.add(key);
    if (!Object.hasOwn(this.values, key)) {
      if (absent === undefined) throw bad("missing_key", `${this.name(key)}: expected ${KINDS[kind]}, got nothing`);
      return absent;
    }
    const value = this.values[key];
    const isDateTime = !(value instanceof TomlDate) || value.isDateTime();
    if (kindOf(value) !== kind || !isDateTime) {
      throw bad("value", `${this.name(key)}: expected ${KINDS[kind]}, got ${brief(value)}`);
    }
    return value as T;
  }

  text(key: string): string {
    return this.get<string>(key, "text");
  }

  int(key: string): bigint {
    return this.get<bigint>(key, "int");
  }

  bool(key: string): boolean {
    return this.get<boolean>(key, "bool", false);
  }

  table(key: string): Table {
    return new Table(this.get<Values>(key, "table", {}), this.name(key));
  }

  tables(key: string): Table[] {
    return this.items<Values>(key, "table").map((item) => new Table(item, this.name(key)));
  }

  texts(key: string): string[] {
    return this.items<string>(key, "text");
  }

  digests(key: string, size: number): Bytes[] {
    return this.texts(key).map((item) => hexOf(item, size, this.name(key)));
  }

  time(key: string): number {
    return unix(this.get<TomlDate>(key, "time"), this.name(key));
  }

  waivers(key: string): Waiver[] {
    const table = this.table(key);
    return Object.keys(table.values).sort().map((name) => ({ name, until: table.time(name) }));
  }

  end(): void {
    const unknown = Object.keys(this.values).filter((key) => !this.seen.has(key)).sort();
    if (!unknown.length) return;
    const known = [...this.seen].sort().map((key) => this.name(key)).join(", ");
    const names = unknown.map((key) => this.name(key)).join(", ");
    throw bad("unknown_key", `${names}: unknown key, expected one of ${known}`);
  }

  private items<T>(key: string, kind: "text" | "table"): T[] {
    const items = this.get<unknown[]>(key, "list", []);
    if (items.length > MAX_ITEMS) {
      throw bad("value", `${this.name(key)}: expected at most ${MAX_ITEMS} items, got ${items.length}`);
    }
    const strange = items.find((item) => kindOf(item) !== kind);
    if (strange !== undefined) {
      throw bad("value", `${this.name(key)}: expected each item to be ${KINDS[kind]}, got ${brief(strange)}`);
    }
    return items as T[];
  }
}

function brief(value: unknown): string {
  const kind = kindOf(value);
  if (kind === "list" || kind === "table") return KINDS[kind];
  return value instanceof TomlDate ? value.toISOString() : String(value).slice(0, 80);
}

function hexOf(text: string, size: number, name: string): Bytes {
  const value = fromHex(text);
  if (value?.length !== size || hex(value) !== text) {
    const got = `${brief(text)} (${text.length} characters)`;
    throw bad("value", `${name}: expected ${2 * size} lower-case hex digits, got ${got}`);
  }
  return value;
}

function unix(moment: TomlDate, name: string): number {
  if (moment.isLocal()) {
    throw bad("value", `${name}: expected a time with an offset such as Z, got ${moment.toISOString()}`);
  }
  const seconds = Math.trunc(moment.getTime() / 1000);
  if (!(seconds >= 0 && seconds <= MAX_TIME)) throw bad("value", `${name}: expected a time in the years 1970 to 9999`);
  return seconds;
}

function rootOf(table: Table, key: string, vendor: string, digest: Bytes): Bytes {
  const text = table.text(key);
  if (text === vendor) return digest;
  if (!text.startsWith(SIMULATED)) {
    throw bad("root", `${table.name(key)}: expected ${vendor} or ${SIMULATED}<SHA-256>, got ${brief(text)}`);
  }
  return hexOf(text.slice(SIMULATED.length), 32, table.name(key));
}

/** One of the known words; `absent` where there is none. */
function oneOf(table: Table, key: string, known: string[], absent?: string): string {
  const text = table.get<string>(key, "text", absent);
  if (!known.includes(text)) {
    throw bad("value", `${table.name(key)}: expected ${known.join(" or ")}, got ${brief(text)}`);
  }
  return text;
}

function vkeys(table: Table, key: string): VerifierKey[] {
  try {
    return table.texts(key).map(parseVkey);
  } catch (error) {
    if (!(error instanceof Refusal) || error.kind === "policy") throw error;
    throw bad("value", `${table.name(key)}: ${error.message}`);
  }
}

/** Parse and check a policy file; refuses `policy.*`. */
export function parsePolicy(text: string): Policy {
  const size = utf8(text).length;
  if (size > MAX_BYTES) throw bad("too_long", `policy: expected at most ${MAX_BYTES} bytes, got ${size}`);
  const top = new Table(parseToml(text));
  const version = top.int("version");
  if (version !== 1n) throw bad("version", `version: expected 1, got ${version}`);
  const [trust, manifest, endorsements] = [top.table("trust"), top.table("manifest"), top.table("endorsements")];
  const [tdx, hardware, gpu] = [top.table("tdx"), top.table("hardware"), top.table("gpu")];
  const [model, config, log, images] = [top.table("model"), top.table("config"), top.table("log"), top.tables("image")];
  const anchors = top.table("anchors");
  const head = {
    profile: oneOf(top, "profile", ["production", "test", "development"]),
    created: top.time("created"),
    notAfter: top.time("not_after"),
  };
  const maxValidityDays = top.int("max_validity_days");
  top.end(); // before the tables, so that one with a wrong name is named, and not what it lacks
  const numbers: [string, bigint, bigint, bigint][] = [["max_validity_days", maxValidityDays, 1n, BigInt(MAX_VALIDITY_DAYS)]];
  const number = (table: Table, key: string, low: bigint, high: bigint): number => {
    const value = table.int(key);
    numbers.push([table.name(key), value, low, high]);
    return Number(value);
  };
  const policy: Policy = {
    ...head,
    maxValidityDays: Number(maxValidityDays),
    tdxRoot: rootOf(trust, "tdx", "intel", INTEL_SGX_ROOT),
    gpuRoot: rootOf(trust, "gpu", "nvidia", NVIDIA_DEVICE_ROOT),
    rimRoot: rootOf(trust, "rim", "nvidia", NVIDIA_RIM_ROOT),
    manifestSigners: manifest.digests("signers", 32),
    manifestVersion: number(manifest, "highest_version", 0n, 1n << 53n),
    revokedImages: manifest.digests("revoked_images", 32),
    manifestLog: vkeys(manifest, "log"),
    images: images.map(imageOf),
    endorsementMaxAgeDays: number(endorsements, "max_age_days", 1n, BigInt(MAX_VALIDITY_DAYS)),
    minTcbEvaluationDataNumber: number(endorsements, "min_tcb_evaluation_data_number", 0n, 1n << 31n),
    mrseam: tdx.digests("mrseam", 48),
    acceptedStatuses: tdx.waivers("accept_status"),
    acceptedAdvisories: tdx.waivers("accept_advisory"),
    anyHardware: hardware.bool("any"),
    ppids: hardware.digests("ppids", 16),
    gpuChips: hardware.digests("gpu_chips", 32),
    gpuCount: number(gpu, "count", 1n, 16n),
    gpuMode: gpu.text("mode"),
    gpuFreshness: oneOf(gpu, "freshness", ["session", "boot"]),
    gpuRevocation: oneOf(gpu, "revocation", ["required", "if-given"]),
    weightsRoots: model.digests("weights_roots", 32),
    numerics: model.texts("numerics"),
    anyConfig: config.bool("any"),
    configs: config.digests("digests", 32),
    operatorLog: vkeys(log, "operator"),
    witnesses: vkeys(log, "witnesses"),
    witnessesRequired: Number(log.get<bigint>("witnesses_required", "int", 0n)),
    witnessed: oneOf(log, "witnessed", ["epoch", "epoch-and-receipt"], "epoch"),
    tsaRoots: anchors.digests("tsa_roots", 32),
    tsaPolicies: anchors.texts("tsa_policies"),
  };
  for (const table of [trust, manifest, endorsements, tdx, hardware, gpu, model, config, log, anchors, ...images]) {
    table.end();
  }
  check(policy, numbers);
  return policy;
}

function parseToml(text: string): Values {
  if (text.startsWith("\ufeff")) throw bad("toml", "policy: expected TOML: no byte-order mark");
  try {
    return parse(text, { integersAsBigInt: true });
  } catch (error) {
    throw bad("toml", `policy: expected TOML: ${String((error as Error).message).split("\n")[0]}`);
  }
}

function imageOf(table: Table): Manifest {
  try {
    return parseManifest(utf8(table.text("statement")));
  } catch (error) {
    if (!(error instanceof Refusal) || error.kind === "policy") throw error;
    throw bad("manifest", `${table.name("statement")}: ${error.message}`);
  }
}

/** What contradicts itself. */
function check(policy: Policy, numbers: readonly [string, bigint, bigint, bigint][]): void {
  if (policy.profile === "production" && isSimulated(policy)) {
    throw bad("root", "trust: expected intel and nvidia in the production profile, got a simulated root");
  }
  const { created, notAfter } = policy;
  if (!(created < notAfter && notAfter <= created + policy.maxValidityDays * DAY_S)) {
    const span = `later than created = ${rfc3339(created)}, by at most max_validity_days = ${policy.maxValidityDays}`;
    throw bad("validity", `not_after: expected ${span}, got ${rfc3339(notAfter)}`);
  }
  for (const [name, value, low, high] of numbers) {
    if (value < low || value > high) throw bad("value", `${name}: expected ${low} to ${high}, got ${value}`);
  }
  if (policy.gpuMode !== "cc-on" && policy.gpuMode !== "protected-pcie") {
    throw bad("value", `gpu.mode: expected cc-on or protected-pcie, got ${brief(policy.gpuMode)}`);
  }
  const signers = new Set(policy.manifestSigners.map(hex)).size;
  if (signers !== 0 && signers !== 2) {
    throw bad("value", `manifest.signers: expected two digests, or none yet, got ${signers}`);
  }
  if (!policy.numerics.every((name) => isAscii(name) && isPrintable(name))) {
    throw bad("value", "model.numerics: expected printable ASCII");
  }
  if (policy.tsaPolicies.some((name) => !/^[0-2](\.(0|[1-9][0-9]{0,38})){1,30}$/.test(name))) {
    throw bad("value", "anchors.tsa_policies: expected object identifiers such as 1.2.3.4.1");
  }
  const status = policy.acceptedStatuses.find(({ name }) => !ACCEPTABLE_STATUSES.includes(name));
  if (status) {
    const known = `${ACCEPTABLE_STATUSES.join(", ")} (UpToDate needs none, Revoked is never accepted)`;
    throw bad("value", `tdx.accept_status: expected one of ${known}, got ${brief(status.name)}`);
  }
  const advisory = policy.acceptedAdvisories.find(({ name }) => !/^[A-Z0-9-]{1,32}$/.test(name));
  if (advisory) {
    const got = brief(advisory.name);
    throw bad("value", `tdx.accept_advisory: expected an advisory such as INTEL-SA-00615, got ${got}`);
  }
  if (policy.anyHardware && (policy.ppids.length || policy.gpuChips.length)) {
    throw bad("contradiction", "hardware: expected either any = true or lists, got both");
  }
  if (policy.anyConfig && policy.configs.length) {
    throw bad("contradiction", "config: expected either any = true or digests, got both");
  }
  checkLog(policy);
  for (const image of policy.images) {
    const what = `image ${hex(image.image_id)}`;
    const kinds = IMAGES_OF[policy.profile]!;
    if (!kinds.includes(image.kind)) {
      const wanted = `kind ${kinds.join(" or ")} in profile ${policy.profile}`;
      throw bad("image", `${what}: expected ${wanted}, got ${image.kind}`);
    }
    if (image.version > policy.manifestVersion) {
      const most = `manifest.highest_version = ${policy.manifestVersion}`;
      throw bad("image", `${what}: expected version at most ${most}, got ${image.version}`);
    }
    if (includes(policy.revokedImages, image.image_id)) {
      throw bad("image", `${what}: expected none that manifest.revoked_images lists`);
    }
  }
}

function checkLog({ manifestLog, operatorLog, witnesses, witnessesRequired }: Policy): void {
  for (const [name, keys] of [["manifest.log", manifestLog], ["log.operator", operatorLog]] as const) {
    if (keys.length && !isLog(keys)) {
      const wanted = "expected one verifier key of type 0x01 and one of type 0x06 with one name";
      throw bad("value", `${name}: ${wanted}`);
    }
  }
  const strange = witnesses.find(({ kind }) => !WITNESS_TYPES.includes(kind));
  if (strange) {
    const wanted = "expected a witness's verifier key, of type 0x04 or 0x06";
    throw bad("value", `log.witnesses: ${wanted}, got ${strange.kind} of ${strange.name}`);
  }
  if (new Set(witnesses.map(({ text }) => text)).size !== witnesses.length) {
    throw bad("value", "log.witnesses: expected each verifier key once, got one twice");
  }
  const others = new Set(operatorLog.map(({ key }) => hex(key.public)));
  for (const { name, key } of witnesses) {
    // Under another name it would be somebody else, and count again.
    if (others.has(hex(key.public))) {
      const wanted = "expected keys that no other witness and no operator log has";
      throw bad("value", `log.witnesses: ${wanted}, got one of ${name}`);
    }
    others.add(hex(key.public));
  }
  const most = new Set(witnesses.map(({ name }) => name)).size;
  if (witnessesRequired < 0 || witnessesRequired > most) {
    const wanted = `expected 0 to ${most}, the witnesses named`;
    throw bad("contradiction", `log.witnesses_required: ${wanted}, got ${witnessesRequired}`);
  }
  if (witnessesRequired && !operatorLog.length) {
    throw bad("contradiction", "log.operator: expected the log that witnesses are required of, got none");
  }
}
