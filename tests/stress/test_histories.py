"""Random histories of one process's writer and reader against a list of the states committed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from storage.child_processes import in_fork, write
from stress.figures import fault_seed

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.errors import CacheNotFoundError, WriterClosedError

NAMES = [f"{file_id}{n}:{label}" for n in range(15) for file_id, label in (("a", "x"), ("ö", "é"))]
SHAPES = [(3,), (400,), (1500,)]
SOME = st.lists(st.sampled_from(NAMES), min_size=1, max_size=20, unique=True)


class WriterAndReader(RuleBasedStateMachine):
    """The reader sees whole states, never goes back, and sees the newest when it refreshes.

    `states` are all commits so far, None for a store that isn't there; the reader is known to have
    reached `view`.
    """

    @initialize(shape=st.sampled_from(SHAPES), on_duplicate=st.sampled_from(["skip", "overwrite"]))
    def begin(self, shape, on_duplicate):
        self.folder = Path(tempfile.mkdtemp())
        self.cache = EmbeddingCache(self.folder / "cache")
        self.config, self.shape, self.on_duplicate = CacheConfig(), shape, on_duplicate
        self.states, self.pending, self.view, self.num_made = [None], {}, 0, 0
        self.writer = self._open_writer()
        self.reader = None

    def _open_writer(self):
        return self.cache.writer(self.config, on_duplicate=self.on_duplicate)

    def _rows(self, names):
        self.num_made += 1
        rows = np.random.default_rng(self.num_made).normal(size=(len(names), *self.shape))
        return dict(zip(names, rows.astype(np.float32), strict=True))

    @property
    def newest(self):
        return self.states[-1]

    def _is_taken(self, name):
        stored = name in (self.newest or {}) or name in self.pending
        return self.on_duplicate == "skip" and stored

    # ---- writing

    @rule(name=st.sampled_from(NAMES))
    def put(self, name):
        row = self._rows([name])[name]
        is_taken = self._is_taken(name)
        is_put = self.writer.put(name, row)
        if not is_taken:
            # Of one that is stored it may learn at the commit only.
            assert is_put
            self.pending[name] = row

    @rule(names=SOME)
    def put_batch(self, names):
        rows = self._rows(names)
        self.writer.put_batch(names, np.stack(list(rows.values())))
        self.pending.update({n: row for n, row in rows.items() if not self._is_taken(n)})

    @rule()
    def commit(self):
        self.writer.commit()
        self._committed()

    def _committed(self):
        if self.pending:
            self.states.append({**(self.newest or {}), **self.pending})
            self.pending = {}

    @rule()
    def discard(self):
        self.writer.discard()
        self.pending = {}
        assert self.writer.num_pending == 0

    @rule()
    def reopen_writer(self):
        self.writer.close()
        self._committed()
        self.writer = self._open_writer()

    @rule(names=SOME)
    @precondition(lambda self: not self.pending)
    def another_process_writes(self, names):
        rows = {n: row for n, row in self._rows(names).items() if not self._is_taken(n)}
        in_fork(lambda: write(self.cache.root, self.config, rows, on_duplicate=self.on_duplicate))
        if rows:
            self.states.append({**(self.newest or {}), **rows})

    # ---- the store as a whole

    @rule(elsewhere=st.booleans())
    def compact(self, elsewhere):
        def compact():
            self.cache.compact(self.config)

        if self.newest is None:
            with pytest.raises(CacheNotFoundError):
                compact()
        else:
            in_fork(compact) if elsewhere else compact()

    @rule(elsewhere=st.booleans())
    @precondition(lambda self: len(self.states) > 4)
    def clear(self, elsewhere):
        def clear():
            self.cache.clear(self.config)

        self.discard()
        in_fork(clear) if elsewhere else clear()
        if self.newest is not None:
            self.states.append(None)

    @rule()
    def verify(self):
        if self.newest is not None:
            report = self.cache.verify(self.config)
            assert report.is_sound
            assert report.num_embeddings == len(self.newest)

    # ---- reading

    @rule()
    @precondition(lambda self: self.newest is not None)
    def reopen_reader(self):
        self._close_reader()
        self.reader = self.cache.reader(self.config)
        self.view = len(self.states) - 1

    @rule()
    @precondition(lambda self: self.reader is not None)
    def refresh(self):
        try:
            self.reader.refresh()
            assert self.newest is not None
        except CacheNotFoundError:
            assert self.newest is None
        else:
            self.view = len(self.states) - 1

    @rule()
    @precondition(lambda self: self.reader is not None)
    def read_in_a_fork(self):
        """A child reads the newest state through its parent's reader, and can't write."""

        def look():
            with pytest.raises(WriterClosedError):
                self.writer.put("child:x", np.ones(self.shape))
            return self._seen()

        assert same(in_fork(look), self.newest)

    @invariant()
    def the_reader_sees_one_state(self):
        if getattr(self, "reader", None) is None:
            return
        seen = self._seen()
        while self.view < len(self.states) and not same(seen, self.states[self.view]):
            self.view += 1
        assert self.view < len(self.states), "no state since the last one seen"

    def _seen(self):
        """All that the reader gives, read in three ways; None if there is no store."""
        try:
            names = list(self.reader)
            rows = self.reader.get_batch(names)
        except CacheNotFoundError:
            return None
        assert len(self.reader) == len(names)
        assert np.array_equal(self.reader.select(names).get_batch(range(len(names))), rows)
        assert all(np.array_equal(self.reader[n], row) for n, row in zip(names, rows, strict=True))
        return dict(zip(names, rows, strict=True))

    def _close_reader(self):
        if self.reader is not None:
            self.reader.close()

    def teardown(self):
        self.writer.close()
        self._committed()
        self._close_reader()
        self.verify()
        if self.newest is not None:
            with self.cache.reader(self.config) as self.reader:
                assert same(self._seen(), self.newest)
        shutil.rmtree(self.folder)


def same(seen, state):
    if seen is None or state is None:
        return seen is state
    return seen.keys() == state.keys() and all(
        seen[name].tobytes() == state[name].tobytes() for name in seen
    )


@pytest.mark.parametrize(
    ("histories", "steps"), [(8, 15), pytest.param(400, 40, marks=pytest.mark.stress)]
)
def test_random_histories(record_property, histories, steps):
    """Whatever one process does to its store, the reader sees one committed state after another."""
    machine = seed(fault_seed())(type("History", (WriterAndReader,), {}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=(Phase.generate,),  # shrinking takes minutes, and the seed repeats a failure
            suppress_health_check=list(HealthCheck),
        ),
    )
    words = f"{histories} histories of {steps} steps, each verified at its end"
    record_property("faults", (words, {}))
