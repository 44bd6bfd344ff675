"""The README's tables, made from the committed results: `python bench/readme_tables.py` rewrites them.

Each table stands between two HTML comments in the README. A test compares what stands there with what the JSON says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def cpu_table(result: dict[str, Any]) -> str:
    """Tokens a second, best of the rounds, and the ratio of ours to each peer."""
    machine, speeds = result["machine"], result["tokens_per_second"]
    ours = next(iter(speeds))
    cells = list(speeds[ours])
    lines = [f"| tokens/s | {' | '.join(cells)} |", "|---|" + "---|" * len(cells)]
    for peer, found in speeds.items():
        shown = []
        for cell in cells:
            ratio = f" ({speeds[ours][cell]['best'] / found[cell]['best']:.1f}x)" if peer != ours else ""
            shown.append(f"{found[cell]['best']:.0f}{ratio}")
        name = f"**{peer}**" if peer == ours else peer
        lines.append(f"| {name} | {' | '.join(shown)} |")
    audit = result["audit"]
    together = (
        f"; {audit['answers']} answers together went at {audit['tokens_per_second']:,.0f} tokens a second"
        if "answers" in audit  # a result from before several could be audited at once has none
        else ""
    )
    lines += [
        "",
        f"SmolLM2-135M, best of {result['rounds']} interleaved rounds; in brackets how many times faster we were.",
        f"Auditing an answer of {audit['tokens']} tokens took 1/{audit['times_faster']:.1f} of the time of",
        f"generating it{together}.",
        f"{machine['cpu']} ({machine['flags']}), {machine['cores']} shared cores, torch {machine['torch']},",
        f"{machine['date']}; `make bench-cpu`, [numbers](bench/results/cpu.json).",
    ]
    return "\n".join(lines)


def quality_table(result: dict[str, Any]) -> str:
    """What quantising to the exact profile costs against the same weights in binary32, and what bf16 costs."""
    profile = result["profile"]
    rows = [("bf16", result["bf16"])]
    rows += [(f"{profile}, seed {row['seed']}", row) for row in result["seeds"]]
    rows += [(f"**{profile}, mean**", result["mean"])]
    lines = ["| against binary32 | perplexity | KL divergence | same most likely token |", "|---|---|---|---|"]
    for name, row in rows:
        percent, top1 = row["perplexity_percent"], 100 * row["top1"]
        lines.append(f"| {name} | {percent:+.2f} % | {row['kl']:.4f} | {top1:.1f} % |")
    texts, draws = (result["interval95"][over]["perplexity_percent"] for over in ("windows", "seeds"))
    kl = result["interval95"]["windows"]["kl"]
    lines += [
        "",
        f"SmolLM2-135M, one set of weights, {result['tokens']:,} tokens of five works in `bench/data`, windows of",
        f"{result['window']:,}. bf16: transformers, every product summed in binary32 and rounded once. The first seed",
        "is the artefact's own; two more show how much one draw of the rotation matters. 95 % intervals of the mean:",
        f"perplexity {texts[0]:+.2f} to {texts[1]:+.2f} %, KL {kl[0]:.4f} to {kl[1]:.4f} over the texts;",
        f"perplexity {draws[0]:+.2f} to {draws[1]:+.2f} % over draws of the rotation;",
        "`bench/quality.py`, [numbers](bench/results/quality-cpu.json).",
    ]
    return "\n".join(lines)


def linear_table(result: dict[str, Any]) -> str:
    """Our time over cuBLAS bf16's, for all matrices of the model, by rows; and a decode step's GEMMs in one graph."""
    ratios = {(row["metric"], row["rows"]): row["ratio"] for row in result["model"]}
    shown = [rows for metric, rows in ratios if metric == "alone"]
    lines = [f"| rows | {' | '.join(map(str, shown))} |", "|---|" + "---|" * len(shown)]
    for metric, title in (("alone", "alone, L2 flushed"), ("in_a_row", "in a row")):
        cells = (f"{ratios[metric, rows]:.2f}" if (metric, rows) in ratios else "" for rows in shown)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    steps = "; ".join(f"{d['rows']}: {d['ours_ms']:.2f} ms ({d['bf16_ms']:.2f})" for d in result["decode"])
    gpu = result["gpu"].split(",")
    lines += [
        "",
        "Our time over that of cuBLAS bf16 in the same run, summed over Qwen3-8B's 36 layers and head,",
        f"epilogue included. All GEMMs of one decode step in one CUDA graph, by batch (cuBLAS bf16): {steps}.",
        f"{gpu[0]}, driver{gpu[1]}, torch {result['versions']['torch']}, Triton {result['versions']['triton']},",
        f"{result['date']}; `bench/gpu_linear.py`, [numbers](bench/results/gpu-linear.json).",
    ]
    return "\n".join(lines)


def attention_table(result: dict[str, Any]) -> str:
    """Time of one layer's attention, in microseconds, and over that of torch's SDPA in bf16."""
    lines = ["| attention | ours, us | SDPA bf16, us | ratio | FlashAttention-2, us |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        name = f"{row['kind']}, {row['batch']} x {row['context']}"
        ours, theirs, flash = (f"{row[key]:.0f}" for key in ("exact_us", "sdpa_default_us", "sdpa_flash_us"))
        lines.append(f"| {name} | {ours} | {theirs} | {row['ratio']:.2f} | {flash} |")
    shape = result["shape"]
    lines += [
        "",
        f"{shape['heads']} heads of {shape['head_dim']}, {shape['kv_heads']} of keys and values, causal;",
        f"SDPA's default is cuDNN here. {result['device']}, driver {result['driver']},",
        f"torch {result['torch']}, Triton {result['triton']}, {result['date']};",
        "`bench/gpu_attention.py`, [numbers](bench/results/gpu-attention.json).",
    ]
    return "\n".join(lines)


def engine_table(result: dict[str, Any], *, steps: bool = True) -> str:
    """What the GPU engine serves, beside peers, limits and vLLM's figures. A figure that is not there is left empty.

    `steps`: with a table of where the time of a step goes.
    """
    found, limits, shape, size = result["found"], result.get("limits", {}), result["shape"], result["protocol"]
    profile, versions, other = result["profile"], result["versions"], result["another_run"]
    batches = [str(n) for n in size["batches"]]
    cells = [*(f"decode b{n}" for n in batches), f"prefill {size['prefills']} x {size['context']:,}", "TTFT"]

    def figures(path: str, part: str = "decode") -> list[float | None]:
        """One a column."""
        parts = found.get(path, {})
        rates = parts.get(part, {})
        shown = [rates.get(n, {}).get("tokens_per_second") for n in batches]
        if part != "decode":
            return [*shown, None, None]
        return [*shown, parts.get("prefill", {}).get("tokens_per_second"), parts.get("ttft", {}).get("ms")]

    def listed(rates: dict[str, Any]) -> list[float | None]:
        return [*(rates["decode"].get(n) for n in batches), rates["prefill"], rates["ttft_ms"]]

    def row(name: str, theirs: list[float | None], ours: list[float | None] | None = None) -> str:
        cells = []
        for at, value in enumerate(theirs):
            time = at == len(theirs) - 1
            shown = "" if value is None else f"{value:,.0f}{' ms' if time else ''}"
            mine = ours[at] if ours else None
            if value and mine:
                shown += f" ({value / mine if time else mine / value:.2f}x)"
            cells.append(shown)
        return f"| {name} | {' | '.join(cells)} |"

    lines = [f"| tokens/s | {' | '.join(cells)} |", "|---|" + "---|" * len(cells)]
    more = {"sampled": "temperature 0.8, top-p 0.95", "context": f"behind {size['context']:,} tokens"}
    lines.append(row(f"**countermark {profile}**", figures(profile)))
    lines += [row(f"{profile}, {what}", figures(profile, part)) for part, what in more.items()]
    peers = {"bf16": "bf16, same engine", "transformers": f"transformers {versions['transformers']}, bf16"}
    for path, name in peers.items():
        if path not in found:
            continue
        lines.append(row(name, figures(path), figures(profile)))
        for part, what in more.items():
            if part in found.get(path, {}):
                lines.append(row(f"{path}, {what}", figures(path, part), figures(profile, part)))
    for name, rates in other["rows"].items():
        lines.append(row(f"{name} (another run)", listed(rates), figures(profile)))
    lines += [row(f"limit of this GPU, {name}", listed(limit)) for name, limit in limits.items()]
    beside = "transformers" in found
    lines += [
        "",
        f"Shapes of {shape['name']}, generated weights, the whole engine: scheduler, sampler, fingerprints, text.",
        f"Decode: prompts of {size['prompt']} tokens, {size['tokens']} new ones each, greedy, while all answers grow;",
        f"the median of stretches of 16 steps{_below_median(found.get(profile, {}))}.",
        f"TTFT: a prompt of {size['context']:,} tokens alone. In brackets how many times faster we were.",
        *(["bf16: cuBLAS and SDPA behind the same scheduler."] if "bf16" in found else []),
        *(["transformers launches each kernel from Python, so it decodes as fast as the host."] if beside else []),
        *_another_run(other, found.get("machine", {}).get("limits")),
    ]
    if limits:
        int8, bf16 = (limit["products_per_second"] / 1e12 for limit in limits.values())
        lines += [
            "Limits: bytes moved at the speed of a copy, measured in this run, or products at the data sheet's",
            f"{int8:,.0f} (int8) and {bf16:,.0f} (bf16) tera a second; for prefill the linear layers alone.",
        ]
    audit = found.get(profile, {}).get("audit")
    if audit:
        lines += [
            f"Auditing an answer of {audit['prompt']:,} + {audit['tokens']:,} tokens took",
            f"1/{audit['times_faster']:.0f} of the time of generating it at batch 1; {audit['answers']} together went",
            f"at {audit['answers_per_second']:.0f} answers, {audit['tokens_per_second']:,.0f} tokens a second.",
        ]
    lines += [*(_profile_lines(found.get(profile, {}).get("profile", {})) if steps else []), ""]
    lines += [
        f"{result['device']}, driver {result['driver']}, torch {versions['torch']}, Triton {versions['triton']},",
        f"{result['date']}, kernels of digest `{result['kernel_digest'][:16]}`; `make bench-gpu`,",
        "[numbers](bench/results/gpu-engine.json).",
    ]
    return "\n".join(lines)


def _below_median(parts: dict[str, Any]) -> str:
    """By how much the mean is less, at most: what a median hides."""
    figures = [f for part in ("decode", "sampled", "context") for f in parts.get(part, {}).values() if "mean" in f]
    if not figures:
        return ""
    most = max(1 - f["mean"] / f["tokens_per_second"] for f in figures)
    return f", the mean of which is lower by at most {100 * max(most, 0):.0f} %"


def _another_run(other: dict[str, Any], machine: dict[str, float] | None) -> list[str]:
    """That vLLM's figures are not of this GPU, and which of the two is faster."""
    lines = [f"vLLM's rows are not of this run: {other['what']}."]
    if machine:
        there, here = other["bf16_flops_per_second"] / 1e12, machine["bf16_flops_per_second"] / 1e12
        lines += [
            f"That GPU was {'faster' if there > here else 'slower'} than this one: cuBLAS bf16 products at",
            f"{there:.0f} TFLOP/s there, {here:.0f} here. Those ratios compare two GPUs as well as two engines.",
        ]
    return lines


def _profile_lines(steps: dict[str, Any]) -> list[str]:
    """Milliseconds of a step on the GPU by kind of kernel, as a table, and how to read it."""
    totals: dict[str, float] = {}
    for step in steps.values():
        for name, part in step["groups"].items():
            totals[name] = totals.get(name, 0.0) + part["ms"]
    if not totals:
        return []
    names = sorted(totals, key=lambda name: -totals[name])
    lines = ["", f"| a step's milliseconds | {' | '.join(names)} | some kernel runs | wall |"]
    lines.append("|---|" + "---|" * (len(names) + 2))
    for name, step in steps.items():
        parts = [f"{step['groups'][n]['ms']:.2f}" if n in step["groups"] else "" for n in names]
        lines.append(f"| {name} | {' | '.join(parts)} | {step['busy_ms']:.2f} | {step['wall_ms']:.2f} |")
    return [
        *lines,
        "",
        "Steps straight through the executor, without the scheduler. Kernels are timed under a profiler, which slows",
        "them a little; the wall time is without it, the mean of ten steps (prefill: three), with whatever they had to",
        "make. Where two operations have a kernel of one name, its time stands in a column of both.",
    ]


def parity_lines(results: dict[str, dict[str, Any]]) -> str:
    """What comparing each GPU with the recorded digests of a CPU found. `results`: by file name.

    One sentence counts the cases of every GPU, so they have to be the same; else ValueError.
    """
    sizes = {(len(r["models"]), _summed(r, "prompts"), _summed(r, "positions")) for r in results.values()}
    if len(sizes) != 1:
        raise ValueError(f"parity: expected the same cases on every GPU, got {sizes}")
    ((models, prompts, positions),) = sizes
    names = " and ".join(r["environment"]["device"] for r in results.values())
    differing = sum(_summed(r, "mismatches") for r in results.values())
    roots = sum(m["weights_root_equal"] for r in results.values() for m in r["models"].values())
    noticed, mutants = (sum(r["mutant"][k] for r in results.values()) for k in ("differ_with_float_sum", "cases"))
    lines = [
        f"{names}, {'each ' if len(results) > 1 else ''}against a CPU: {prompts:,} prompts of 1 to 4,000 tokens on",
        f"{models} models, the logits of {positions:,} positions, every token and fingerprint:",
        f"**{differing} differences**, in ragged batches on the one side and one by one on the other.",
        f"{roots} of {models * len(results)} artefacts built beside the GPU had the CPU's root.",
        f"One integer sum replaced by a float sum changed {noticed} of {mutants} answers.",
        "",
    ]
    for name, result in results.items():
        where = result["environment"]
        drawn = "on the GPU" if result["drawn_on"] == "device" else "by the CPU's sampler from the GPU's logits"
        lines += [
            f"- [{where['device']}](bench/results/{name}): tokens drawn {drawn},",
            f"  kernels of digest `{where['kernel_digest'][:16]}`, driver {where['driver']},",
            f"  torch {where['torch']}, Triton {where['triton']}, {where['date']}",
        ]
    lines += [
        "",
        "`bench/parity.py`, [digests](tests/data/parity/exact-v1.json);",
        "[what changed since](docs/decisions.md#kernels-on-a-gpu).",
    ]
    return "\n".join(lines)


def determinism_lines(reports: dict[str, dict[str, Any]]) -> str:
    """What the determinism suite found on each machine, by file name."""
    lines = []
    for name, report in reports.items():
        where, ran = report["environment"], [c for c in report["cases"] if c["status"] != "SKIP"]
        one = sum(c["status"] == "PASS" and c["distinct"] == 1 for c in ran)
        model = "a small generated model" if where["model"] == "source" else where["model"]
        lines.append(
            f"- [{where['device']}](bench/results/{name}): {one} of {len(ran)} conditions left one result to each"
            f" question,\n  {sum(c['runs'] for c in ran):,} runs of {model},"
            f" kernels of digest `{where['kernel_digest'][:16]}`"
        )
    names = [c["name"] for c in max(reports.values(), key=lambda r: len(r["cases"]))["cases"]]
    return (
        "The determinism suite hashes every logit of an answer given alone, and of the same answer under each condition"
        "\n"
        f"({', '.join(names)}):\n\n" + "\n".join(lines)
    )


def _summed(result: dict[str, Any], field: str) -> int:
    return sum(model[field] for model in result["models"].values())


def appraisal_table(result: dict[str, Any]) -> str:
    """Processor time of one appraisal, and what of the aim is missed."""
    names = {
        "session": "a session's evidence, by a process that has seen none of it",
        "session again": "the next connection to that node",
        "new process": "the very first of a new process, imports done",
        "TDX files": "a genuine quote with Intel's endorsements",
        "GPU files": "a genuine H100 report with a driver RIM",
    }
    lines = ["| appraisal, processor time | best | median | 95 % |", "|---|---|---|---|"]
    for key, found in result["appraisals"].items():
        values = " | ".join(f"{found[name]:.1f} ms" for name in ("best_ms", "median_ms", "p95_ms"))
        lines.append(f"| {names[key]} | {values} |")
    target, machine = result["target_ms"], result["machine"]
    slow = [names[key] for key, found in result["appraisals"].items() if found["median_ms"] > target]
    missed = f"missed by: {', '.join(slow)}" if slow else "met by all"
    lines += [
        "",
        "Quote, both event logs, one GPU with driver and VBIOS RIM, CRLs and an OCSP response. The aim is",
        f"{target:.0f} ms, {missed}.",
        "Half of what the first costs are signatures on P-384; which certificate issued which, and what a RIM's signer",
        "signed, is then remembered for as long as the process lives.",
        f"{machine['cpu']}, {machine['cores']} shared cores, {machine['date']}; `bench/appraisal.py`,",
        "[numbers](bench/results/appraisal.json).",
    ]
    return "\n".join(lines)


def records_table(result: dict[str, Any]) -> str:
    """What the records cost, without an engine."""
    log, machine = result["verified"], result["machine"]
    lines = ["| records, no engine | on a disk | in memory |", "|---|---|---|"]
    for key, name in (("intents", "durable INTENTs"), ("receipts", "INTENT, OUTCOME and receipt")):
        shown = [f"{result[where][key]['per_s']:,.0f} a second" for where in ("disk", "memory")]
        lines.append(f"| {name}, {result['concurrent']} at a time | {' | '.join(shown)} |")
    shown = [f"{result[where]['alone']['median_ms']:.1f} ms" for where in ("disk", "memory")]
    lines.append(f"| added before the first token, one at a time, median | {' | '.join(shown)} |")
    peak, small = log["peak_mib"], log["peak_mib_of_1000_leaves"]
    rate, wait = result["disk"]["intents"]["per_s"], result["disk"]["alone"]["median_ms"]
    lines += [
        "",
        f"The best of {result['rounds']} rounds on a machine that others were using. The aims, on a disk, are 2,000",
        f"INTENTs a second ({'met' if rate >= 2000 else 'missed'}) and 2 ms ({'met' if wait <= 2 else 'missed'}).",
        f"Verifying a log of {log['leaves']:,} leaves in files took {log['seconds']:.0f} s and {peak:.0f} MiB"
        f" ({small:.0f} MiB for 1,000 leaves).",
        f"{machine['cpu']}, {machine['cores']} shared cores, {machine['date']}; `bench/records.py`,",
        "[numbers](bench/results/records.json).",
    ]
    return "\n".join(lines)


def proxy_table(result: dict[str, Any]) -> str:
    """Time to the first token, directly and through the proxy."""
    machine, found, overhead = result["machine"], result["first_token"], result["overhead"]
    names = {
        "direct": "a session of the library",
        "proxy": "the proxy, over plain HTTP",
        "openai": "the proxy, through the `openai` package",
    }
    lines = ["| to the first token, no engine | best | median | 95 % |", "|---|---|---|---|"]
    for way, name in names.items():
        shown = [f"{found[way][key]:.1f} ms" for key in ("best_ms", "median_ms", "p95_ms")]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    cost, target = overhead["median_ms"], result["target_ms"]
    lines += [
        "",
        f"{result['rounds']} rounds in turns on a machine that others were using; within a round the proxy took",
        f"{cost:.1f} ms longer (median; the aim, at most {target:g} ms, is {'met' if cost <= target else 'missed'}).",
        f"{machine['cpu']}, {machine['cores']} shared cores, {machine['date']}; `bench/proxy.py`,",
        "[numbers](bench/results/proxy.json).",
    ]
    return "\n".join(lines)


def engine_section(file: Path) -> str:
    """The engine on a GPU, or that nobody has measured it."""
    if not file.exists():
        return "What a whole GPU node serves in a second is not measured yet; its kernels are, below."
    return f"On a GPU:\n\n{engine_table(json.loads(file.read_text()), steps=False)}"


def _read(pattern: str) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))}


def rendered() -> dict[str, str]:
    """Every table by the name of its comments."""
    return {
        "engine": engine_section(RESULTS / "gpu-engine.json"),
        "appraisal": appraisal_table(json.loads((RESULTS / "appraisal.json").read_text())),
        "records": records_table(json.loads((RESULTS / "records.json").read_text())),
        "proxy": proxy_table(json.loads((RESULTS / "proxy.json").read_text())),
        "cpu": cpu_table(json.loads((RESULTS / "cpu.json").read_text())),
        "linear": linear_table(json.loads((RESULTS / "gpu-linear.json").read_text())),
        "attention": attention_table(json.loads((RESULTS / "gpu-attention.json").read_text())),
        "parity": parity_lines(_read("parity-*.json")),
        "determinism": determinism_lines(_read("determinism-*.json")),
        "quality": quality_table(json.loads((RESULTS / "quality-cpu.json").read_text())),
    }


def replaced(readme: str) -> str:
    """The README with every table as the results have it."""
    for name, text in rendered().items():
        readme, count = re.subn(
            rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)",
            lambda found, text=text: f"{found[1]}{text}\n{found[2]}",
            readme,
            flags=re.S,
        )
        if count != 1:
            raise SystemExit(f"README.md: expected one table '{name}', got {count}")
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(replaced(path.read_text()))
