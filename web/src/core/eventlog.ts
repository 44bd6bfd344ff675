/**
 * Measurement event logs in the TCG crypto-agile form (PC Client Platform Firmware Profile, section 10), their replay,
 * and the grammar of our own log in RTMR3 (docs/formats.md section 7).
 *
 * A log may carry digests of several algorithms; SHA-384 is one of them and the one kept. Not checked here: that an
 * event's digest is the hash of its data, except in RTMR3.
 */

import { type Bytes, Reader, compare, equal, isAscii, isPrintable, isZero, sha384, utf8, zeros } from "./bytes.js";
import * as cbor from "./cbor.js";
import { malformed } from "./errors.js";

const SHA384 = 0x000c;
const DIGEST_BYTES = 48;
export const EV_NO_ACTION = 3;
const MAX_LOG_BYTES = 1024 * 1024;
const MAX_EVENTS = 4096;
const MAX_EVENT_BYTES = 64 * 1024;
const MAX_ALGORITHMS = 16;
const MAX_DIGEST_BYTES = 128;
const SIGNATURE = utf8("Spec ID Event03\0");
const KNOWN_SIZES: Record<number, number> = {
  4: 20, 11: 32, [SHA384]: DIGEST_BYTES, 13: 64, 18: 32, 39: 32, 40: 48, 41: 64,
};

export interface Event {
  readonly register: number; // 0 is MRTD, 1 to 4 are RTMR0 to RTMR3
  readonly type: number;
  readonly digest: Bytes;
  readonly data: Bytes;
}

interface SpecId {
  readonly register: number;
  readonly platformClass: number;
  readonly version: Bytes;
  readonly uintnSize: number;
  readonly algorithms: readonly (readonly [number, number])[];
  readonly vendorInfo: Bytes;
}

export interface EventLog {
  readonly spec: SpecId;
  readonly events: readonly Event[];
  readonly padding: number;
}

/** Parse a whole log; refuses `eventlog.*`. */
export function parseEventLog(data: Bytes): EventLog {
  if (data.length > MAX_LOG_BYTES) {
    throw malformed("eventlog.too_long", `eventlog: expected at most ${MAX_LOG_BYTES} bytes, got ${data.length}`);
  }
  if (equal(data.subarray(0, 4), utf8("CCEL"))) {
    throw malformed("eventlog.acpi_table", "eventlog: expected the log, got the ACPI table that points to it");
  }
  const reader = new Reader(data, "eventlog");
  const spec = parseSpecId(reader);
  const sizes = new Map(spec.algorithms);
  const fill = data.at(-1) === 0 ? 0 : 0xff;
  let used = data.length;
  while (used > 0 && data[used - 1] === fill) used--;
  const events: Event[] = [];
  while (reader.offset < used) {
    const start = data.subarray(reader.offset, reader.offset + 4);
    if (start.every((byte) => byte === 0xff) || isZero(data.subarray(reader.offset, reader.offset + 12))) {
      const message = `eventlog: expected only 0xff or only zero bytes after the last event at ${reader.offset}`;
      throw malformed("eventlog.trailing", message);
    }
    if (events.length === MAX_EVENTS) {
      throw malformed("eventlog.too_many", `eventlog: expected at most ${MAX_EVENTS} events`);
    }
    events.push(parseEvent(reader, sizes));
  }
  return { spec, events, padding: reader.left };
}

/** RTMR0 to RTMR3 after these events, each from zero. */
export function replay(events: Iterable<Pick<Event, "register" | "type" | "digest">>): Bytes[] {
  const registers = [zeros(48), zeros(48), zeros(48), zeros(48)];
  for (const { register, type, digest } of events) {
    if (register !== 0 && type !== EV_NO_ACTION) registers[register - 1] = sha384(registers[register - 1]!, digest);
  }
  return registers;
}

function parseSpecId(reader: Reader): SpecId {
  const bad = (message: string) => malformed("eventlog.algorithms", `eventlog.algorithms: expected ${message}`);
  const register = registerOf(reader.uint(4, "register"));
  reader.expect(EV_NO_ACTION, 4, "spec_id");
  reader.expect(zeros(20), 20, "spec_id");
  const payload = new Reader(reader.take(sizeOf(reader.uint(4, "spec_id_size")), "spec_id"), "eventlog");
  payload.expect(SIGNATURE, SIGNATURE.length, "spec_id");
  const platformClass = payload.uint(4, "platform_class");
  const version = payload.take(3, "spec_version");
  const uintnSize = payload.uint(1, "uintn_size");
  const count = payload.uint(4, "algorithm_count");
  if (count < 1 || count > MAX_ALGORITHMS) throw bad(`1 to ${MAX_ALGORITHMS}, got ${count}`);
  const algorithms: [number, number][] = [];
  for (let i = 0; i < count; i++) algorithms.push([payload.uint(2, "algorithm"), payload.uint(2, "digest_size")]);
  const sizes = new Map(algorithms);
  if (sizes.size !== count || !sizes.has(SHA384)) throw bad("SHA-384 and no repetition");
  for (const [kind, size] of algorithms) {
    if (size < 1 || size > MAX_DIGEST_BYTES || size !== (KNOWN_SIZES[kind] ?? size)) {
      throw bad(`the digest size of algorithm ${kind}, got ${size}`);
    }
  }
  const vendorInfo = payload.take(payload.uint(1, "vendor_info_size"), "vendor_info");
  payload.end();
  return { register, platformClass, version, uintnSize, algorithms, vendorInfo };
}

function parseEvent(reader: Reader, sizes: ReadonlyMap<number, number>): Event {
  const register = registerOf(reader.uint(4, "register"));
  const type = reader.uint(4, "event_type");
  const count = reader.uint(4, "digest_count");
  if (count < 1 || count > sizes.size) {
    throw malformed("eventlog.digest_count", `eventlog.digest_count: expected 1 to ${sizes.size}, got ${count}`);
  }
  const digests = new Map<number, Bytes>();
  const badAlgorithm = (message: string) =>
    malformed("eventlog.digest_algorithm", `eventlog.digest_algorithm: expected ${message}`);
  for (let i = 0; i < count; i++) {
    const kind = reader.uint(2, "digest_algorithm");
    if (!sizes.has(kind) || digests.has(kind)) throw badAlgorithm(`one of the Spec ID event's, each once, got ${kind}`);
    digests.set(kind, reader.take(sizes.get(kind)!, "digest"));
  }
  const digest = digests.get(SHA384);
  if (!digest) throw badAlgorithm("a SHA-384 digest");
  return { register, type, digest, data: reader.take(sizeOf(reader.uint(4, "event_size")), "event") };
}

function registerOf(value: number): number {
  if (value > 4) throw malformed("eventlog.register", `eventlog.register: expected 0 to 4, got ${value}`);
  return value;
}

function sizeOf(value: number): number {
  if (value > MAX_EVENT_BYTES) {
    const message = `eventlog.event_size: expected at most ${MAX_EVENT_BYTES}, got ${value}`;
    throw malformed("eventlog.event_size", message);
  }
  return value;
}

const EVENT_TYPE = 0x434d0001;
const REGISTER = 4;
export const BOOT_EVENTS = ["image-id", "config", "weights-root", "numerics", "gpu", "keys", "system-ready"] as const;
const MODES = ["cc-on", "protected-pcie", "cc-off"];
const MAX_GPUS = 64;
const MAX_TEXT = 64;

export interface GpuIdentity {
  readonly deviceKey: Bytes;
  readonly mode: string;
  readonly devtools: boolean;
}

/** What our init measured into RTMR3. */
export interface BootEvents {
  readonly imageId: Bytes;
  readonly config: Bytes;
  readonly weightsRoot: Bytes;
  readonly profile: string;
  readonly kernelDigest: Bytes;
  readonly gpus: readonly GpuIdentity[];
  readonly keys: Bytes;
}

/** Parse a complete RTMR3 log; refuses `rtmr3.*`, `eventlog.*`, `cbor.*`. */
export function parseBootLog(data: Bytes): BootEvents {
  const log = parseEventLog(data);
  const { spec } = log;
  const ours =
    spec.register === REGISTER && spec.platformClass === 0 && equal(spec.version, Uint8Array.of(0, 2, 0)) &&
    spec.uintnSize === 2 && spec.algorithms.length === 1 && spec.vendorInfo.length === 0;
  if (log.padding || !ours) throw malformed("rtmr3.header", "rtmr3: expected our header and no padding");
  const values: cbor.Value[] = [];
  log.events.forEach((event, position) => {
    const name = BOOT_EVENTS[position];
    if (name === undefined) {
      throw malformed("rtmr3.after_ready", `rtmr3: expected no event after ${BOOT_EVENTS.at(-1)}`);
    }
    if (event.register !== REGISTER || event.type !== EVENT_TYPE) {
      throw malformed("rtmr3.kind", `rtmr3: expected register ${REGISTER} and our event type at event ${position}`);
    }
    if (!equal(sha384(event.data), event.digest)) {
      throw malformed("rtmr3.digest", `rtmr3: expected the digest of the data at event ${position}`);
    }
    const pair = cbor.decode(event.data);
    if (!Array.isArray(pair) || pair.length !== 2 || pair[0] !== name) {
      throw malformed("rtmr3.order", `rtmr3: expected ${name} at event ${position}`);
    }
    values.push(pair[1]!);
  });
  if (values.length !== BOOT_EVENTS.length) {
    throw malformed("rtmr3.order", `rtmr3: expected ${BOOT_EVENTS[values.length]}, got the end of the log`);
  }
  const [imageId, config, weightsRoot, numerics, gpus, keys, ready] = values;
  if (!Array.isArray(numerics) || numerics.length !== 2 || ready !== null) {
    throw wrongValue("rtmr3: expected [profile, kernel digest] and null");
  }
  return {
    imageId: digestOf(imageId!),
    config: digestOf(config!),
    weightsRoot: digestOf(weightsRoot!),
    profile: textOf(numerics[0]!),
    kernelDigest: digestOf(numerics[1]!),
    gpus: gpusOf(gpus!),
    keys: digestOf(keys!),
  };
}

const wrongValue = (message: string) => malformed("rtmr3.value", message);

function digestOf(value: cbor.Value): Bytes {
  if (!(value instanceof Uint8Array) || value.length !== 32) throw wrongValue("rtmr3: expected a 32-byte digest");
  return value;
}

function textOf(value: cbor.Value): string {
  const good = typeof value === "string" && value.length > 0 && value.length <= MAX_TEXT;
  if (!good || !isAscii(value) || !isPrintable(value)) {
    throw wrongValue(`rtmr3: expected 1 to ${MAX_TEXT} printable ASCII characters`);
  }
  return value;
}

function gpusOf(value: cbor.Value): GpuIdentity[] {
  if (!Array.isArray(value) || value.length > MAX_GPUS) {
    throw wrongValue(`rtmr3.gpu: expected a list of at most ${MAX_GPUS}`);
  }
  const gpus = value.map((item): GpuIdentity => {
    if (!Array.isArray(item) || item.length !== 3 || typeof item[2] !== "boolean") {
      throw wrongValue("rtmr3.gpu: expected [device key, mode, devtools]");
    }
    if (typeof item[1] !== "string" || !MODES.includes(item[1])) throw wrongValue("rtmr3.gpu: expected a known mode");
    return { deviceKey: digestOf(item[0]!), mode: item[1], devtools: item[2] };
  });
  if (gpus.some((gpu, i) => i > 0 && compare(gpus[i - 1]!.deviceKey, gpu.deviceKey) >= 0)) {
    throw wrongValue("rtmr3.gpu: expected distinct device keys in order");
  }
  return gpus;
}
