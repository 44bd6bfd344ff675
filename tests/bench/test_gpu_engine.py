"""The GPU benchmark runs to its end on a CPU at a tiny shape, counts what it says it counts, and reports what fails."""

import json
from pathlib import Path
from typing import Any

import pytest

import gpu_engine
import gpu_paths
import readme_tables
from countermark_kernels import PROFILE
from generated import QWEN3_8B
from gpu_paths import FULL
from serving import Heard, rates_of, windows

TINY = ["--shape", "tiny", "--device", "cpu", "--here"]


def run(file: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code = gpu_engine.main([*TINY, "--out", str(file), *more])
    found: dict[str, Any] = json.loads(file.read_text())
    return code, found


def test_every_part_of_every_path_ends_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_engine, "kernel_digest", lambda: bytes(32))
    file = tmp_path / "engine.json"
    code, result = run(file)
    assert not result["failed"] and code == 0
    served = {"decode", "sampled", "context", "prefill", "ttft", "profile"}
    expected = {
        "machine": {"limits"},
        PROFILE: served | {"audit"},
        "bf16": served,
        "transformers": {"decode", "context", "prefill", "ttft"},
    }
    assert {path: set(parts) for path, parts in result["found"].items()} == expected
    assert result["found"][PROFILE]["audit"]["differences"] == 0
    assert min(result["limits"][path]["decode"]["1"] for path in (PROFILE, "bf16")) > 0
    table = readme_tables.engine_table(result)
    assert table in capsys.readouterr().out
    for parts in result["found"].values():
        for part in ("decode", "sampled", "context"):
            for figures in parts.get(part, {}).values():
                assert figures["least"] <= figures["tokens_per_second"] <= figures["most"]
                assert f"| {figures['tokens_per_second']:,.0f} " in table
    assert readme_tables.engine_section(file).endswith(table)

    before = result["found"]
    code, result = run(file, "--paths", PROFILE, "--parts", "ttft")  # measured again, the rest stays
    assert code == 0
    assert result["found"]["bf16"] == before["bf16"]
    assert result["found"][PROFILE]["decode"] == before[PROFILE]["decode"]
    assert result["found"][PROFILE]["ttft"] != before[PROFILE]["ttft"]

    monkeypatch.setattr(gpu_engine, "kernel_digest", lambda: bytes(31) + b"1")  # figures of other kernels do not mix
    code, result = run(file, "--paths", PROFILE, "--parts", "ttft")
    assert code == 0 and {path: set(parts) for path, parts in result["found"].items()} == {PROFILE: {"ttft"}}


def test_limits_of_an_h100() -> None:
    """7.57 GB of matrices at 3.0 TB/s are 396 tokens a second; 6.95e9 products a token of prompt at 1,979e12/s.

    A library's product is no limit: on an H100 cuBLAS int8 makes 891e12/s, and ours 1,250e12 in a prefill step.
    """
    machine = {"copy_bytes_per_second": 3.0e12, "int8_ops_per_second": 891e12, "bf16_flops_per_second": 679e12}
    found = gpu_engine.limits(QWEN3_8B, FULL, machine, "NVIDIA H100 80GB HBM3")[PROFILE]
    assert found["decode"]["1"] == pytest.approx(396, rel=0.005)
    assert found["decode"]["256"] == pytest.approx(256 / ((7.57e9 + 256 * 192 * 76032) / 3.0e12), rel=0.005)
    assert found["prefill"] == pytest.approx(1979e12 / 2 / 6.95e9, rel=0.005)
    assert found["ttft_ms"] == pytest.approx(2048 / found["prefill"] * 1e3)
    elsewhere = gpu_engine.limits(QWEN3_8B, FULL, machine, "another")[PROFILE]
    assert elsewhere["prefill"] == pytest.approx(891e12 / 2 / 6.95e9, rel=0.005)
    assert elsewhere["decode"]["256"] == pytest.approx(891e12 / 2 / 7.57e9, rel=0.005)


def test_the_table_says_whose_gpu_was_faster_and_what_a_median_hides() -> None:
    machine = {"copy_bytes_per_second": 3.0e12, "int8_ops_per_second": 891e12, "bf16_flops_per_second": 679e12}
    result: dict[str, Any] = {
        "date": "2026-11-22",
        "device": "NVIDIA H100 80GB HBM3",
        "driver": "580",
        "versions": {"torch": "2.11", "triton": "3.6", "transformers": ""},
        "profile": PROFILE,
        "kernel_digest": "00" * 32,
        "shape": {"name": "qwen3-8b"},
        "protocol": {k: getattr(FULL, k) for k in FULL.__slots__},
        "found": {
            "machine": {"limits": machine},
            PROFILE: {"decode": {"1": rates_of([100.0, 100.0, 50.0])}},
        },
        "limits": gpu_engine.limits(QWEN3_8B, FULL, machine, "NVIDIA H100 80GB HBM3"),
        "another_run": {**gpu_engine.VLLM_RUN, "rows": gpu_engine.VLLM},
    }
    table = " ".join(readme_tables.engine_table(result).split())
    assert "That GPU was faster than this one: cuBLAS bf16 products at 759 TFLOP/s there, 679 here." in table
    assert "the mean of which is lower by at most 25 %" in table  # three windows of 16 steps in 0.16 + 0.16 + 0.32 s
    machine["bf16_flops_per_second"] = 800e12
    assert "That GPU was slower than this one" in " ".join(readme_tables.engine_table(result).split())


def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(**fields: Any) -> Any:
        marks = list(fields["fingerprints"])
        marks[3] = bytes(16)
        return recording(**fields | {"fingerprints": marks})

    recording = gpu_paths.Recording
    monkeypatch.setattr(gpu_paths, "Recording", changed)
    code, result = run(tmp_path / "engine.json", "--paths", PROFILE, "--parts", "audit,ttft")
    assert code == 1
    assert set(result["failed"]) == {f"{PROFILE} audit"}
    why = result["failed"][f"{PROFILE} audit"]
    assert "Traceback" in why and "1 of 1 answers differ" in why and "'position': 3" in why
    assert set(result["found"][PROFILE]) == {"ttft"}


def test_windows_count_only_what_all_answers_share() -> None:
    """Three answers of a token each 10 ms; one begins late, one ends early: 300 tokens a second between the two."""
    times = {"early": range(40), "late": range(10, 60), "short": range(5, 50)}
    heard = [Heard([0.01 * step + 0.001 * n for step in steps]) for n, steps in enumerate(times.values())]
    rates = windows(heard, steps=8)
    assert len(rates) == 3
    assert rates == pytest.approx([300.0] * 3)
    with pytest.raises(RuntimeError, match="no steady state"):
        windows([heard[0], Heard([1.0, 1.1])], steps=8)


def test_without_a_result_nothing_is_claimed(tmp_path: Path) -> None:
    section = readme_tables.engine_section(tmp_path / "absent.json")
    assert "not measured" in section and "|" not in section
