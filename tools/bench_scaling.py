"""What grows with a store: three sizes measured, larger ones by formula; writes docs/scaling.md.

    python tools/bench_scaling.py [--folder DIR] [--json FILE]   # 25 GB of disk, half an hour
    python tools/bench_scaling.py --growth                       # the formulas alone, at once
    python tools/bench_scaling.py --quick                        # tiny sizes; writes nothing

Each step runs in a process of its own (tools/scaling_steps.py), some several times, and the
smallest figure is kept: others use the machine, too. Times are those of the processor (user and
system), but where the table says wall time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from document_tables import write_between
from scaling_samples import HIDDEN_SHAPE, name_of
from scaling_steps import NUM_SINGLES

from lmdbcache.extraction.scaling import growth_of
from lmdbcache.extraction.space import estimated_bytes
from lmdbcache.files import readable_size

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
STEPS = Path(__file__).with_name("scaling_steps.py")
SIZES = (28_109, 500_000, 2_000_000)
LARGEST = 20_000_000
NUM_HIDDEN = 400
Figures = dict[str, float]
Table = dict[str, Figures]

# Step, arguments, how often. The second look at the table finds it kept.
POOLED = [
    ("first_reads", [], 3),
    ("singles", [], 3),
    ("select_all", [], 2),
    ("epoch", ["200000"], 2),
    ("page_tables", [], 1),
    ("coverage", [], 2),
    ("info", [], 2),
    ("list_stores", [], 3),
    ("checksums", [], 2),
    ("verify", [], 2),
    ("evicted", ["0"], 2),
    ("evicted", ["0.5"], 2),
    ("evicted", ["0.5", "asked"], 2),
    ("evicted", ["1"], 2),
    ("evicted", ["1", "asked"], 2),
    ("compact", [], 1),
]
HIDDEN = [
    ("page_tables", [], 1),
    ("verify", [], 2),
    ("evicted", ["0"], 2),
    ("evicted", ["1"], 2),
    ("evicted", ["1", "asked"], 2),
    ("compact", [], 1),
]
ROWS = [
    ("write, sorted: µs each", "write", "CPU µs", "{:.0f}"),
    ("write, random order: µs each", "write random", "CPU µs", "{:.0f}"),
    ("the same, embeddings/s of wall time", "write random", "rate", "{:,.0f}"),
    ("write, sorted, embeddings/s of wall time", "write", "rate", "{:,.0f}"),
    ("the same, MB/s of values", "write", "MB/s", "{:.0f}"),
    ("on disk, bytes each", "write", "bytes per embedding", "{:,.0f}"),
    ("open to first sample, ms of wall time", "first_reads", "open to first sample, ms", "{:.1f}"),
    ("first batch of 256 by id, ms of wall time", "first_reads", "first batch by id, ms", "{:.1f}"),
    ("private memory of 40 batches, MiB", "first_reads", "private, MiB", "{:.1f}"),
    ("single sample by id, µs", "singles", "CPU µs", "{:.0f}"),
    ("table of all places: made, s", "table", "CPU s", "{:.2f}"),
    ("the same from its file, s", "table again", "CPU s", "{:.2f}"),
    ("select of all: private bytes each", "select_all", "bytes per id", "{:.0f}"),
    ("200,000 in random order, first time, µs each", "epoch", "CPU µs per sample", "{:.1f}"),
    ("page tables of a reader of all, MiB per GiB", "page_tables", "MiB per GiB", "{:.1f}"),
    ("coverage of all ids, s", "coverage", "CPU s", "{:.2f}"),
    ("its memory at most, bytes each", "coverage", "peak bytes per id", "{:.0f}"),
    ("`ls`, ms", "list_stores", "CPU ms", "{:.1f}"),
    ("`info` with its classes, s", "info", "CPU s", "{:.2f}"),
    ("all keys with checksums, s", "checksums", "CPU s", "{:.2f}"),
    ("`verify`, s", "verify", "CPU s", "{:.2f}"),
    ("its memory at most, MiB", "verify", "private peak, MiB", "{:.0f}"),
    ("`compact`, s", "compact", "CPU s", "{:.2f}"),
    ("`merge` into another root, s", "merge", "CPU s", "{:.1f}"),
    ("the same again, nothing new, s", "merge again", "CPU s", "{:.1f}"),
    ("its memory at most, MiB", "merge", "private peak, MiB", "{:.0f}"),
    ("`push` to a folder, s", "push", "CPU s", "{:.1f}"),
    ("the same again, nothing new, s", "push again", "CPU s", "{:.1f}"),
    ("its memory at most, MiB", "push", "private peak, MiB", "{:.0f}"),
    ("there: bytes each", "push", "there, bytes each", "{:,.0f}"),
    ("of these, in commits", "push", "commits, bytes each", "{:.0f}"),
    ("files there", "push", "files", "{:.0f}"),
    ("`pull` from a folder, s", "pull", "CPU s", "{:.1f}"),
    ("the same again, nothing new, s", "pull again", "CPU s", "{:.1f}"),
    ("its memory at most, MiB", "pull", "private peak, MiB", "{:.0f}"),
    ("random batches, all in memory, µs each of wall time", "evicted 0", "µs per sample", "{:.0f}"),
    ("half of it dropped, as such", "evicted 0.5", "µs per sample", "{:.0f}"),
    ("half of it dropped, asked ahead", "evicted 0.5 asked", "µs per sample", "{:.0f}"),
    ("all of it dropped, as such", "evicted 1", "µs per sample", "{:.0f}"),
    ("all of it dropped, asked ahead", "evicted 1 asked", "µs per sample", "{:.0f}"),
]


def run_step(name: str, root: Path, num_samples: int, *arguments: str) -> Figures:
    """One step in a process of its own."""
    command = [sys.executable, str(STEPS), name, str(root), str(num_samples), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    figures: Figures = json.loads(done.stdout)
    return figures


def best(runs: list[Figures]) -> Figures:
    """The smallest of each figure; rates are made of these."""
    return {name: min(run[name] for run in runs) for name in runs[0]}


def measure(num_samples: int, folder: Path, *, is_hidden: bool = False) -> Table:
    """All figures of one store, which is removed again."""
    table: Table = {}
    value_bytes = 4 * (math.prod(HIDDEN_SHAPE) if is_hidden else 768)
    with tempfile.TemporaryDirectory(prefix="lmdbcache-scaling-", dir=folder) as scratch:
        root = Path(scratch) / "cache"
        if not is_hidden and num_samples <= SIZES[1]:
            shuffled = Path(scratch) / "shuffled"
            table["write random"] = run_step("write", shuffled, num_samples, "random")
            for path in sorted(shuffled.rglob("data.mdb")):
                path.unlink()
        table["write"] = run_step("write_hidden" if is_hidden else "write", root, num_samples)
        if not is_hidden:
            table["table"] = run_step("table", root, num_samples)
            table["table again"] = run_step("table", root, num_samples)
        for name, arguments, times in HIDDEN if is_hidden else POOLED:
            runs = [
                run_step(name, root, num_samples, *arguments)
                for _ in range(times if num_samples in (*SIZES, NUM_HIDDEN) else 1)
            ]
            table[" ".join([name, *arguments]) if name == "evicted" else name] = best(runs)
            print(num_samples, name, *arguments, file=sys.stderr)
        if not is_hidden:
            table |= beyond_one_store(root, num_samples, Path(scratch))
    for name in ("write", "write random", "singles", "list_stores"):
        if name in table:
            number = {"singles": NUM_SINGLES, "list_stores": 1}.get(name, num_samples)
            table[name]["CPU µs"] = 1e6 * table[name]["CPU s"] / number
            table[name]["CPU ms"] = 1e3 * table[name]["CPU s"] / number
            table[name]["rate"] = number / table[name]["s"]
            table[name]["MB/s"] = table[name]["rate"] * value_bytes / 1e6
    return table


def beyond_one_store(root: Path, num_samples: int, scratch: Path) -> Table:
    """Merged into another root, pushed to a folder and pulled from there; each once more."""
    table: Table = {}
    place = scratch / "place"
    for name, store, target in (
        ("merge", root, scratch / "merged"),
        ("push", root, place),
        ("pull", scratch / "pulled", place),
    ):
        for title in (name, f"{name} again"):
            table[title] = run_step(name, store, num_samples, str(target))
            print(num_samples, title, file=sys.stderr)
        shutil.rmtree(scratch / "merged", ignore_errors=True)
    return table


def figures_table(tables: dict[str, Table]) -> str:
    """The measured figures as Markdown: one column for each store."""
    lines = ["| | " + " | ".join(tables) + " |", "|---|" + "---|" * len(tables)]
    for title, name, figure, form in ROWS:
        cells = [
            form.format(table[name][figure]) if name in table else "" for table in tables.values()
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def growth_table() -> str:
    """What the formulas say of four sizes, pooled and hidden, as Markdown."""
    columns = {}
    for kind, shape in (("pooled", (768,)), ("hidden", HIDDEN_SHAPE)):
        each = bytes_each(shape)
        for number in (*SIZES, LARGEST):
            growth = growth_of(number, round(number * each), 4 * math.prod(shape))
            columns[f"{_number(number)} {kind}"] = growth
    rows = [
        ("on disk; memory for random reads", "store_bytes", readable_size),
        ("one writer", "write_seconds", readable_time),
        ("page tables, each process, at most", "table_bytes", readable_size),
        ("list of samples, each process", "list_bytes", readable_size),
        ("list of clips, each process of an extraction", "clip_bytes", readable_size),
        ("`verify`, first opening of a copy", "check_seconds", readable_time),
        ("`push`, `pull` at 1 Gbit/s", "transfer_seconds", readable_time),
    ]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for title, field, form in rows:
        cells = [form(getattr(growth, field)) for growth in columns.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bytes_each(shape: tuple[int, ...]) -> float:
    """What one more embedding takes on disk, as foretold."""
    names = [name_of(number) for number in range(2000)]
    return (
        estimated_bytes(names, shape, "float32") - estimated_bytes(names[:1000], shape, "float32")
    ) / 1000


def readable_time(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def _number(number: int) -> str:
    return f"{number / 1e6:.0f} M" if number >= 1_000_000 else f"{number / 1e3:.0f} k"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing")
    parser.add_argument("--growth", action="store_true", help="write the formulas' table alone")
    parser.add_argument("--folder", type=Path, help="where the data goes; default: the temp folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.growth:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(write_between(text, "growth", growth_table()), encoding="utf-8")
        return
    sizes, num_hidden = ((2000,), 8) if arguments.quick else (SIZES, NUM_HIDDEN)
    folder = arguments.folder or Path(tempfile.gettempdir())
    tables = {f"{_number(size)} pooled": measure(size, folder) for size in sizes}
    tables[f"{num_hidden} hidden"] = measure(num_hidden, folder, is_hidden=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(tables, indent=1), encoding="utf-8")
    figures, growth = figures_table(tables), growth_table()
    print(f"{figures}\n\n{growth}")
    if not arguments.quick:
        text = DOCUMENT.read_text(encoding="utf-8")
        text = write_between(write_between(text, "figures", figures), "growth", growth)
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
