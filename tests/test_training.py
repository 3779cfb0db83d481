"""Embeddings as tensors, for training loops."""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from worker_errors import raises_in_worker

from lmdbcache import (
    CacheConfig,
    EmbeddingDataset,
    TensorMapping,
    collate_embeddings,
    make_dataloader,
)
from lmdbcache.errors import (
    ConfigError,
    InvalidEmbeddingError,
    MissingLabelError,
    SampleNotFoundError,
)
from lmdbcache.storage import as_read, as_stored
from lmdbcache.training import as_tensor

LABELS = {"dog": 1, "drum": 0}


@pytest.fixture
def reader(filled, config):
    with filled.reader(config) as reader:
        yield reader


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_as_tensor_shares_memory_and_keeps_bits(dtype, shape):
    """The tensor is the array, dtype included."""
    array = np.ones(shape, dtype)
    tensor = as_tensor(array)
    assert tensor.dtype == getattr(torch, np.dtype(dtype).name)
    assert tensor.shape == shape
    array[...] = 2
    assert (tensor == 2).all()


def test_tensor_mapping_is_the_reader_in_tensors(reader, embeddings):
    """Same keys, same values; writable tensors of their own memory."""
    tensors = TensorMapping(reader)
    assert list(tensors) == list(reader)
    assert len(tensors) == 20
    assert tensors.arrays is reader
    for sample_id, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), embeddings[sample_id])
    tensors["video_00001:dog"].zero_()
    assert tensors["video_00001:dog"].any()
    assert tensors.get("none:x") is None


def test_tensor_mapping_narrows_to_classes(reader, filled, config):
    """Other classes aren't there, by any way of asking; later commits count."""
    dogs = TensorMapping(reader, classes=["DOG"])
    assert len(dogs) == 10
    assert all(sample_id.endswith(":dog") for sample_id in dogs)
    assert "video_00001:Dog" in dogs
    for sample_id in ("video_00000:drum", "bad", 5):
        assert sample_id not in dogs
        with pytest.raises(KeyError):
            dogs[sample_id]
    with filled.writer(config) as writer:
        writer.put("new:dog", np.zeros(8))
    reader.refresh()
    assert len(dogs) == 11
    assert "dog" in repr(dogs)


def test_tensor_mapping_pickles(reader, embeddings):
    """It travels as its path and classes."""
    dogs = pickle.loads(pickle.dumps(TensorMapping(reader, classes={"dog"})))
    assert set(dogs) == {sample_id for sample_id in embeddings if sample_id.endswith("dog")}


@pytest.mark.parametrize("collate", [collate_embeddings, None])
@pytest.mark.parametrize("labels", [None, LABELS, list(range(20))])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_dataloader_batches(cache, embeddings, collate, labels, dtype):
    """Our collate function and torch's default give the same batches, in order."""
    config = CacheConfig(dtype=dtype)
    with cache.writer(config) as writer:
        writer.put_batch(embeddings, embeddings.values())
    dataset = EmbeddingDataset(cache.reader(config), list(embeddings), labels)
    assert len(dataset) == 20
    batches = list(DataLoader(dataset, batch_size=6, collate_fn=collate))
    stacked = as_tensor(as_read(as_stored("", list(embeddings.values()), dtype), dtype))
    if labels is not None:
        expected = [LABELS[i.split(":")[1]] for i in embeddings] if labels is LABELS else labels
        found = torch.cat([batch[1] for batch in batches])
        assert found.dtype == torch.int64
        assert found.tolist() == expected
        assert dataset[3][1] == expected[3]
        batches = [batch[0] for batch in batches]
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    assert torch.equal(torch.cat(batches), stacked)


def test_dataset_takes_everything_by_default(reader, embeddings):
    """Without sample ids it is all that is stored, in the reader's order."""
    assert EmbeddingDataset(reader).sample_ids == sorted(embeddings)


def test_dataset_batch_is_a_list_of_samples(reader):
    """Another collate function sees a list of (embedding, label)."""
    dataset = EmbeddingDataset(reader, labels=LABELS)
    batch = dataset.__getitems__([0, 1, 2])
    assert isinstance(batch, list)
    assert [(len(embedding), int(label)) for embedding, label in batch] == [(8, 0), (8, 1), (8, 0)]
    assert collate_embeddings([dataset[0], dataset[1]])[0].shape == (2, 8)


def test_ragged_store_goes_through_a_collate_function_that_pads(cache, config):
    """Embeddings of different lengths reach the user's collate function one by one."""
    with cache.writer(config, ragged=True) as writer:
        for n in range(1, 5):
            writer.put(f"{n}:x", np.full((n, 3), n))
    dataset = EmbeddingDataset(cache.reader(config))
    padded = next(
        iter(DataLoader(dataset, batch_size=4, collate_fn=torch.nn.utils.rnn.pad_sequence))
    )
    assert padded.shape == (4, 4, 3)


def test_labels_must_fit(reader):
    """As many labels as samples, and one for each class."""
    with pytest.raises(ConfigError, match="3 labels for 20 samples"):
        EmbeddingDataset(reader, labels=[1, 2, 3])
    with pytest.raises(KeyError, match="drum"):
        EmbeddingDataset(reader, labels={"dog": 1})
    with pytest.raises(MissingLabelError, match=r"labels: none for 'drum'.*sample_ids") as caught:
        make_dataloader(reader, 4, labels={"dog": 1})
    assert isinstance(caught.value, KeyError)
    assert "'dog'" not in str(caught.value).split(";", 1)[0]
    dogs = [sample_id for sample_id in reader if sample_id.endswith(":dog")]
    assert EmbeddingDataset(reader, dogs, labels={"dog": 1}).labels.tolist() == [1] * 10


@pytest.mark.parametrize("num_workers", [0, 1])
def test_missing_sample_reaches_the_training_loop(reader, num_workers):
    """A miss in a worker arrives as our error with its message."""
    dataset = EmbeddingDataset(reader, ["video_00001:dog", "none:x"])
    with raises_in_worker(SampleNotFoundError, match="none:x"):
        list(DataLoader(dataset, batch_size=2, num_workers=num_workers))
    assert issubclass(InvalidEmbeddingError, ValueError)


@pytest.mark.parametrize("shape", [(7,), (40, 512)])  # 512 bytes to 64 KiB, and more
def test_int8_from_workers_and_threads(cache, shape):
    """Rows of int8 become float32 in the memory that a worker or a thread hands over."""
    config = CacheConfig(dtype="int8")
    names = [f"{n:02d}:x" for n in range(20)]
    given = np.random.default_rng(0).normal(size=(20, 4, *shape)).astype(np.float32)
    with cache.writer(config) as writer:
        writer.put_batch(names, given)
    expected = torch.from_numpy(as_read(given, "int8"))
    dataset = EmbeddingDataset(cache.reader(config), names)
    in_worker = DataLoader(dataset, batch_size=6, num_workers=1, collate_fn=collate_embeddings)
    assert torch.equal(torch.cat(list(in_worker)), expected)
    in_thread = make_dataloader(cache.reader(config), batch_size=6, prefetch=2, num_threads=2)
    assert torch.equal(torch.cat(list(in_thread)), expected)
