"""The model's pool of key/value blocks: its size, who gets blocks and when they come back, and short memory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tinymodel import TinyArtefact

from countermark_appliance.engine import model as module
from countermark_appliance.engine.model import Chunk, Model, available_bytes
from countermark_kernels.cache import BLOCK, KvCache


def test_blocks_come_back_when_a_cache_is_closed_or_collected() -> None:
    model = Model(TinyArtefact())
    before = model.blocks.available
    kept, dropped = model.new_cache(BLOCK + 1), model.new_cache(1)
    assert (kept.capacity, dropped.capacity) == (2 * BLOCK, BLOCK)
    assert 0 not in kept.blocks and not set(kept.blocks) & set(dropped.blocks)
    assert model.blocks.available == before - 3
    del dropped
    assert model.blocks.available == before - 2
    kept.close()
    kept.close()
    assert model.blocks.available == before and kept.capacity == 0
    with pytest.raises(ValueError, match="tokens within the 0"):
        model.forward([Chunk(cache=kept, start=0, tokens=(1,), logits=1)])


def test_a_pool_of_a_given_size_is_made_once() -> None:
    model = Model(TinyArtefact())
    model.size_pool(4)
    assert (model.pool.blocks, model.blocks.available) == (4, 3)
    assert model.pool.size_bytes == 4 * model.block_bytes
    with pytest.raises(ValueError, match="size_pool"):
        model.size_pool(5)
    held = model.new_cache(2 * BLOCK)
    with pytest.raises(MemoryError):
        model.new_cache(2 * BLOCK)
    assert model.blocks.available == 1  # a refused cache takes nothing
    held.close()
    assert model.new_cache(3 * BLOCK).capacity == 3 * BLOCK


@pytest.mark.parametrize(("context", "tokens"), [(100, 16 * 100), (8192, 16 * 8192), (131_072, 131_072)])
def test_the_default_size(context: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = TinyArtefact(context=context)
    monkeypatch.setattr(module, "available_bytes", lambda: 1 << 40)
    assert Model(artefact).pool.blocks == 1 + -(-tokens // BLOCK)
    model = Model(artefact)
    monkeypatch.setattr(module, "available_bytes", lambda: 4 * 10 * model.block_bytes + 3)
    assert model.pool.blocks == 1 + 10
    monkeypatch.setattr(module, "available_bytes", lambda: 0)
    assert Model(artefact).pool.blocks == 2


@pytest.mark.skipif(shutil.which("free") is None, reason="needs procps")
def test_available_memory_is_what_free_says() -> None:
    said = subprocess.run(["free", "-b"], capture_output=True, text=True, check=True).stdout.splitlines()[1].split()[-1]
    assert available_bytes() == pytest.approx(int(said), rel=0.2)


def test_a_control_group_may_leave_less_than_the_system_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's files read: the tightest group on the way up counts, page cache that can go does not."""
    whole = available_bytes()

    def group(path: str, most: str, used: int, cache: int) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / "memory.max").write_text(f"{most}\n")
        (tmp_path / path / "memory.current").write_text(f"{used}\n")
        (tmp_path / path / "memory.stat").write_text(f"anon 5\nfile 900\ninactive_file {cache}\nactive_file 3\n")

    own = tmp_path / "cgroup"
    own.write_text("1:cpu:/elsewhere\n0::/pod/box\n")
    monkeypatch.setattr(module, "_GROUPS", tmp_path)
    monkeypatch.setattr(module, "_OWN_GROUP", own)
    assert available_bytes() == pytest.approx(whole, rel=0.2)  # no such folder: nothing is known of a limit
    group("pod/box", "max", 7000, 0)
    assert available_bytes() == pytest.approx(whole, rel=0.2)
    group("pod", "100000", 60000, 1000)
    assert available_bytes() == 41000
    group("pod/box", "20000", 7000, 500)
    assert available_bytes() == 13500
    group("pod/box", "20000", 30000, 0)
    assert available_bytes() == 0
    own.write_text("0::/\n")
    group("", "30000", 1000, 0)
    assert available_bytes() == 29000
    (tmp_path / "memory.current").write_text("nonsense")
    assert available_bytes() == pytest.approx(whole, rel=0.2)


def test_where_memory_is_short_it_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says RuntimeError; what else is one stays one."""
    model = Model(TinyArtefact())
    chunk = Chunk(cache=model.new_cache(3), start=0, tokens=(1, 2, 3), logits=1)
    expected = model.forward([chunk])
    real = model.decoder.logits

    def failing(x: torch.Tensor) -> torch.Tensor:
        torch.empty(1 << 50)
        return real(x)

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return real(x) @ real(x)

    def on_a_gpu(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for broken, error in ((failing, MemoryError), (on_a_gpu, MemoryError), (wrong, RuntimeError)):
        with monkeypatch.context() as patch:
            patch.setattr(type(model.decoder), "logits", lambda self, x, broken=broken: broken(x))
            with pytest.raises(error):
                model.forward([chunk])
    assert torch.equal(model.forward([chunk]), expected)
    with pytest.raises(MemoryError):
        Model(TinyArtefact()).size_pool(1 << 40)


def test_sequences_may_share_blocks() -> None:
    """Two tables over one prefix, computed once: the logits of a sequence that computed it itself."""
    model = Model(TinyArtefact())
    prefix = [(7 * i + 1) % model.vocab for i in range(BLOCK)]
    tails = [[5, 6, 7], [9, 9, 9, 9]]
    first = model.new_cache(BLOCK)
    model.forward([Chunk(cache=first, start=0, tokens=prefix, logits=0)])
    chunks = [
        Chunk(
            cache=KvCache(model.pool, first.blocks + model.blocks.take(1)), start=BLOCK, tokens=tail, logits=len(tail)
        )
        for tail in tails
    ]
    found = model.forward(chunks).split([len(tail) for tail in tails])
    for tail, logits in zip(tails, found, strict=True):
        whole = Chunk(cache=model.new_cache(2 * BLOCK), start=0, tokens=[*prefix, *tail], logits=len(tail))
        assert torch.equal(model.forward([whole]), logits)
