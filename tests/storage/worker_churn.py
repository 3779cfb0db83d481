"""Epochs of a DataLoader over a store, and what they leave in reader table and descriptors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lmdbcache import EmbeddingDataset, EmbeddingReader, collate_embeddings

NUM_SAMPLES = 64


def fill(cache, config):
    values = np.arange(NUM_SAMPLES, dtype=np.float32)[:, None] * np.ones(16, np.float32)
    with cache.writer(config) as writer:
        writer.put_batch([f"{n:03d}:x" for n in range(NUM_SAMPLES)], values)


def table(reader):
    """Process id of every taken slot, idle ones included."""
    lines = reader._holder.environment.env.readers().splitlines()
    first = [line.split()[:1] for line in lines]
    return [int(pid[0]) for pid in first if pid and pid[0].isdigit()]


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@dataclass
class Churn:
    """What was seen over the epochs."""

    most_slots: int = 0
    own_slots: set[int] = field(default_factory=set)
    descriptors: list[int] = field(default_factory=list)


def run_epochs(reader: EmbeddingReader, method, persistent, num_epochs, num_workers) -> Churn:
    """Read every sample in every epoch, and check each value."""
    dataset = EmbeddingDataset(reader, labels=list(range(NUM_SAMPLES)))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=8,
        shuffle=True,
        num_workers=num_workers,
        multiprocessing_context=method,
        persistent_workers=persistent,
        collate_fn=collate_embeddings,
    )
    churn = Churn()
    assert len(reader) == NUM_SAMPLES
    for _ in range(num_epochs):
        seen = []
        for embeddings, labels in loader:
            assert torch.equal(embeddings[:, 0], labels.to(torch.float32))
            seen += labels.tolist()
        assert sorted(seen) == list(range(NUM_SAMPLES))
        pids = table(reader)
        churn.most_slots = max(churn.most_slots, len(pids))
        churn.own_slots.add(pids.count(os.getpid()))
        churn.descriptors.append(descriptors())
    return churn


def assert_nothing_piles_up(churn: Churn, num_workers: int) -> None:
    """One slot of our own, the workers' of this epoch, and a few of those before it."""
    assert churn.own_slots == {1}, churn
    assert churn.most_slots <= 1 + 3 * num_workers, churn
    # A few come and go with tensors in flight; in the long run there are no more than at first.
    half = len(churn.descriptors) // 2
    assert min(churn.descriptors[half:]) <= min(churn.descriptors[1:half]) + 2, churn
