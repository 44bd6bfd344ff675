/**
 * What a bundle carries to show by when its log had grown so far: tokens of others over checkpoints. Read, so that no
 * byte goes unaccounted for, and not judged: that is left to the command line (step 21).
 */

import type { Bytes } from "./bytes.js";
import * as cbor from "./cbor.js";
import { MAX_NOTE_BYTES } from "./checkpoint.js";
import { malformed } from "./errors.js";
import { HASH_BYTES, MAX_PROOF } from "./merkle.js";

const MAX_ANCHORS = 8;
const MAX_TOKEN_BYTES = 64 * 1024;
export const MAX_ANCHORS_BYTES = MAX_ANCHORS * (MAX_NOTE_BYTES + MAX_TOKEN_BYTES + 4096);
const KINDS = ["rfc3161", "ots"];

/** The kind of each; refuses `cbor.*`, `anchors.*`. */
export function parseAnchors(data: Bytes): string[] {
  const bad = (code: string, message: string) => malformed(`anchors.${code}`, `anchors.${code}: expected ${message}`);
  const value = cbor.fields(cbor.decode(data, MAX_ANCHORS_BYTES), "anchors", { v: "int", anchors: "list" });
  if (value.int("v") !== 1n) throw bad("version", `1, got ${value.int("v")}`);
  const items = value.list("anchors");
  if (!items.length || items.length > MAX_ANCHORS) throw bad("count", `1 to ${MAX_ANCHORS}, got ${items.length}`);
  return items.map((item) => {
    const anchor = cbor.fields(item, "anchors", { kind: "text", checkpoint: "bytes", proof: "list", token: "bytes" });
    const kind = anchor.text("kind");
    if (!KINDS.includes(kind)) throw bad("kind", KINDS.join(" or "));
    for (const [name, most] of [["checkpoint", MAX_NOTE_BYTES], ["token", MAX_TOKEN_BYTES]] as const) {
      if (anchor.bytes(name).length > most) throw bad("too_long", `at most ${most} bytes of ${name}`);
    }
    const proof = anchor.list("proof");
    if (proof.length > MAX_PROOF || proof.some((node) => !(node instanceof Uint8Array && node.length === HASH_BYTES))) {
      throw bad("proof", `at most ${MAX_PROOF} hashes of ${HASH_BYTES} bytes`);
    }
    return kind;
  });
}
