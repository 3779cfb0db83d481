"""Measure exports of a store and how fast they are read; write the table of docs/benchmarks.md.

python tools/bench_exports.py            # two minutes
python tools/bench_exports.py --quick    # tiny sizes, to see that it runs; writes nothing
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from document_tables import table_command

from lmdbcache import CacheConfig, EmbeddingCache, export_embeddings

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
PACKAGES = ("lmdb", "pyarrow", "datasets", "pylance", "webdataset", "torch")
FORMATS = ("parquet", "lance", "webdataset")
BATCH, WORKERS, SHARDS, SIZE = 256, 2, 8, 768
ROUNDS = 3


class Exports:
    """A store and its exports.

    Args:
        folder: An empty folder.
        num_samples: Of the store.
    """

    def __init__(self, folder: Path, num_samples: int) -> None:
        self.folder = folder
        self.num_samples = num_samples
        self.cache, self.config = EmbeddingCache(folder / "cache"), CacheConfig()
        self.ids = [f"video_{n:05d}:{n % 10}" for n in range(num_samples)]
        values = np.random.default_rng(0).random((num_samples, SIZE), dtype=np.float32)
        with self.cache.writer(self.config) as writer:
            writer.put_batch(self.ids, values)
        self.random = np.random.default_rng(1)

    def export(self, kind: str) -> int:
        done = export_embeddings(
            self.cache, self.config, self.folder / kind, format=kind, num_shards=SHARDS,
            overwrite=True,
        )  # fmt: skip
        return done.num_embeddings

    def batches(self) -> list[list[int]]:
        """Positions in random order, in batches."""
        order = self.random.permutation(self.num_samples).tolist()
        return [order[first : first + BATCH] for first in range(0, len(order), BATCH)]

    # Each reads all samples, or those of some batches, and gives their number.

    def store_in_order(self) -> int:
        with self.cache.reader(self.config) as reader:
            chosen = reader.select(self.ids)
            return sum(
                len(chosen.get_batch(range(first, min(first + BATCH, self.num_samples))))
                for first in range(0, self.num_samples, BATCH)
            )

    def store_at_random(self) -> int:
        with self.cache.reader(self.config) as reader:
            chosen = reader.select(self.ids)
            return sum(len(chosen.get_batch(batch)) for batch in self.batches())

    def store_by_id(self) -> int:
        with self.cache.reader(self.config) as reader:
            return sum(
                len(reader.get_batch([self.ids[one] for one in batch])) for batch in self.batches()
            )

    def parquet_rows(self) -> int:
        return sum(1 for _ in self._rows().with_format("numpy"))

    def parquet_tables(self) -> int:
        tables = self._rows().with_format("arrow").iter(batch_size=BATCH)
        return sum(
            len(table["embedding"].combine_chunks().values.to_numpy().reshape(-1, SIZE))
            for table in tables
        )

    def parquet_workers(self) -> int:
        from torch.utils.data import DataLoader

        rows = self._rows().with_format("torch")
        loader = DataLoader(rows, batch_size=BATCH, num_workers=WORKERS)
        return sum(len(batch["embedding"]) for batch in loader)

    def lance_in_order(self) -> int:
        batches = self._lance().to_batches(columns=["sample_id", "embedding"], batch_size=BATCH)
        return sum(len(batch.column(1).values.to_numpy().reshape(-1, SIZE)) for batch in batches)

    def lance_at_random(self) -> int:
        dataset = self._lance()
        return sum(
            len(dataset.take(batch, columns=["embedding"])["embedding"].combine_chunks())
            for batch in self.batches()
        )

    def lance_by_id(self) -> int:
        dataset, found = self._lance(), 0
        for batch in self.batches()[:8]:
            ids = ", ".join(f"'{self.ids[one]}'" for one in batch)
            found += dataset.to_table(
                columns=["sample_id", "embedding"], filter=f"sample_id IN ({ids})"
            ).num_rows
        return found

    def tars_in_order(self) -> int:
        return self._tars(0)

    def tars_workers(self) -> int:
        return self._tars(WORKERS)

    def _rows(self):
        from datasets import load_dataset

        files = str(self.folder / "parquet" / "*.parquet")
        return load_dataset("parquet", data_files=files, split="train", streaming=True)

    def _lance(self):
        import lance

        return lance.dataset(str(self.folder / "lance"))

    def _tars(self, num_workers: int) -> int:
        import webdataset

        shards = f"{self.folder}/webdataset/embeddings-{{00001..{SHARDS:05d}}}.tar"
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode()
        samples = samples.to_tuple("npy").batched(BATCH)
        loader = webdataset.WebLoader(samples, batch_size=None, num_workers=num_workers)
        return sum(len(embeddings) for (embeddings,) in loader)


READINGS = {
    "store, in order": Exports.store_in_order,
    "store, random batches": Exports.store_at_random,
    "store, random batches by id": Exports.store_by_id,
    "Parquet, datasets, rows": Exports.parquet_rows,
    "Parquet, datasets, Arrow tables": Exports.parquet_tables,
    f"Parquet, datasets, DataLoader, {WORKERS} workers": Exports.parquet_workers,
    "Lance, in order": Exports.lance_in_order,
    "Lance, random batches by row": Exports.lance_at_random,
    "Lance, random batches by id": Exports.lance_by_id,
    "webdataset, in order": Exports.tars_in_order,
    f"webdataset, {WORKERS} workers": Exports.tars_workers,
}


def measure(num_samples: int, rounds: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Bytes of the store and of each export; (samples per second, CPU µs per sample) of each way.

    The machine is shared: of several rounds the best counts. The CPU time is that of all threads
    and processes together, and hardly depends on what else is running.
    """
    ways = {f"export to {kind}": partial(Exports.export, kind=kind) for kind in FORMATS} | READINGS
    figures = {way: [0.0, math.inf] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(Path(folder), num_samples)
        for _, (way, do) in itertools.product(range(rounds), ways.items()):
            cpu, start = _cpu_seconds(), time.perf_counter()
            found = do(exports)
            seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
            rate, cost = figures[way]
            figures[way] = [max(rate, found / seconds), min(cost, cpu / found * 1e6)]
        return {kind: float(_size(Path(folder) / kind)) for kind in ("cache", *FORMATS)}, figures


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def table(*, quick: bool) -> str:
    """The table as Markdown."""
    num_samples = 2000 if quick else 28_109
    sizes, figures = measure(num_samples, 1 if quick else ROUNDS)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    written = ", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in sizes.items())
    facts = (
        f"`python tools/bench_exports.py` on {os.cpu_count()} cores, {versions}: {num_samples:,} × "
        f"({SIZE},) float32 in {SHARDS} shards, batches of {BATCH}, page cache warm, opening "
        f"included; the best of {ROUNDS}. On disk: {written}."
    )
    lines = [facts, "", "| way | samples/s | CPU µs/sample |", "|---|---|---|"]
    lines += [f"| {way} | {rate:,.0f} | {cost:,.1f} |" for way, (rate, cost) in figures.items()]
    return "\n".join(lines)


def main() -> None:
    table_command(__doc__ or "", DOCUMENT, "exports", table)


if __name__ == "__main__":
    main()
