"""Code that is not ours reads what we publish: tlog-scales (C2SP tiles, notes, cosignatures, proofs) and pycose (COSE).

tlog-scales is by the author of sigmon, a Sigsum monitor; pycose an implementation of RFC 9052. Each is also shown
something changed, and must refuse it.
"""

from __future__ import annotations

from pathlib import Path

import cbor2
import pytest
from log_tree import Operator, boot
from pycose.keys import EC2Key
from pycose.messages import SignMessage
from record_values import intent, open_recorder, outcome
from tlog_scales.backend import LocalBackend
from tlog_scales.reader import TilesReader
from tlog_scales.signing import Vkey
from tlog_scales.tlog import ConsistencyProof, ConsistencyProofInvalid, InclusionProof, InclusionProofInvalid

from countermark import cosigned
from countermark.formats.witnessed import boot_log_keys
from countermark.logkeys import new_keys, verify_signature
from countermark.logsource import directory
from countermark.tlog import merkle
from countermark.tlog.checkpoint import ED25519, ML_DSA_44, verify_checkpoint
from countermark.tlog.cosignature import VerifierKey, parse_vkey
from countermark_appliance.platform.keyring import Keyring
from countermark_appliance.records.previous import read_sidecar
from countermark_appliance.records.recorder import Recorder
from countermark_appliance.records.signer import Signer

ANSWERS = 300  # more than a tile holds


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published files of a boot's log."""
    root = tmp_path_factory.mktemp("log")
    recorder = open_recorder(root)
    for _ in range(ANSWERS):
        outcome(recorder, intent(recorder))
    recorder.close()
    return root / recorder.epoch.boot_id.hex()


def reader(path: Path) -> TilesReader:
    found = TilesReader(LocalBackend(path))
    found.get_checkpoint()
    return found


def test_another_reader_finds_the_same_tree(log: Path) -> None:
    theirs, sidecar = reader(log), read_sidecar(log)
    checkpoint = theirs.get_checkpoint()
    keys = boot_log_keys(sidecar.keys)
    ours = verify_checkpoint((log / "checkpoint").read_bytes(), sidecar.epoch.origin, keys, verify_signature)
    assert (checkpoint.origin, checkpoint.size, checkpoint.root_hash) == (ours.origin, ours.size, ours.root)
    assert ours.size == 1 + 2 * ANSWERS
    for kind, public in ((ED25519, keys.ed25519), (ML_DSA_44, keys.ml_dsa_44)):
        checkpoint.verify(Vkey(ours.origin, None, kind, public))
        with pytest.raises(RuntimeError):  # another key has another id
            checkpoint.verify(Vkey(ours.origin, None, kind, public[:-1] + bytes([public[-1] ^ 1])))
    assert theirs.calculate_root_hash() == ours.root
    source = directory(log)
    entries = [*source.entries(0, 256), *source.entries(1, 256), *source.entries(2, ours.size - 512)]
    assert [theirs.get_entry(i) for i in range(ours.size)] == entries


def test_proofs_are_the_same_both_ways(log: Path) -> None:
    theirs, source = reader(log), directory(log)
    head = theirs.get_checkpoint()
    sidecar = read_sidecar(log)
    ours = verify_checkpoint(
        (log / "checkpoint").read_bytes(), sidecar.epoch.origin, boot_log_keys(sidecar.keys), verify_signature
    )
    for index in (*range(0, ours.size, 7), 255, 256, 511, 512, ours.size - 1):
        proof = source.inclusion(index, ours)
        assert tuple(theirs.get_inclusion_proof(index, ours.size).node_hashes) == proof
        hashed = merkle.leaf_hash(theirs.get_entry(index))
        InclusionProof(index, ours.size, list(proof)).check(hashed, head.root_hash)
        with pytest.raises(InclusionProofInvalid):
            InclusionProof(index, ours.size, list(proof)).check(bytes(32), head.root_hash)
    for old in (*range(1, ours.size, 11), 255, 256, 257, 512, ours.size):
        proof = source.consistency(old, ours)
        assert tuple(theirs.get_consistency_proof(old, ours.size).node_hashes) == proof
        old_root = theirs.mth(0, old)
        ConsistencyProof(old, ours.size, list(proof)).check(old_root, head.root_hash)
        merkle.verify_consistency(old, ours.size, old_root, ours.root, proof)
        if old < ours.size:
            with pytest.raises(ConsistencyProofInvalid):
                ConsistencyProof(old, ours.size, list(proof)).check(bytes(32), head.root_hash)


def test_every_size_of_the_log_has_the_same_root(log: Path) -> None:
    theirs, ours = reader(log), merkle.Tree()
    for index in range(1 + 2 * ANSWERS):
        ours.append(merkle.leaf_hash(theirs.get_entry(index)))
        assert theirs.mth(0, index + 1) == ours.root()


def test_cosignatures_hold_for_another_verifier(tmp_path: Path) -> None:
    operator, witness = Operator(tmp_path / "starts"), new_keys("w.example/1")
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    signed = operator.cosign(tmp_path / "state", witness)
    assert signed is not None
    cosigned.add_lines(operator.path, signed.log.note, signed.lines)
    checkpoint = reader(operator.path).get_checkpoint()
    assert len(checkpoint.signatures) == 4
    for key in (*operator.keys.as_log, *witness.as_witness):
        theirs = Vkey.from_string(str(key))
        assert theirs.key_id == int.from_bytes(key.key_id)
        assert parse_vkey(theirs.serialize()) == key
        checkpoint.verify(theirs)
    stranger = new_keys("w.example/1").as_witness
    with pytest.raises(RuntimeError):
        checkpoint.verify(Vkey.from_string(str(stranger[0])))


def test_cosignatures_of_another_signer_hold_for_us(tmp_path: Path) -> None:
    """Their ML-DSA-44 signer over our checkpoint; type 0x04 they only verify."""
    from tlog_scales.signing import MLDSA44CosignatureSigner

    from countermark.tlog.checkpoint import Signature
    from countermark.tlog.cosignature import verify_cosignatures, with_lines

    operator = Operator(tmp_path / "starts")
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    signer = MLDSA44CosignatureSigner("w.example/theirs", bytes(range(32)))
    line = signer.sign(reader(operator.path).get_checkpoint())
    ours = Signature(name=line.name, key_id=line.key_id.to_bytes(4), blob=line.payload)
    key = VerifierKey(name="w.example/theirs", kind=ML_DSA_44, public=signer.vkey.pubkey)
    note = with_lines(operator.note, [ours])
    assert verify_cosignatures(note, [key], verify_signature) == ("w.example/theirs",)


@pytest.mark.parametrize("change", ["", "payload", "header", "signature"])
def test_a_receipts_es256_half_holds_for_another_cose(tmp_path: Path, change: str) -> None:
    """pycose knows no ML-DSA, and no cbor2 of today, so it is handed the decoded structure with the first signer."""
    keyring = Keyring()
    recorder: Recorder = open_recorder(tmp_path)
    recorder._signer = Signer(keyring)
    receipt = recorder.receipt(outcome(recorder, intent(recorder)))
    recorder.close()
    tagged = cbor2.loads(receipt)
    body, unprotected, payload, signers = tagged.value
    protected, _, signature = signers[0]
    assert (tagged.tag, len(signers)) == (98, 2)
    if change == "payload":
        payload = payload[:-1] + bytes([payload[-1] ^ 1])
    if change == "header":
        body = body.replace(b"receipt+cbor", b"receipt+CBOR")
    if change == "signature":
        signature = signature[:-1] + bytes([signature[-1] ^ 1])
    message = SignMessage.from_cose_obj([body, dict(unprotected), payload, [[protected, {}, signature]]], True)
    numbers = keyring.receipt_es256.public_key().public_numbers()
    signer = message.signers[0]
    signer.key = EC2Key(crv="P_256", x=numbers.x.to_bytes(32), y=numbers.y.to_bytes(32))
    signer.external_aad = b"countermark/receipt/v1"
    assert signer.verify_signature() is (change == "")
