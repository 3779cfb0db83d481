"""Measure merging against copying files: `python tools/bench_merge.py`; prints a table."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.exchange import merge_stores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="Few and small: only tries the code.")
    quick = parser.parse_args().quick
    shapes = {"pooled": (200, (8,)), "hidden": (8, (20, 8))}
    if not quick:
        shapes = {"pooled": (28_109, (768,)), "hidden": (300, (1214, 768))}
    ways = ("copy", "merge of 1", "of 4", "of 4 again", "all close", "all replaced")
    print("| what |", " | ".join(f"{way}, s" for way in ways), "|")
    print("|---|---|---|---|---|---|---|")
    for name, (number, shape) in shapes.items():
        with tempfile.TemporaryDirectory(prefix="merge-") as folder:
            rows = [measure(Path(folder, str(n)), number, shape) for n in range(1 if quick else 3)]
        middle = [statistics.median(column) for column in zip(*rows, strict=True)]
        cells = [f"{number:,} × {shape}, {name}", *(f"{seconds:.2g}" for seconds in middle)]
        print(f"| {' | '.join(cells)} |")


def measure(folder: Path, number: int, shape: tuple[int, ...]) -> list[float]:
    """Seconds of each way, in turn, on files that the page cache holds."""
    config = CacheConfig()
    ids = [f"video_{n:05d}:dog" for n in range(number)]
    whole = filled(folder / "whole", config, ids, shape, 0.0)
    parts = [filled(folder / f"part-{n}", config, ids[n::4], shape, 0.0) for n in range(4)]
    near = filled(folder / "near", config, ids, shape, 1e-6)
    one, four = EmbeddingCache(folder / "one"), EmbeddingCache(folder / "four")

    def copy() -> None:
        shutil.copytree(whole, folder / "copy")
        for path in (folder / "copy").rglob("data.mdb"):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    return [
        seconds(copy),
        seconds(lambda: merge_stores(one, [whole])),
        seconds(lambda: merge_stores(four, parts)),
        seconds(lambda: merge_stores(four, parts)),
        seconds(lambda: merge_stores(four, [near])),
        seconds(lambda: merge_stores(four, [near], tolerance=0.0, on_duplicate="overwrite")),
    ]


def beside_write(*, quick: bool = False) -> dict[str, dict[str, float]]:
    """Seconds of a write of pooled embeddings and of a merge of them, in turn."""
    number = 200 if quick else 28_109
    config, rows = CacheConfig(), np.random.default_rng(0).random((number, 768), dtype=np.float32)
    ids = [f"video_{n:05d}:dog" for n in range(number)]
    figures: dict[str, list[float]] = {}
    for _ in range(1 if quick else 3):
        with tempfile.TemporaryDirectory(prefix="merge-") as folder:
            source, target = EmbeddingCache(Path(folder, "a")), EmbeddingCache(Path(folder, "b"))

            def write(source: EmbeddingCache = source) -> None:
                with source.writer(config) as writer:
                    for start in range(0, number, 1024):
                        writer.put_batch(ids[start : start + 1024], rows[start : start + 1024])

            def merge(source: EmbeddingCache = source, target: EmbeddingCache = target) -> None:
                merge_stores(target, [source.root])

            for way, run in (("write", write), ("merge of it", merge)):
                cpu = time.process_time()
                figures.setdefault(f"{way}, s", []).append(seconds(run))
                figures.setdefault(f"{way}, CPU s", []).append(time.process_time() - cpu)
    found = {way: statistics.median(values) for way, values in figures.items()}
    return {f"merging next to writing, {number:,} × (768,)": found}


def filled(
    root: Path, config: CacheConfig, ids: list[str], shape: tuple[int, ...], shift: float
) -> Path:
    with EmbeddingCache(root).writer(config) as writer:
        for sample_id in ids:
            dice = np.random.default_rng(int(sample_id[6:11]))
            writer.put(sample_id, dice.random(shape, dtype=np.float32) + np.float32(shift))
    return root


def seconds(what: Callable[[], object]) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
