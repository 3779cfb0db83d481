"""One dataset under several DataLoaders, each with a collate function of its own."""

from __future__ import annotations

import pytest
import torch
from storage.child_processes import numbered
from torch.utils.data import DataLoader

from lmdbcache import EmbeddingDataset, collate_embeddings

SAMPLES = numbered(0, 20, size=4)


@pytest.fixture
def dataset(cache, config):
    """20 embeddings that hold their number."""
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLES, list(SAMPLES.values()))
    with cache.reader(config) as reader:
        yield EmbeddingDataset(reader)


def stacked(batch):
    return torch.stack(batch)


def concatenated(batch):
    return torch.cat(batch).view(-1, 4)


def sorted_first(batch):
    return torch.stack(sorted(batch, key=len))


def copied(batch):
    return torch.stack(batch.copy())


@pytest.mark.parametrize(
    ("collate", "num_workers"),
    [(stacked, 0), (concatenated, 0), (sorted_first, 0), (copied, 0), (None, 0), (stacked, 1)],
)
def test_collate_functions_do_not_disturb_each_other(dataset, collate, num_workers):
    """What `collate_embeddings` has no use for is still there for another function."""
    for function in (collate_embeddings, collate, collate_embeddings, collate):
        loader = DataLoader(dataset, 6, num_workers=num_workers, collate_fn=function)
        batches = list(loader)
        assert [len(batch) for batch in batches] == [6, 6, 6, 2]
        assert torch.cat(batches)[:, 0].tolist() == list(range(20))


def test_collated_batches_pass_through(filled, config):
    """With collated=True the loader gives the same batches, with workers and without."""
    ids = list(filled.reader(config))
    with filled.reader(config) as reader:
        plain = EmbeddingDataset(reader, ids, labels={"dog": 2, "drum": 3})
        lean = EmbeddingDataset(reader, ids, labels={"dog": 2, "drum": 3}, collated=True)
        for workers in (0, 2):
            batches = [
                list(DataLoader(d, 6, num_workers=workers, collate_fn=collate_embeddings))
                for d in (plain, lean)
            ]
            for (left, left_labels), (right, right_labels) in zip(*batches, strict=True):
                assert torch.equal(left, right)
                assert torch.equal(left_labels, right_labels)
