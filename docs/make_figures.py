"""Draw the figures of the docs: diagrams from docs/diagrams/*.dot, charts from bench/results/*.json, both as SVG.

    pip install matplotlib && apt install graphviz && python docs/make_figures.py

Neither is needed to build or test anything, so neither is locked. Each figure carries the SHA-256 of what it was drawn
from in its first comment; a test compares that with the source as it is, so that no figure can lag behind its numbers.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "bench" / "results"
IMAGES = DOCS / "img"
OURS, PEERS = "#2f6b3a", ("#8494a4", "#b3bdc7", "#d3dae0")
INK, GRID = "#2b343c", "#e3e8ec"


def digest(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


def engine_bars() -> tuple[bytes, list[str], dict[str, list[float]]]:
    """Tokens a second by batch: ours, the same engine in bf16, transformers."""
    result = json.loads((RESULTS / "gpu-engine.json").read_text())
    batches = [str(n) for n in result["protocol"]["batches"]]
    names = {
        result["profile"]: f"countermark {result['profile']}",
        "bf16": "bf16, same engine",
        "transformers": "transformers, bf16",
    }
    rates = {
        title: [result["found"][path]["decode"][n]["tokens_per_second"] for n in batches]
        for path, title in names.items()
        if path in result["found"]
    }
    return json.dumps(rates).encode(), [f"batch {n}" for n in batches], rates


def cpu_bars() -> tuple[bytes, list[str], dict[str, list[float]]]:
    """Tokens a second on a CPU, every peer."""
    speeds = json.loads((RESULTS / "cpu.json").read_text())["tokens_per_second"]
    cells = list(next(iter(speeds.values())))
    rates = {peer: [found[cell]["best"] for cell in cells] for peer, found in speeds.items()}
    return json.dumps(rates).encode(), cells, rates


Bars = Callable[[], tuple[bytes, list[str], dict[str, list[float]]]]
CHARTS: dict[str, tuple[str, Bars]] = {
    "engine.svg": ("Decode on one H100, Qwen3-8B shapes: times the slowest path", engine_bars),
    "cpu.svg": ("Two CPU cores, SmolLM2-135M: times the slowest path", cpu_bars),
}


def sources() -> dict[str, str]:
    """Figure -> SHA-256 of what it must be drawn from."""
    found = {f"{path.stem}.svg": digest(path.read_bytes()) for path in (DOCS / "diagrams").glob("*.dot")}
    return found | {name: digest(bars()[0]) for name, (_, bars) in CHARTS.items()}


def stamped(svg: str, source: str) -> str:
    """The SVG from its root element on, behind a comment that names the source."""
    return f"<!-- drawn from {source} by docs/make_figures.py -->\n{svg[svg.index('<svg') :].strip()}\n"


def diagram(path: Path) -> str:
    done = subprocess.run(["dot", "-Tsvg", str(path)], capture_output=True, text=True, check=True, timeout=60)  # noqa: S607
    return re.sub(r"<!--.*?-->\n?", "", done.stdout, flags=re.S)


def chart(title: str, groups: Sequence[str], rates: dict[str, list[float]]) -> str:
    """Grouped bars, each group scaled to its slowest, the rate in figures at the end of its bar."""
    import matplotlib as mpl  # noqa: PLC0415  for who draws; `sources` is for everybody

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "countermark", "font.family": "DejaVu Sans"})
    from matplotlib import pyplot  # noqa: PLC0415

    count = len(rates)
    figure, axes = pyplot.subplots(figsize=(8.0, 0.5 + 0.25 * (count + 1) * len(groups)))
    for at, (name, values) in enumerate(rates.items()):
        colour = OURS if at == 0 else PEERS[(at - 1) % len(PEERS)]
        for group in range(len(groups)):
            slowest = min(other[group] for other in rates.values())
            times, y = values[group] / slowest, group * (count + 1) + at
            axes.barh(y, times, height=0.8, color=colour, label=name if group == 0 else None)
            bold: Any = "bold" if at == 0 else "normal"
            text = f" {values[group]:,.0f}/s, {times:.1f}x"
            axes.text(times, y, text, va="center", fontsize=8, color=INK, fontweight=bold)
    axes.set_yticks([group * (count + 1) + (count - 1) / 2 for group in range(len(groups))], groups, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(axes.get_xlim()))
    axes.set_xticks([])
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.axvline(1.0, color=GRID, zorder=0)
    axes.tick_params(length=0, colors=INK)
    figure.tight_layout()
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return written.getvalue()


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    wanted = sources()
    for path in sorted((DOCS / "diagrams").glob("*.dot")):
        (IMAGES / f"{path.stem}.svg").write_text(stamped(diagram(path), wanted[f"{path.stem}.svg"]))
    for name, (title, bars) in CHARTS.items():
        _, groups, rates = bars()
        (IMAGES / name).write_text(stamped(chart(title, groups, rates), wanted[name]))


if __name__ == "__main__":
    main()
