"""The pieces of a build on small inputs: what keep.txt keeps, what libraries follow, cpio, GPT, byte code, compare."""

from __future__ import annotations

import os
import py_compile
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steps.compare import first_difference, first_differing_byte
from steps.elf import read_dynamic
from steps.errors import BuildError
from steps.gpt import TYPE_DATA, TYPE_ESP, Partition, write_disk
from steps.imports import imported, reach
from steps.initramfs import cpio, depends, load_order
from steps.select import close, link_target, parse_keep, select

from countermark_measurements.gpt import read_gpt

DISK, FIRST, SECOND = (uuid.UUID(int=number) for number in (1, 2, 3))


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_the_last_pattern_that_matches_decides(tmp_path: Path) -> None:
    root = tree(tmp_path, "usr/lib/a.py", "usr/lib/deep/b.py", "usr/lib/deep/test/c.py", "usr/bin/tool", "etc/x")
    rules = parse_keep("usr/lib/**/*.py  # modules\n!usr/lib/**/test/**\nusr/bin/t??l\n", ())
    assert select(root, rules, "keep") == ["usr/bin/tool", "usr/lib/a.py", "usr/lib/deep/b.py"]
    assert select(root, parse_keep("usr/lib/*\n", ()), "keep") == ["usr/lib/a.py"]


def test_a_pattern_that_matches_nothing_ends_the_build(tmp_path: Path) -> None:
    root = tree(tmp_path, "usr/bin/tool")
    with pytest.raises(BuildError, match="usr/bin/gone"):
        select(root, parse_keep("usr/bin/tool\nusr/bin/gone\n", ()), "keep.txt")
    with pytest.raises(BuildError, match="!etc/"):
        select(root, parse_keep("usr/bin/tool\n!etc/**\n", ()), "keep.txt")


def test_lines_for_one_kind_are_not_another_s() -> None:
    text = "a\n[development]\nusr/bin/sh\n[gpu]\nb\n[all]\nc\n"
    assert [rule.line for rule in parse_keep(text, ("production", "cpu"))] == ["a", "c"]
    assert [rule.line for rule in parse_keep(text, ("development", "cpu"))] == ["a", "usr/bin/sh", "c"]


def test_a_link_brings_its_target_and_never_leaves_the_root(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "usr/lib/libx.so.1.2", "usr/lib/other")
    (tmp_path / "outside").write_text("secret")
    (root / "usr/lib/libx.so.1").symlink_to("libx.so.1.2")
    (root / "usr/lib/up").symlink_to("../../../outside")
    (root / "usr/lib/abs").symlink_to("/usr/lib/other")
    assert close(root, ["usr/lib/libx.so.1"])[0] == ["usr/lib/libx.so.1", "usr/lib/libx.so.1.2"]
    assert link_target(root, "usr/lib/abs") == "usr/lib/other"
    assert link_target(root, "usr/lib/up") is None
    (root / "outside").write_text("inside")
    assert link_target(root, "usr/lib/up") == "outside"  # as it leads in a chroot


def _executable() -> Path:
    """A dynamic x86-64 ELF file of this machine."""
    return Path(sys.executable).resolve()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="compares with readelf of binutils")
def test_dynamic_facts_are_those_of_readelf() -> None:
    for path in (_executable(), Path(shutil.which("readelf") or "").resolve()):
        said = subprocess.run(["readelf", "-dWl", str(path)], capture_output=True, text=True, check=True).stdout
        dynamic = read_dynamic(path)
        assert dynamic is not None
        assert list(dynamic.needed) == re.findall(r"\(NEEDED\).*\[(.*)\]", said)
        assert [dynamic.interpreter] == re.findall(r"interpreter: (\S+)\]", said)
        run_paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", said)
        assert list(dynamic.run_path) == [part for paths in run_paths for part in paths.split(":")]


def test_what_is_no_elf_file_needs_nothing_and_half_of_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"#!/bin/sh\n")
    assert read_dynamic(tmp_path / "text") is None
    (tmp_path / "half").write_bytes(_executable().read_bytes()[:100])
    with pytest.raises(BuildError):
        read_dynamic(tmp_path / "half")


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path, "usr/lib/other")
    program = root / "usr/bin/program"
    program.parent.mkdir(parents=True)
    shutil.copy(_executable(), program)
    with pytest.raises(BuildError, match=r"usr/bin/program needs lib|No such file"):
        close(root, ["usr/bin/program"])


@pytest.mark.skipif(shutil.which("cpio") is None, reason="compares with cpio")
def test_the_archive_unpacks_with_cpio(tmp_path: Path) -> None:
    data = cpio({"dev": None, "modules": None, "init": b"\x7fELF..", "modules/a.ko": b"12345"}, {"init"})
    assert len(data) % 4 == 0
    subprocess.run(["cpio", "-idm", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "init").read_bytes() == b"\x7fELF.."
    assert (tmp_path / "modules/a.ko").read_bytes() == b"12345"
    assert os.access(tmp_path / "init", os.X_OK) and not os.access(tmp_path / "modules/a.ko", os.X_OK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev", "init", "modules"]


def test_an_archive_does_not_depend_on_the_order_it_is_given() -> None:
    entries: dict[str, bytes | None] = {"b": b"2", "a": b"1", "c": None}
    assert cpio(entries, set()) == cpio(dict(sorted(entries.items())), set())


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    def module(name: str, needs: str) -> None:
        (tmp_path / f"{name}.ko").write_bytes(b"\0depends=" + needs.encode() + b"\0~Module signature appended~\n")

    module("dm-verity", "dm-bufio,dm-mod")
    module("dm-bufio", "dm-mod")
    module("dm-mod", "")
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    names = [path.name for path in load_order(tmp_path, ["dm_verity", "ext4"])]
    assert names == ["dm-mod.ko", "dm-bufio.ko", "dm-verity.ko"]
    with pytest.raises(BuildError, match="no kernel module erofs"):
        load_order(tmp_path, ["erofs"])
    (tmp_path / "dm-mod.ko").write_bytes(b"\0depends=\0")
    with pytest.raises(BuildError, match="not signed"):
        load_order(tmp_path, ["dm_verity"])
    with pytest.raises(BuildError):
        depends(b"no modinfo")


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(min_value=1, max_value=3 << 20), min_size=1, max_size=3))
def test_a_disk_reads_back_and_is_the_same_each_time(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("disk")
    partitions = []
    for number, size in enumerate(sizes):
        (folder / f"part-{number}").write_bytes((b"%d" % number) * size)
        guid = uuid.UUID(int=10 + number)
        kind = TYPE_ESP if number == 0 else TYPE_DATA
        partitions.append(
            Partition(name=f"part-{number}", type_guid=kind, guid=guid, content=folder / f"part-{number}")
        )
    for name in ("one.raw", "two.raw"):
        write_disk(folder / name, DISK, tuple(partitions))
    data = (folder / "one.raw").read_bytes()
    assert data == (folder / "two.raw").read_bytes()
    table = read_gpt(folder / "one.raw")  # the reader of countermark-measure, written from the specification by itself
    assert table.system.number == 1
    assert [entry.name for entry in table.partitions] == [partition.name for partition in partitions]
    for entry, partition in zip(table.partitions, partitions, strict=True):
        content = partition.content.read_bytes()
        assert (entry.kind, entry.unique) == (partition.type_guid, partition.guid)
        assert data[entry.start : entry.start + entry.size] == content.ljust(entry.size, b"\0")
        assert entry.start % (1 << 20) == entry.size % (1 << 20) == 0


def test_a_name_that_gpt_cannot_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(b"x")
    part = Partition(name="n" * 36, type_guid=TYPE_DATA, guid=FIRST, content=tmp_path / "content")
    with pytest.raises(BuildError):
        write_disk(tmp_path / "disk", DISK, (part,))
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(BuildError):
        write_disk(
            tmp_path / "disk",
            DISK,
            (Partition(name="n", type_guid=TYPE_DATA, guid=SECOND, content=tmp_path / "empty"),),
        )


def test_imports_are_found_where_they_hide(tmp_path: Path) -> None:
    source = """
from __future__ import annotations
import json, os.path
from typing import TYPE_CHECKING
from . import sibling
from ..other import name
if TYPE_CHECKING:
    import unseen
else:
    import seen
try:
    import maybe
except ImportError:
    maybe = None
def late():
    from pkg.deep import thing
"""
    found = dict(imported(source, "top.mid.module", False))
    assert {"json", "os.path", "seen", "top.mid", "top.mid.sibling", "top.other", "top.other.name"} <= set(found)
    assert {"pkg.deep", "pkg.deep.thing", "maybe"} <= set(found)
    assert "unseen" not in found
    assert found["maybe"] and found["pkg.deep.thing"] and not found["pkg.deep"]


def test_reach_follows_ours_and_names_the_others(tmp_path: Path) -> None:
    for name, text in {
        "ours/__init__.py": "",
        "ours/a.py": "from ours import b\nimport numpy.linalg\n",
        "ours/b.py": "def f():\n    import ours.late\n",
        "ours/late.py": "from ours.never import x\n",
        "ours/never.py": "import torch\n",
        "ours/alone.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    ours, others = reach({"ours": tmp_path}, ["ours.a"], ("ours.never",))
    assert ours == {"ours", "ours.a", "ours.b", "ours.late"}
    assert others == {"numpy": "ours.a"}


def test_byte_code_does_not_depend_on_what_was_compiled_before(tmp_path: Path) -> None:
    """The builder keeps byte code by what it was made of; image/build --check holds it with the image's Python."""
    folder = Path(os.__file__).parent
    names = ["argparse.py", "ast.py", "dataclasses.py", "enum.py", "inspect.py", "typing.py"]
    script = (
        "import py_compile, sys\nfor name in sys.argv[3:]: py_compile.compile(f'{sys.argv[1]}/{name}', "
        "cfile=f'{sys.argv[2]}/{name}c', dfile=name, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)"
    )
    for out, order in (("forward", names), ("backward", names[::-1])):
        (tmp_path / out).mkdir()
        command = [sys.executable, "-I", "-c", script, str(folder), str(tmp_path / out), *order]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": "0" if out == "forward" else "7"})
    for name in names:
        assert (tmp_path / "forward" / f"{name}c").read_bytes() == (tmp_path / "backward" / f"{name}c").read_bytes()
    assert py_compile.PycInvalidationMode.UNCHECKED_HASH.value == 3


def test_two_builds_are_compared_by_file_then_by_byte(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "files.txt").write_text("aa 1 0644 usr/a\nbb 1 0644 usr/b\n")
        (folder / "disk.raw").write_bytes(bytes(100))
    assert first_difference(one, other, ["disk.raw"]) is None
    (other / "disk.raw").write_bytes(bytes(60) + b"x" + bytes(39))
    assert "disk.raw from byte 60" in (first_difference(one, other, ["disk.raw"]) or "")
    (other / "files.txt").write_text("aa 1 0644 usr/a\ncc 1 0644 usr/b\n")
    assert (first_difference(one, other, ["disk.raw"]) or "").startswith("/usr/b: ")
    (other / "disk.raw").write_bytes(bytes(99))
    assert first_differing_byte(one / "disk.raw", other / "disk.raw") == 99
