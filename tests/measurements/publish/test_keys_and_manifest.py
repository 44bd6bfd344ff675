"""The publisher's key files, and what a manifest is made from."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from publisher import (
    DAY_S,
    LOG_NAME,
    NOW,
    image_id,
    image_json,
    prediction,
    publisher,
    sha256,
    signed,
    statement,
)

from countermark.errors import CountermarkError, FormatError, UsageError
from countermark.formats.manifest import ImageKind, Subject, encode_manifest, parse_manifest, signer_digest
from countermark.policy import SIMULATED_MRSEAM, verify_manifest
from countermark_measurements import keys as key_files
from countermark_measurements.manifest import Launch, build, parse_image
from countermark_measurements.prediction import check, parse_json, to_json


def test_private_keys_are_private_and_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    made = key_files.create(folder, LOG_NAME)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    private = {key_files.ES256_NAME, key_files.ML_DSA_NAME, key_files.LOG_NAME}
    assert {name for name, mode in modes.items() if mode == 0o600} == private
    assert {name for name, mode in modes.items() if mode == 0o644} == {"signers", "vkeys"}
    again = key_files.load(folder)
    assert (again.signers, again.log.as_log) == (made.signers, made.log.as_log)
    assert again.signers == tuple(map(signer_digest, again.cose))
    message = encode_manifest(statement())
    assert verify_manifest(again.sign(message), signers=made.signers, now=NOW) == statement()


def test_a_passphrase_covers_every_private_key(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    key_files.create(folder, LOG_NAME, passphrase=b"secret")
    for name in (key_files.ES256_NAME, key_files.ML_DSA_NAME):
        with pytest.raises(TypeError):
            serialization.load_pem_private_key((folder / name).read_bytes(), None)
    assert key_files.load(folder, passphrase=b"secret").log.name == LOG_NAME
    for wrong in (None, b"other"):
        with pytest.raises(UsageError) as err:
            key_files.load(folder, passphrase=wrong)
        assert err.value.code == "usage.key"


@pytest.mark.parametrize("name", [key_files.ES256_NAME, key_files.ML_DSA_NAME, key_files.LOG_NAME])
def test_keys_others_can_read_or_of_another_kind_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "keys"
    key_files.create(folder, LOG_NAME)
    path = folder / name
    path.chmod(0o640)
    with pytest.raises(UsageError) as err:
        key_files.load(folder)
    assert err.value.code == "usage.key_mode"
    other = {key_files.ES256_NAME: key_files.ML_DSA_NAME}.get(name, key_files.ES256_NAME)
    for data in ((folder / other).read_bytes(), b"", b"-----BEGIN PRIVATE KEY-----\n"):
        path.chmod(0o600)
        path.write_bytes(data)
        with pytest.raises(UsageError) as err:
            key_files.load(folder)
        assert err.value.code == "usage.key"


def test_keys_never_take_the_place_of_others(tmp_path: Path) -> None:
    key_files.create(tmp_path / "keys", LOG_NAME)
    with pytest.raises(UsageError) as err:
        key_files.create(tmp_path / "keys", LOG_NAME)
    assert err.value.code == "usage.file"
    with pytest.raises(UsageError) as err:
        key_files.create(tmp_path / "more", "two words")
    assert err.value.code == "usage.key_name"
    assert not (tmp_path / "more").exists()


def test_a_manifest_says_what_was_predicted_and_described() -> None:
    image = parse_manifest(encode_manifest(statement(revoked=[image_id("old"), image_id("old")])))
    assert (image.kind, image.platform, image.version) == (ImageKind.PRODUCTION, "tdx", 1)
    assert (image.shapes, image.events) == (prediction().shapes, prediction().events)
    assert image.not_before < NOW < image.not_after == NOW + 30 * DAY_S
    assert image.revoked_images == (image_id("old"),)
    subjects = {item.name: item.sha256 for item in image.subjects}
    assert subjects == {
        "disk.raw": sha256("one"),
        "uki.efi": sha256("uki one"),
        "OVMF.fd": sha256("firmware"),
        "debian.lock": sha256("lock"),
        "files.txt": sha256("files one"),
    }
    assert image.mrseam == ()  # no TDX module was tried, so none is named
    assert statement(platform="vtpm").mrseam == (SIMULATED_MRSEAM,)


def test_who_builds_again_gets_the_same_manifest() -> None:
    """Sizes and times of a build are not part of it."""
    first = json.loads(image_json())
    later = {**first, "seconds": {"disk": 3.5}, "sizes": {"disk.raw": 1}}
    made = [
        build(prediction(), parse_image(json.dumps(value).encode()), version=1, now=NOW, valid_days=30)
        for value in (first, later)
    ]
    assert encode_manifest(made[0]) == encode_manifest(made[1])


def test_weights_and_launch_constants_can_be_named() -> None:
    launch = Launch(xfam=b"\xe7" + bytes(7), mrseam=(b"\x01" * 48,))
    made = build(
        prediction(),
        parse_image(image_json()),
        version=7,
        now=NOW,
        valid_days=1,
        weights=[Subject(name="smollm2", sha256=sha256("weights"))],
        launch=launch,
    )
    assert Subject(name="weights/smollm2", sha256=sha256("weights")) in made.subjects
    assert (made.xfam, made.mrseam) == (launch.xfam, launch.mrseam)


@pytest.mark.parametrize(
    "changes",
    [
        {"image": parse_image(image_json("two"))},  # another disk than the one predicted from
        {"prediction": replace(prediction(), inputs=())},
        {"prediction": prediction(platform="vtpm")},  # production is for TDX
        {"image": parse_image(image_json("one", ImageKind.TEST))},  # and the test image is not
        {"revoked": [image_id("one")]},
        {"version": 0},
        {"valid_days": 0},
        {"valid_days": 2000},
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any]) -> None:
    values: dict[str, Any] = {
        "prediction": prediction(),
        "image": parse_image(image_json()),
        "version": 1,
        "valid_days": 30,
        **changes,
    }
    with pytest.raises(UsageError) as err:
        build(values.pop("prediction"), values.pop("image"), now=NOW, **values)
    assert err.value.code == "usage.manifest"


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("subjects"),
        lambda value: value["subjects"].pop("disk.raw"),
        lambda value: value["subjects"].update({"disk.raw": "00"}),
        lambda value: value["subjects"].update({"disk.raw": None}),
        lambda value: value.update(kind="simulated"),
        lambda value: value.update(kind=["production"]),
        lambda value: value.pop("variant"),
        lambda value: value.update(image_id="zz"),
        lambda value: value.update(lock_sha256="00"),
        lambda value: value.update(files_sha256=1),
    ],
)
def test_another_image_description_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(image_json())
    change(value)
    with pytest.raises(FormatError) as err:
        parse_image(json.dumps(value).encode())
    assert err.value.code.startswith("image.")


def test_a_prediction_survives_its_file() -> None:
    for made in (prediction(), prediction(platform="vtpm")):
        assert parse_json(to_json(made)) == made


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(format="countermark-prediction/2"),
        lambda value: value.update(platform="sim"),
        lambda value: value.update(more=1),
        lambda value: value.update(rtmr1="00"),
        lambda value: value.update(rtmr1="00" * 48),
        lambda value: value.update(rtmr2=value["rtmr2"].upper()),
        lambda value: value["events"].reverse(),
        lambda value: value["events"].pop(),
        lambda value: value["shapes"].append(value["shapes"][0]),
        lambda value: value.update(shapes=[]),
        lambda value: value["inputs"][0].pop("name"),
        lambda value: value["inputs"][0].update(name=""),
        lambda value: value["inputs"][0].update(sha256=5),
        lambda value: value.update(inputs=value["inputs"] * 40),
    ],
)
def test_a_prediction_that_contradicts_itself_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(to_json(prediction()))
    change(value)
    with pytest.raises(FormatError) as err:
        parse_json(json.dumps(value).encode())
    assert err.value.code.startswith(("prediction.", "manifest."))
    with pytest.raises(FormatError):
        check(replace(prediction(), rtmr1=bytes(48)))


def test_signatures_are_made_anew_each_time() -> None:
    """Which is why the log names the envelope and not the statement."""
    assert signed() != signed()
    for envelope in (signed(), signed()):
        assert verify_manifest(envelope, signers=publisher().signers, now=NOW) == statement()
    with pytest.raises(CountermarkError) as err:
        verify_manifest(signed(), signers=[bytes(32)], now=NOW)
    assert err.value.code == "manifest.signer"
