"""Measure reading, writing and extraction, and write the tables of docs/benchmarks.md.

python tools/bench.py            # some minutes
python tools/bench.py --quick    # tiny sizes, to see that it runs; writes nothing
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import bench_command
import bench_datasets
import bench_extraction
import bench_merge
import bench_push
import bench_reading
from document_tables import table_command

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
PACKAGES = ("lmdb", "numpy", "torch", "transformers", "torchaudio", "soundfile", "soxr")
TITLES = {
    "P": "P: 28,109 × (768,) float32, batches of 256",
    "H": "H: 300 × (1214, 768) float32, batches of 8",
}


def tables(*, quick: bool) -> str:
    """All tables as Markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    system = f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}"
    python = f"Python {platform.python_version()}, {versions}"
    lines = [f"`make bench` on {system}, {python}. Medians; reading with torch on one thread."]
    for name, figures in bench_reading.measure(quick=quick).items():
        lines += ["", f"### {TITLES[name]}", "", "| what | ours | others | ratio |"]
        lines.append("|---|---|---|---|")
        lines += [_row(what, ways) for what, ways in figures.items()]
    by_way = {
        **bench_merge.beside_write(quick=quick),
        **bench_datasets.measure(quick=quick),
        **bench_extraction.measure(quick=quick),
        **bench_command.measure(quick=quick),
        **bench_push.measure(quick=quick),
    }
    for what, ways in by_way.items():
        lines += ["", f"### {what}", "", "| way | figure |", "|---|---|"]
        lines += [f"| {way} | {_number(figure)} |" for way, figure in ways.items()]
    return "\n".join(lines)


def _row(what: str, ways: dict[str, float]) -> str:
    others = [name for name in ways if name in ("RAM", "memmap", "npy", "LMDB")]
    ours = [name for name in ways if name not in others]
    own = ", ".join(
        _number(ways[name]) + (f" ({name.removeprefix('ours, ')})" if name != "ours" else "")
        for name in ours
    )
    theirs = ", ".join(f"{name} {_number(ways[name])}" for name in others)
    ratios = ", ".join(f"{ways[ours[0]] / ways[name]:.2f} × {name}" for name in others)
    return f"| {what} | {own} | {theirs} | {ratios} |"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def main() -> None:
    table_command(__doc__ or "", DOCUMENT, "tables", tables)


if __name__ == "__main__":
    main()
