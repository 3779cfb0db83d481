"""The whole main job on a small dataset that is made here: extract once, find again, train.

python tools/demo.py [--folder .demo] [--clips-per-class 24]
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from pathlib import Path

import torch
from small_ast import save_small_ast
from synthetic_vegas import make_synthetic_vegas

from lmdbcache import (
    CacheConfig,
    EmbeddingCache,
    EmbeddingDataset,
    VEGASDataset,
    collate_embeddings,
    extract_or_load_ast_embeddings,
    progress_bar,
)
from lmdbcache.cli.inspect import ls_command
from lmdbcache.extraction import ExtractionSummary

NEXT = """
Next, on a folder of your own with a folder of audio files for each class:

  {0} dataset MY_FOLDER                                  # what it is taken for
  {0} extract MY_FOLDER --model ast --root my.cache      # fetches AST once: 0.35 GB
  {0} coverage MY_FOLDER --model ast --root my.cache     # what is stored of each class
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".demo"))
    parser.add_argument("--clips-per-class", type=int, default=24)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # The summaries printed here say what these log records would.
    logging.getLogger("lmdbcache.extraction").setLevel(logging.ERROR)
    demo = Demo(arguments.folder, arguments.clips_per_class)
    demo.make_data()
    first = demo.extract("First run: every clip is decoded, embedded and stored")
    demo.show_sizes()
    second = demo.extract("Second run: everything is found again, no model is loaded")
    demo.show_a_miss()
    accuracy, training_seconds = demo.train_probe()
    headline("Done")
    print(f"first run    {first.seconds:8.2f} s   {first.num_extracted} embeddings computed")
    print(f"second run   {second.seconds:8.2f} s   {second.num_extracted} embeddings computed")
    print(f"linear probe {training_seconds:8.2f} s   test accuracy {100 * accuracy:.1f} %")
    assert second.num_extracted == 0, "the second run must not compute anything"
    command = Path(sys.executable).with_name("lmdbcache")
    command = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    print(NEXT.format(command))


class Demo:
    def __init__(self, folder: Path, clips_per_class: int) -> None:
        self.folder = folder
        self.clips_per_class = clips_per_class
        self.root = folder / "VEGAS"
        self.model = folder / "small-ast"
        self.cache = EmbeddingCache(folder / "VEGAS.cache")

    def make_data(self) -> None:
        headline("A small VEGAS tree and a small AST with random weights")
        shutil.rmtree(self.folder, ignore_errors=True)
        make_synthetic_vegas(self.root, clips_per_class=self.clips_per_class)
        save_small_ast(self.model)
        num_files = sum(1 for _ in self.root.rglob("*.wav"))
        print(f"{num_files} wav files of 10 classes in {self.root}; one of them is broken")

    def dataset(self, split: str = "all") -> VEGASDataset:
        return VEGASDataset(self.root, split=split, ast_cache_dir=self.cache.root)

    def extract(self, title: str) -> ExtractionSummary:
        headline(title)
        dataset = self.dataset()
        with progress_bar("extracting", shown=True) as report:
            summary = extract_or_load_ast_embeddings(
                dataset, model_name=str(self.model), progress=report
            )
        print(summary)
        print(f"model loaded: {'yes' if summary.built_model else 'no'}")
        return summary

    def config(self) -> CacheConfig:
        return self.dataset().cache_config(model_name=str(self.model))

    def show_sizes(self) -> None:
        headline("What is stored (lmdbcache ls)")
        ls_command(root=self.cache.root)

    def show_a_miss(self) -> None:
        headline("Another duration is a miss, never stale data")
        config = self.config().replace(duration=10.0)
        print(f"stored: {config in self.cache}")
        print(self.cache.explain(config))

    def train_probe(self) -> tuple[float, float]:
        headline("A linear probe from a DataLoader with 2 workers, on cached embeddings alone")
        started = time.perf_counter()
        train, test = self.loader("train"), self.loader("test")
        features = torch.cat([embeddings for embeddings, _ in train])
        mean, scale = features.mean(0), features.std(0) + 1e-6
        probe = torch.nn.Linear(features.shape[1], 10)
        optimizer = torch.optim.Adam(probe.parameters(), lr=0.05)
        for _ in range(30):
            for embeddings, labels in train:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(probe((embeddings - mean) / scale), labels)
                loss.backward()
                optimizer.step()
        hits = total = 0
        with torch.no_grad():
            for embeddings, labels in test:
                hits += int((probe((embeddings - mean) / scale).argmax(1) == labels).sum())
                total += len(labels)
        print(f"30 epochs over {len(features)} clips, tested on {total}")
        return hits / total, time.perf_counter() - started

    def loader(self, split: str) -> torch.utils.data.DataLoader[object]:
        dataset = self.dataset(split)
        reader = self.cache.reader(self.config())
        missing = set(reader.missing(dataset.sample_ids))
        return torch.utils.data.DataLoader(
            EmbeddingDataset(
                reader,
                [sample_id for sample_id in dataset.sample_ids if sample_id not in missing],
                labels=dataset.CLASS_LABELS,
            ),
            batch_size=32,
            shuffle=split == "train",
            num_workers=2,
            persistent_workers=True,
            collate_fn=collate_embeddings,
        )


def headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
