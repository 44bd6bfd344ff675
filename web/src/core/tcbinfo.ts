/**
 * TCB info version 3 and QE identity version 2 as values: what Intel's signed JSON says, before anything is compared.
 *
 * Intel PCS API version 4. Levels are put in Intel's order, the newest first. Unknown members are tolerated, as in every
 * vendor's signed document; what is read must be there and have its exact size. Not checked here: signatures and dates.
 */

import { type Bytes, fromHex, isAscii, isPrintable } from "./bytes.js";
import { type Refusal, malformed } from "./errors.js";
import type { Json, JsonObject } from "./json.js";

const COMPONENTS = 16;
const MAX_LEVELS = 256;
const MAX_IDENTITIES = 64;
const MAX_ADVISORIES = 256;

export interface Level {
  readonly status: string;
  readonly advisories: readonly string[];
}

export interface TcbLevel extends Level {
  readonly sgx: readonly number[];
  readonly pceSvn: number;
  readonly tdx: readonly number[];
}

export interface SvnLevel extends Level {
  readonly isvSvn: number;
}

/** `name` is empty for the unversioned module, which the platform's levels rate. */
export interface ModuleIdentity {
  readonly name: string;
  readonly mrsigner: Bytes;
  readonly attributes: Bytes;
  readonly levels: readonly SvnLevel[];
}

export interface TcbInfo {
  readonly fmspc: Bytes;
  readonly pceId: Bytes;
  readonly module: ModuleIdentity;
  readonly modules: readonly ModuleIdentity[];
  readonly levels: readonly TcbLevel[];
}

export interface QeIdentity {
  readonly miscSelect: Bytes;
  readonly miscSelectMask: Bytes;
  readonly attributes: Bytes;
  readonly attributesMask: Bytes;
  readonly mrsigner: Bytes;
  readonly isvProdId: number;
  readonly levels: readonly SvnLevel[];
}

/** What every member of the wrong form is refused with. */
export const bad = (message: string): Refusal => malformed("endorsements.malformed", `endorsements.${message}`);

export function integer(body: JsonObject, name: string, what: string, most: number, least = 0): number {
  const value = body.get(name);
  if (typeof value !== "bigint" || value < BigInt(least) || value > BigInt(most)) {
    throw bad(`${what}.${name}: expected ${least} to ${most}`);
  }
  return Number(value);
}

const TIME = /^(\d{4}-\d{2}-\d{2})[T ](\d{2}:\d{2}:\d{2})(?:[.,]\d+)?(Z|[+-]\d{2}:?\d{2})$/;

/** An RFC 3339 time in unix seconds. */
export function moment(body: JsonObject, name: string, what: string): number {
  const value = body.get(name);
  const found = typeof value === "string" ? TIME.exec(value) : null;
  const [, day, clock, zone] = found ?? [];
  const time = Date.parse(`${day}T${clock}${zone === "Z" ? "Z" : zone?.replace(/^(...):?(..)$/, "$1:$2")}`);
  if (Number.isNaN(time)) throw bad(`${what}.${name}: expected an RFC 3339 time`);
  return time / 1000;
}

export function parseTcbInfo(body: JsonObject): TcbInfo {
  const what = "tcb_info";
  integer(body, "version", what, 3, 3);
  integer(body, "tcbType", what, 0);
  const levels = items(body, "tcbLevels", what, 1, MAX_LEVELS).map(([item, at]): TcbLevel => {
    const tcb = object(item, "tcb", at);
    moment(item, "tcbDate", at);
    return {
      sgx: components(tcb, "sgxtcbcomponents", at),
      pceSvn: integer(tcb, "pcesvn", at, 0xffff),
      tdx: components(tcb, "tdxtcbcomponents", at),
      ...levelOf(item, at),
    };
  });
  const modules = items(body, "tdxModuleIdentities", what, 0, MAX_IDENTITIES).map(([item, at]) =>
    module(item, at, text(item, "id", at).toUpperCase(), svnLevels(item, at, 0xff)),
  );
  if (new Set(modules.map(({ name }) => name)).size !== modules.length) {
    throw bad(`${what}.tdxModuleIdentities: expected each id once`);
  }
  return {
    fmspc: hexOf(body, "fmspc", what, 6),
    pceId: hexOf(body, "pceId", what, 2),
    module: module(object(body, "tdxModule", what), `${what}.tdxModule`, "", []),
    modules,
    levels: levels.sort((left, right) => order(key(right), key(left))),
  };
}

export function parseQeIdentity(body: JsonObject): QeIdentity {
  const what = "qe_identity";
  integer(body, "version", what, 2, 2);
  return {
    miscSelect: hexOf(body, "miscselect", what, 4),
    miscSelectMask: hexOf(body, "miscselectMask", what, 4),
    attributes: hexOf(body, "attributes", what, 16),
    attributesMask: hexOf(body, "attributesMask", what, 16),
    mrsigner: hexOf(body, "mrsigner", what, 32),
    isvProdId: integer(body, "isvprodid", what, 0xffff),
    levels: svnLevels(body, what, 0xffff),
  };
}

const key = (level: TcbLevel): number[] => [...level.sgx, level.pceSvn, ...level.tdx];

function order(left: readonly number[], right: readonly number[]): number {
  const at = left.findIndex((value, i) => value !== right[i]);
  return at < 0 ? 0 : left[at]! - right[at]!;
}

function module(item: JsonObject, what: string, name: string, levels: SvnLevel[]): ModuleIdentity {
  const found = { name, mrsigner: hexOf(item, "mrsigner", what, 48), attributes: hexOf(item, "attributes", what, 8) };
  hexOf(item, "attributesMask", what, 8);
  return { ...found, levels };
}

function svnLevels(body: JsonObject, what: string, most: number): SvnLevel[] {
  const levels = items(body, "tcbLevels", what, 1, MAX_LEVELS).map(([item, at]): SvnLevel => {
    moment(item, "tcbDate", at);
    return { isvSvn: integer(object(item, "tcb", at), "isvsvn", at, most), ...levelOf(item, at) };
  });
  return levels.sort((left, right) => right.isvSvn - left.isvSvn);
}

function items(body: JsonObject, name: string, what: string, least: number, most: number): [JsonObject, string][] {
  const found = body.get(name) === undefined ? [] : body.get(name);
  if (!Array.isArray(found) || found.length < least || found.length > most) {
    throw bad(`${what}.${name}: expected a list of ${least} to ${most}`);
  }
  return found.map((item, i) => {
    if (!(item instanceof Map)) throw bad(`${what}.${name}: expected objects`);
    return [item, `${what}.${name}[${i}]`];
  });
}

function object(body: JsonObject, name: string, what: string): JsonObject {
  const value = body.get(name);
  if (!(value instanceof Map)) throw bad(`${what}.${name}: expected an object`);
  return value;
}

function shortText(value: Json | undefined, where: string): string {
  const good = typeof value === "string" && isAscii(value) && isPrintable(value) && value.length > 0;
  if (!good || value.length > 64) throw bad(`${where}: expected a short text`);
  return value;
}

const text = (body: JsonObject, name: string, what: string): string => shortText(body.get(name), `${what}.${name}`);

function levelOf(item: JsonObject, what: string): Level {
  const found = item.get("advisoryIDs") === undefined ? [] : item.get("advisoryIDs");
  const status = text(item, "tcbStatus", what);
  if (!Array.isArray(found) || found.length > MAX_ADVISORIES) {
    throw bad(`${what}.advisoryIDs: expected a list of at most ${MAX_ADVISORIES}`);
  }
  return { status, advisories: found.map((id) => shortText(id, `${what}.advisoryIDs`)) };
}

function components(tcb: JsonObject, name: string, what: string): number[] {
  return items(tcb, name, what, COMPONENTS, COMPONENTS).map(([item, at]) => integer(item, "svn", at, 0xff));
}

function hexOf(body: JsonObject, name: string, what: string, size: number): Bytes {
  const value = body.get(name);
  const data = typeof value === "string" && value.length === 2 * size ? fromHex(value) : null;
  if (data?.length !== size) throw bad(`${what}.${name}: expected ${size} bytes in hex`);
  return data;
}
