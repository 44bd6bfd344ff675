"""debian.lock and wheels.lock: strict to read, and what stands in the tree is what packages.toml asks for."""

from __future__ import annotations

import contextlib
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steps.errors import BuildError
from steps.locks import encode_debian_lock, parse_debian_lock, parse_wheels_lock

IMAGE = Path(__file__).resolve().parents[2] / "image"
LINE = f"libc6 2.41-12+deb13u4 amd64 {'ab' * 32} 2846580 debian/pool/main/g/glibc/libc6_2.41-12+deb13u4_amd64.deb"
OTHER = f"zlib1g 1:1.3 amd64 {'cd' * 32} 88720 debian-security/pool/updates/main/z/zlib/zlib1g_1.3_amd64.deb"
LOCK = f"# made by image/lock\nepoch = 1795305600\n\n[rootfs]\n{LINE}\n{OTHER}\n"


def test_a_lock_is_read_and_written_back() -> None:
    lock = parse_debian_lock(LOCK)
    assert lock.epoch == 1795305600
    libc, zlib = lock.packages("rootfs")
    assert (libc.name, libc.size, libc.filename) == ("libc6", 2846580, "libc6_2.41-12+deb13u4_amd64.deb")
    assert libc.url == "http://deb.debian.org/debian/pool/main/g/glibc/libc6_2.41-12+deb13u4_amd64.deb"
    assert zlib.url.startswith("http://security.debian.org/debian-security/pool/")
    assert parse_debian_lock(encode_debian_lock(lock)) == lock


@pytest.mark.parametrize(
    "text",
    [
        "",
        LOCK.replace("epoch = 1795305600\n", ""),
        LOCK.replace("[rootfs]\n", ""),
        LOCK + LINE + "\n",  # twice
        LOCK.replace(f"{LINE}\n{OTHER}", f"{OTHER}\n{LINE}"),  # out of order
        LOCK + "[rootfs]\n" + LINE + "\n",
        LOCK + "epoch = 1795305601\n",
        LOCK.replace("ab" * 32, "AB" * 32),
        LOCK.replace("ab" * 32, "ab" * 31),
        LOCK.replace("2846580", "0"),
        LOCK.replace("2846580", "99999999999"),
        LOCK.replace("debian/pool/main", "debian/pool/../main"),
        LOCK.replace("debian/pool", "elsewhere/pool"),
        LOCK.replace("amd64 ab", "arm64 ab"),
        LOCK.replace(LINE, LINE + " more"),
        LOCK.replace(LINE, LINE.replace("libc6 2", "lib/c6 2")),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(BuildError):
        parse_debian_lock(text)


@given(st.text(max_size=300))
def test_any_text_is_a_lock_or_a_build_error(text: str) -> None:
    for parse in (parse_debian_lock, parse_wheels_lock):
        with contextlib.suppress(BuildError):
            parse(text)


def test_a_set_that_the_lock_lacks_is_named() -> None:
    with pytest.raises(BuildError, match="tools"):
        parse_debian_lock(LOCK).packages("tools")


@pytest.mark.parametrize(
    "text", ["", "grpcio==1.0\n", f"b==1 --hash=sha256:{'0' * 64}\na==1 --hash=sha256:{'0' * 64}\n"]
)
def test_wheels_need_a_hash_and_an_order(text: str) -> None:
    with pytest.raises(BuildError):
        parse_wheels_lock(text)


def test_the_locks_in_the_tree_hold_what_is_asked_for() -> None:
    wanted = tomllib.loads((IMAGE / "packages.toml").read_text())
    lock = parse_debian_lock((IMAGE / "debian.lock").read_text())
    sets = {name: part for name, part in wanted.items() if "packages" in part}
    assert set(lock.sets) == set(sets)
    for name, part in sets.items():
        names = {package.name for package in lock.sets[name]}
        assert set(part["packages"]) <= names
        assert not set(part.get("drop", [])) & names
    wheels = parse_wheels_lock((IMAGE / "wheels.lock").read_text())
    assert [wheel.name for wheel in wheels] == sorted(wanted["wheels"]["names"])


def test_every_wheel_is_one_that_the_requirements_allow() -> None:
    requirements = (IMAGE.parent / "requirements" / "appliance.lock").read_text()
    allowed = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", requirements, re.MULTILINE))
    hashes = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", requirements))
    for wheel in parse_wheels_lock((IMAGE / "wheels.lock").read_text()):
        assert wheel.name in allowed
        assert wheel.sha256 in hashes, f"{wheel.name}: run image/lock"
