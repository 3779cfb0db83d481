"""How fast embeddings are read and written, beside a tensor in RAM and a numpy memmap.

    python tools/bench_reading.py [--quick] [--folder DIR] [--json FILE]

Every pair is measured in turn (ours, theirs, ours, theirs, …) and the median over the rounds is
kept: on a shared machine only ratios of one run count. torch runs on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch

from lmdbcache import (
    CacheConfig,
    EmbeddingCache,
    EmbeddingDataset,
    collate_embeddings,
    make_dataloader,
    preload,
)


@dataclass(frozen=True)
class Workload:
    name: str
    num_samples: int
    shape: tuple[int, ...]
    batch_size: int
    rounds: int
    num_starts: int = 5

    @property
    def config(self) -> CacheConfig:
        return CacheConfig(output="pooler_output" if len(self.shape) == 1 else "last_hidden_state")

    @property
    def keys(self) -> list[str]:
        return [f"video_{i:05d}:{i % 10}" for i in range(self.num_samples)]


POOLED = Workload("P", 28109, (768,), 256, 9)
HIDDEN = Workload("H", 300, (1214, 768), 8, 5)
FEWEST_ROUNDS, ENOUGH_SECONDS = 3, 5.0  # of one comparison
QUICK = [Workload("P", 512, (768,), 64, 1, 1), Workload("H", 8, (100, 768), 4, 1, 1)]

Figures = dict[str, dict[str, float]]


class RamDataset(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, embeddings: torch.Tensor) -> None:
        self.embeddings = embeddings

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        return self.embeddings.index_select(0, torch.tensor(indices))


class MemmapDataset(RamDataset):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.array = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self.array[indices])


def as_it_is(batch: Any) -> Any:
    return batch


class Bench:
    """One workload, written once, read in all ways."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.work = workload
        self.folder = folder / workload.name
        self.folder.mkdir(parents=True)
        self.cache = EmbeddingCache(self.folder / "cache")
        self.npy = self.folder / "embeddings.npy"
        generator = np.random.default_rng(0)
        self.embeddings = generator.random(
            (workload.num_samples, *workload.shape), dtype=np.float32
        )
        self.figures: Figures = {}

    def run(self) -> Figures:
        self.write()
        self.read_epochs()
        self.read_dtypes()
        self.read_through_loaders()
        self.read_singles()
        self.read_preloaded()
        self.search()
        self.open_fresh()
        self.read_cold()
        return self.figures

    # ---- writing

    def write(self) -> None:
        def ours() -> None:
            shutil.rmtree(self.cache.root, ignore_errors=True)
            keys, step = self.work.keys, 1024
            with self.cache.writer(self.work.config) as writer:
                for start in range(0, len(keys), step):
                    writer.put_batch(
                        keys[start : start + step], self.embeddings[start : start + step]
                    )

        def npy() -> None:
            with self.npy.open("wb") as file:
                np.save(file, self.embeddings)
                file.flush()
                os.fdatasync(file.fileno())

        def plain() -> None:
            folder = self.folder / "plain"
            shutil.rmtree(folder, ignore_errors=True)
            keys = [key.encode() for key in self.work.keys]
            step = 2048 if len(self.work.shape) == 1 else 18  # as many as we commit
            with lmdb.open(str(folder), map_size=1 << 40) as environment:
                for start in range(0, len(keys), step):
                    part = slice(start, start + step)
                    pairs = zip(keys[part], self.embeddings[part], strict=True)
                    with environment.begin(write=True) as transaction:
                        transaction.cursor().putmulti(list(pairs), append=True)

        ways = {"ours": ours, "LMDB": plain, "npy": npy}
        self.compare("write, s", ways, rounds=3, cpu="write, CPU s")
        shutil.rmtree(self.folder / "plain")
        stored = self.cache.size(self.work.config)
        self.figures["disk / raw"] = {"ours": stored / self.embeddings.nbytes}

    # ---- reading

    def read_epochs(self) -> None:
        work = self.work
        reader = self.cache.reader(work.config)
        keys = work.keys
        selection = reader.select(keys)
        ram = torch.from_numpy(self.embeddings)
        memmap = np.load(self.npy, mmap_mode="r")
        order = np.random.default_rng(1).permutation(work.num_samples)
        batches = [order[i : i + work.batch_size] for i in range(0, len(order), work.batch_size)]
        ids = [[keys[i] for i in batch] for batch in batches]

        def epoch(fetch: Callable[[Any], Any], over: Sequence[Any] = batches) -> Callable[[], None]:
            def run() -> None:
                for batch in over:
                    fetch(batch)

            return run

        self.compare(
            "epoch, µs/sample",
            {
                "ours": epoch(selection.get_batch),
                "ours, by id": epoch(reader.get_batch, ids),
                "RAM": epoch(lambda batch: ram.index_select(0, torch.from_numpy(batch))),
                "memmap": epoch(lambda batch: memmap[batch]),
            },
            scale=1e6 / work.num_samples,
        )
        reader.close()

    def read_dtypes(self) -> None:
        """As float32 tensors, whatever is stored; a few batches of those with the largest rows."""
        work = self.work
        if len(work.shape) == 1:
            return
        cache = EmbeddingCache(self.folder / "dtypes")
        keys = work.keys[: 8 * work.batch_size]
        ways = {}
        for dtype in ("float32", "float16", "int8"):
            config = work.config.replace(dtype=dtype)
            with cache.writer(config) as writer:
                writer.put_batch(keys, self.embeddings[: len(keys)])
            dataset = EmbeddingDataset(cache.reader(config), keys)
            order = np.random.default_rng(1).permutation(len(keys)).reshape(-1, work.batch_size)

            def epoch(dataset: Any = dataset, order: Any = order) -> None:
                for batch in order.tolist():
                    dataset.fetch(batch).float()

            ways["ours" if dtype == "float32" else f"ours, {dtype}"] = epoch
        self.compare("stored as float32, read as it, µs/sample", ways, scale=1e6 / len(keys))
        shutil.rmtree(cache.root)

    def read_through_loaders(self) -> None:
        reader = self.cache.reader(self.work.config)
        ours = EmbeddingDataset(reader, self.work.keys, collated=True)
        ram = RamDataset(torch.from_numpy(self.embeddings))
        memmap = MemmapDataset(self.npy)
        for workers in (0, 2):
            loaders = {
                "ours": self.loader(ours, workers, collate_embeddings),
                "RAM": self.loader(ram, workers, as_it_is),
                "memmap": self.loader(memmap, workers, as_it_is),
            }
            self.compare(
                f"DataLoader, {workers} workers, µs/sample",
                {name: _exhaust(loader) for name, loader in loaders.items()},
                scale=1e6 / self.work.num_samples,
            )
        own = {
            name: _exhaust(
                make_dataloader(ours, self.work.batch_size, shuffle=True, prefetch=prefetch)
            )
            for name, prefetch in (("ours", None), ("ours, prefetch=2", 2))
        }
        ram_loader = _exhaust(self.loader(ram, 0, as_it_is))
        self.compare(
            "make_dataloader, empty loop, µs/sample",
            {**own, "RAM": ram_loader},
            scale=1e6 / self.work.num_samples,
        )
        reader.close()

    def loader(self, dataset: Any, workers: int, collate_fn: Any) -> Any:
        return torch.utils.data.DataLoader(
            dataset,
            batch_size=self.work.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate_fn,
        )

    def read_singles(self) -> None:
        work = self.work
        reader = self.cache.reader(work.config)
        memmap = np.load(self.npy, mmap_mode="r")
        chosen = np.random.default_rng(2).integers(0, work.num_samples, 2000).tolist()
        if len(work.shape) > 1:
            chosen = chosen[:100]
        every = work.keys  # made at each look
        keys = [every[i] for i in chosen]
        self.compare(
            "one sample, owned, µs",
            {
                "ours": lambda: [reader[key] for key in keys] and None,
                "memmap": lambda: [memmap[i].copy() for i in chosen] and None,
            },
            scale=1e6 / len(chosen),
        )
        reader.close()

    def read_preloaded(self) -> None:
        work = self.work
        reader = self.cache.reader(work.config)
        self.compare("preload, s", {"ours": lambda: preload(reader, work.keys)}, rounds=3)
        preloaded = preload(reader, work.keys).select()
        selection = reader.select(work.keys)
        order = np.random.default_rng(4).permutation(work.num_samples)
        batches = [order[i : i + work.batch_size] for i in range(0, len(order), work.batch_size)]
        self.compare(
            "epoch after preload, µs/sample",
            {
                "ours": lambda: [preloaded.get_batch(batch) is None for batch in batches],
                "ours, from the store": lambda: [selection.get_batch(b) is None for b in batches],
            },
            scale=1e6 / work.num_samples,
        )
        reader.close()

    def search(self) -> None:
        if len(self.work.shape) > 1:
            return
        array = self.embeddings
        lengths = np.linalg.norm(array, axis=1)
        with self.cache.reader(self.work.config) as reader:
            for count in (1, 256):
                queries = array[:count]

                def in_memory(queries: Any = queries) -> None:
                    scores = queries @ array.T / lengths
                    np.argpartition(scores, -10, axis=1)

                self.compare(
                    f"nearest 10 of {count} {'vector' if count == 1 else 'vectors'}, ms",
                    {
                        "ours": lambda queries=queries: reader.nearest(queries),
                        "RAM": in_memory,
                    },
                    scale=1e3,
                    rounds=3,
                )

    def open_fresh(self) -> None:
        sizes = (str(self.work.num_samples), str(self.work.batch_size))
        ours = (sys.executable, __file__, "--child", str(self.cache.root), self.work.name, *sizes)
        memmap = (sys.executable, __file__, "--memmap-child", str(self.npy))
        store = self.cache.path(self.work.config)
        key = self.work.keys[self.work.num_samples // 2]
        plain = (sys.executable, __file__, "--lmdb-child", *map(str, store.glob("gen-*")), key)
        times: dict[str, dict[str, list[float]]] = {}
        for _ in range(self.work.num_starts):
            for way, command in (("ours", ours), ("memmap", memmap), ("LMDB", plain)):
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                for name, figure in json.loads(done.stdout).items():
                    times.setdefault(name, {}).setdefault(way, []).append(figure)
        for name, ways in times.items():
            self.figures[name] = {way: statistics.median(found) for way, found in ways.items()}

    def read_cold(self) -> None:
        work = self.work
        order = np.random.default_rng(3).permutation(work.num_samples)
        batches = [order[i : i + work.batch_size] for i in range(0, len(order), work.batch_size)]

        def ours() -> None:
            with self.cache.reader(work.config) as reader:
                selection = reader.select(work.keys)
                for batch, following in zip(batches, [*batches[1:], batches[0][:0]], strict=True):
                    selection.will_need(following)
                    selection.get_batch(batch)

        def memmap() -> None:
            array = np.load(self.npy, mmap_mode="r")
            for batch in batches:
                array[batch]

        files = [self.npy, *self.cache.root.rglob("data.mdb")]
        self.compare(
            "cold page cache, open + epoch, s",
            {"ours": ours, "memmap": memmap},
            rounds=3,
            before=lambda: _drop_pages(files),
        )

    # ---- measuring

    def compare(
        self,
        title: str,
        ways: dict[str, Callable[[], Any]],
        *,
        scale: float = 1.0,
        rounds: int | None = None,
        before: Callable[[], None] | None = None,
        cpu: str | None = None,
    ) -> None:
        cpu_times: dict[str, list[float]] = {name: [] for name in ways}
        times: dict[str, list[float]] = {name: [] for name in ways}
        if before is None and rounds is None:
            for run in ways.values():
                run()  # warm: page cache, allocator, workers
        began = time.perf_counter()
        for count in range(rounds or self.work.rounds):
            if count >= FEWEST_ROUNDS and time.perf_counter() - began > ENOUGH_SECONDS:
                break  # a slow day: fewer rounds, all rows
            for name, run in ways.items():
                if before is not None:
                    before()
                started, cpu_started = time.perf_counter(), time.process_time()
                run()
                cpu_times[name].append((time.process_time() - cpu_started) * scale)
                times[name].append((time.perf_counter() - started) * scale)
        if cpu is not None:
            self.figures[cpu] = {name: min(values) for name, values in cpu_times.items()}
        self.figures[title] = {name: statistics.median(values) for name, values in times.items()}


def _exhaust(loader: Any) -> Callable[[], None]:
    def run() -> None:
        for _ in loader:
            pass

    return run


def _drop_pages(files: Sequence[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def child(root: str, name: str, num_samples: int, batch_size: int) -> None:
    """In a fresh process: time to the first sample and batch, and private memory."""
    shape = POOLED.shape if name == "P" else HIDDEN.shape
    work = Workload(name, num_samples, shape, batch_size, 1)
    keys = work.keys
    before = _private_mib()
    readers = []

    def read() -> None:
        readers.append(EmbeddingCache(root).reader(work.config))
        readers[0][keys[num_samples // 2]]

    figures = _first_sample(read)
    reader = readers[0]
    first = time.perf_counter()
    reader.get_batch(keys[:batch_size])
    batch = time.perf_counter()
    selection = reader.select(keys)
    batch_mib = 0.0
    for start in range(0, num_samples, batch_size):
        held = selection.get_batch(range(start, min(start + batch_size, num_samples)))
        batch_mib = max(batch_mib, held.nbytes / 2**20)
        del held
    figures["then the first batch, ms"] = (batch - first) * 1e3
    private_mib = _private_mib() - before - batch_mib
    figures["private memory after an epoch, less one batch, MiB"] = private_mib
    print(json.dumps(figures))


def memmap_child(npy: str) -> None:
    """In a fresh process: time to the first row of a memmap."""

    def read() -> None:
        array = np.load(npy, mmap_mode="r")
        array[len(array) // 2].copy()

    print(json.dumps(_first_sample(read)))


def lmdb_child(generation: str, key: str) -> None:
    """In a fresh process: time to the first value through py-lmdb alone."""

    def read() -> None:
        environment = lmdb.open(generation, readonly=True)
        with environment.begin(buffers=True) as transaction:
            np.frombuffer(transaction.get(key.encode()), np.uint8).copy()

    print(json.dumps(_first_sample(read)))


def _first_sample(read: Callable[[], Any]) -> dict[str, float]:
    started, cpu_started = time.perf_counter(), time.process_time()
    read()
    return {
        "open → first sample, ms": (time.perf_counter() - started) * 1e3,
        "the same, CPU ms": (time.process_time() - cpu_started) * 1e3,
    }


def _private_mib() -> float:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    lines = [line.split() for line in text.splitlines()]
    return next(int(line[1]) / 1024 for line in lines if line[0] == "Anonymous:")


def measure(*, quick: bool = False, folder: Path | None = None) -> dict[str, Figures]:
    """All figures by workload."""
    torch.set_num_threads(1)
    figures = {}
    for workload in QUICK if quick else (POOLED, HIDDEN):
        with tempfile.TemporaryDirectory(prefix="lmdbcache-bench-", dir=folder) as scratch:
            figures[workload.name] = Bench(workload, Path(scratch)).run()
    return figures


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        return
    if sys.argv[1:2] == ["--memmap-child"]:
        memmap_child(sys.argv[2])
        return
    if sys.argv[1:2] == ["--lmdb-child"]:
        lmdb_child(sys.argv[2], sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where the data goes; default: the temp folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    figures = measure(quick=arguments.quick, folder=arguments.folder)
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
