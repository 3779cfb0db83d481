"""Reading from the mapped pages: the same values as LMDB gives, or a clean refusal."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from storage.child_processes import in_fork, numbered, write

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.errors import SampleNotFoundError
from lmdbcache.storage import NUMPY_DTYPES, value_table
from lmdbcache.storage.pages.pages import UnreadablePagesError

SAMPLE_IDS = [
    f"{name}{n}:{label}"
    for n in range(12)
    for name, label in (("clip", "dog"), ("größe", "tür"), ("音", "犬"), ("a:b", "x"), ("🎵z", "é"))
]
# Within a leaf, just below and above the largest such value, and on several pages.
SHAPES = {"float32": [(2,), (300,), (520,), (3, 700)], "float16": [(4,), (700,), (3, 900)]}
SHAPES["bfloat16"] = SHAPES["float16"]


# ---- random histories


class Histories(RuleBasedStateMachine):
    """Whatever other processes do to a store, all ways of reading agree with a snapshot's dict."""

    @initialize(data=st.data())
    def create(self, data):
        self.folder = Path(tempfile.mkdtemp())
        self.cache = EmbeddingCache(self.folder / "cache")
        dtype = data.draw(st.sampled_from(sorted(SHAPES)))
        self.config = CacheConfig(dtype=dtype)
        self.dtype = NUMPY_DTYPES[dtype]
        self.shape = data.draw(st.sampled_from(SHAPES[dtype]))
        self.num_made = 0
        self.committed = self._values(SAMPLE_IDS[7::-1])
        self.pending = {}
        self._in_another_process(self._write, [self.committed])
        self.reader = self.cache.reader(self.config)
        self.reopen(0)

    def _values(self, sample_ids):
        self.num_made += 1
        rows = np.random.default_rng(self.num_made).normal(size=(len(sample_ids), *self.shape))
        return dict(zip(sample_ids, rows.astype(self.dtype), strict=True))

    def _in_another_process(self, function, *args):
        in_fork(lambda: function(*args))

    def _write(self, commits):
        for items in commits:
            write(self.cache.root, self.config, items, on_duplicate="overwrite")

    def _clear_and_write(self, items):
        self.cache.clear(self.config)
        self._write([items])

    @rule(sample_ids=st.lists(st.sampled_from(SAMPLE_IDS), min_size=1, max_size=30, unique=True))
    def put(self, sample_ids):
        self.pending.update(self._values(sample_ids))

    @rule()
    @precondition(lambda self: self.pending)
    def commit(self):
        self._in_another_process(self._write, [self.pending])
        self.committed.update(self.pending)
        self.pending = {}

    @rule(times=st.integers(1, 4))
    def overwrite_everything(self, times):
        """Pages that no snapshot holds are used again from the third commit on."""
        commits = [self._values(list(self.committed)) for _ in range(times)]
        self._in_another_process(self._write, commits)
        self.committed.update(commits[-1])

    @rule()
    def compact(self):
        self._in_another_process(lambda: self.cache.compact(self.config) and None)

    @rule(num_kept=st.integers(1, 20))
    def clear_and_refill(self, num_kept):
        """The new store has the old one's generation name, and often its transaction ids."""
        self.committed = self._values(list(self.committed)[:num_kept])
        self._in_another_process(self._clear_and_write, self.committed)

    @rule()
    def refresh(self):
        self.reader.refresh()
        self.model = dict(self.committed)

    @rule(unwatched=st.integers(0, 4))
    def reopen(self, unwatched):
        """Pin a snapshot; where its values lie is found out some steps later."""
        self.reader.close()
        assert len(self.reader) == len(self.committed)
        self.everything = self.reader.select()
        self.unwatched = unwatched
        self.model = dict(self.committed)

    @rule()
    def look_for_something_new(self):
        """A sample that only the newest commit has moves the snapshot on."""
        new = [sample_id for sample_id in self.committed if sample_id not in self.model]
        if new:
            assert same(self.reader.get_batch(new), by_id(self.committed, new))
            self.model = dict(self.committed)

    @invariant()
    def reads_agree(self):
        self.unwatched -= 1
        if self.unwatched >= 0:
            return
        sample_ids = list(self.model)
        expected = by_id(self.model, sample_ids)
        assert same(self.reader.get_batch(sample_ids), expected)
        out = np.zeros_like(expected)
        assert self.reader.get_batch(sample_ids, out=out) is out
        assert same(out, expected)
        for name in sample_ids[:5]:
            assert same(self.reader[name], self.model[name])
        selection = self.reader.select(sample_ids)
        backwards = np.arange(len(sample_ids))[::-1]
        for _ in range(2):  # looked up, then remembered
            assert same(selection.get_batch(backwards), expected[::-1])
        assert same(selection.get_batch(backwards.tolist(), out), expected[::-1])
        whole = self.reader.select()
        assert whole.sample_ids == sorted(self.model, key=str.encode)
        if set(self.everything.sample_ids) <= set(self.model):
            whole = self.everything  # of an older snapshot
        found = whole.get_batch(range(len(whole)))
        assert same(found, by_id(self.model, whole.sample_ids))

    def teardown(self):
        self.reader.close()
        shutil.rmtree(self.folder)


def by_id(values, sample_ids):
    return np.stack([values[sample_id] for sample_id in sample_ids])


def same(found, expected):
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("histories", [4, pytest.param(200, marks=pytest.mark.stress)])
def test_random_histories(histories):
    """Each of 12 steps, of every dtype and length of value."""
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=histories,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# ---- falling back to LMDB


def test_unreadable_pages_are_read_through_lmdb(filled, config, embeddings, monkeypatch, caplog):
    """Values, misses and `out` are the same; the log says once why it is slower."""

    def refuse(*_):
        raise UnreadablePagesError("another layout")

    monkeypatch.setattr(value_table, "read_table", refuse)
    names = list(embeddings)
    expected = by_id(embeddings, names)
    with caplog.at_level(logging.INFO), filled.reader(config) as reader:
        selection = reader.select(names)
        out = np.zeros_like(expected)
        for batch in (
            reader.get_batch(names),
            reader.get_batch(names, out),
            selection.get_batch(range(20)),
            selection.get_batch(np.arange(20), out),
            np.stack([reader[name] for name in names * 20][:20]),
        ):
            assert same(batch, expected)
        assert selection.copy_with([0], lambda *_: 1) is None
        selection.will_need([0])
        assert reader._snapshot.values is None
        with pytest.raises(SampleNotFoundError, match="none:x"):
            reader.get_batch([names[0], "none:x"])
    assert sum("another layout" in record.message for record in caplog.records) == 1


def test_a_table_of_a_store_made_again_is_not_taken_for_the_old_one(cache, config):
    """A snapshot of a cleared store keeps its values, though a new file has its name and ids."""
    old = numbered(0, 50)
    new = {**old, "clip_000007:x": np.full(64, 1000, np.float32)}
    write(cache.root, config, old)
    with cache.reader(config) as reader:
        assert len(reader) == 50  # pinned, its values not located yet

        def make_again():
            cache.clear(config)
            write(cache.root, config, new)

        in_fork(make_again)
        assert reader.get_batch(["clip_000007:x"])[0, 0] == 7
        reader.refresh()
        assert reader.get_batch(["clip_000007:x"])[0, 0] == 1000


def test_other_spellings_in_batches_hide_no_sample(filled, config, embeddings):
    """Places remembered under other spellings of some ids don't stand for those of all."""
    dogs = [name for name in embeddings if name.endswith("dog")]
    spellings = [name[:-3] + label for name in dogs for label in ("DOG", "Dog", "dOg")]
    with filled.reader(config) as reader:
        assert len(reader.get_batch(spellings)) == 30
        for name in list(embeddings) * 30:
            assert same(reader[name], embeddings[name])


# ---- reuse of large buffers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_held_of_a_batch_is_never_filled_again(cache, dtype):
    """An array, its slice, a tensor, a memoryview: while one lives, its buffer isn't reused."""
    config = CacheConfig(dtype=dtype)
    values = np.arange(64, dtype=np.float32)[:, None] + np.zeros((64, 40_000), np.float32)
    names = [f"{n}:x" for n in range(64)]
    write(cache.root, config, dict(zip(names, values.astype(NUMPY_DTYPES[dtype]), strict=True)))
    with cache.reader(config) as reader:
        selection = reader.select(names)
        held = []
        for n in range(12):
            batch = selection.get_batch(np.arange(n * 4, n * 4 + 16) % 64)
            raw = batch.view(np.int16)
            kept = (
                batch,
                batch[3:5, 7:9],
                torch.from_numpy(raw)[2],
                memoryview(raw),
                raw.reshape(-1).T[1::2],
            )[n % 5]
            held.append((kept, bytes(np.asarray(kept).tobytes())))
            del batch, raw, kept
            selection.get_batch(np.arange(16))
        for kept, content in held:
            assert np.asarray(kept).tobytes() == content


def test_a_buffer_that_nobody_holds_is_used_again(cache, config):
    """A loop that drops each batch works in the same memory."""
    write(cache.root, config, {f"{n}:x": np.full(20_000, n, np.float32) for n in range(40)})
    with cache.reader(config) as reader:
        selection = reader.select()
        addresses = {selection.get_batch(np.arange(n, n + 20)).ctypes.data for n in range(20)}
    assert len(addresses) <= 2
