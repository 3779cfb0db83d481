"""Stores that this machine didn't write are checked once, before LMDB sees them; and commits that
are gone are noticed.
"""

from __future__ import annotations

import os
import shutil
import time

import numpy as np
import platformdirs
import pytest
from storage.child_processes import NOBODY, in_fork, numbered, peer_process, write
from storage.damage import data_file, flip_value

from lmdbcache import EmbeddingCache
from lmdbcache.errors import IntegrityError
from lmdbcache.storage.checks import first_opening

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@pytest.fixture
def copy(filled, config):
    """A copy of a store, as from another machine: the files have other inodes."""
    shutil.copytree(filled.root, filled.root.parent / "copy")
    return EmbeddingCache(filled.root.parent / "copy")


@pytest.fixture
def checks(monkeypatch):
    """How often a generation was checked."""
    calls = []
    real = first_opening.check_generation

    def counted(*args, **options):
        calls.append(args)
        time.sleep(0.2)  # so that others come meanwhile
        return real(*args, **options)

    monkeypatch.setattr(first_opening, "check_generation", counted)
    return calls


def change(path, at, bits=0x10):
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


def test_copy_is_checked_once(copy, config, embeddings, checks):
    """The second opening knows; so does the copy's writer."""
    for _ in range(2):
        with copy.reader(config) as reader:
            assert reader == embeddings
    with copy.writer(config) as writer:
        writer.put("new:x", np.ones(8))
    assert len(checks) == 1


def test_own_store_is_never_checked(filled, config, checks):
    """Neither after writing nor after a compaction, by this or another process."""
    filled.reader(config)["video_00001:dog"]
    filled.compact(config)
    with peer_process() as peer:
        peer.call(write, filled.root, config, numbered(0, 3, 8))
    assert len(filled.reader(config)) == 23
    assert not checks


def test_damaged_value_of_a_copy_is_refused(copy, config, embeddings):
    """The error names the sample and what to do; the repaired copy opens."""
    flip_value(data_file(copy, config), embeddings["video_00003:dog"])
    for _ in range(2):
        with pytest.raises(IntegrityError, match="video_00003:dog"):
            copy.reader(config)["video_00001:dog"]
    assert copy.repair(config).dropped == ("video_00003:dog",)
    assert len(copy.reader(config)) == 19


def test_another_machine_checks_again(filled, config, checks, monkeypatch):
    """On a shared disk each machine checks once, and they don't drive each other out."""
    filled.reader(config)["video_00001:dog"]
    for machine in ("a" * 16, "b" * 16, "a" * 16, "b" * 16):
        monkeypatch.setattr(first_opening, "_machine", lambda machine=machine: machine)
        filled.reader(config)["video_00001:dog"]
    assert len(checks) == 2


@pytest.mark.parametrize("setting", ["1", "values", "0"])
def test_check_can_be_skipped(copy, config, embeddings, setting, monkeypatch):
    """All of it, or the values alone."""
    flip_value(data_file(copy, config), embeddings["video_00003:dog"])
    monkeypatch.setenv(first_opening.SKIP_VARIABLE, setting)
    if setting == "0":
        with pytest.raises(IntegrityError):
            copy.reader(config)["video_00001:dog"]
    else:
        with copy.reader(config) as reader:
            assert len(reader) == 20
        monkeypatch.delenv(first_opening.SKIP_VARIABLE)
        with pytest.raises(IntegrityError):  # what wasn't checked isn't known
            copy.reader(config)["video_00001:dog"]


@as_root
def test_where_nobody_may_write_the_user_remembers(copy, config, checks, tmp_path, monkeypatch):
    """In the user's own cache directory."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_: str(tmp_path / "own"))
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.getuid() and path != path.parent:
            path.chmod(path.stat().st_mode | 0o055)
    (tmp_path / "own").mkdir()
    (tmp_path / "own").chmod(0o777)

    def read():
        for _ in range(2):
            with copy.reader(config) as reader:
                len(reader)
        return len(checks)

    assert in_fork(read, user=NOBODY) == 1
    assert not (data_file(copy, config).parent / "checked").read_text().count("\n") > 3


def test_processes_that_come_at_once_check_once(copy, config, checks):
    """The others wait for the one that checks."""
    go_reading, go_writing = os.pipe()

    def read():
        os.read(go_reading, 1)
        return len(copy.reader(config)), len(checks)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(in_fork, read) for _ in range(4)]
        os.write(go_writing, b"....")
        found = [answer.result() for answer in answers]
    os.close(go_reading)
    os.close(go_writing)
    assert [count for count, _ in found] == [20] * 4
    assert sum(number for _, number in found) == 1


# ---- the newest commit


@pytest.fixture
def two_commits(filled, config):
    """data.mdb after a second commit, and the number of that."""
    with filled.writer(config) as writer:
        writer.put("second:x", np.ones(8))
    data = data_file(filled, config)
    numbers = [int.from_bytes(data.read_bytes()[at : at + 8], "little") for at in (144, 4240)]
    return data, max(numbers)


def test_lost_commit_is_noticed(filled, config, two_commits):
    """LMDB would go back to the commit before without a word."""
    data, newest = two_commits
    for at, bits in ((144, 2), (0, 1), (16, 1), (88 + 40, 1), (10, 8)):
        content = data.read_bytes()
        change(data, (newest & 1) * 4096 + at, bits)
        with pytest.raises(IntegrityError):
            filled.reader(config)["video_00001:dog"]
        assert filled.verify(config).structure
        data.write_bytes(content)
    assert "second:x" in filled.reader(config)


@pytest.mark.parametrize("record", [b"", b"garbage" * 40, None])
def test_record_that_is_lost_or_garbage_is_ignored(filled, config, two_commits, record):
    """It is derived; the next commit writes it again."""
    path = two_commits[0].parent / "committed"
    if record is None:
        path.unlink()
    else:
        path.write_bytes(record)
    assert "second:x" in filled.reader(config)
    with filled.writer(config) as writer:
        writer.put("third:x", np.ones(8))
    assert path.stat().st_size > 150


def test_record_behind_the_file_is_fine(filled, config, two_commits):
    """A writer killed before it wrote the record has lost nothing."""
    path = two_commits[0].parent / "committed"
    before = path.read_bytes()
    with filled.writer(config) as writer:
        writer.put("third:x", np.ones(8))
    path.write_bytes(before)
    assert "third:x" in filled.reader(config)
    assert filled.verify(config).is_sound


def test_cleared_store_starts_anew(filled, config):
    """The record goes with its generation."""
    for _ in range(3):
        with filled.writer(config, on_duplicate="overwrite") as writer:
            writer.put("a:x", np.ones(8))
    filled.clear(config)
    with filled.writer(config) as writer:
        writer.put("b:x", np.ones(8))
    assert list(filled.reader(config)) == ["b:x"]
