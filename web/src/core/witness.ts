/**
 * Step 20: does the operator log hold this start, and have enough witnesses seen it?
 *
 * The EPOCH that came along is the appraised boot's, and leaf 0 of that boot's log; it stands in the policy's operator
 * log, under a head with both of the operator's signatures; and of the policy's witnesses enough have cosigned that
 * head. Where the policy asks for it, so has a checkpoint of the boot's own log that extends the receipt's. A policy
 * that names no operator log leaves the step out, and the result says `unwitnessed`.
 */

import { type Bytes, hex } from "./bytes.js";
import * as cbor from "./cbor.js";
import { type Checkpoint, ED25519, MAX_NOTE_BYTES, ML_DSA_44, verifyCheckpoint } from "./checkpoint.js";
import { verifyCosignatures } from "./cosignature.js";
import { type Refusal, malformed, refused } from "./errors.js";
import { HASH_BYTES, MAX_PROOF, leafHash, verifyConsistency, verifyInclusion } from "./merkle.js";
import type { Policy } from "./policy.js";
import { MAX_RECORD_BYTES, leafDigest, parseEpoch } from "./records.js";
import type { Steps, Verdict } from "./steps.js";

export const MAX_WITNESSED_BYTES = 2 * MAX_NOTE_BYTES + MAX_RECORD_BYTES + 16 * 1024;
export const MAX_RECEIPT_WITNESS_BYTES = MAX_NOTE_BYTES + 16 * 1024;
const MAX_INDEX = (1n << 63n) - 2n;
const SALT_BYTES = 32;
const RECEIPT = "log witnesses of the receipt";

/** Step 20 for the EPOCH in a bundle: the witnesses that count. */
export function verifyWitnessed(data: Bytes | null, verdict: Verdict, policy: Policy, steps: Steps): string[] {
  const named = policy.operatorLog.length > 0;
  if (!named || (!data?.length && !policy.witnessesRequired)) {
    const why = named ? "no EPOCH in it was shown" : "the policy names no operator log";
    steps.skip("20", `unwitnessed: ${why}; nobody else is known to have seen this log`);
    return [];
  }
  return steps.step("20", (detail) => {
    if (!data?.length) throw unwitnessed("the operator log", policy, []);
    const [head, index, note] = verifyEpoch(data, verdict, policy);
    const names = counted(note, policy, "the start's EPOCH", true);
    detail(`EPOCH ${index} of ${head.size} in ${head.origin}; ${witnessedBy(names)}`);
    return names;
  });
}

/** Step 20 for the receipt's checkpoint. Nothing is asked for unless the policy says `epoch-and-receipt`. */
export function verifyReceiptWitness(
  data: Bytes | null,
  verdict: Verdict,
  before: Checkpoint,
  policy: Policy,
  steps: Steps,
): void {
  const required = policy.witnessesRequired > 0 && policy.witnessed === "epoch-and-receipt";
  if (!policy.witnesses.length || (data === null && !required)) return;
  steps.step("20", (detail) => {
    if (data === null) throw unwitnessed("the receipt's checkpoint", policy, []);
    const { checkpoint, proof } = parseReceiptWitness(data);
    const head = openBoot(checkpoint, verdict);
    verifyConsistency(before.size, head.size, before.root, head.root, proof);
    const names = counted(checkpoint, policy, "the receipt's checkpoint", required);
    detail(`sizes ${before.size}, ${head.size}; witnessed by ${names.join(", ") || "nobody"}`);
  }, "", RECEIPT);
}

export const witnessedBy = (names: readonly string[]): string =>
  names.length ? `witnessed by ${names.join(", ")}` : "unwitnessed";

/** Refuses `cbor.*`, `witnessed.field`. */
export function parseWitnessed(data: Bytes) {
  const value = fields(data, "witnessed", MAX_WITNESSED_BYTES, {
    record: "bytes",
    salt: "bytes",
    index: "int",
    proof: "list",
    checkpoint: "bytes",
    boot_proof: "list",
    boot_checkpoint: "bytes",
  });
  const [salt, index] = [value.bytes("salt"), value.int("index")];
  if (salt.length !== SALT_BYTES) {
    throw malformed("witnessed.field", `witnessed: expected a salt of ${SALT_BYTES} bytes, got ${salt.length}`);
  }
  if (index < 0n || index > MAX_INDEX) throw malformed("witnessed.field", "witnessed.index: expected at most 63 bits");
  return {
    record: value.bytes("record"),
    salt,
    index,
    proof: proofOf("witnessed", value.list("proof")),
    checkpoint: value.bytes("checkpoint"),
    bootProof: proofOf("witnessed", value.list("boot_proof")),
    bootCheckpoint: value.bytes("boot_checkpoint"),
  };
}

/** Refuses `cbor.*`, `receipt_witness.field`. */
export function parseReceiptWitness(data: Bytes) {
  const value = fields(data, "receipt_witness", MAX_RECEIPT_WITNESS_BYTES, { checkpoint: "bytes", proof: "list" });
  return { checkpoint: value.bytes("checkpoint"), proof: proofOf("receipt_witness", value.list("proof")) };
}

function verifyEpoch(data: Bytes, verdict: Verdict, policy: Policy): [Checkpoint, bigint, Bytes] {
  const { record, salt, index, proof, checkpoint, bootProof, bootCheckpoint } = parseWitnessed(data);
  const epoch = parseEpoch(record);
  const { claims } = verdict;
  const same = [
    ["boot id", hex(claims.boot_id), hex(epoch.boot_id)],
    ["keys digest", hex(claims.keys), hex(epoch.keys_digest)],
    ["log origin", claims.logOrigin, epoch.origin],
  ] as const;
  for (const [name, wanted, got] of same) {
    if (wanted !== got) throw refused("log.operator", `${name} of the EPOCH: expected ${wanted}, got ${got}`);
  }
  const boot = openBoot(bootCheckpoint, verdict);
  verifyInclusion(0n, boot.size, leafDigest("epoch", epoch.boot_id, null, record, salt, 0n), bootProof, boot.root);
  const [classic, later] = [ED25519, ML_DSA_44].map((kind) => policy.operatorLog.find((key) => key.kind === kind)!);
  const head = verifyCheckpoint(checkpoint, classic!.name, classic!.key, later!.key);
  const leaf = cbor.encode(cbor.mapOf({ v: 1n, type: "operator-epoch", record, salt }));
  verifyInclusion(index, head.size, leafHash(leaf), proof, head.root);
  return [head, index, checkpoint];
}

const openBoot = (data: Bytes, { claims, keys }: Verdict): Checkpoint =>
  verifyCheckpoint(data, claims.logOrigin, keys["log-ed25519"], keys["log-ml-dsa-44"]);

function counted(note: Bytes, policy: Policy, what: string, required: boolean): string[] {
  const names = verifyCosignatures(note, policy.witnesses);
  if (required && names.length < policy.witnessesRequired) throw unwitnessed(what, policy, names);
  return names;
}

function unwitnessed(what: string, policy: Policy, names: readonly string[]): Refusal {
  const wanted = `expected at least ${policy.witnessesRequired} witnesses, got ${names.join(", ") || "none"}`;
  return refused("log.unwitnessed", `${what}: ${wanted}`);
}

function fields(data: Bytes, what: string, most: number, types: Record<string, cbor.Type>): cbor.Fields {
  const value = cbor.fields(cbor.decode(data, most), what, { v: "int", ...types });
  if (value.int("v") !== 1n) throw malformed(`${what}.field`, `${what}.v: expected 1, got ${value.int("v")}`);
  return value;
}

function proofOf(what: string, items: cbor.Value[]): Bytes[] {
  const good = items.every((item) => item instanceof Uint8Array && item.length === HASH_BYTES);
  if (items.length > MAX_PROOF || !good) {
    throw malformed(`${what}.field`, `${what}: expected proofs of at most ${MAX_PROOF} hashes of ${HASH_BYTES} bytes`);
  }
  return items as Bytes[];
}
