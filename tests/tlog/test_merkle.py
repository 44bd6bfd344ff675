"""RFC 6962 trees against the vectors of certificate-transparency and a definition written down independently."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import LogError
from countermark.tlog import merkle
from countermark.tlog.merkle import CompactRange, Tree, leaf_hash

LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
PATH_0_OF_8 = [
    "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
]
CONSISTENCY_6_8 = [
    "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
]
CONSISTENCY_2_5 = [
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
]


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def tree_of(leaves: list[bytes]) -> Tree:
    return Tree(leaf_hash(leaf) for leaf in leaves)


def hexed(proof: tuple[bytes, ...]) -> list[str]:
    return [item.hex() for item in proof]


def test_roots_of_the_certificate_transparency_tree() -> None:
    tree, edge = tree_of(LEAVES), CompactRange()
    assert merkle.EMPTY_ROOT == tree.root(0) == edge.root() == mth([])
    for size, expected in enumerate(ROOTS, 1):
        edge.append(leaf_hash(LEAVES[size - 1]))
        assert tree.root(size).hex() == edge.root().hex() == expected


def test_paths_of_the_certificate_transparency_tree() -> None:
    tree = tree_of(LEAVES)
    assert hexed(merkle.inclusion_proof(0, 8, tree.node)) == PATH_0_OF_8
    assert hexed(merkle.inclusion_proof(5, 8, tree.node)) == [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        CONSISTENCY_6_8[1],
        ROOTS[3],
    ]
    assert hexed(merkle.consistency_proof(6, 8, tree.node)) == CONSISTENCY_6_8
    assert hexed(merkle.consistency_proof(2, 5, tree.node)) == CONSISTENCY_2_5
    assert merkle.consistency_proof(8, 8, tree.node) == ()


def test_every_proof_of_every_small_tree() -> None:
    leaves = [bytes([i]) for i in range(40)]
    tree = tree_of(leaves)
    roots = [mth(leaves[:size]) for size in range(41)]
    for size in range(1, 41):
        assert tree.root(size) == roots[size]
        for index in range(size):
            proof = merkle.inclusion_proof(index, size, tree.node)
            merkle.verify_inclusion(index, size, leaf_hash(leaves[index]), proof, roots[size])
        for old in range(1, size + 1):
            proof = merkle.consistency_proof(old, size, tree.node)
            merkle.verify_consistency(old, size, roots[old], roots[size], proof)


def test_truncate_takes_leaves_back() -> None:
    leaves = [bytes([i]) for i in range(20)]
    tree = tree_of(leaves)
    tree.truncate(13)
    assert (tree.size, tree.root()) == (13, mth(leaves[:13]))
    tree.append(leaf_hash(b"other"))
    assert tree.root() == mth([*leaves[:13], b"other"])


def refused(code: str, call: object, *args: object) -> None:
    with pytest.raises(LogError) as caught:
        call(*args)  # type: ignore[operator]
    assert caught.value.code == code


def test_no_changed_inclusion_proof_verifies() -> None:
    leaves = [bytes([i]) for i in range(23)]
    tree, size = tree_of(leaves), 23
    root = mth(leaves)
    for index in range(size):
        proof, leaf = merkle.inclusion_proof(index, size, tree.node), leaf_hash(leaves[index])
        for i in range(len(proof)):
            changed = (*proof[:i], bytes(32), *proof[i + 1 :])
            refused("log.inclusion", merkle.verify_inclusion, index, size, leaf, changed, root)
        refused("log.proof", merkle.verify_inclusion, index, size, leaf, proof[:-1], root)
        refused("log.proof", merkle.verify_inclusion, index, size, leaf, (*proof, bytes(32)), root)
        refused("log.proof", merkle.verify_inclusion, index, size, leaf, (*proof[:-1], b"short"), root)
        refused("log.inclusion", merkle.verify_inclusion, index, size, leaf_hash(b"other"), proof, root)
        for other in range(size):
            if other != index:
                with pytest.raises(LogError):
                    merkle.verify_inclusion(other, size, leaf, proof, root)
    refused("log.range", merkle.verify_inclusion, 23, 23, bytes(32), (), root)
    refused("log.range", merkle.verify_inclusion, -1, 23, bytes(32), (), root)
    refused("log.proof", merkle.verify_inclusion, 0, 2**62, bytes(32), [bytes(32)] * 64, root)


def test_no_changed_consistency_proof_verifies() -> None:
    leaves = [bytes([i]) for i in range(19)]
    tree, new = tree_of(leaves), 19
    for old in range(1, new):
        proof = merkle.consistency_proof(old, new, tree.node)
        roots = (mth(leaves[:old]), mth(leaves))
        for i in range(len(proof)):
            changed = (*proof[:i], bytes(32), *proof[i + 1 :])
            refused("log.consistency", merkle.verify_consistency, old, new, *roots, changed)
        with pytest.raises(LogError):
            merkle.verify_consistency(old, new, *roots, proof[:-1])
        with pytest.raises(LogError):
            merkle.verify_consistency(old, new, *roots, (*proof, bytes(32)))
        refused("log.consistency", merkle.verify_consistency, old, new, bytes(32), roots[1], proof)
        refused("log.consistency", merkle.verify_consistency, old, new, roots[0], bytes(32), proof)
    refused("log.consistency", merkle.verify_consistency, 5, 5, mth(leaves[:5]), bytes(32), ())
    refused("log.proof", merkle.verify_consistency, 5, 5, mth(leaves[:5]), mth(leaves[:5]), [bytes(32)])
    refused("log.range", merkle.verify_consistency, 0, 5, bytes(32), bytes(32), ())
    refused("log.range", merkle.verify_consistency, 6, 5, bytes(32), bytes(32), ())
    refused("log.range", merkle.inclusion_proof, 5, 5, tree.node)
    refused("log.range", merkle.consistency_proof, 0, 5, tree.node)


def test_a_rewritten_leaf_is_no_consistent_history() -> None:
    leaves = [bytes([i]) for i in range(12)]
    forked = tree_of([*leaves[:4], b"rewritten", *leaves[5:]])
    proof = merkle.consistency_proof(7, 12, forked.node)
    refused("log.consistency", merkle.verify_consistency, 7, 12, mth(leaves[:7]), forked.root(), proof)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 80),
    st.integers(1, 80),
    st.binary(min_size=32, max_size=32),
    st.lists(st.binary(max_size=33), max_size=9),
)
def test_arbitrary_proofs_are_refused_in_one_way(index: int, size: int, leaf: bytes, proof: list[bytes]) -> None:
    with pytest.raises(LogError):
        merkle.verify_inclusion(index, size, leaf, proof, b"\x01" * 32)
    with pytest.raises(LogError):
        merkle.verify_consistency(index, size, leaf, b"\x01" * 32, proof)
