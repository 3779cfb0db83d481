"""`pull` under faults: cut, killed, damaged, full, at once; nothing is lost and nothing wrong."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from sharing.shared_samples import shard_of, some_embeddings
from sharing.shared_stores import assert_same, share, stored
from small_disks import empty, fill, small_disk

from lmdbcache import EmbeddingCache
from lmdbcache.errors import CacheFullError, RemoteError, StorageError
from lmdbcache.exchange import Remote, pull
from lmdbcache.exchange.sharing.downloads import Downloads
from lmdbcache.exchange.sharing.history import read_history
from lmdbcache.storage import PULLING_NAME

LARGE = (64, 64)  # 16 KiB an embedding


def part_of(cache, config, entry) -> Path:
    return cache.path(config) / PULLING_NAME / f"{entry.sha256}.part"


def begin(cache, config, entry, data) -> None:
    """What a killed pull has left of a shard."""
    part = part_of(cache, config, entry)
    part.parent.mkdir(parents=True)
    part.write_bytes(data)


def test_a_cut_download_goes_on_where_it_was(remote, cache, config):
    """What was fetched before isn't fetched again, and the file is gone afterwards."""
    values = some_embeddings(0, 8)
    entry, data = shard_of(config, values)
    share(remote, config, values)
    begin(cache, config, entry, data[:100])
    report = pull(cache, remote.url)
    assert report.bytes_to_fetch == report.bytes_fetched == entry.num_bytes - 100
    assert_same(stored(cache, config), values)
    assert not part_of(cache, config, entry).exists()


@pytest.mark.parametrize("left", [b"\0" * 100, b"\0" * 10_000])
def test_a_damaged_beginning_is_fetched_again(remote, cache, config, left):
    """What a power cut left, or more than the shard has, costs a second look and no more."""
    values = some_embeddings(0, 8)
    share(remote, config, values)
    begin(cache, config, shard_of(config, values)[0], left)
    assert pull(cache, remote.url).exit_code == 0
    assert_same(stored(cache, config), values)


def test_a_connection_that_breaks_leaves_what_came(remote, cache, config, monkeypatch):
    """A place that goes away: one error; what is imported stays, and the rest isn't begun anew."""
    parts = [some_embeddings(10 * n, 10, shape=LARGE) for n in range(3)]
    commit = share(remote, config, *parts)
    plain, calls = Remote.fetch, []

    def fetch(self, path, target, num_bytes, progress=None):
        calls.append(path)
        if len(calls) == 2:
            plain(self, path, target, num_bytes // 2, progress)
            raise RemoteError("the connection is gone")
        plain(self, path, target, num_bytes, progress)

    monkeypatch.setattr(Remote, "fetch", fetch)
    plain_list = Remote.list_files

    def list_files(self, folder):
        if len(calls) == 2:
            raise RemoteError("nobody answers")
        return plain_list(self, folder)

    monkeypatch.setattr(Remote, "list_files", list_files)
    with pytest.raises(RemoteError, match="nobody answers"):
        pull(cache, remote.url)
    assert len(stored(cache, config)) == 10
    calls.extend([""] * 5)
    report = pull(cache, remote.url)
    sizes = [entry.num_bytes for entry in commit.shards]
    assert report.bytes_fetched == sum(sizes[1:]) - sizes[1] // 2
    assert_same(stored(cache, config), {k: v for part in parts for k, v in part.items()})


def test_parts_that_no_shard_asks_for_are_removed(remote, cache, config):
    """What a killed pull left of a shard that was withdrawn since isn't kept for ever."""
    share(remote, config, some_embeddings(0, 3))
    begin(cache, config, shard_of(config, some_embeddings(50, 3))[0], b"half a shard")
    assert pull(cache, remote.url).exit_code == 0
    assert not list(cache.root.rglob("*.part"))


KILLED = """
import os, signal, sys
from lmdbcache.exchange.sharing import pulling, downloads
from lmdbcache.exchange.sharing.history import read_history
from lmdbcache.exchange import pull
from lmdbcache.exchange import Remote
from lmdbcache.exchange import verify_remote
import lmdbcache.exchange.sharing.remote as remote
remote._PIECE_BYTES = 20_000
left = int(sys.argv[3])
def count(frame, event, argument):
    global left
    if event == "call" and "lmdbcache" in frame.f_code.co_filename:
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
pull(sys.argv[1] + "-warm", sys.argv[2])
sys.setprofile(count)
pull(sys.argv[1], sys.argv[2])
sys.setprofile(None)
print("calls", int(sys.argv[3]) - left)
"""


def run_killed(root, url, after):
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(root), url, str(after)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )


def test_killed_at_any_moment(remote, tmp_path, config):
    """kill -9 in the middle, and again: what is there is right, and the last pull completes it."""
    parts = [some_embeddings(4 * n, 4, shape=LARGE) for n in range(3)]
    share(remote, config, *parts)
    expected = {k: v for part in parts for k, v in part.items()}
    done = run_killed(tmp_path / "whole", remote.url, 10**9)
    calls = int(done.stdout.split()[1])
    cache = EmbeddingCache(tmp_path / "cache")
    for share_of_calls in (0.15, 0.4, 0.45, 0.7, 0.9):
        killed = run_killed(cache.root, remote.url, int(calls * share_of_calls))
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
        if config in cache:
            found = stored(cache, config)
            assert_same(found, {name: expected[name] for name in found})
            assert len(found) % 4 == 0  # each shard is one transaction
    assert pull(cache, remote.url).exit_code == 0
    assert_same(stored(cache, config), expected)
    assert cache.verify(config).is_sound


def test_two_pulls_at_once_fetch_everything_once(remote, cache, config, caplog):
    """The second waits for the first, and finds it all there."""
    caplog.set_level(logging.WARNING)
    values = some_embeddings(0, 30)
    commit = share(remote, config, values)
    reports = []
    with Downloads(cache.path(config)).held():
        pulls = [
            threading.Thread(target=lambda: reports.append(pull(cache, remote.url)))
            for _ in range(2)
        ]
        for one in pulls:
            one.start()
        while sum("waiting for another pull" in line for line in caplog.messages) < 2:
            time.sleep(0.01)
        time.sleep(0.3)
        assert not reports
        assert config not in cache
    for one in pulls:
        one.join()
    assert sum(report.bytes_fetched for report in reports) == commit.shards[0].num_bytes
    assert_same(stored(cache, config), values)


def test_two_pushers_in_conflict_are_both_named(remote, cache, config):
    """`error` keeps what came first and names both; `theirs` ends at the later, and stays there."""
    ours, theirs = some_embeddings(0, 3), some_embeddings(0, 3, seed=1)
    one = share(remote, config, ours, writer="node-a")
    two = share(remote, config, theirs, writer="node-b")
    report = pull(cache, remote.url)
    assert (report.exit_code, report.merged.num_new) == (1, 3)
    first, second = sorted((one, two), key=lambda commit: commit.id)
    for conflict in report.merged.conflicts:
        assert conflict.stored.detail["commit"] == first.id
        assert conflict.given.detail["commit"] == second.id
        assert conflict.max_abs > 0
    before, after = (ours, theirs) if first is one else (theirs, ours)
    assert_same(stored(cache, config), before)
    assert pull(cache, remote.url, on_duplicate="overwrite").exit_code == 0
    assert_same(stored(cache, config), after)
    again = pull(cache, remote.url, on_duplicate="overwrite")
    assert (again.exit_code, again.bytes_fetched) == (0, 0)
    assert_same(stored(cache, config), after)


def test_what_differs_in_the_last_bits_is_fetched_once(remote, filled, config, embeddings):
    """Within the tolerance ours is kept and counted; the next pull doesn't look again."""
    near = {name: value + np.float32(1e-6) for name, value in embeddings.items()}
    share(remote, config, near)
    report = pull(filled, remote.url)
    assert (report.exit_code, report.merged.num_close) == (0, 20)
    again = pull(filled, remote.url)
    assert (again.exit_code, again.bytes_fetched, again.num_settled) == (0, 0, 20)
    closer = pull(filled, remote.url, tolerance=1e-9)
    assert (closer.exit_code, len(closer.merged.conflicts)) == (1, 20)
    assert_same(stored(filled, config), embeddings)


def test_a_record_of_comparisons_that_was_cut_does_no_harm(remote, filled, config, embeddings):
    """Half a record at the end, as a kill leaves it, and rubbish: what is whole still counts."""
    near = {name: value + np.float32(1e-6) for name, value in embeddings.items()}
    names = sorted(near)
    share(remote, config, {name: near[name] for name in names[:10]})
    pull(filled, remote.url)
    path = filled.path(config) / PULLING_NAME / "compared"
    path.write_bytes(path.read_bytes() + b"half a rec")
    share(remote, config, {name: near[name] for name in names[10:]}, writer="node-b")
    again = pull(filled, remote.url)
    assert (again.num_settled, again.merged.num_close) == (10, 10)
    assert pull(filled, remote.url).num_settled == 20
    path.write_bytes(b"rubbish" * 100)
    assert pull(filled, remote.url).merged.num_close == 20


def test_a_place_that_goes_away_while_commits_are_read(remote, config, monkeypatch):
    """One error, at once, and not a try for each of the commits that are left."""
    for number in range(5):
        share(remote, config, some_embeddings(number, 1), writer=f"node-{number}")
    plain, read = Remote.list_files, []

    def fail(self, path, num_bytes):
        read.append(path)
        raise RemoteError("the connection is gone")

    def list_files(self, folder):
        if read:
            raise RemoteError("nobody answers")
        return plain(self, folder)

    monkeypatch.setattr(Remote, "read", fail)
    monkeypatch.setattr(Remote, "list_files", list_files)
    with pytest.raises(RemoteError, match="nobody answers"):
        read_history(remote, config.fingerprint)
    assert len(read) == 1


def test_a_conflict_is_told_until_it_is_decided(remote, filled, config, embeddings):
    """`error` tells it at every pull; `ours` decides it, and asks for no bytes again."""
    share(remote, config, {"video_00001:dog": np.ones(8, "f4")})
    for _ in range(2):
        report = pull(filled, remote.url)
        assert (report.exit_code, len(report.merged.conflicts)) == (1, 1)
        assert report.merged.conflicts[0].stored.writer == "this store"
    assert pull(filled, remote.url, on_duplicate="skip").exit_code == 0
    assert pull(filled, remote.url, on_duplicate="skip").bytes_fetched == 0
    assert_same(stored(filled, config), embeddings)


def test_embeddings_of_other_weights_are_refused(remote, cache, config):
    """Of two writers with different weights only those that fit the store come in; exit code 1."""
    one, two = some_embeddings(0, 3), some_embeddings(3, 3)
    with cache.writer(config, provenance={"weights_digest": "1"}) as writer:
        writer.put("mine:dog", np.ones(8))
    share(remote, config, one, provenance={"weights_digest": "1"})
    three = some_embeddings(6, 3)
    share(remote, config, two, three, provenance={"weights_digest": "2"}, writer="node-b")
    report = pull(cache, remote.url)
    assert report.exit_code == 1
    assert [refusal.where for refusal in report.merged.refused] == ["node-b"]
    assert sorted(stored(cache, config)) == sorted([*one, "mine:dog"])


def test_a_disk_without_room_is_refused_before(remote, tmp_path, config):
    """Nothing is fetched where the embeddings don't fit."""
    share(remote, config, some_embeddings(0, 10))
    with small_disk(tmp_path / "disk", 40) as disk:
        fill(disk, 4 << 20)
        with pytest.raises(CacheFullError, match="this pull needs"):
            pull(disk / "cache", remote.url)
        assert not list((disk / "cache").rglob("*.part"))


def test_a_disk_that_fills_up_keeps_what_was_imported(remote, tmp_path, config, monkeypatch):
    """Full in the middle: an error of ours, what was committed stays, and the pull goes on."""
    parts = [some_embeddings(60 * n, 60, shape=LARGE) for n in range(4)]
    share(remote, config, *parts)
    with small_disk(tmp_path / "disk", 64) as disk:
        cache = EmbeddingCache(disk / "cache")
        plain, calls = Downloads.fetch, []

        def fetch(self, *arguments):
            calls.append(arguments)
            if len(calls) == 3:
                fill(disk, 300_000)
            return plain(self, *arguments)

        monkeypatch.setattr(Downloads, "fetch", fetch)
        with pytest.raises(CacheFullError):
            pull(cache, remote.url)
        assert len(stored(cache, config)) == 120
        assert not list(cache.root.rglob("*.part"))
        empty(disk)
        assert pull(cache, remote.url).exit_code == 0
        assert_same(stored(cache, config), {k: v for part in parts for k, v in part.items()})


def test_a_root_that_cannot_be_written(remote, tmp_path, config):
    """A file in the place of the root is said before anything is fetched."""
    share(remote, config, some_embeddings(0, 3))
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file"):
        pull(tmp_path / "file", remote.url)
