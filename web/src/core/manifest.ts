/**
 * The measurement manifest: what an image measures to, in a DSSE envelope with two signatures (docs/formats.md, 9).
 *
 * An in-toto Statement v1; one value has one byte string, so parsing encodes again and compares. Not checked here: the
 * signatures and times of a manifest that stands in a policy, which checked them when it was pinned.
 */

import { type Bytes, base64, concat, equal, fromBase64, fromHex, hex, includes, isPrintable, points, rfc3339, sha256, utf8, zeros } from "./bytes.js";
import { malformed, refused } from "./errors.js";
import { replay } from "./eventlog.js";
import { type Json, type JsonObject, dumpBytes, load } from "./json.js";
import { type Algorithm, type CoseKey, checkPoint, encodeCoseKey, parseCoseKey, verifySignature } from "./keys.js";

const STATEMENT_TYPE = "https://in-toto.io/Statement/v1";
const PREDICATE_TYPE = "https://countermark.dev/measurement/v1";
const PAYLOAD_TYPE = "application/vnd.in-toto+json";
export const MAX_MANIFEST_BYTES = 4 * 1024 * 1024;
const MAX_SHAPES = 64;
const MAX_TEXT = 256;
const MAX_ITEMS = 4096;
const SIGNERS: readonly (readonly [Algorithm, number])[] = [["ES256", 64], ["ML_DSA_65", 3309]];
export const IMAGE_KINDS = ["production", "test", "development", "simulated"];

export interface Shape {
  readonly name: string;
  readonly mrtd: Bytes;
  readonly rtmr0: Bytes;
}

interface PredictedEvent {
  readonly register: number;
  readonly type: number;
  readonly digest: Bytes;
  readonly source: string;
  readonly shape: string;
  readonly note: string;
}

export interface Manifest {
  readonly kind: string;
  readonly platform: string;
  readonly version: number;
  readonly notBefore: number;
  readonly notAfter: number;
  readonly image_id: Bytes;
  readonly shapes: readonly Shape[];
  readonly rtmr1: Bytes;
  readonly rtmr2: Bytes;
  readonly td_attributes: Bytes;
  readonly xfam: Bytes;
  readonly mrconfigid: Bytes;
  readonly mrowner: Bytes;
  readonly mrownerconfig: Bytes;
  readonly events: readonly PredictedEvent[];
}

const bad = (code: string, message: string) => malformed(`manifest.${code}`, `manifest.${message}`);

function members(value: Json | undefined, ...names: string[]): JsonObject {
  if (!(value instanceof Map) || value.size !== names.length || names.some((name) => !value.has(name))) {
    throw bad("members", `members: expected an object with exactly ${names.sort().join(", ")}`);
  }
  return value;
}

function items(value: Json | undefined, name: string, most: number): Json[] {
  if (!Array.isArray(value) || value.length > most) throw bad("members", `${name}: expected a list of at most ${most}`);
  return value;
}

function text(value: Json | undefined, name: string): string {
  if (typeof value !== "string" || points(value) > MAX_TEXT || !isPrintable(value)) {
    throw bad("text", `${name}: expected at most ${MAX_TEXT} printable characters`);
  }
  return value;
}

function uint(value: Json | undefined, name: string): number {
  if (typeof value !== "bigint" || value < 0n || value >= 1n << 53n) {
    throw bad("integer", `${name}: expected an integer from 0 to 2^53 - 1`);
  }
  return Number(value);
}

function digest(value: Json | undefined, size: number, name: string): Bytes {
  const data = typeof value === "string" ? fromHex(value) : null;
  if (data?.length !== size) throw bad("digest", `${name}: expected ${size} bytes of hex`);
  return data;
}

function unbase64(value: Json | undefined, name: string): Bytes {
  const data = typeof value === "string" ? fromBase64(value) : null;
  if (data === null) throw bad("base64", `${name}: expected base64`);
  return data;
}

interface Signature {
  readonly key: CoseKey;
  readonly signature: Bytes;
}

/** A DSSE envelope in its one compact form; refuses `manifest.*`, `cose_key.*`, `cbor.*`. */
function parseEnvelope(data: Bytes): { payload: Bytes; signatures: Signature[] } {
  const value = members(load(data, "manifest", MAX_MANIFEST_BYTES), "payloadType", "payload", "signatures");
  if (value.get("payloadType") !== PAYLOAD_TYPE) {
    throw bad("payload_type", `payloadType: expected ${PAYLOAD_TYPE}`);
  }
  const entries = items(value.get("signatures"), "signatures", 2);
  if (entries.length !== 2) throw bad("signatures", `signatures: expected 2, got ${entries.length}`);
  const signatures = SIGNERS.map(([algorithm, size], i): Signature => {
    const entry = members(entries[i], "keyid", "publicKey", "sig");
    const key = parseCoseKey(unbase64(entry.get("publicKey"), "publicKey"));
    const signature = unbase64(entry.get("sig"), "sig");
    if (key.algorithm !== algorithm || signature.length !== size) {
      throw bad("signatures", `signatures: expected ${algorithm} here`);
    }
    if (entry.get("keyid") !== keyId(key)) throw bad("keyid", "keyid: expected the digest of the public key");
    return { key, signature };
  });
  const payload = unbase64(value.get("payload"), "payload");
  const again: JsonObject = new Map<string, Json>([
    ["payloadType", PAYLOAD_TYPE],
    ["payload", base64(payload)],
    [
      "signatures",
      signatures.map(
        ({ key, signature }): Json =>
          new Map([
            ["keyid", keyId(key)],
            ["publicKey", base64(encodeCoseKey(key))],
            ["sig", base64(signature)],
          ]),
      ),
    ],
  ]);
  if (!equal(dumpBytes(again), data)) throw bad("not_canonical", "form: expected the one compact encoding");
  return { payload, signatures };
}

/** How a policy names a manifest signer. */
const signerDigest = (key: CoseKey): Bytes => sha256(encodeCoseKey(key));
const keyId = (key: CoseKey): string => hex(signerDigest(key));

/** The statement; refuses `manifest.*`. */
export function parseManifest(data: Bytes): Manifest {
  const whole = load(data, "manifest", MAX_MANIFEST_BYTES);
  const value = members(whole, "_type", "subject", "predicateType", "predicate");
  if (value.get("_type") !== STATEMENT_TYPE || value.get("predicateType") !== PREDICATE_TYPE) {
    throw bad("type", `type: expected an in-toto statement with ${PREDICATE_TYPE}`);
  }
  const body = members(
    value.get("predicate"),
    ..."kind platform simulated version not_before not_after image_id shapes rtmr1 rtmr2".split(" "),
    ..."td_attributes xfam mrseam mrconfigid mrowner mrownerconfig events revoked_images".split(" "),
  );
  const platform = body.get("platform");
  if (platform !== "sim" && platform !== "tdx" && platform !== "vtpm") {
    throw bad("platform", "platform: expected sim, tdx or vtpm");
  }
  const kind = body.get("kind");
  if (typeof kind !== "string" || !IMAGE_KINDS.includes(kind)) throw bad("kind", "kind: expected a known image kind");
  for (const item of items(value.get("subject"), "subject", MAX_ITEMS)) {
    const subject = members(item, "name", "digest");
    const named = members(subject.get("digest"), "sha256");
    text(subject.get("name"), "subject");
    digest(named.get("sha256"), 32, "subject");
  }
  const manifest: Manifest = {
    kind,
    platform,
    version: uint(body.get("version"), "version"),
    notBefore: uint(body.get("not_before"), "not_before"),
    notAfter: uint(body.get("not_after"), "not_after"),
    image_id: digest(body.get("image_id"), 32, "image_id"),
    shapes: items(body.get("shapes"), "shapes", MAX_SHAPES).map(shape),
    rtmr1: digest(body.get("rtmr1"), 48, "rtmr1"),
    rtmr2: digest(body.get("rtmr2"), 48, "rtmr2"),
    td_attributes: digest(body.get("td_attributes"), 8, "td_attributes"),
    xfam: digest(body.get("xfam"), 8, "xfam"),
    mrconfigid: digest(body.get("mrconfigid"), 48, "mrconfigid"),
    mrowner: digest(body.get("mrowner"), 48, "mrowner"),
    mrownerconfig: digest(body.get("mrownerconfig"), 48, "mrownerconfig"),
    events: items(body.get("events"), "events", MAX_ITEMS).map(event),
  };
  for (const item of items(body.get("mrseam"), "mrseam", MAX_SHAPES)) digest(item, 48, "mrseam");
  for (const item of items(body.get("revoked_images"), "revoked_images", MAX_ITEMS)) digest(item, 32, "revoked_images");
  checkManifest(manifest);
  // Digests have one form, and the rest of the members are what they are: equal again but for `simulated` and case.
  const canonical = new Map(body).set("simulated", platform !== "tdx");
  const again: JsonObject = new Map(value).set("predicate", canonical);
  if (!equal(dumpBytes(lowerHex(again)), data)) throw bad("not_canonical", "form: expected the one compact encoding");
  return manifest;
}

const HEX_MEMBERS = new Set(
  "sha256 image_id mrtd rtmr0 rtmr1 rtmr2 td_attributes xfam mrconfigid mrowner mrownerconfig digest".split(" "),
);
const HEX_LISTS = new Set(["mrseam", "revoked_images"]);

/** The same value with every digest as `hex` writes it. */
function lowerHex(value: Json, name = ""): Json {
  if (value instanceof Map) return new Map([...value].map(([key, item]) => [key, lowerHex(item, key)]));
  if (Array.isArray(value)) return value.map((item) => lowerHex(item, HEX_LISTS.has(name) ? name : ""));
  const isHex = typeof value === "string" && (HEX_MEMBERS.has(name) || HEX_LISTS.has(name));
  return isHex ? hex(fromHex(value)!) : value;
}

function shape(item: Json): Shape {
  const fields = members(item, "name", "mrtd", "rtmr0");
  const name = text(fields.get("name"), "shapes");
  if (!name) throw bad("shapes", "shapes: expected a name");
  return { name, mrtd: digest(fields.get("mrtd"), 48, "mrtd"), rtmr0: digest(fields.get("rtmr0"), 48, "rtmr0") };
}

function event(item: Json): PredictedEvent {
  const fields = members(item, "register", "event_type", "digest", "source", "shape", "note");
  const register = uint(fields.get("register"), "register");
  const type = uint(fields.get("event_type"), "event_type");
  if (register < 1 || register > 4 || type >= 2 ** 32) {
    throw bad("events", "events: expected register 1 to 4 and a 32-bit type");
  }
  const source = fields.get("source");
  if (source !== "image" && source !== "firmware" && source !== "launch") {
    throw bad("events", "events: expected source image, firmware or launch");
  }
  return {
    register,
    type,
    digest: digest(fields.get("digest"), 48, "digest"),
    source,
    shape: text(fields.get("shape"), "shape"),
    note: text(fields.get("note"), "note"),
  };
}

/** Refuse a manifest that contradicts itself. */
function checkManifest(manifest: Manifest): void {
  if (manifest.notAfter <= manifest.notBefore) {
    throw bad("validity", "not_after: expected later than not_before");
  }
  if (manifest.kind === "production" && manifest.platform !== "tdx") {
    throw bad("kind", "kind: expected no production image on a simulated platform");
  }
  const names = manifest.shapes.map(({ name }) => name);
  if (!names.length || new Set(names).size !== names.length) {
    throw bad("shapes", "shapes: expected at least one, with distinct names");
  }
  if (manifest.events.some((item) => item.shape && (!names.includes(item.shape) || item.register !== 1))) {
    throw bad("events", "events: expected shape events of a named shape in RTMR0");
  }
  for (const { name, rtmr0 } of manifest.shapes) {
    const found = replay(manifest.events.filter((item) => item.shape === "" || item.shape === name));
    const wanted = [rtmr0, manifest.rtmr1, manifest.rtmr2, zeros(48)];
    if (found.some((value, i) => !equal(value, wanted[i]!))) {
      throw bad("events", `events: expected to replay to the registers of ${name}`);
    }
  }
}

/** Step 19: both signatures under keys whose digests are in `signers`, and the validity at `now`. */
export function verifyManifest(envelope: Bytes, signers: readonly Bytes[], now: number): Manifest {
  const { payload, signatures } = parseEnvelope(envelope);
  const head = `DSSEv1 ${utf8(PAYLOAD_TYPE).length} ${PAYLOAD_TYPE} ${payload.length} `;
  const message = concat(utf8(head), payload);
  for (const { key, signature } of signatures) {
    if (!includes(signers, signerDigest(key))) {
      const known = signers.map(hex).join(" or ") || "a signer (none is named)";
      throw refused("manifest.signer", `manifest signer: expected ${known}, got ${keyId(key)}`);
    }
    checkPoint(key);
    if (!verifySignature(key, signature, message)) {
      const whose = `the ${key.algorithm} signature of ${keyId(key)}`;
      throw refused("manifest.signature", `manifest: ${whose} does not verify`);
    }
  }
  const image = parseManifest(payload);
  if (now < image.notBefore) {
    const message = `manifest: valid from ${rfc3339(image.notBefore)}, time is ${rfc3339(now)}`;
    throw refused("manifest.not_yet_valid", message);
  }
  if (now > image.notAfter) {
    throw refused("manifest.expired", `manifest: valid until ${rfc3339(image.notAfter)}, time is ${rfc3339(now)}`);
  }
  return image;
}
