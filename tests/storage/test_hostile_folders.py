"""Links, pipes, sockets, devices and folders where files of a store belong."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading

import numpy as np
import pytest
from storage.child_processes import in_fork, numbered, write

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.cache import (
    ClipFailure,
    Source,
    SourceRecorder,
    SourceRecords,
    is_store,
    leftovers_under,
    update_failures,
    write_sources,
)
from lmdbcache.cli.doctor.stores import check_stores
from lmdbcache.errors import CacheError, NotRegularFileError
from lmdbcache.exchange import held_store
from lmdbcache.exchange.sharing.local_folder import LocalFolder
from lmdbcache.files import check_file, open_file, read_file, replace_file

GOOD, HOSTILE = (CacheConfig(duration=seconds) for seconds in (5.0, 6.0))
NUMBERS = numbered(0, 40)
MORE = numbered(40, 60)

# Without these nothing can be read, or what is read can't be trusted.
NEEDED = ("CURRENT", "gen-000001", "gen-000001/data.mdb", "gen-000001/lock.mdb")
GUARDS = ("gen-000001/committed",)
WRITTEN = (
    "writer.lock",
    "last_used",
    "failures.json",
    "sources.sqlite3",
    "sources.sqlite3-journal",
    "sources.sqlite3-wal",
    "statistics",
    "statistics/lock",
    "statistics/totals.json",
    "gen-000001/checked",
    "gen-000002",
)
FOLDERS = ("gen-000001", "gen-000002", "statistics")
KINDS = ("link", "link to nothing", "link to a folder", "pipe", "socket", "device", "folder")


def make(path, kind, outside):
    """Put something else in the place of a file or folder of a store."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(outside / "file")
    elif kind == "link to nothing":
        path.symlink_to(outside / "nothing")
    elif kind == "link to a folder":
        path.symlink_to(outside / "folder")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with _inside(path.parent):  # the name of a socket is 107 bytes at most
            server = socket.socket(socket.AF_UNIX)
            server.bind(path.name)
            server.close()
    elif kind == "device":
        try:
            os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("this user can't make devices")
    else:
        path.mkdir()


@contextlib.contextmanager
def _inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def seen(folder):
    """Every entry below a folder with its content."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def outside(tmp_path):
    """What nothing may touch: a file that looks like a lock file, and a folder with files."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_bytes(b"precious" * 1000)
    (folder / "folder" / "precious.tmp").write_text("kept")
    (folder / "folder" / "precious.counts").write_text("kept")
    return folder


@pytest.fixture
def root(tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    for config in (GOOD, HOSTILE):
        write(cache.root, config, NUMBERS)
        with cache.reader(config) as reader:
            reader.get_batch(list(NUMBERS))
    return cache


def tried(use):
    """What a use of the hostile store gives: anything, or an error of ours that names it."""
    try:
        return use()
    except CacheError as error:
        return error


def use_all(cache):
    """Everything that can be done with a root; returns what went wrong with the hostile store."""
    store = cache.path(HOSTILE)
    assert is_store(store)
    assert len(cache.folders()) == 2
    by_name = {info.path: info for info in cache.stores()}
    assert by_name[cache.path(GOOD)].num_embeddings == len(NUMBERS)
    list(check_stores(cache))
    leftovers_under(cache.root)

    def read():
        with cache.reader(HOSTILE) as reader:
            found = reader.get_batch(list(NUMBERS))
        assert (found == np.stack(list(NUMBERS.values()))).all()

    def record():
        write_sources(store, [("a:x", None, b"12345678", Source("a", 1, 2, b"3", ""))])

    def written():
        with cache.writer(HOSTILE, before_commit=SourceRecorder(store)) as writer:
            writer.put_batch(MORE, MORE.values())

    def removed():
        with cache.writer(HOSTILE) as writer:
            writer.remove(MORE)

    def sources():
        with SourceRecords(store) as records:
            records.check()

    uses = (
        lambda: cache.info(HOSTILE),
        cache.size,
        lambda: cache.coverage(HOSTILE, NUMBERS),
        lambda: cache.explain(HOSTILE, "clip_000001:x"),
        lambda: cache.statistics(HOSTILE),
        read,
        record,
        sources,
        written,
        removed,
        lambda: update_failures(store, ["a:x"], [ClipFailure("a:x", "a.wav", "silent")]),
        lambda: cache.verify(HOSTILE),
        lambda: cache.repair(HOSTILE, dry_run=True),
        lambda: cache.repair(HOSTILE),
        lambda: cache.compact(HOSTILE),
        lambda: leftovers_under(cache.root, remove=True),
    )
    errors = [answer for use in uses if isinstance(answer := tried(use), CacheError)]
    with cache.reader(GOOD) as reader:
        assert len(reader) == len(NUMBERS)
    return errors, by_name[store].damage


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in (*NEEDED, *GUARDS, *WRITTEN)
        for kind in (KINDS if name not in WRITTEN else ("link", "link to a folder", "pipe"))
        if kind != "folder" or name not in FOLDERS
    ],
)
def test_nothing_waits_or_leaves_the_folder(root, outside, name, kind):
    """Every use of a root with one hostile store ends, serves the other, and touches no target."""
    store, before = root.path(HOSTILE), seen(outside)
    make(store / name, kind, outside)
    errors, damage = in_fork(lambda: _shown(use_all(root)))
    assert seen(outside) == before
    if name in NEEDED:
        assert damage is not None
        assert name in damage
    if name in (*NEEDED, *GUARDS):
        assert "NotRegularFileError" in {kind for kind, _ in errors}
        # A file that is there by itself would be a store again.
        make(store / name, kind, outside)
    in_fork(lambda: _removed(root, store))
    assert seen(outside) == before
    assert root.path(GOOD).is_dir()


def _shown(answer):
    errors, damage = answer
    return [(type(error).__name__, str(error)) for error in errors], damage


def _removed(root, store):
    with contextlib.suppress(CacheError):
        root.remove(store)


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "device"])
@pytest.mark.parametrize("name", [*NEEDED, *GUARDS])
def test_what_is_needed_is_refused_as_not_a_file(root, outside, name, kind):
    """Reading and writing are refused by name, and removing the store removes the link."""
    store = root.path(HOSTILE)
    make(store / name, kind, outside)

    def refused():
        for use in (lambda: root.reader(HOSTILE).get_batch(list(NUMBERS)), _writing(root)):
            with pytest.raises(NotRegularFileError) as caught:
                use()
            assert str(store / name) in str(caught.value)
        root.remove(store)

    in_fork(refused)
    assert not store.exists()


def _writing(root):
    def use():
        with root.writer(HOSTILE) as writer:
            writer.put_batch(MORE, MORE.values())

    return use


def test_folder_of_the_store_and_root_may_be_links(root, tmp_path):
    """Whoever moves a store, or the root, to another disk and links it reads and writes on."""
    store = root.path(HOSTILE)
    elsewhere = tmp_path / "scratch"
    store.rename(elsewhere)
    store.symlink_to(elsewhere)
    (tmp_path / "linked").symlink_to(root.root)
    cache = EmbeddingCache(tmp_path / "linked")
    write(cache.root, HOSTILE, MORE)
    assert cache.compact(HOSTILE).num_embeddings == 60
    assert cache.verify(HOSTILE).is_sound
    with cache.reader(HOSTILE) as reader:
        assert len(reader) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_opened_as_themselves_or_not_at_all(tmp_path, outside, kind):
    """Opening, reading and appending refuse; replacing a file takes any but a folder's place."""
    path, before = tmp_path / "entry", seen(outside)
    make(path, kind, outside)
    uses = (
        lambda: os.close(open_file(path)),
        lambda: os.close(open_file(path, os.O_WRONLY | os.O_CREAT)),
        lambda: os.close(open_file(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)),
        lambda: read_file(path),
        lambda: check_file(path),
    )
    for use in uses:
        with pytest.raises(NotRegularFileError):
            use()
    if kind == "folder":
        with pytest.raises(NotRegularFileError):
            replace_file(path, b"new")
    else:
        temporary = tmp_path / f".entry.{os.getpid()}-{threading.get_ident()}.tmp"
        make(temporary, kind, outside)
        replace_file(path, b"new", durable=True)
        assert read_file(path) == b"new"
        assert read_file(path, 2) == b"ne"
    assert not list(tmp_path.glob(".entry*"))
    assert seen(outside) == before


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe"])
@pytest.mark.parametrize(
    "name", ["extras/sharing/lock", "extras/sharing", "extras", "gone.running"]
)
def test_folders_that_are_filled_are_no_way_out(root, outside, name, kind):
    """A pull's folder and the lock beside a staging store are refused in the same way."""
    store, before = root.path(HOSTILE), seen(outside)
    make(store / name, kind, outside)

    def refused():
        with pytest.raises(NotRegularFileError), contextlib.ExitStack() as stack:
            if name == "gone.running":
                stack.enter_context(held_store(store / "gone", 0))
            else:
                stack.enter_context(LocalFolder(store).held())

    in_fork(refused)
    assert seen(outside) == before
