"""Reading what is damaged, half gone, or somebody else's."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from storage.child_processes import NOBODY, in_fork, numbered, peer_process, rewrite, write
from stress.page_kinds import byte_ranges

from lmdbcache import EmbeddingCache
from lmdbcache.errors import CacheError, CacheNotFoundError, IntegrityError
from lmdbcache.storage import check_data_file

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@pytest.fixture
def generation(filled, config):
    folder = filled.path(config)
    return folder / (folder / "CURRENT").read_text().strip()


@pytest.fixture
def public(config):
    """A cache of three embeddings that other users may read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    cache = EmbeddingCache(folder / "cache")
    write(cache.root, config, numbered(0, 3))
    yield cache
    shutil.rmtree(folder)


def every_use(cache, config):
    """Each way to look into a store."""
    with cache.reader(config) as reader:
        list(reader.items())
    cache.writer(config).close()
    cache.info(config)
    cache.coverage(config, ["a:x"])


def test_keys_out_of_order_end_an_iteration(cache, config):
    """A damaged branch page that leads back to the same leaf is an error, not an endless list."""
    names = [f"video_{n:05d}:x" for n in range(6000)]
    write(cache.root, config, dict.fromkeys(names, np.ones(4)))
    data = cache.path(config) / "gen-000001" / "data.mdb"
    content = bytearray(data.read_bytes())
    (_, pointers_end), (_, _) = byte_ranges(bytes(content))["checksums branch"]
    page = pointers_end // 4096 * 4096
    last_node = page + int.from_bytes(content[pointers_end - 2 : pointers_end], "little")
    content[last_node + 8] = ord("z")  # the last leaf begins there, says its parent
    data.write_bytes(content)
    with cache.reader(config) as reader:
        for look in (lambda: list(reader), reader.select):
            with pytest.raises(IntegrityError):
                look()
    report = cache.verify(config)
    assert names[-1] in report.damaged, "verify must name what can't be found any more"


def test_a_wrong_count_in_the_meta_page_is_an_error(filled, config, generation):
    """Nobody makes room for a list of 2^60 samples."""
    content = bytearray((generation / "data.mdb").read_bytes())
    for page in (0, 4096):
        content[page + 88 + 32 + 7] ^= 0x10  # the main database's number of entries
    (generation / "data.mdb").write_bytes(content)
    with filled.reader(config) as reader:
        for count in (len, list):
            with pytest.raises(IntegrityError):
                count(reader)


def test_missing_lock_file_is_made_again(filled, config, generation, embeddings):
    """A store copied without its lock file reads and writes as ever."""
    (generation / "lock.mdb").unlink()
    assert filled.reader(config) == embeddings
    (generation / "lock.mdb").write_bytes(b"garbage")
    with filled.writer(config) as writer:
        assert writer.put("new:x", np.ones(8))
    assert len(filled.reader(config)) == 21


@pytest.mark.parametrize("keep", [0, 1, 100, 4096, 8191, 8192, 12288, -4096, -1])
def test_truncated_file_is_an_error_not_a_crash(filled, config, generation, keep):
    """Cut anywhere, data.mdb is refused before LMDB touches it."""
    data = generation / "data.mdb"
    os.truncate(data, keep if keep >= 0 else data.stat().st_size + keep)

    def look():
        for use in (
            lambda: len(filled.reader(config)),
            lambda: filled.writer(config),
            lambda: filled.info(config),
            lambda: filled.compact(config),
            lambda: filled.coverage(config, ["a:x"]),
        ):
            with pytest.raises(IntegrityError, match=r"data\.mdb (is truncated|isn't an LMDB)"):
                use()
        assert "data.mdb" in filled.stores()[0].damage
        finding = filled.verify(config).structure[0]
        assert "is truncated" in finding or "isn't an LMDB" in finding

    in_fork(look)


@pytest.mark.parametrize(
    "content", [b"", b"gen-1", b"../../etc", b"gen-000001/..", b"\xff\xfe", b"x"]
)
def test_garbage_in_current_is_an_error(filled, config, content):
    """CURRENT names a generation or nothing is opened; clearing still works."""
    (filled.path(config) / "CURRENT").write_bytes(content)
    for use in (every_use, EmbeddingCache.verify, EmbeddingCache.compact):
        with pytest.raises(IntegrityError, match="CURRENT"):
            use(filled, config)
    assert "CURRENT" in filled.stores()[0].damage


def test_current_that_names_nothing_is_an_error(filled, config, generation):
    """A generation that is gone is a loss, not an empty store."""
    shutil.rmtree(generation)
    with pytest.raises(IntegrityError, match=r"data\.mdb is missing"):
        every_use(filled, config)
    assert not generation.exists()


def test_foreign_lmdb_is_not_read(filled, config, generation, tmp_path):
    """An LMDB environment without our metadata is left alone."""
    import lmdb

    shutil.rmtree(generation)
    with lmdb.open(str(generation)) as env, env.begin(write=True) as txn:
        txn.put(b"a:x", b"1234")
    with pytest.raises(IntegrityError):
        every_use(filled, config)


def test_damaged_metadata_is_an_error(filled, config, generation):
    """One changed byte of the metadata record is noticed."""
    data = generation / "data.mdb"
    content = bytearray(data.read_bytes())
    at = content.rfind(b"soundfile+soxr")
    content[at] ^= 1
    while (at := content.rfind(b"soundfile+soxr", 0, at)) >= 0:
        content[at] ^= 1
    data.write_bytes(content)
    with pytest.raises(IntegrityError):
        every_use(filled, config)


def test_size_check_never_cries_wolf_beside_a_writer(cache, config):
    """A file that grows while it is looked at isn't called truncated."""
    write(cache.root, config, numbered(0, 3))
    generation = cache.path(config) / "gen-000001"
    with peer_process() as peer:
        peer.start(write, cache.root, config, numbered(3, 600), commit_records=4)
        while not peer._connection.poll(0):
            check_data_file(generation)
        peer.answer()


def test_size_check_takes_the_size_last(generation, monkeypatch):
    """A commit between the look at the pages and at the size only makes the file larger."""
    calls = []
    real = {name: getattr(os, name) for name in ("fstat", "pread")}

    def recorded(name):
        return lambda *args: (calls.append(name), real[name](*args))[1]

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, recorded(name))
        check_data_file(generation)
    assert calls[-3:] == ["pread", "pread", "fstat"]


@as_root
def test_other_user_reads_without_write_permission(public, config):
    """Who may read but not write reads, several times and after a refresh."""

    def read():
        with public.reader(config) as reader:
            assert not reader.refresh()
            assert list(reader) == list(numbered(0, 3))
            return [float(reader[name][0]) for name in reader]

    assert in_fork(read, user=NOBODY) == [0, 1, 2]
    assert in_fork(lambda: public.info(config).num_embeddings, user=NOBODY) == 3
    assert in_fork(lambda: public.verify(config).is_sound, user=NOBODY)


@as_root
def test_reader_without_a_lock_never_gives_wrong_values(public, config):
    """Nothing keeps a writer from the pages of a reader that may not lock: it has to move on."""
    names = [f"{n:03d}:x" for n in range(200)]
    config = config.replace(duration=3)
    write(public.root, config, {n: np.zeros(768, np.float32) for n in names})
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()

    def rewrite_when_asked():
        with peer_process() as peer:
            while os.read(from_child, 1) == b"?":
                peer.call(rewrite, public.root, config, names, 7)
                os.write(to_child, b"!")

    def read():
        with public.reader(config) as reader:
            for ask in (reader.get_batch, lambda many: np.stack([reader[name] for name in many])):
                assert len(np.unique(ask(names))) == 1
                os.write(to_parent, b"?")
                os.read(from_parent, 1)
                assert np.unique(ask(names)).tolist() == [7]
                assert len(list(reader)) == 200

    thread = threading.Thread(target=rewrite_when_asked)
    thread.start()
    try:
        in_fork(read, user=NOBODY)
    finally:
        os.write(to_parent, b".")
        thread.join()
        for descriptor in (from_child, to_parent, from_parent, to_child):
            os.close(descriptor)


@as_root
def test_unreadable_store_says_so(public, config):
    """Without permission to read, every use raises an error of ours."""
    data = next(public.root.rglob("data.mdb"))

    def look():
        for use in (
            lambda: len(public.reader(config)),
            lambda: public.writer(config),
            lambda: public.info(config),
            lambda: public.coverage(config, ["a:x"]),
        ):
            with pytest.raises(CacheError):
                use()

    for path in (data, data.parent, data.parent.parent / "CURRENT"):
        mode = path.stat().st_mode
        path.chmod(0o600)
        in_fork(look, user=NOBODY)
        path.chmod(mode)
    data.chmod(0o600)
    with pytest.raises(AssertionError, match="isn't readable"):
        in_fork(lambda: len(public.reader(config)), user=NOBODY)


def test_read_only_copy_is_read(filled, config, embeddings):
    """A copy whose files and folders are read-only gives the same embeddings."""
    copy = EmbeddingCache(filled.root.parent / "copy")
    shutil.copytree(filled.root, copy.root)
    paths = [copy.root, *copy.root.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert copy.reader(config) == embeddings
    finally:
        for path in paths:
            path.chmod(0o755)


def test_reader_of_nothing_says_so(cache, config):
    """No store is CacheNotFoundError, which is a FileNotFoundError."""
    with pytest.raises(CacheNotFoundError):
        cache.reader(config)
    with pytest.raises(FileNotFoundError):
        cache.info(config)
    for use in (cache.verify, cache.compact):
        with pytest.raises(CacheNotFoundError):
            use(config)
