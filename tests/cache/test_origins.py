"""Records of who computed an embedding: they follow it, and older files do without."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest

from lmdbcache import CacheConfig
from lmdbcache.cache import (
    SOURCES_NAME,
    THIS_STORE,
    Origin,
    Source,
    SourceRecorder,
    SourceRecords,
    adopt_sources,
    count_origins,
    records,
)
from lmdbcache.errors import CacheFullError, IntegrityError
from lmdbcache.exchange import Intake

NODE = Origin("node-\udcff", {"commit": "c1"}, {"weights_digest": "w"})
IDS = [f"{n}:x" for n in range(4)]


@pytest.fixture
def merged(cache):
    """A store of four embeddings from elsewhere and one of its own."""
    config = CacheConfig(namespace="origins")
    with cache.writer(config) as writer:
        writer.put("own:x", np.zeros(8))
    intake = Intake(cache, config)
    values = np.arange(32, dtype=np.float32).reshape(4, 8)
    intake.add(intake.checked(IDS, values, NODE), NODE.provenance)
    return cache, config


def test_origins_are_read_back(merged):
    """Bytes of a name that aren't UTF-8 included."""
    cache, config = merged
    assert count_origins(cache.path(config)) == [(NODE, 4), (THIS_STORE, 1)]


def test_an_embedding_that_is_computed_again_is_our_own(merged):
    """Removed and computed anew, even to the same bits; others keep their origin."""
    cache, config = merged
    store = cache.path(config)
    with cache.writer(config) as writer:
        writer.remove(["2:x"])
    recorder = SourceRecorder(store)
    recorder.note("2:x", Source("a.wav", 1, 1, None))
    from lmdbcache.storage import EmbeddingWriter

    known = {"weights_digest": "w"}
    with EmbeddingWriter(store, config, provenance=known, before_commit=recorder) as writer:
        writer.put("2:x", np.arange(16, 24))
    assert count_origins(store) == [(NODE, 3), (THIS_STORE, 2)]


def test_files_from_before_there_were_origins(cache, config):
    """They are read, and get the tables with the first origin, under the same version."""
    with cache.writer(config) as writer:
        writer.put("own:x", np.zeros(8))
    store = cache.path(config)
    recorder = SourceRecorder(store)
    recorder.note("a:x", Source("a.wav", 1, 1, None))
    from lmdbcache.storage import EmbeddingWriter

    with EmbeddingWriter(store, config, before_commit=recorder) as writer:
        writer.put("a:x", np.ones(8))
    with sqlite3.connect(store / SOURCES_NAME) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    connection.close()
    assert "origins" not in tables
    assert count_origins(store) == []
    intake = Intake(cache, config)
    intake.add(intake.checked(["b:x"], np.ones((1, 8), np.float32), NODE), NODE.provenance)
    assert count_origins(store) == [(THIS_STORE, 2), (NODE, 1)]
    connection = sqlite3.connect(store / SOURCES_NAME)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    connection.close()


def test_adopting_files_keeps_origins(merged, tmp_path):
    """Only damaged records are made anew."""
    cache, config = merged
    (tmp_path / "a.wav").write_bytes(b"x")
    assert adopt_sources(cache.path(config), {"0:x": str(tmp_path / "a.wav")}) == 1
    assert count_origins(cache.path(config))[0] == (NODE, 4)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE origins SET record = 'garbage'",
        "UPDATE origins SET record = '[1]'",
        """UPDATE origins SET record = '{"writer": "x", "detail": 3, "provenance": {}}'""",
        "DELETE FROM origins",
    ],
)
def test_damaged_origins_are_an_error(statement, merged):
    """Of ours, with the remedy; the embeddings can be read."""
    cache, config = merged
    connection = sqlite3.connect(cache.path(config) / SOURCES_NAME, isolation_level=None)
    connection.execute(statement)
    connection.close()
    with pytest.raises(IntegrityError):
        count_origins(cache.path(config))
    assert cache.explain(config, "0:x").is_stored


def test_a_store_without_records(filled, config):
    """Nothing is made to look."""
    assert count_origins(filled.path(config)) == []
    with SourceRecords(filled.path(config)) as opened:
        assert not opened.has_origins
    assert not (filled.path(config) / SOURCES_NAME).exists()


def test_a_full_disk_is_told_as_such(cache, monkeypatch):
    """As our error for it, and nothing is merged: no embedding without its origin."""

    def fails(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(records, "_origin_rows", fails)
    config = CacheConfig(namespace="origins")
    intake = Intake(cache, config)
    rows = intake.checked(IDS, np.zeros((4, 8), np.float32), NODE)
    with pytest.raises(CacheFullError):
        intake.add(rows, NODE.provenance)
    assert cache.info(config).num_embeddings == 0
