"""A store that the memory can't hold: what is read is asked for ahead, and nothing beside it."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os

import numpy as np
import pytest
from storage.damage import data_file

from lmdbcache import CacheConfig
from lmdbcache.storage import MappedFile, as_read, gather, value_bytes

SHAPES = {"pooled": (300,), "hidden": (160, 512)}  # the latter 64 KiB and more in any dtype


@pytest.fixture(params=itertools.product(SHAPES, ["float32", "int8"]), ids="-".join)
def stored(request, cache):
    """A reader's config, ids and values."""
    output, dtype = request.param
    config = CacheConfig(output=output, dtype=dtype)
    values = np.random.default_rng(0).random((24, *SHAPES[output]), dtype=np.float32)
    values = as_read(values, dtype)
    names = [f"clip_{number:02d}:x" for number in range(24)]
    with cache.writer(config) as writer:
        writer.put_batch(names, values)
    return config, names, values


@pytest.fixture
def asked(monkeypatch):
    """What is asked for, as (offsets, length)."""
    calls = []
    original = MappedFile.will_need

    def will_need(self, offsets, length):
        calls.append((list(offsets), length))
        original(self, offsets, length)

    monkeypatch.setattr(MappedFile, "will_need", will_need)
    return calls


def read_in_all_ways(reader, names, values):
    selection = reader.select(names)
    order = np.random.default_rng(1).permutation(len(names))
    assert np.array_equal(selection.get_batch(order), values[order])
    assert np.array_equal(reader.get_batch([names[i] for i in order]), values[order])
    out = np.empty_like(values)
    selection.get_batch(order, out)
    assert np.array_equal(out, values[order])
    for _ in range(3):
        for number in order:
            assert np.array_equal(reader[names[number]], values[number])


def test_what_fits_is_not_asked_for(stored, cache, asked):
    """A store that the page cache holds is read as ever."""
    config, names, values = stored
    with cache.reader(config) as reader:
        read_in_all_ways(reader, names, values)
    assert asked == []


def test_what_does_not_fit_is_asked_for(stored, cache, asked, monkeypatch):
    """Batches, single reads and given buffers ask for exactly their values, and give the same."""
    config, names, values = stored
    monkeypatch.setattr(gather, "memory_limit", lambda: 1 << 10)
    with cache.reader(config) as reader:
        read_in_all_ways(reader, names, values)
        lengths = {length for _, length in asked}
        assert lengths == {value_bytes(values[0].shape, config.dtype)}
        batches = [offsets for offsets, _ in asked if len(offsets) > 1]
        assert [len(set(offsets)) for offsets in batches] == [24, 24, 24]
        assert [len(offsets) for offsets, _ in asked].count(1) >= 24


def test_what_is_stored_is_told_without_reading_the_values(cache, config):
    """Listing and looking for all samples leaves nearly all of the file on the disk."""
    names = [f"clip_{n:06d}:x" for n in range(20_000)]
    with cache.writer(config) as writer:
        for start in range(0, len(names), 1000):  # keys lie among the values of every commit
            writer.put_batch(names[start : start + 1000], np.zeros((1000, 384), np.float32))
            writer.commit()
    path = data_file(cache, config)
    with cache.reader(config) as reader:
        assert len(reader) == len(names)
        for look in (lambda: list(reader) == names, lambda: reader.missing(names) == []):
            forget(path)
            if share_in_memory(path) > 0.05:
                pytest.skip("this file system keeps its files in memory")
            assert look()
            assert share_in_memory(path) < 0.2
        forget(path)
        reader.get_batch(names)
        assert share_in_memory(path) > 0.9


def forget(path):
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share_in_memory(path):
    """How much of a file is in the page cache, 0 to 1."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
    start = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapped)))
    assert ctypes.CDLL(None).mincore(start, ctypes.c_size_t(len(mapped)), pages) == 0
    return sum(page & 1 for page in pages) / len(pages)
