"""Embeddings held in shared memory."""

from __future__ import annotations

import pickle
from itertools import product

import numpy as np
import pytest
import torch
from storage.child_processes import numbered
from torch.utils.data import DataLoader

from lmdbcache import CacheConfig, EmbeddingDataset, collate_embeddings
from lmdbcache.config import COMPUTE_DTYPES, DTYPES
from lmdbcache.errors import CacheFullError, InvalidEmbeddingError, SampleNotFoundError
from lmdbcache.storage import as_read, as_stored
from lmdbcache.training import make_dataloader, preload, preloading
from lmdbcache.training.tensors import as_tensor

SAMPLES = numbered(0, 50, size=300)


@pytest.fixture
def reader(cache, config):
    """A reader of 50 embeddings of shape (300,) that hold their number."""
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLES, list(SAMPLES.values()))
    with cache.reader(config) as reader:
        yield reader


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [*product(DTYPES, [(7,), (3, 5)]), *product(COMPUTE_DTYPES, [()])],
)
def test_values_are_those_of_the_store(cache, dtype, shape, monkeypatch):
    """To the bit, in the order asked for, however many steps it takes."""
    monkeypatch.setattr(preloading, "_STEP_BYTES", 64)
    config = CacheConfig(dtype=dtype)
    values = as_tensor(as_read(as_stored("", torch.randn(20, *shape), dtype), dtype))
    names = [f"{n:02d}:x" for n in range(20)]
    with cache.writer(config) as writer:
        writer.put_batch(names, values)
    steps = []
    with cache.reader(config) as reader:
        whole = preload(reader, progress=lambda *step: steps.append(step))
        backwards = preload(reader, names[::-1])
    assert len(whole) == 20
    assert steps[-1] == (20, 20)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert whole.embeddings.is_shared()
    assert torch.equal(whole.embeddings, values)
    assert torch.equal(backwards.embeddings, values.flip(0))
    assert torch.equal(backwards.select(names[3:5]).get_batch([1, 0, 0]), values[[4, 3, 3]])


def test_splits_share_one_copy(reader):
    """Several datasets read the same memory, each in its own order, with its own labels."""
    preloaded = preload(reader)
    names = list(SAMPLES)
    train = EmbeddingDataset(preloaded, names[40:10:-1], labels=list(range(30)))
    test = EmbeddingDataset(preloaded, [name.upper().replace("CLIP", "clip") for name in names[:5]])
    assert train.selection._embeddings.data_ptr() == preloaded.embeddings.data_ptr()
    assert test.selection._embeddings.data_ptr() == preloaded.embeddings.data_ptr()
    embeddings, labels = train.fetch([0, 29])
    assert (embeddings[:, 0].tolist(), labels.tolist()) == ([40, 11], [0, 29])
    assert test[4][0] == 4
    (batch,) = make_dataloader(test, 5, prefetch=0)
    batch.zero_()
    assert preloaded.embeddings[1].any()  # a batch is a copy


class _Located(EmbeddingDataset):
    """Says besides which memory a worker reads: its inode, which is the shared file's."""

    def __getitems__(self, indices):
        storage = self.selection._embeddings.untyped_storage()
        self.selection._embeddings[0, 0] += 1  # seen by all, if it is one memory
        return [(self.fetch(indices), storage.is_shared())]


def _first(batch):
    return batch[0]


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_read_the_same_memory(reader, context):
    """Worker processes get the tensor without a copy: what one writes is seen here."""
    preloaded = preload(reader)
    dataset = _Located(preloaded, list(SAMPLES)[1:])
    loader = DataLoader(
        dataset, 7, num_workers=1, multiprocessing_context=context, collate_fn=_first
    )
    seen = []
    for batch, is_shared in loader:
        assert is_shared
        seen += batch[:, 0].int().tolist()
    assert seen == list(range(1, 50))
    assert preloaded.embeddings[0, 0] == 7


@pytest.mark.parametrize("collate", [None, collate_embeddings])
def test_torch_dataloader_takes_it(reader, collate):
    """Like a dataset over the store."""
    dataset = EmbeddingDataset(preload(reader), labels={"x": 2})
    batches = list(DataLoader(dataset, 20, collate_fn=collate))
    assert torch.cat([batch[0] for batch in batches])[:, 0].tolist() == list(range(50))
    assert [len(batch[1]) for batch in batches] == [20, 20, 10]


def test_a_limit_is_kept(reader):
    """One byte too few is refused before anything is read."""
    needed = 50 * 300 * 4
    assert len(preload(reader, max_bytes=needed)) == 50
    with pytest.raises(CacheFullError):
        preload(reader, max_bytes=needed - 1)
    assert len(preload(reader, list(SAMPLES)[:10], max_bytes=needed - 1)) == 10


def test_missing_samples_are_refused(reader):
    """In the store, and in what was preloaded of it."""
    with pytest.raises(SampleNotFoundError, match="none:x"):
        preload(reader, [*SAMPLES, "none:x"])
    preloaded = preload(reader, list(SAMPLES)[:10])
    with pytest.raises(SampleNotFoundError, match="clip_000010:x"):
        EmbeddingDataset(preloaded, list(SAMPLES)[9:11])


def test_ragged_stores_are_refused(cache, config):
    """They make no tensor."""
    with cache.writer(config, ragged=True) as writer:
        writer.put_batch(["a:x", "b:x"], [np.ones((2, 3)), np.ones((1, 3))])
    with cache.reader(config) as reader, pytest.raises(InvalidEmbeddingError):
        preload(reader)


def test_nothing_selected(reader):
    """No samples are no error, from the store or from what was preloaded."""
    assert preload(reader, []).select().get_batch([]).shape == (0, 300)
    assert preload(reader).select([]).get_batch([]).shape == (0, 300)


def test_plain_pickle_keeps_values(reader):
    """Without torch's reductions it is a copy, and the same."""
    preloaded = preload(reader)
    again = pickle.loads(pickle.dumps(preloaded))
    assert torch.equal(again.select(["clip_000003:x"]).get_batch([0]), preloaded.embeddings[3:4])
