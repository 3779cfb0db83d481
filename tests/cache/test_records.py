"""The file of the records: damaged, locked, not to be written, shared, left by a killed run."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_disks import empty, fill as fill_disk, small_disk

from lmdbcache import EmbeddingCache
from lmdbcache.cache import (
    SOURCES_NAME,
    SourceRecorder,
    SourceRecords,
    adopt_sources,
    check_sources,
    recorded_sources,
    records,
    source_of,
)
from lmdbcache.errors import FormatVersionError, IntegrityError, StorageError


def garble(path):
    path.write_bytes(b"not a database" * 100)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


def zero_a_page(path):
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [garble, cut, zero_a_page])
def test_damaged_records_are_reported_and_made_anew(damage, store, clips, cache, config):
    """The embeddings aren't concerned; adopting the present files makes the records anew."""
    damage(store / SOURCES_NAME)
    with pytest.raises(IntegrityError):
        check_sources(store)
    assert cache.verify(config).is_sound
    assert adopt_sources(store, clips) == len(clips)
    assert check_sources(store).num("unchanged") == len(clips)


@pytest.mark.parametrize("damage", [garble, cut])
def test_damaged_records_never_stop_a_writer(damage, store, fill, clips, cache, config, caplog):
    """What is embedded is stored, and it is said once that its sources aren't recorded."""
    damage(store / SOURCES_NAME)
    more = {f"more_{n}:dog": path for n, path in enumerate(clips.values())}
    fill(more, commit_records=3)
    with cache.reader(config) as reader:
        assert len(reader) == 2 * len(clips)
    if damage is garble:
        assert caplog.text.count("isn't recorded") == 1


def test_empty_file_holds_no_records(store, fill, clips):
    """A run that was killed right after it made the file left nothing to report."""
    (store / SOURCES_NAME).write_bytes(b"")
    assert check_sources(store).num("unknown") == len(clips)
    fill(clips, on_duplicate="overwrite")
    assert check_sources(store).num("unchanged") == len(clips)


def test_locked_records_never_stop_a_writer(store, fill, clips, monkeypatch, caplog):
    """A program that keeps the file locked costs the records, after a wait, and nothing else."""
    monkeypatch.setattr(records._connect, "__defaults__", (0.1,))
    other = sqlite3.connect(store / SOURCES_NAME)
    other.execute("BEGIN EXCLUSIVE")
    try:
        fill({"new:dog": next(iter(clips.values()))})
        with pytest.raises(StorageError):
            check_sources(store)
    finally:
        other.close()
    assert "isn't recorded: " in caplog.text
    assert check_sources(store).ids("unknown") == ["new:dog"]


def test_a_folder_in_its_place_never_stops_a_writer(store, fill, clips, caplog):
    """Nor does anything else that can't be opened."""
    (store / SOURCES_NAME).unlink()
    (store / SOURCES_NAME).mkdir()
    fill({"new:dog": next(iter(clips.values()))})
    assert "isn't recorded: " in caplog.text
    with pytest.raises(StorageError):
        check_sources(store)


def test_newer_version_is_refused(store, fill, clips, caplog):
    """What a newer lmdbcache wrote is neither guessed at nor written over."""
    connection = sqlite3.connect(store / SOURCES_NAME)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(FormatVersionError):
        check_sources(store)
    fill({"new:dog": next(iter(clips.values()))})
    assert "Upgrade" in caplog.text


def test_full_disk_costs_the_records_only(tmp_path, config, clips, caplog):
    """Without room for the records the embeddings are stored as long as there is room for them."""
    with small_disk(tmp_path / "disk", 48) as disk:
        cache = EmbeddingCache(disk / "cache")
        with cache.writer(config) as writer:
            writer.put("first:dog", np.ones(8))
        recorder = SourceRecorder(cache.path(config))

        def full_for_records(committed):
            fill_disk(disk, 0)
            recorder(committed)
            empty(disk)

        with cache.writer(config, before_commit=full_for_records) as writer:
            for sample_id, path in clips.items():
                recorder.note(sample_id, source_of(path))
                writer.put(sample_id, np.ones(8))
        with cache.reader(config) as reader:
            assert len(reader) == 1 + len(clips)
        assert "isn't recorded" in caplog.text
        assert check_sources(cache.path(config)).num("unknown") == 1 + len(clips)
        assert cache.verify(config).is_sound


CHILD = """
import os, signal, sys
import numpy as np
from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.cache import source_of
from lmdbcache.cache import SourceRecorder

root, data, kill, first, *ids = sys.argv[1:]
cache, config = EmbeddingCache(root), CacheConfig()
recorder = SourceRecorder(cache.path(config), data)

def before_commit(committed):
    recorder(committed)
    if kill == "between":
        os.kill(os.getpid(), signal.SIGKILL)

writer = cache.writer(config, before_commit=before_commit, on_duplicate="overwrite")
for sample_id in ids:
    recorder.note(sample_id, source_of(f"{data}/{sample_id}.wav"))
    writer.put(sample_id, np.full(8, float(first)))
    writer.commit()
if kill == "after":
    os.kill(os.getpid(), signal.SIGKILL)
writer.close()
"""


def child(cache, data, kill, first, *ids):
    arguments = [cache.root, data, kill, first, *ids]
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)])


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}:dog.wav").write_bytes(b"%d" % number)
    return folder


def test_killed_between_the_two_commits(cache, config, data):
    """A record without its embedding is harmless: the old embedding keeps its old record."""
    assert child(cache, data, "no", 1, "00:dog").wait() == 0
    store = cache.path(config)
    assert check_sources(store).num("unchanged") == 1
    (data / "00:dog.wav").write_bytes(b"new content")
    for _ in range(2):
        assert child(cache, data, "between", 2, "00:dog").wait() == -signal.SIGKILL
        assert check_sources(store).ids("changed") == ["00:dog"]
    assert child(cache, data, "between", 1, "01:dog").wait() == -signal.SIGKILL
    assert [i for i, *_ in recorded_sources(store)] == ["00:dog"]
    assert child(cache, data, "no", 2, "00:dog").wait() == 0
    assert check_sources(store).found == ()


def test_every_embedding_of_a_killed_run_has_its_record(cache, config, data):
    """The record is on the disk before the embedding is."""
    ids = [f"{number:02d}:dog" for number in range(20)]
    assert child(cache, data, "after", 1, *ids).wait() == -signal.SIGKILL
    report = check_sources(cache.path(config))
    assert (report.num("unchanged"), report.found) == (20, ())


def test_two_processes(cache, config, data):
    """Two writers and a reader at once: every embedding ends with the record of its own file."""
    ids = [f"{number:02d}:dog" for number in range(20)]
    both = [child(cache, data, "no", 1, *ids), child(cache, data, "no", 2, *reversed(ids))]
    while any(process.poll() is None for process in both):
        if config in cache:
            assert check_sources(cache.path(config)).found == ()
    assert [process.wait() for process in both] == [0, 0]
    assert check_sources(cache.path(config)).num("unchanged") == 20


def test_a_commit_in_a_thread_records_too(cache, config, data):
    """Large commits go on in a thread; what is collected meanwhile comes with its own."""
    recorder = SourceRecorder(cache.path(config), data)
    with cache.writer(config, before_commit=recorder, commit_bytes=33 << 20) as writer:
        for number in range(20):
            sample_id = f"{number:02d}:dog"
            recorder.note(sample_id, source_of(f"{data}/{sample_id}.wav"))
            writer.put(sample_id, np.full(1 << 20, float(number), np.float32))
    assert check_sources(cache.path(config)).num("unchanged") == 20


def test_a_commit_that_failed_keeps_its_sources(cache, config, data):
    """Embeddings that are committed at the second try have their records, too."""
    recorder = SourceRecorder(cache.path(config), data)
    failing = [False, True, False, False]

    def before_commit(committed):
        recorder(committed)
        if failing.pop(0):
            raise StorageError("the disk is full")

    with cache.writer(config, before_commit=before_commit) as writer:
        for number in range(3):
            sample_id = f"{number:02d}:dog"
            recorder.note(sample_id, source_of(f"{data}/{sample_id}.wav"))
            writer.put(sample_id, np.full(8, float(number)))
            if number == 1:
                with pytest.raises(StorageError):
                    writer.commit()
            else:
                assert writer.commit()
    assert check_sources(cache.path(config)).num("unchanged") == 3


def test_opened_by_each_process_for_itself(store, clips):
    """A child that was forked with records open reads and leaves its parent's alone."""
    with SourceRecords(store) as opened:
        pid = os.fork()
        if pid == 0:
            found = check_sources(store).num("unchanged")
            os._exit(0 if found == len(clips) else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert opened.sizes_and_times(list(clips))


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(umask, fill, clips, cache, config):
    """A group that shares its stores shares the records."""
    before = os.umask(umask)
    try:
        fill(clips)
    finally:
        os.umask(before)
    mode = (cache.path(config) / SOURCES_NAME).stat().st_mode & 0o777
    assert mode == 0o666 & ~umask


def test_nothing_is_left_beside_the_file(store):
    """No journal and no shared memory stays when nobody writes."""
    assert [path.name for path in store.glob(f"{SOURCES_NAME}*")] == [SOURCES_NAME]


@pytest.mark.skipif(os.geteuid() != 0, reason="another user can be played by root only")
def test_reading_without_permission_to_write(store, clips, tmp_path):
    """Whoever may only read the store can verify its sources."""
    code = (
        "import os, sys\n"
        "from lmdbcache.cache import SourceRecords\n"
        "from pathlib import Path\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "with SourceRecords(Path(sys.argv[1])) as records:\n"
        "    print(len(records.sizes_and_times(sys.argv[2:])))\n"
    )
    for folder in (store, *store.parents):
        if Path("/tmp") in folder.parents:
            folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, store, *clips],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{len(clips)}\n", done.stderr


def test_locked_records_hardly_delay_a_writer(store, fill, clips, cache, config, monkeypatch):
    """The store's other writers wait meanwhile: one commit is patient, those after it aren't."""
    monkeypatch.setattr(records, "_PATIENCE_SECONDS", 0.3)
    waited = []
    connect = records._connect

    def note_and_connect(path, busy_seconds):
        waited.append(busy_seconds)
        return connect(path, busy_seconds)

    monkeypatch.setattr(records, "_connect", note_and_connect)
    holder = sqlite3.connect(store / SOURCES_NAME, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    more = {f"more_{n}:dog": path for n, path in enumerate(clips.values())}
    fill(more, commit_records=1)
    holder.close()
    assert waited[0] == 0.3
    assert set(waited[1:]) == {0.0}
    with cache.reader(config) as reader:
        assert reader.missing(more) == []
