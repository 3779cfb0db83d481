"""Roots shared between users, read-only roots, and lock files that aren't as they should be."""

from __future__ import annotations

import codecs
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from storage.child_processes import NOBODY, in_fork, numbered, peer_process, read, write

from lmdbcache import EmbeddingCache
from lmdbcache.errors import ReadOnlyCacheError, StorageError

ALICE, BOB, TEAM = 12001, 12002, 12100
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
NOISE = np.random.default_rng(0).bytes(1 << 17)
_held = []


@pytest.fixture
def team_root():
    """A setgid folder of a group that two users belong to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = folder / "cache"
    root.mkdir()
    os.chown(root, ALICE, TEAM)
    root.chmod(0o2775)
    yield root
    shutil.rmtree(folder)


def acting_as(user, umask, function, group=TEAM):
    """What `function` returns when this user of the group calls it."""

    codecs.lookup("ascii")  # Python's own files may lie where another user can't read

    def act():
        os.setgroups([group])
        os.setgid(user)
        os.setuid(user)
        os.umask(umask)
        return function()

    return in_fork(act)


def reads(root, config):
    with EmbeddingCache(root).reader(config) as reader:
        return [float(reader.get_batch([name])[0, 0]) for name in reader]


def refused(root, config):
    """The error of writing, of extending and of clearing; reading may go on."""
    cache = EmbeddingCache(root)
    messages = []
    for use in (
        lambda: write(root, config, {"zzz:x": np.zeros(64)}),
        lambda: cache.compact(config),
        lambda: cache.clear(config),
    ):
        with pytest.raises(ReadOnlyCacheError) as caught:
            use()
        messages.append(str(caught.value))
    assert not any("\n" in message for message in messages)
    return messages


@as_root
def test_group_with_umask_002_writes_in_turn(team_root, config):
    """Two users with umask 002 fill, compact and read one store, whoever was there first."""
    acting_as(ALICE, 0o002, lambda: write(team_root, config, numbered(0, 3)))
    acting_as(BOB, 0o002, lambda: write(team_root, config, numbered(3, 6)))
    acting_as(BOB, 0o002, lambda: EmbeddingCache(team_root).compact(config))
    acting_as(ALICE, 0o002, lambda: write(team_root, config, numbered(6, 9)))
    acting_as(ALICE, 0o002, lambda: EmbeddingCache(team_root).compact(config))
    for user in (ALICE, BOB):
        assert acting_as(user, 0o002, lambda: reads(team_root, config)) == list(range(9))
    for path in team_root.rglob("*"):
        status = path.stat()
        assert status.st_gid == TEAM
        assert stat.S_IMODE(status.st_mode) & 0o777 == (0o775 if path.is_dir() else 0o664)
    assert acting_as(NOBODY, 0o022, lambda: reads(team_root, config), NOBODY) == list(range(9))


@as_root
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_group_that_may_only_read(team_root, config, umask):
    """What was made under umask 022 or 027 is read by the group, and writing it is our error."""
    acting_as(ALICE, umask, lambda: write(team_root, config, numbered(0, 3)))
    assert acting_as(BOB, 0o002, lambda: reads(team_root, config)) == [0, 1, 2]
    assert acting_as(BOB, 0o002, lambda: refused(team_root, config))
    acting_as(ALICE, umask, lambda: write(team_root, config, numbered(3, 5)))
    assert acting_as(BOB, 0o002, lambda: reads(team_root, config)) == [0, 1, 2, 3, 4]
    # Another store in the same root is nobody's business.
    other = config.replace(duration=9)
    acting_as(BOB, 0o002, lambda: write(team_root, other, numbered(0, 2)))
    assert acting_as(ALICE, umask, lambda: reads(team_root, other)) == [0, 1]


@as_root
def test_private_store_in_a_shared_root(team_root, config):
    """Under umask 077 nobody else gets in: every use says so, and listing the root still works."""
    acting_as(ALICE, 0o077, lambda: write(team_root, config, numbered(0, 3)))
    for path in team_root.rglob("*"):
        assert not path.stat().st_mode & 0o077

    def look():
        cache = EmbeddingCache(team_root)
        for use in (lambda: len(cache.reader(config)), lambda: cache.writer(config)):
            with pytest.raises(StorageError):
                use()
        return [store.damage for store in cache.stores()]

    (damage,) = acting_as(BOB, 0o002, look)
    assert "ermission" in damage
    acting_as(ALICE, 0o077, lambda: write(team_root, config, numbered(3, 4)))
    assert acting_as(ALICE, 0o077, lambda: reads(team_root, config)) == [0, 1, 2, 3]


@as_root
def test_reader_that_may_not_touch_the_lock_file(team_root, config):
    """A lock file of somebody else's, readable or not: the values are read all the same."""
    acting_as(ALICE, 0o022, lambda: write(team_root, config, numbered(0, 3)))
    lock = next(team_root.rglob("lock.mdb"))
    for mode in (0o644, 0o600, 0o000):
        lock.chmod(mode)
        assert acting_as(BOB, 0o022, lambda: reads(team_root, config)) == [0, 1, 2]
    lock.unlink()
    assert acting_as(BOB, 0o022, lambda: reads(team_root, config)) == [0, 1, 2]


@pytest.mark.parametrize("with_lock_file", [True, False])
def test_read_only_file_system(filled, config, embeddings, tmp_path, with_lock_file):
    """Mounted read-only, with or without a lock file, a store is read, and writing is our error."""
    place = tmp_path / "mounted"
    place.mkdir()
    if not with_lock_file:
        next(filled.root.rglob("lock.mdb")).unlink()
    mounts = (["--bind", filled.root, place], ["-o", "remount,ro,bind", place])
    for arguments in mounts:
        command = ["mount", *arguments]
        if os.getuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
            subprocess.run(["umount", "-l", place], check=False, capture_output=True)
            pytest.skip("mounting isn't allowed here")
    try:
        cache = EmbeddingCache(place)
        assert cache.reader(config) == embeddings
        assert cache.info(config).num_embeddings == len(embeddings)
        assert cache.verify(config).is_sound
        with pytest.raises(ReadOnlyCacheError):
            cache.check_writable(config.replace(duration=9))
        for use in (
            lambda: write(place, config, numbered(0, 1, 8)),
            lambda: write(place, config.replace(duration=9), numbered(0, 1)),
            lambda: cache.compact(config),
            lambda: cache.clear(config),
        ):
            with pytest.raises(ReadOnlyCacheError) as caught:
                use()
            assert "\n" not in str(caught.value)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("content", [None, b"", b"garbage", NOISE[:4096], bytes(1 << 20)])
def test_lock_file_that_nobody_holds_is_made_anew(filled, config, embeddings, content):
    """Missing, empty or garbage: the store reads and writes as ever."""
    lock = next(filled.root.rglob("lock.mdb"))
    for use in (
        lambda: filled.reader(config) == embeddings,
        lambda: write(filled.root, config, numbered(0, 5, 8)) == 5,
        lambda: filled.verify(config).is_sound,
    ):
        lock.unlink(missing_ok=True)
        if content is not None:
            lock.write_bytes(content)
        assert in_fork(use)
    with filled.reader(config) as reader:
        assert len(reader) == len(embeddings) + 5


def hold(root, config):
    reader = EmbeddingCache(root).reader(config)
    _held.append(reader)
    return len(reader)


@pytest.mark.parametrize("content", [NOISE, b"xyz" * 50, b""])
def test_lock_file_that_is_overwritten_under_a_holder(filled, config, embeddings, content):
    """The error names the lock file and who holds it, and doesn't call a sound store damaged."""
    lock = next(filled.root.rglob("lock.mdb"))
    with peer_process() as holder:
        holder.call(hold, filled.root, config)
        if content:
            with lock.open("r+b") as file:
                file.write(content)
        else:
            os.truncate(lock, 0)
        for use in (
            lambda: len(filled.reader(config)),
            lambda: write(filled.root, config, numbered(0, 5, 8)),
        ):
            with pytest.raises(StorageError) as caught:
                use()
            message = str(caught.value)
            assert f"({holder.process.pid} " in message
            assert "data is sound" in message
            assert "\n" not in message
        holder.kill()
    assert filled.reader(config) == embeddings
    with peer_process() as peer:
        assert peer.call(read, filled.root, config, list(embeddings)).shape == (20, 8)
        assert peer.call(write, filled.root, config, numbered(0, 5, 8)) == 5
    assert filled.verify(config).is_sound
