"""What a sample costs through a dataset and torch's DataLoader, beside a dict of tensors in RAM.

    python tools/bench_datasets.py [--quick]

Processor time a sample: the lowest of each batch over some rounds, all ways in turn. The clips are
empty files, as a hit reads none.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lmdbcache import EmbeddingCache
from lmdbcache.datasets import (
    CachedAudioDataset,
    VEGASDataset,
    collate_mixed,
    open_dataset,
    vegas_collate_fn,
)

TITLE = "Through a dataset, processor time in µs a sample"
BATCHES, ROUNDS = 24, 9


class RamDataset(Dataset[dict[str, Any]]):
    """The items of a `VEGASDataset`, its embeddings in a dict of tensors."""

    def __init__(self, dataset: VEGASDataset, embeddings: torch.Tensor) -> None:
        self.samples = dataset.samples
        self.embeddings = dict(zip(dataset.sample_ids, embeddings.unbind(0), strict=True))
        self.keys = [key for key in dataset[0] if key not in ("audio_emb", "label")]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {
            "audio_emb": self.embeddings[f"{sample['file_id']}:{sample['class_name']}"],
            "label": torch.tensor(sample["class_label"], dtype=torch.long),
            **{key: sample[key] for key in self.keys},
        }


def batches_through(
    dataset: Any, collate: Callable[..., Any], order: list[int], size: int
) -> Iterator[tuple[int, float]]:
    """Yield the number of samples and the seconds of each batch."""
    batches = [order[start : start + size] for start in range(0, len(order), size)][:BATCHES]
    loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=collate))
    for batch in batches:
        start = time.process_time()
        next(loader)
        yield len(batch), time.process_time() - start


def items_of(dataset: Any, order: list[int]) -> Iterator[tuple[int, float]]:
    """Yield the number of samples and the seconds of some items, taken one by one."""
    for start in range(0, len(order), 100):
        some = order[start : start + 100]
        before = time.process_time()
        for index in some:
            dataset[index]
        yield len(some), time.process_time() - before


def store(cache: EmbeddingCache, config: Any, sample_ids: Sequence[str]) -> torch.Tensor:
    """Write one embedding for each sample."""
    values = np.random.default_rng(0).random((len(sample_ids), 768), dtype=np.float32)
    with cache.writer(config) as writer:
        for start in range(0, len(sample_ids), 1024):
            writer.put_batch(sample_ids[start : start + 1024], values[start : start + 1024])
    return torch.from_numpy(values)


def empty_clips(paths: Sequence[Path]) -> None:
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True)
    for path in paths:
        path.touch()


def adapters(folder: Path, number: int) -> dict[str, Any]:
    """Return a dataset of each layout, of so many clips."""
    names = [f"1-{index:06d}-A-{index % 10}" for index in range(number)]
    empty_clips(
        [folder / f"folder/class{index % 10}/{name}.wav" for index, name in enumerate(names)]
    )
    empty_clips([folder / f"esc/audio/{name}.wav" for name in names])
    (folder / "esc" / "meta").mkdir()
    lines = [f"{name}.wav,1,{index % 10},class{index % 10}\n" for index, name in enumerate(names)]
    table = "".join(["filename,fold,target,category\n", *lines])
    (folder / "esc" / "meta" / "esc50.csv").write_text(table, encoding="utf-8")
    rows = {
        "id": names,
        "label": [f"class{name[-1]}" for name in names],
        "audio": [{"bytes": b"", "path": None}] * number,
    }
    return {
        "Hugging Face": open_dataset(
            datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False)),
            id_column="id",
            namespace="hf-bench",
        ),
        "ESC-50": open_dataset(folder / "esc"),
        "folder": open_dataset(folder / "folder"),
    }


def measure(*, quick: bool) -> dict[str, dict[str, float]]:
    """Return the table's rows: way → µs a sample."""
    number, others, rounds = (300, 60, 1) if quick else (28109, 6144, ROUNDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            return {TITLE: _measured(Path(temporary), number, others, rounds)}
    finally:
        torch.set_num_threads(threads)


def _measured(folder: Path, number: int, others: int, rounds: int) -> dict[str, float]:
    classes = list(VEGASDataset.CLASS_LABELS)
    empty_clips(
        [folder / f"VEGAS/{classes[i % 10]}/audios/video_{i // 10:05d}.wav" for i in range(number)]
    )
    vegas = VEGASDataset(folder / "VEGAS", load_audio=False, ast_cache_dir=folder / "cache")
    cache, config = EmbeddingCache(folder / "cache"), vegas.cache_config()
    embeddings = store(cache, config, vegas.sample_ids)
    ram = RamDataset(vegas, embeddings)
    vegas.load_ast_embeddings_from_cache()
    order = np.random.default_rng(1).permutation(number).tolist()
    ways: dict[str, Callable[[], Iterator[tuple[int, float]]]] = {}
    for size in (64, 256):
        for name, dataset in (("a dict of tensors", ram), ("VEGASDataset", vegas)):
            ways[f"{name}, batches of {size}"] = lambda dataset=dataset, size=size: batches_through(
                dataset, vegas_collate_fn, order, size
            )
    for name, dataset in (("a dict of tensors", ram), ("VEGASDataset", vegas)):
        ways[f"{name}, one item"] = lambda dataset=dataset: items_of(dataset, order[:4000])
    listed = {"VEGAS": vegas, **adapters(folder, others)}
    for name, dataset in listed.items():
        own = config.replace(namespace=dataset.namespace)
        if dataset is not vegas:
            store(cache, own, dataset.sample_ids)
        cached = CachedAudioDataset(cache, own, dataset)
        some = np.random.default_rng(1).permutation(len(cached)).tolist()
        ways[f"CachedAudioDataset of {name}, batches of 256"] = lambda cached=cached, some=some: (
            batches_through(cached, collate_mixed, some, 256)
        )
    lowest: dict[str, list[tuple[int, float]]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            found = list(way())
            lowest[name] = [min(pair) for pair in zip(lowest.get(name, found), found, strict=True)]
    return {
        name: 1e6 * sum(seconds for _, seconds in parts) / sum(count for count, _ in parts)
        for name, parts in lowest.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    for title, ways in measure(quick=parser.parse_args().quick).items():
        print(title)
        for way, figure in ways.items():
            print(f"{figure:8.2f}  {way}")


if __name__ == "__main__":
    main()
