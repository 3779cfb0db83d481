"""Kept offset tables: written once beside a large store, used by others, never trusted blindly."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from storage.child_processes import NOBODY, in_fork, numbered, peer_process, read, write

from lmdbcache import EmbeddingCache
from lmdbcache.storage import value_table

NAMES = list(numbered(0, 400))


@pytest.fixture(autouse=True)
def _four_hundred_is_large(monkeypatch):
    monkeypatch.setattr(value_table, "_READ_AT_ONCE", 100)
    monkeypatch.setattr(value_table, "_FIRST_READS", 10)


@pytest.fixture
def root():
    """A cache root that other users reach, unlike pytest's own folders."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder / "cache"
    shutil.rmtree(folder)


@pytest.fixture
def store(root, config):
    """The folder of the live generation of a store of 400."""
    write(root, config, numbered(0, 400))
    for table in root.rglob("offsets-*"):
        table.unlink()
    return next(root.rglob("data.mdb")).parent


def read_all(root, config):
    """Batches until the table is used; returns whether pages had to be walked for it."""
    walks = []
    original = value_table.read_table

    def counted(*args):
        walks.append(1)
        return original(*args)

    value_table.read_table = counted
    try:
        with EmbeddingCache(root).reader(config) as reader:
            for _ in range(3):
                batch = reader.get_batch(NAMES[::-1])
                assert batch[:, 0].tolist() == list(range(399, -1, -1))
            assert reader._snapshot.values is not None
            assert (reader.select().get_batch([5, 3]) == [[5], [3]]).all()
    finally:
        value_table.read_table = original
    return len(walks)


def tables(store):
    return sorted(path.name for path in store.iterdir() if "offsets" in path.name)


def test_first_reads_go_through_lmdb(store, root, config):
    """A large store isn't walked for a few samples."""
    with EmbeddingCache(root).reader(config) as reader:
        assert reader.get_batch(NAMES[:5])[4, 0] == 4
        assert reader._snapshot.values is None
    assert tables(store) == []


def test_a_table_is_kept_and_used_by_other_processes(store, root, config):
    """The first reader walks the pages, others take its table; it names the transaction."""
    assert read_all(root, config) == 1
    (name,) = tables(store)
    assert name.removeprefix("offsets-").isdigit()
    kept = (store / name).stat()
    assert in_fork(lambda: read_all(root, config)) == 0
    with peer_process() as peer:
        assert (peer.call(read, root, config, NAMES)[:, 0] == np.arange(400)).all()
    assert (store / name).stat().st_mtime_ns == kept.st_mtime_ns


@pytest.mark.parametrize("where", [0, 24, 30, 40, 48, 60, 500, -1])
@pytest.mark.parametrize("change", ["flip", "cut", "empty"])
def test_a_damaged_table_is_made_again(store, root, config, where, change):
    """Whatever byte is hit, values stay right and the next reader finds a sound table."""
    read_all(root, config)
    path = store / tables(store)[0]
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[where] ^= 0x41
    path.write_bytes({"flip": damaged, "cut": sound[:where], "empty": b""}[change])
    assert in_fork(lambda: read_all(root, config)) == 1
    assert path.read_bytes() == sound


def test_a_table_of_another_snapshot_is_not_used(store, root, config):
    """After a commit the old table is replaced, even if it carries the new name."""
    read_all(root, config)
    path = store / tables(store)[0]
    old = path.read_bytes()
    write(root, config, {NAMES[7]: np.full(64, 7)}, on_duplicate="overwrite")
    number = int(path.name.removeprefix("offsets-"))
    for later in range(number + 1, number + 3):
        (store / f"offsets-{later}").write_bytes(old)
    assert in_fork(lambda: read_all(root, config)) == 1
    assert path.name not in tables(store)
    assert in_fork(lambda: read_all(root, config)) == 0


def test_a_table_of_a_copied_store_is_not_used(store, root, config, tmp_path, caplog):
    """Another file, though it holds the same, has another table; the copied one isn't damaged."""
    read_all(root, config)
    shutil.copytree(root, tmp_path / "copy")
    shutil.copytree(root, tmp_path / "other")
    with caplog.at_level("WARNING", "lmdbcache"):
        assert read_all(tmp_path / "other", config) == 1
    assert not caplog.records
    assert in_fork(lambda: read_all(tmp_path / "copy", config)) == 1
    assert in_fork(lambda: read_all(tmp_path / "copy", config)) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("is_kept", [True, False])
def test_a_read_only_folder_works(store, root, config, is_kept):
    """Who may not write uses the kept table, or makes one for itself and leaves no file."""
    if is_kept:
        read_all(root, config)
    before = tables(store)
    store.chmod(0o555)
    assert in_fork(lambda: read_all(root, config), user=NOBODY) == (0 if is_kept else 1)
    assert tables(store) == before


def test_compaction_leaves_no_table_behind(store, root, config):
    """The table goes with its generation; the new one gets its own."""
    read_all(root, config)
    EmbeddingCache(root).compact(config)
    assert not store.exists()
    assert read_all(root, config) in (0, 1)
    assert read_all(root, config) == 0
