"""The committed wire code is what protoc makes of the committed .proto."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from google.protobuf import descriptor_pb2

from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb

ROOT = Path(__file__).parents[2]
PROTO = "countermark/wire/countermark_v1.proto"


def compile_proto(tmp_path: Path, *outputs: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "client"), *outputs, str(ROOT / "client" / PROTO)],
        check=True,
        cwd=tmp_path,
        timeout=60,
    )


def test_descriptor_is_current(tmp_path: Path) -> None:
    compile_proto(tmp_path, "--descriptor_set_out=set.bin")
    files = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set.bin").read_bytes())
    committed = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert [file.name for file in files.file] == [PROTO]
    for message in files.file[0].message_type:  # protoc adds a derived name that Python's copy leaves out
        for field in (*message.field, *(inner for nested in message.nested_type for inner in nested.field)):
            field.ClearField("json_name")
    assert files.file[0] == committed


def test_files_are_current(tmp_path: Path) -> None:
    """Byte for byte; meaningful under the generator version the files name."""
    compile_proto(tmp_path, "--python_out=.", "--pyi_out=.")
    for name in ("countermark_v1_pb2.py", "countermark_v1_pb2.pyi"):
        made = (tmp_path / "countermark/wire" / name).read_text()
        committed = (ROOT / "client/countermark/wire" / name).read_text()
        version = re.compile(r"Protobuf Python Version: \S+|^    \d+,$", re.MULTILINE)
        assert version.sub("", made) == version.sub("", committed)


def test_declared_protobuf_runs_the_committed_code() -> None:
    text = (ROOT / "client/countermark/wire/countermark_v1_pb2.py").read_text()
    needed = re.search(r"Protobuf Python Version: (\d+)\.(\d+)\.(\d+)", text)
    assert needed is not None
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (floor,) = [entry for entry in dependencies if entry.startswith("protobuf")]
    assert f">={'.'.join(needed.groups())}" in floor
    installed = tuple(int(part) for part in importlib.metadata.version("protobuf").split(".")[:3])
    assert installed >= tuple(map(int, needed.groups()))


def test_codec_names_the_services() -> None:
    services = pb.DESCRIPTOR.services_by_name
    assert services["Countermark"].full_name == codec.SERVICE
    assert services["Log"].full_name == codec.LOG_SERVICE
    methods = {f"/{codec.SERVICE}/{method.name}" for method in services["Countermark"].methods}
    assert methods == {codec.ATTEST, codec.GET_EVIDENCE, codec.GENERATE, codec.REPLAY}
