"""The artefact as a whole: built twice, loaded, damaged everywhere, and forged with a consistent hash tree."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import blake3
import pytest
import torch
from tinymodels import TEMPLATE, whole, write_folder

from countermark.errors import WeightsError
from countermark_appliance.engine.weights import DamagedBlock, build, fold, load, parallel, tensor_specs, verify, verity
from countermark_appliance.engine.weights.fold import Folder
from countermark_appliance.engine.weights.folder import FolderSource
from countermark_appliance.engine.weights.pack import Packer, read_members
from countermark_appliance.engine.weights.quantise import quantise_rows
from countermark_appliance.engine.weights.ropetable import angles
from countermark_kernels import PROFILE

FILES = ("weights.img", "weights.verity", "weights.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny"
    write_folder(path, "llama")
    return path


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    build(source, path)
    return path


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).write_bytes((good / name).read_bytes())
    return tmp_path


def refusal(path: Path, **options: object) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        load(path, **options)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_loaded_tensors_are_the_folded_ones_quantised(architecture: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", architecture, dtype=torch.bfloat16)
    built = build(tmp_path / "tiny", tmp_path / "out", name="my model")
    artefact = load(tmp_path / "out", expected_root=built.weights_root)
    c = artefact.config
    assert c == built.config and c.name == "my model" and c.architecture == architecture
    assert list(artefact.tensors) == [spec.name for spec in tensor_specs(c)]
    folded = Folder(FolderSource(tmp_path / "tiny"), c, dtype=torch.float64)
    assert torch.equal(artefact.tensor("embed"), whole(folded.embed()).float())
    assert torch.equal(artefact.tensor("rope.cos"), angles(c, 0, c.context).double().cos().float())
    assert torch.equal(artefact.tensor("rope.sin"), angles(c, 0, c.context).double().sin().float())
    linears = {"head": whole(folded.head())}
    for i in range(c.layers):
        linears |= {
            f"layers.{i}.qkv": whole(folded.qkv(i)),
            f"layers.{i}.o": folded.output(i),
            f"layers.{i}.gate_up": whole(folded.gate_up(i)),
            f"layers.{i}.down": folded.down(i),
        }
        if c.attention_bias:
            assert torch.equal(artefact.tensor(f"layers.{i}.qkv.bias"), folded.qkv_bias(i).float())
        if c.output_bias:
            assert torch.equal(artefact.tensor(f"layers.{i}.o.bias"), folded.output_bias(i).float())
        if c.qk_norm:
            assert torch.equal(artefact.tensor(f"layers.{i}.k_norm"), folded.head_norm(i, "k").float())
    for name, matrix in linears.items():
        q, scale = quantise_rows(matrix, what=name)
        assert torch.equal(artefact.tensor(name), q), name
        assert torch.equal(artefact.tensor(f"{name}.scale"), scale), name
    assert artefact.chat_template == TEMPLATE
    assert artefact.tokenizer_json == (tmp_path / "tiny/tokenizer.json").read_bytes()
    assert artefact.tokenizer_digest == blake3.blake3(artefact.tokenizer_json).digest()
    assert artefact.template_digest == blake3.blake3(TEMPLATE.encode()).digest()
    assert artefact.weights_root == built.weights_root and artefact.manifest_digest == built.manifest_digest


def test_second_build_is_bit_identical_on_any_number_of_threads(
    source: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "_BLOCK_ELEMENTS", 1 << 13)  # many small jobs
    before = torch.get_num_threads()
    for count in (1, 5):
        monkeypatch.setattr(parallel, "threads", lambda count=count: count)
        build(source, tmp_path)  # the second time over the first one's files
        assert all((tmp_path / name).read_bytes() == (good / name).read_bytes() for name in FILES)
    assert torch.get_num_threads() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_name_context_and_template_are_part_of_it(source: Path, good: Path, tmp_path: Path) -> None:
    roots = {load(good).weights_root, build(source, tmp_path / "n", name="other").weights_root}
    shorter = build(source, tmp_path / "c", context=32)
    assert shorter.config.context == 32 and load(tmp_path / "c").tensor("rope.cos").shape == (32, 32)
    assert len(roots | {shorter.weights_root}) == 3


def test_progress_reaches_the_total(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    build(source, tmp_path, progress=lambda *call: calls.append(call))
    verified: list[tuple[int, int, str]] = []
    verify(tmp_path, progress=lambda *call: verified.append(call))
    for seen in (calls, verified):
        assert [c[0] for c in seen] == sorted(c[0] for c in seen)
        assert seen[-1][0] == seen[-1][1] and len({c[1] for c in seen}) == 1
    assert any("layers.1.down" in label for _, _, label in calls)


def test_verify_reports_what_it_found(good: Path) -> None:
    found = verify(good)
    artefact = load(good, verify=False)
    assert found.weights_root == artefact.weights_root and found.config == artefact.config
    assert found.tensors == len(artefact.tensors)
    assert found.data_blocks * 4096 == (good / "weights.img").stat().st_size


def test_tensors_are_views_of_the_file(good: Path) -> None:
    artefact = load(good)
    first, second = artefact.tensor("head"), artefact.tensor("head")
    assert first.data_ptr() == second.data_ptr() and first.data_ptr() % 512 == 0


# --- damage ---------------------------------------------------------------------------------------------------------


def test_one_flipped_byte_anywhere_is_named(good: Path, copy: Path) -> None:
    """In every member, its header and its padding, and in the end of the archive."""
    image = (good / "weights.img").read_bytes()
    members = read_members(memoryview(image))
    places: list[tuple[int, str]] = [(len(image) - 1, ""), (1, "MANIFEST" if members[0].offset < 4096 else "")]
    for member in members:
        places.append((member.offset - 500, ""))
        places.append((member.offset + member.size_bytes // 2, member.name))
    for position, name in places[:: max(1, len(places) // 40)]:
        with (copy / "weights.img").open("r+b") as file:
            file.seek(position)
            file.write(bytes([image[position] ^ 0x10]))
        error = refusal(copy)
        assert error.code == "weights.block"
        assert isinstance(error, DamagedBlock)
        assert error.block == position // 4096 and error.first_byte == position // 4096 * 4096
        block_holds_header = any(m.offset - 512 >= error.first_byte and m.name == name for m in members)
        assert name in error.member or (block_holds_header and "headers" in error.member)
        with (copy / "weights.img").open("r+b") as file:
            file.seek(position)
            file.write(image[position : position + 1])
    assert load(copy).weights_root == load(good).weights_root


def test_the_owner_of_a_block_inside_a_large_tensor(good: Path, copy: Path) -> None:
    members = {m.name: m for m in read_members(memoryview((good / "weights.img").read_bytes()))}
    member = members["tensors/layers.1.gate_up.int8"]
    with (copy / "weights.img").open("r+b") as file:
        file.seek(member.offset + 3 * 4096)
        file.write(b"\x85\x86")
    error = refusal(copy)
    assert isinstance(error, DamagedBlock) and error.member == "tensors/layers.1.gate_up.int8"


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("weights.img", lambda d: d[:-1], "weights.truncated"),
        ("weights.img", lambda d: d[:-4096], "weights.truncated"),
        ("weights.img", lambda d: d + bytes(4096), "weights.truncated"),
        ("weights.img", lambda d: d[:4096], "weights.truncated"),
        ("weights.img", lambda d: b"", "weights.truncated"),
        ("weights.verity", lambda d: d[:-1], "weights.truncated"),
        ("weights.verity", lambda d: b"", "weights.truncated"),
        ("weights.verity", lambda d: b"\0" + d[1:], "weights.superblock"),
        ("weights.verity", lambda d: d[:4096] + bytes([d[4096] ^ 1]) + d[4097:], "weights.root"),
        ("weights.verity", lambda d: d[:-4096] + bytes([d[-4096] ^ 1]) + d[-4095:], "weights.tree"),
        ("weights.json", lambda d: b"", "weights.json"),
        ("weights.json", lambda d: d + bytes(1 << 16), "weights.json"),
        ("weights.json", lambda d: d.replace(b'"salt"', b'"pepper"'), "weights.json"),
        ("weights.json", lambda d: d.replace(b'"root": "', b'"root": "A'), "weights.json"),
    ],
)
def test_damaged_files(name: str, change: Callable[[bytes], bytes], code: str, copy: Path) -> None:
    path = copy / name
    path.write_bytes(change(path.read_bytes()))
    assert refusal(copy).code == code


@pytest.mark.parametrize("name", FILES)
def test_missing_files(name: str, copy: Path) -> None:
    (copy / name).unlink()
    assert refusal(copy).code == "weights.missing"


def test_another_root_is_refused_with_and_without_reading_blocks(good: Path) -> None:
    assert refusal(good, expected_root=bytes(32)).code == "weights.root"
    assert refusal(good, expected_root=bytes(32), verify=False).code == "weights.root"


def test_weights_json_may_be_absent_or_lie_when_the_root_is_given(copy: Path) -> None:
    root = load(copy).weights_root
    value = json.loads((copy / "weights.json").read_text())
    (copy / "weights.json").write_text(json.dumps(value | {"root": "00" * 32}))
    assert refusal(copy).code == "weights.root"
    assert load(copy, expected_root=root).weights_root == root
    (copy / "weights.json").unlink()
    assert load(copy, expected_root=root).weights_root == root


# --- forgeries: the content is wrong and the hash tree is right ---------------------------------------------------


def forge(path: Path, change: Callable[[bytearray], None]) -> bytes:
    image = bytearray((path / "weights.img").read_bytes())
    change(image)
    root, tree = verity.build_tree(memoryview(image))
    (path / "weights.img").write_bytes(image)
    (path / "weights.verity").write_bytes(tree)
    return root


def patch_member(name: str, edit: Callable[[bytes], bytes], *, manifest: bool = True) -> Callable[[bytearray], None]:
    """Replace a member's data by as many other bytes; `manifest`: make the manifest agree."""

    def change(image: bytearray) -> None:
        members = {m.name: m for m in read_members(memoryview(bytes(image)))}
        member = members[name]
        old = bytes(image[member.offset : member.offset + member.size_bytes])
        new = edit(old)
        assert len(new) == len(old) and new != old
        image[member.offset : member.offset + member.size_bytes] = new
        table = members["MANIFEST"]
        if manifest and name != "MANIFEST":
            lines = bytes(image[table.offset : table.offset + table.size_bytes])
            hashes = [blake3.blake3(data).hexdigest().encode() for data in (old, new)]
            assert hashes[0] in lines
            image[table.offset : table.offset + table.size_bytes] = lines.replace(*hashes)

    return change


def floats(*values: float) -> Callable[[bytes], bytes]:
    return lambda old: torch.tensor(values).numpy().tobytes() + old[4 * len(values) :]


Members = list[tuple[str, bytes]]


def swap(members: Members) -> None:
    members[5], members[6] = members[6], members[5]


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members.append(members[-1]),  # the same name and content twice
        lambda members: members.append(("tensors/head.scale.f32", b"other")),
        lambda members: members.append(("extra", b"")),
        lambda members: members.insert(0, ("extra", b"")),
        lambda members: members.pop(),
        lambda members: members.pop(0),
        lambda members: members.pop(2),
        swap,
        lambda members: members.__setitem__(-1, (members[-1][0], members[-1][1] + bytes(4))),
        lambda members: members.clear(),
    ],
)
def test_repacked_members_are_refused(change: Callable[[Members], object], good: Path, copy: Path) -> None:
    image = (good / "weights.img").read_bytes()
    members = [(m.name, image[m.offset : m.offset + m.size_bytes]) for m in read_members(memoryview(image))]
    change(members)
    path = copy / "weights.img"
    with Packer(path) as packer:
        for name, data in members:
            packer.digests.clear()  # the writer would not write a name twice
            packer.begin(name, len(data))
            if data:
                packer.write(data)
        packer.close()
    with path.open("ab") as file:
        file.write(bytes(4096 if not members else 0))
    root = forge(copy, lambda _: None)
    assert refusal(copy, expected_root=root).code in ("weights.members", "weights.image")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (patch_member("MANIFEST", lambda d: d.upper()), "weights.manifest"),
        (patch_member("MANIFEST", lambda d: d[:-1] + b" "), "weights.manifest"),
        (patch_member("MANIFEST", lambda d: d.replace(b"tensors/head.int8", b"tensors/tail.int8")), "weights.manifest"),
        (patch_member("tensors/head.int8", lambda d: bytes([d[0] ^ 1]) + d[1:], manifest=False), "weights.manifest"),
        (patch_member("tokenizer.json", lambda d: d[:-1] + b" ", manifest=False), "weights.manifest"),
        (patch_member("chat_template.jinja", lambda d: b"\xff" + d[1:]), "weights.text"),
        (patch_member("model.json", lambda d: b"[" + d[1:]), "weights.json"),
        (patch_member("model.json", lambda d: d.replace(b'"layers"', b'"loyers"')), "weights.json"),
        (patch_member("model.json", lambda d: d.replace(b'"layers": 2', b'"layers": 1')), "weights.model_json"),
        (patch_member("model.json", lambda d: d.replace(b'"layers": 2', b'"layers":2 ')), "weights.model_json"),
        (patch_member("model.json", lambda d: d.replace(b'"context": 96', b'"context": 95')), "weights.model_json"),
        (patch_member("model.json", lambda d: d.replace(b"llama", b"gemma")), "weights.unsupported_architecture"),
        (patch_member("model.json", lambda d: d.replace(b'"head_dim": 64', b'"head_dim": 65')),
         "weights.unsupported_head_dim"),
        (patch_member("model.json", lambda d: d.replace(PROFILE.encode(), b"exact-v9")), "weights.unsupported_profile"),
        (patch_member("model.json", lambda d: d.replace(b'"odd": 3', b'"odd": 5')), "weights.unsupported_rotation"),
        (patch_member("model.json", lambda d: d.replace(b'"bos_id": 1', b'"bos_id": x')), "weights.json"),
        (patch_member("tensors/embed.f32", floats(float("nan"))), "weights.values"),
        (patch_member("tensors/embed.f32", floats(0.0, float("-inf"))), "weights.values"),
        (patch_member("tensors/head.scale.f32", floats(-1.0)), "weights.values"),
        (patch_member("tensors/rope.cos.f32", floats(1.5)), "weights.values"),
        (patch_member("tensors/layers.0.qkv.bias.f32", floats(float("inf"))), "weights.values"),
        (patch_member("tensors/layers.1.down.int8", lambda d: b"\x80" + d[1:]), "weights.values"),
        (lambda image: image.__setitem__(0, image[0] ^ 1), "weights.image"),
        (lambda image: image.__setitem__(-1, 1), "weights.image"),
        (lambda image: image.extend(bytes(4096)), "weights.image"),
    ],
)  # fmt: skip
def test_forged_content_is_refused(change: Callable[[bytearray], None], code: str, copy: Path) -> None:
    root = forge(copy, change)
    assert refusal(copy, expected_root=root).code == code


def test_no_room_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000})())
    with pytest.raises(WeightsError) as caught:
        build(source, tmp_path / "out")
    assert caught.value.code == "weights.no_space"
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_folder(tmp_path / "tiny", "llama")
    file = tmp_path / "tiny/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"layers\.1\.down") as caught:
        build(tmp_path / "tiny", tmp_path / "out")
    assert caught.value.code == "weights.not_finite"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Packer, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Packer, "write", full)
    with pytest.raises(WeightsError) as caught:
        build(source, tmp_path / "out")
    assert caught.value.code == "weights.no_space"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_directory_that_cannot_be_made(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError) as caught:
        build(source, tmp_path / "file" / "out")
    assert caught.value.code == "weights.io"


def test_same_bits_without_vector_instructions(source: Path, good: Path, tmp_path: Path) -> None:
    """Another processor, as far as one machine can show it: torch's plain C++ paths instead of its AVX2 ones."""
    call = (
        "import sys; from pathlib import Path; import torch; from countermark_appliance.engine.weights import build;"
        "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'; build(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", call, str(source), str(tmp_path)], check=True, env=environment)
    assert all((tmp_path / name).read_bytes() == (good / name).read_bytes() for name in FILES)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", "llama", vocab_size=192)
    with pytest.raises(WeightsError) as caught:
        build(tmp_path / "tiny", tmp_path / "out")
    assert caught.value.code == "weights.unsupported_tokenizer"
