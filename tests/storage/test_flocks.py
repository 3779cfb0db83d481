"""Locks of a process that is killed while a child that it forked lives on."""

from __future__ import annotations

import fcntl
import os
import signal

import pytest

from lmdbcache.exchange.sharing.local_folder import LocalFolder
from lmdbcache.files import flocked
from lmdbcache.storage import write_lock
from lmdbcache.storage.checks.first_opening import _one_at_a_time


def by_hand(store):
    return flocked(store / "lock", os.O_RDWR | os.O_CREAT), store / "lock"


def writing(store):
    return write_lock(store), store / "writer.lock"


def pulling(store):
    return LocalFolder(store).held(), store / "extras" / "sharing" / "lock"


def checking(store):
    (store / "gen-000001").mkdir(parents=True)
    (store / "gen-000001" / "data.mdb").touch()
    return _one_at_a_time(store / "gen-000001"), store / "gen-000001" / "data.mdb"


@pytest.mark.parametrize("kind", [by_hand, writing, pulling, checking])
def test_lock_of_a_killed_process_is_free_while_its_child_lives(tmp_path, kind):
    """A worker that was forked inside a lock and outlives its parent keeps nobody waiting."""
    store = tmp_path / "store"
    store.mkdir()
    lock, path = kind(store)
    reading, told = os.pipe()
    ends, held = os.pipe()  # the child lives until this is closed
    parent = os.fork()
    if parent == 0:
        os.close(held)
        with lock:
            if os.fork() == 0:
                os.close(told)
                os.read(ends, 1)
                os._exit(0)
            os.write(told, b"x")
            signal.pause()
        os._exit(1)
    os.close(told)
    assert os.read(reading, 1) == b"x"
    assert is_locked(path)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(reading, 1) == b""  # the child has closed its end: its handlers are through
    assert not is_locked(path)
    for descriptor in (reading, ends, held):
        os.close(descriptor)


def is_locked(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
