/** RFC 9162 Merkle trees over SHA-256: hashing (2.1.1), inclusion (2.1.3.2) and consistency (2.1.4.2), verified. */

import { type Bytes, equal, hex, sha256 } from "./bytes.js";
import { refused } from "./errors.js";

export const HASH_BYTES = 32;
export const MAX_PROOF = 63;
export const MAX_SIZE = (1n << 63n) - 1n;
export const EMPTY_ROOT = sha256(new Uint8Array());

export const leafHash = (leaf: Bytes): Bytes => sha256(Uint8Array.of(0), leaf);
const nodeHash = (left: Bytes, right: Bytes): Bytes => sha256(Uint8Array.of(1), left, right);

const badProof = (message: string) => refused("log.proof", message);

/** Refuses `log.range`, `log.proof`, `log.inclusion`. */
export function verifyInclusion(index: bigint, size: bigint, leaf: Bytes, proof: readonly Bytes[], root: Bytes): void {
  if (index < 0n || index >= size || size > MAX_SIZE) {
    throw refused("log.range", `leaf index: expected less than the tree size ${size}, got ${index}`);
  }
  checkHashes(proof);
  let [first, last, node] = [index, size - 1n, leaf];
  for (const sibling of proof) {
    if (last === 0n) throw badProof("inclusion proof: longer than the tree is high");
    if (first & 1n || first === last) {
      node = nodeHash(sibling, node);
      while (!(first & 1n) && first) [first, last] = [first >> 1n, last >> 1n];
    } else {
      node = nodeHash(node, sibling);
    }
    [first, last] = [first >> 1n, last >> 1n];
  }
  if (last) throw badProof("inclusion proof: shorter than the tree is high");
  if (!equal(node, root)) throw refused("log.inclusion", `root: expected ${hex(root)}, got ${hex(node)}`);
}

/** Refuses `log.range`, `log.proof`, `log.consistency`. */
export function verifyConsistency(
  oldSize: bigint,
  newSize: bigint,
  oldRoot: Bytes,
  newRoot: Bytes,
  proof: readonly Bytes[],
): void {
  if (oldSize < 1n || oldSize > newSize || newSize > MAX_SIZE) {
    throw refused("log.range", `tree size: expected 1 to ${newSize}, got ${oldSize}`);
  }
  checkHashes(proof);
  if (oldSize === newSize) {
    if (proof.length) throw badProof("consistency proof: expected none between equal sizes");
    sameRoot("old root", newRoot, oldRoot);
    return;
  }
  // Where the old tree is one complete subtree, its root is where the proof starts.
  const path = (oldSize & (oldSize - 1n)) === 0n ? [oldRoot, ...proof] : [...proof];
  if (!path.length) throw badProof("consistency proof: expected hashes, got none");
  let [first, last] = [oldSize - 1n, newSize - 1n];
  while (first & 1n) [first, last] = [first >> 1n, last >> 1n];
  let [fromOld, fromNew] = [path[0]!, path[0]!];
  for (const sibling of path.slice(1)) {
    if (last === 0n) throw badProof("consistency proof: longer than the tree is high");
    if (first & 1n || first === last) {
      [fromOld, fromNew] = [nodeHash(sibling, fromOld), nodeHash(sibling, fromNew)];
      while (!(first & 1n) && first) [first, last] = [first >> 1n, last >> 1n];
    } else {
      fromNew = nodeHash(fromNew, sibling);
    }
    [first, last] = [first >> 1n, last >> 1n];
  }
  if (last) throw badProof("consistency proof: shorter than the tree is high");
  sameRoot("old root", oldRoot, fromOld);
  sameRoot("new root", newRoot, fromNew);
}

function sameRoot(what: string, expected: Bytes, got: Bytes): void {
  if (!equal(expected, got)) throw refused("log.consistency", `${what}: expected ${hex(expected)}, got ${hex(got)}`);
}

function checkHashes(proof: readonly Bytes[]): void {
  if (proof.length > MAX_PROOF || proof.some((item) => item.length !== HASH_BYTES)) {
    throw badProof(`proof: expected at most ${MAX_PROOF} hashes of ${HASH_BYTES} bytes`);
  }
}
