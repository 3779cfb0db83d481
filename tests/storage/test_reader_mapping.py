"""A reader is a Mapping, as Python's own tests of mappings define one."""

from __future__ import annotations

import collections.abc
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch

from lmdbcache import CacheConfig, EmbeddingReader
from lmdbcache.errors import (
    CacheNotFoundError,
    IntegrityError,
    InvalidEmbeddingError,
    SampleNotFoundError,
)
from lmdbcache.storage import writer as writing

mapping_tests = pytest.importorskip("test.mapping_tests")


class NumberReader(EmbeddingReader):
    """Gives numbers for arrays of one element: CPython's tests hash the values."""

    def __getitem__(self, sample_id):
        return float(super().__getitem__(sample_id)[0])


class TestMappingProtocol(mapping_tests.BasicTestMappingProtocol):
    """The reading half of CPython's tests."""

    # A store can't be changed through a reader.
    test_write = test_update = test_setdefault = test_pop = test_popitem = None

    @pytest.fixture(autouse=True)
    def _root(self, cache, monkeypatch):
        self.cache, self.monkeypatch = cache, monkeypatch
        self.stores = 0

    def _reference(self):
        return {"1:a": 0.0, "b:b": 1.0, "c:c": 2.0}

    def _store(self, data):
        self.stores += 1
        config = CacheConfig(duration=self.stores)
        with self.monkeypatch.context() as patch, self.cache.writer(config) as writer:
            # A store without embeddings is one that lost its only batch to an exception.
            writer.put_batch(data or ["x:x"], [np.array([n]) for n in data.values() or [0]])
            if not data:
                patch.setattr(writing, "put_embeddings", lambda *_, **__: (0, []))
                writer.commit()
        return NumberReader(self.cache.path(config), config)

    def _empty_mapping(self):
        return self._store({})

    def _full_mapping(self, data):
        return self._store(dict(data))

    def test_constructor(self):
        """Two empty stores are equal and different objects."""
        assert self._empty_mapping() == self._empty_mapping()
        assert self._empty_mapping() is not self._empty_mapping()


@pytest.fixture
def reader(filled, config):
    with filled.reader(config) as reader:
        yield reader


def test_reader_is_a_mapping(reader, embeddings):
    """get, keys, items, values, len and iteration agree with a dict of the same content."""
    assert isinstance(reader, collections.abc.Mapping)
    assert not isinstance(reader, collections.abc.MutableMapping)
    assert len(reader) == len(embeddings) == 20
    assert list(reader) == list(reader.keys()) == sorted(embeddings)
    for (sample_id, embedding), value in zip(reader.items(), reader.values(), strict=True):
        np.testing.assert_array_equal(embedding, embeddings[sample_id])
        np.testing.assert_array_equal(value, embeddings[sample_id])
        np.testing.assert_array_equal(reader.get(sample_id), embeddings[sample_id])
    assert reader.keys() & {"video_00001:dog", "none:x"} == {"video_00001:dog"}
    assert reader.get("none:x") is None
    assert reader.get("none:x", 5) == 5


def test_equality_is_that_of_content(reader, embeddings, filled, config):
    """Equal to any mapping with the same ids and values, and to nothing else."""
    other = filled.reader(config)
    assert reader == other == embeddings
    assert embeddings == reader
    assert not reader.__ne__(embeddings)
    changed = {**embeddings, "video_00001:dog": np.zeros(8)}
    renamed = {sample_id + "x": value for sample_id, value in embeddings.items()}
    for unequal in (changed, renamed, {}, None, 5, list(embeddings), set(embeddings)):
        assert reader != unequal


def test_reader_is_unhashable(reader):
    """Like every mapping that compares by content."""
    with pytest.raises(TypeError, match="unhashable"):
        hash(reader)


@pytest.mark.parametrize("key", [5, None, b"video_00001:dog", ("a", "b"), [], "no colon", "", "a:"])
def test_what_is_no_sample_id_is_not_contained(reader, key):
    """Any object may be asked for; what can't be stored isn't there."""
    assert key not in reader
    assert reader.get(key) is None
    with pytest.raises(SampleNotFoundError):
        reader[key]


def test_lookup_takes_every_form_of_a_sample_id(reader):
    """The class in capitals is the same sample."""
    assert "video_00001:DOG" in reader
    np.testing.assert_array_equal(reader["video_00001:Dog"], reader["video_00001:dog"])
    np.testing.assert_array_equal(
        reader.get_batch(["video_00001:DOG"])[0], reader["video_00001:dog"]
    )
    assert reader.missing(["video_00001:DOG"]) == []


def test_repr_names_the_store(reader, filled, config):
    """The repr is short and opens nothing."""
    assert repr(reader) == f"EmbeddingReader({str(filled.path(config))!r})"


def test_arrays_are_owned_and_writable(reader, filled, config, embeddings):
    """A caller may change what it got; neither the store nor another read notices."""
    first = next(iter(embeddings))
    for array in (reader[first], reader.get_batch([first])):
        assert array.flags.writeable
        array[:] = 0
    np.testing.assert_array_equal(reader[first], embeddings[first])
    kept = reader[first]
    reader.close()
    np.testing.assert_array_equal(kept, embeddings[first])
    assert filled.verify(config).is_sound


def test_batches_that_are_kept_are_never_written_again(cache, config):
    """Large batches, their slices and tensors made of them stay as they are while others follow."""
    values = np.random.default_rng(3).normal(size=(8, 100_000)).astype(np.float32)
    names = [f"{n}:x" for n in range(8)]
    with cache.writer(config) as writer:
        writer.put_batch(names, values)
    with cache.reader(config) as reader:
        whole, part = reader.get_batch(names), reader.get_batch(names[::-1])[2:3, 5:]
        tensor = torch.from_numpy(reader.get_batch(names))[1:]
        for _ in range(10):
            assert reader.get_batch(names[4:] * 2).any()
        np.testing.assert_array_equal(whole, values)
        np.testing.assert_array_equal(part, values[::-1][2:3, 5:])
        np.testing.assert_array_equal(tensor.numpy(), values[1:])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (768,), (3, 5), (2, 1, 4)])
def test_get_batch_equals_reads_by_key(cache, dtype, shape):
    """One call gives what a loop over keys gives, in order, repeats included, to the bit."""
    config = CacheConfig(dtype=dtype)
    generator = np.random.default_rng(2)
    sample_ids = [f"{n}:x" for n in range(30)]
    with cache.writer(config) as writer:
        writer.put_batch(sample_ids, generator.normal(size=(30, *shape)))
    asked = [sample_ids[n] for n in generator.integers(0, 30, 50)]
    with cache.reader(config) as reader:
        rows = [reader[sample_id] for sample_id in asked]
        batch = reader.get_batch(asked)
        assert (batch.shape, batch.dtype) == ((50, *shape), rows[0].dtype)
        assert batch.tobytes() == b"".join(row.tobytes() for row in rows)
        out = np.empty((50, *shape), batch.dtype)
        assert reader.get_batch(asked, out=out) is out
        assert out.tobytes() == batch.tobytes()
        assert reader.get_batch([]).shape == (0, *shape)
        assert reader.dtype == {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((2, 8), np.float64),
        np.empty((3, 8), np.float32),
        np.empty((2, 4), np.float32),
        np.empty((2, 16), np.float32)[:, ::2],
        np.empty((2, 8), np.float32, order="F"),
    ],
)
def test_out_that_does_not_fit_is_refused(reader, out):
    """`out` is filled as it is or not at all."""
    with pytest.raises(InvalidEmbeddingError, match=r"\(2, 8\)"):
        reader.get_batch(["video_00000:drum", "video_00001:dog"], out=out)


def test_misses_are_named(reader):
    """A batch with absent samples names them, some if they are many, and the store."""
    with pytest.raises(SampleNotFoundError, match=r"'no:x': not in .*20 embeddings"):
        reader["no:x"]
    many = [f"no_{n}:x" for n in range(5)]
    with pytest.raises(KeyError, match="'no_0:x', 'no_1:x', 'no_2:x' and 2 more"):
        reader.get_batch(["video_00001:dog", *many])
    assert reader.missing(["video_00001:dog", *many, many[0], "bad"]) == [*many, "bad"]


def test_iteration_crosses_its_own_steps(cache, config):
    """More samples than one step fetches come each once and in order."""
    sample_ids = [f"{n:05d}:x" for n in range(9000)]
    with cache.writer(config, commit_records=10_000) as writer:
        writer.put_batch(sample_ids, np.arange(9000, dtype=np.float32)[:, None])
    with cache.reader(config) as reader:
        assert list(reader) == sample_ids


def test_reader_pickles_as_its_path(reader, filled, config, embeddings):
    """A pickled reader is small, opens when first read, and keeps its config."""
    payload = pickle.dumps(reader)
    assert len(payload) < 1000
    with pickle.loads(payload) as copy:
        assert copy == embeddings
        assert copy.path == filled.path(config)
    filled.clear(config)
    copy = pickle.loads(payload)
    with pytest.raises(CacheNotFoundError):
        len(copy)


def test_reader_of_another_config_is_refused(filled, config):
    """A reader that was told a config doesn't read a store of another."""
    with pytest.raises(IntegrityError):
        len(EmbeddingReader(filled.path(config), CacheConfig(duration=1)))
    assert len(EmbeddingReader(filled.path(config))) == 20


def test_closed_reader_opens_again(reader):
    """Reading after close is no error."""
    assert len(reader) == 20
    reader.close()
    reader.close()
    assert len(reader) == 20


def test_links_to_a_store_are_that_store(filled, config, tmp_path, embeddings):
    """One store read by two paths at once is one environment."""
    (tmp_path / "link").symlink_to(filled.root)
    linked = EmbeddingReader(tmp_path / "link" / filled.path(config).name)
    with filled.reader(config) as reader, linked:
        assert reader == embeddings
        assert linked == embeddings
        assert not linked.refresh()
