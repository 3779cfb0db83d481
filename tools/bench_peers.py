"""Compare lmdbcache with other ways to keep embeddings: `make bench-peers`, some minutes.

All ways store the same embeddings and read them in the same shuffled batches, in turn, round after
round, each in the fastest way its documentation shows; torch runs on one thread. The tables go to
docs/benchmarks.md and the chart beside it; `--quick` takes tiny sizes and writes nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lmdb
import numpy as np
import torch
from bench_reading import HIDDEN, POOLED, QUICK, Workload
from document_tables import table_command

from lmdbcache import EmbeddingCache

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
SAMPLES_AT_ONCE = 1024  # that a writer is given

Fetch = Callable[[Sequence[int]], torch.Tensor]


class Way:
    """One way to keep embeddings: `write` them once, `open` them in each process that reads."""

    name: ClassVar[str]
    package: ClassVar[str]

    def __init__(self, folder: Path, work: Workload) -> None:
        self.folder, self.work = folder, work
        self.file = folder / "embeddings"

    def write(self, embeddings: np.ndarray) -> None:
        raise NotImplementedError

    def open(self) -> Fetch:
        """Return what gives the embeddings at some positions: a new tensor, first axis batch."""
        raise NotImplementedError


class Ours(Way):
    name = package = "lmdbcache"

    def write(self, embeddings: np.ndarray) -> None:
        keys = self.work.keys
        with EmbeddingCache(self.folder).writer(self.work.config) as writer:
            for start in range(0, len(keys), SAMPLES_AT_ONCE):
                part = slice(start, start + SAMPLES_AT_ONCE)
                writer.put_batch(keys[part], embeddings[part])

    def open(self) -> Fetch:
        selection = EmbeddingCache(self.folder).reader(self.work.config).select(self.work.keys)
        return lambda positions: torch.from_numpy(selection.get_batch(positions))


class Memmap(Way):
    name, package = "NumPy memmap", "numpy"

    def write(self, embeddings: np.ndarray) -> None:
        np.save(self.file.with_suffix(".npy"), embeddings)

    def open(self) -> Fetch:
        array = np.load(self.file.with_suffix(".npy"), mmap_mode="r")
        return lambda positions: torch.from_numpy(array[positions])


class DictOfTensors(Way):
    """What most scripts have: one file, loaded whole."""

    name, package = "dict of tensors in RAM", "torch"

    def write(self, embeddings: np.ndarray) -> None:
        rows = torch.from_numpy(embeddings).unbind()
        torch.save({k: v.clone() for k, v in zip(self.work.keys, rows, strict=True)}, self.file)

    def open(self) -> Fetch:
        stored, keys = torch.load(self.file), self.work.keys
        return lambda positions: torch.stack([stored[keys[i]] for i in positions])


class TorchMmap(Way):
    name, package = "torch.load(mmap=True)", "torch"

    def write(self, embeddings: np.ndarray) -> None:
        torch.save(torch.from_numpy(embeddings), self.file)

    def open(self) -> Fetch:
        stored = torch.load(self.file, mmap=True)
        return lambda positions: stored.index_select(0, torch.as_tensor(positions))


class TensorDict(Way):
    name = package = "tensordict"

    def write(self, embeddings: np.ndarray) -> None:
        import tensordict

        found = {"embedding": torch.from_numpy(embeddings)}
        tensordict.TensorDict(found, [len(embeddings)]).memmap(self.file)

    def open(self) -> Fetch:
        import tensordict

        stored = tensordict.TensorDict.load_memmap(self.file)
        return lambda positions: stored[torch.as_tensor(positions)]["embedding"]


class Safetensors(Way):
    """One tensor a sample, under its id."""

    name = package = "safetensors"

    def write(self, embeddings: np.ndarray) -> None:
        from safetensors.numpy import save_file

        save_file(dict(zip(self.work.keys, embeddings, strict=True)), self.file)

    def open(self) -> Fetch:
        from safetensors import safe_open

        stored, keys = safe_open(self.file, "pt"), self.work.keys
        return lambda positions: torch.stack([stored.get_tensor(keys[i]) for i in positions])


class HuggingFace(Way):
    name, package = "Hugging Face datasets", "datasets"

    def write(self, embeddings: np.ndarray) -> None:
        import datasets

        shape = self.work.shape
        kind: Any = (
            datasets.Sequence(datasets.Value("float32"), length=shape[0])
            if len(shape) == 1
            else datasets.Array2D(shape, "float32")
        )

        def rows() -> Any:
            for key, embedding in zip(self.work.keys, embeddings, strict=True):
                yield {"id": key, "embedding": embedding}

        datasets.disable_progress_bars()
        made = datasets.Dataset.from_generator(
            rows,
            features=datasets.Features({"id": datasets.Value("string"), "embedding": kind}),
            cache_dir=str(self.folder / "made"),
            writer_batch_size=64,
        )
        made.save_to_disk(str(self.file))
        shutil.rmtree(self.folder / "made")

    def open(self) -> Fetch:
        import datasets

        stored = datasets.load_from_disk(str(self.file)).with_format("torch", ["embedding"])
        return lambda positions: stored[list(positions)]["embedding"]


class PlainLMDB(Way):
    """A transaction for all reads, a value a sample."""

    name, package = "LMDB alone", "lmdb"

    def write(self, embeddings: np.ndarray) -> None:
        keys, size = self.work.keys, 2 * embeddings.nbytes + 2**28
        with lmdb.open(str(self.file), map_size=size) as environment:
            for start in range(0, len(keys), SAMPLES_AT_ONCE):
                part = slice(start, start + SAMPLES_AT_ONCE)
                with environment.begin(write=True) as transaction:
                    for key, value in zip(keys[part], embeddings[part], strict=True):
                        transaction.put(key.encode(), value.tobytes())

    def open(self) -> Fetch:
        environment = lmdb.open(str(self.file), readonly=True, lock=False)
        transaction = environment.begin(buffers=True)
        keys, shape = [key.encode() for key in self.work.keys], self.work.shape

        def fetch(positions: Sequence[int]) -> torch.Tensor:
            values = [np.frombuffer(transaction.get(keys[i]), np.float32) for i in positions]
            return torch.from_numpy(np.stack(values).reshape(len(values), *shape))

        return fetch


WAYS: tuple[type[Way], ...] = (
    Ours,
    Memmap,
    TorchMmap,
    DictOfTensors,
    TensorDict,
    Safetensors,
    HuggingFace,
    PlainLMDB,
)
EPOCH = "epoch, µs/sample"
COLUMNS = (EPOCH, "one sample, µs", "open → first sample, ms", "write, s", "disk / raw")


class Comparison:
    """All ways with one workload; figures by way and column."""

    def __init__(self, work: Workload, folder: Path) -> None:
        self.work = work
        self.ways = [way(folder / way.__name__, work) for way in WAYS]
        self.figures: dict[str, dict[str, float]] = {way.name: {} for way in self.ways}

    def run(self) -> dict[str, dict[str, float]]:
        work, dice = self.work, np.random.default_rng(0)
        embeddings = dice.random((work.num_samples, *work.shape), dtype=np.float32)
        for way in self.ways:
            self.write(way, embeddings)
        order = dice.permutation(work.num_samples)
        batches = [order[i : i + work.batch_size] for i in range(0, len(order), work.batch_size)]
        fetches = {way.name: way.open() for way in self.ways}
        for name, fetch in fetches.items():
            same = np.array_equal(fetch(batches[0]).numpy(), embeddings[batches[0]])
            assert same, f"{name} gave other embeddings than it was given"
        singles = order[: 1000 if len(work.shape) == 1 else 50, None]
        self.read(EPOCH, fetches, batches, len(order))
        self.read("one sample, µs", fetches, singles, len(singles))
        self.open_fresh()
        return self.figures

    def write(self, way: Way, embeddings: np.ndarray) -> None:
        way.folder.mkdir(parents=True)
        importlib.import_module(way.package)
        started = time.perf_counter()
        way.write(embeddings)
        files = [path for path in way.folder.rglob("*") if path.is_file()]
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        size = sum(path.stat().st_blocks * 512 for path in files)
        self.figures[way.name]["write, s"] = time.perf_counter() - started
        self.figures[way.name]["disk / raw"] = size / embeddings.nbytes

    def read(
        self, column: str, fetches: dict[str, Fetch], batches: Sequence[Any], num_samples: int
    ) -> None:
        times: dict[str, list[float]] = {name: [] for name in fetches}
        for _ in range(self.work.rounds + 1):
            for name, fetch in fetches.items():
                started = time.perf_counter()
                for positions in batches:
                    fetch(positions)
                times[name].append((time.perf_counter() - started) / num_samples * 1e6)
        for name, found in times.items():
            self.figures[name][column] = statistics.median(found[1:])  # the first warms up

    def open_fresh(self) -> None:
        work = json.dumps(dataclasses.asdict(self.work))
        times: dict[str, list[float]] = {way.name: [] for way in self.ways}
        for _ in range(self.work.num_starts):
            for way in self.ways:
                child = (__file__, "--first", type(way).__name__, str(way.folder), work)
                done = subprocess.run(
                    (sys.executable, *child), check=True, capture_output=True, text=True
                )
                times[way.name].append(float(done.stdout))
        for name, found in times.items():
            self.figures[name]["open → first sample, ms"] = statistics.median(found)


def print_first(kind: str, folder: str, workload: str) -> None:
    """In a fresh process: milliseconds from opening to the first sample, after imports."""
    settings = json.loads(workload)
    work = Workload(**{**settings, "shape": tuple(settings["shape"])})
    way = next(each for each in WAYS if each.__name__ == kind)(Path(folder), work)
    importlib.import_module(way.package)
    started = time.perf_counter()
    way.open()([work.num_samples // 2])
    print((time.perf_counter() - started) * 1e3)


def tables(*, quick: bool) -> str:
    """A table of each workload as Markdown, the fastest epoch first; draws the chart as well."""
    torch.set_num_threads(1)
    # Eight copies of the hidden states: 100 of them leave a laptop its memory.
    works = QUICK if quick else (POOLED, dataclasses.replace(HIDDEN, num_samples=96))
    figures = {}
    for work in works:
        title = f"{work.num_samples:,} × {work.shape} float32, batches of {work.batch_size}"
        with tempfile.TemporaryDirectory(prefix="lmdbcache-peers-") as folder:
            figures[title] = Comparison(work, Path(folder)).run()
    with tempfile.TemporaryDirectory() as folder:
        draw(figures, Path(folder) / "peers.svg" if quick else DOCUMENT.with_name("peers.svg"))
    packages = sorted({way.package for way in WAYS} - {"lmdbcache"})
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    system = f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}"
    python = f"Python {platform.python_version()}, {versions}"
    lines = [f"`make bench-peers` on {system}, {python}. Medians; torch on one thread.", ""]
    lines.append("![Epochs of all ways](peers.svg)")
    for title, ways in figures.items():
        lines += ["", f"{title}:", "", f"| way | {' | '.join(COLUMNS)} |"]
        lines.append("|---" * (len(COLUMNS) + 1) + "|")
        for name, found in sorted(ways.items(), key=lambda way: way[1][EPOCH]):
            lines.append(f"| {name} | {' | '.join(f'{found[what]:,.3g}' for what in COLUMNS)} |")
    return "\n".join(lines)


def draw(figures: dict[str, dict[str, dict[str, float]]], chart: Path) -> None:
    """Draw the epochs of all workloads as bars, in microseconds a sample, on a log scale."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "peers"  # the same figures give the same file
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(1, len(figures), figsize=(10, 3.6), layout="constrained")
    for axis, (title, ways) in zip(np.atleast_1d(axes), figures.items(), strict=True):
        names = sorted(ways, key=lambda name: -ways[name][EPOCH])
        colors = ["#c0392b" if name == Ours.name else "#7f8c8d" for name in names]
        bars = axis.barh(names, [ways[name][EPOCH] for name in names], color=colors)
        axis.bar_label(
            bars, [f"{float(f'{bar.get_width():.3g}'):,.10g}" for bar in bars], padding=3
        )
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.15)
        axis.set_xlabel("epoch, µs a sample")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(chart, facecolor="white", metadata={"Date": None})


def main() -> None:
    if sys.argv[1:2] == ["--first"]:
        print_first(*sys.argv[2:])
    else:
        table_command(__doc__ or "", DOCUMENT, "peers", tables)


if __name__ == "__main__":
    main()
