"""`pull` under faults: cut, killed, damaged, full, at once; nothing is lost and nothing wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sharing.shared_samples import put_manifest, shard_of, some_embeddings
from sharing.shared_stores import assert_same, share, stored
from small_disks import empty, fill, small_disk

from lmdbcache import EmbeddingCache
from lmdbcache.errors import CacheFullError, RemoteError, StorageError
from lmdbcache.exchange import Remote, pull
from lmdbcache.exchange.sharing import remote as remote_module
from lmdbcache.exchange.sharing.local_folder import LocalFolder
from lmdbcache.exchange.sharing.manifests import read_state
from lmdbcache.storage import EXTRAS_NAME

LARGE = (64, 64)  # 16 KiB an embedding


def part_of(cache, config, entry) -> Path:
    return cache.path(config) / EXTRAS_NAME / "sharing" / f"{entry.sha256}.part"


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
    begin(cache, config, entry, data[: entry.header_bytes + 100])
    report = pull(cache, None, remote.url)
    num_bytes = entry.num_bytes - entry.header_bytes - 100
    assert report.bytes_to_fetch == report.bytes_fetched == num_bytes
    assert_same(stored(cache, config), values)
    assert not part_of(cache, config, entry).exists()


@pytest.mark.parametrize("left", [b"\0" * 10, b"\0" * 1000, b"\0" * 10_000])
def test_a_damaged_beginning_is_fetched_again(remote, cache, config, left):
    """What a power cut left, or more than the shard has, costs a second look and no more."""
    values = some_embeddings(0, 8)
    share(remote, config, values)
    begin(cache, config, shard_of(config, values)[0], left)
    assert pull(cache, None, remote.url).exit_code == 0
    assert_same(stored(cache, config), values)


def test_a_connection_that_breaks_leaves_what_came(remote, cache, config, monkeypatch):
    """A place that goes away: one error; what is imported stays, and the rest isn't begun anew."""
    monkeypatch.setattr(remote_module, "CONNECTIONS", 1)
    parts = [some_embeddings(10 * n, 10, shape=LARGE) for n in range(3)]
    shared = share(remote, config, *parts)
    plain, calls = Remote.pieces, []

    def pieces(self, path, first, last):
        calls.append(path)
        if len(calls) == 2:
            yield from plain(self, path, first, last // 2)
            raise RemoteError("the connection is gone")
        yield from plain(self, path, first, last)

    monkeypatch.setattr(Remote, "pieces", pieces)
    plain_list = Remote.list_files

    def list_files(self, folder):
        if len(calls) == 2:
            raise RemoteError("nothing answers")
        return plain_list(self, folder)

    monkeypatch.setattr(Remote, "list_files", list_files)
    with pytest.raises(RemoteError):
        pull(cache, None, remote.url)
    assert len(stored(cache, config)) == 10
    calls.extend([""] * 5)
    report = pull(cache, None, remote.url)
    second, third = (entry for entry in shared.shards if entry.path not in calls[0])
    num_bytes = second.num_bytes - second.num_bytes // 2 + third.num_bytes - third.header_bytes
    assert report.bytes_fetched == num_bytes
    assert_same(stored(cache, config), {k: v for part in parts for k, v in part.items()})


def test_parts_that_no_shard_asks_for_are_removed(remote, cache, config):
    """What a killed pull left of a shard that was withdrawn since isn't kept for ever."""
    share(remote, config, some_embeddings(0, 3))
    begin(cache, config, shard_of(config, some_embeddings(50, 3))[0], b"half a shard")
    assert pull(cache, None, remote.url).exit_code == 0
    assert not list(cache.root.rglob("*.part"))


def test_two_pushers_in_conflict_are_both_named(remote, cache, config):
    """`error` keeps what came first and names both; `overwrite` ends at the later."""
    ours, theirs = some_embeddings(0, 3), some_embeddings(0, 3, seed=1)
    one = share(remote, config, ours, writer="node-a")
    two = share(remote, config, theirs, writer="node-b")
    report = pull(cache, None, remote.url)
    assert (report.exit_code, report.num_new) == (1, 3)
    first, second = sorted((one, two), key=lambda manifest: manifest.id)
    for conflict in report.conflicts:
        assert conflict.stored.detail["manifest"] == first.id
        assert conflict.given.detail["manifest"] == second.id
        assert conflict.max_abs > 0
    before, after = (ours, theirs) if first is one else (theirs, ours)
    assert_same(stored(cache, config), before)
    assert pull(cache, None, remote.url, on_duplicate="overwrite").exit_code == 0
    assert_same(stored(cache, config), after)
    again = pull(cache, None, remote.url, on_duplicate="overwrite")
    assert (again.exit_code, again.bytes_fetched) == (0, 0)
    assert_same(stored(cache, config), after)


def test_what_differs_in_the_last_bits_is_kept(remote, filled, config, embeddings):
    """Within the tolerance the stored one is kept and counted; `skip` doesn't even look."""
    near = {name: value + np.float32(1e-6) for name, value in embeddings.items()}
    share(remote, config, near)
    report = pull(filled, None, remote.url)
    assert (report.exit_code, report.num_close) == (0, 20)
    skipped = pull(filled, None, remote.url, on_duplicate="skip", tolerance=1e-9)
    assert (skipped.exit_code, skipped.bytes_fetched, skipped.num_skipped) == (0, 0, 20)
    closer = pull(filled, None, remote.url, tolerance=1e-9)
    assert (closer.exit_code, len(closer.conflicts)) == (1, 20)
    assert_same(stored(filled, config), embeddings)


def test_a_place_that_goes_away_while_manifests_are_read(remote, config, monkeypatch):
    """One error, at once, and not a try for each of the manifests that are left."""
    for number in range(50):
        share(remote, config, some_embeddings(number, 1), writer=f"node-{number}")
    plain, read = Remote.list_files, []

    def fail(self, path, *_):
        read.append(path)
        raise RemoteError("the connection is gone")

    def list_files(self, folder):
        if read:
            raise RemoteError("nothing answers")
        return plain(self, folder)

    monkeypatch.setattr(Remote, "read", fail)
    monkeypatch.setattr(Remote, "list_files", list_files)
    with pytest.raises(RemoteError):
        read_state(remote, config.fingerprint, LocalFolder(None))
    assert len(read) <= 8


def test_a_conflict_is_reported_until_it_is_decided(remote, filled, config, embeddings):
    """`error` lists it at every pull; `skip` and `overwrite` decide."""
    share(remote, config, {"video_00001:dog": np.ones(8, "f4")})
    for _ in range(2):
        report = pull(filled, None, remote.url)
        assert (report.exit_code, len(report.conflicts)) == (1, 1)
        assert report.conflicts[0].stored.writer == "this store"
    assert pull(filled, None, remote.url, on_duplicate="skip").exit_code == 0
    assert_same(stored(filled, config), embeddings)
    assert pull(filled, None, remote.url, on_duplicate="overwrite").exit_code == 0
    assert stored(filled, config)["video_00001:dog"].tolist() == [1.0] * 8


def test_embeddings_of_other_weights_are_refused(remote, cache, config):
    """Of two writers with different weights only those that fit the store come in; exit code 1."""
    one, two = some_embeddings(0, 3), some_embeddings(3, 3)
    with cache.writer(config, provenance={"weights_digest": "1"}) as writer:
        writer.put("mine:dog", np.ones(8))
    share(remote, config, one, provenance={"weights_digest": "1"})
    three = some_embeddings(6, 3)
    share(remote, config, two, three, provenance={"weights_digest": "2"}, writer="node-b")
    report = pull(cache, None, remote.url)
    assert report.exit_code == 1
    assert [refusal.where for refusal in report.refused] == ["node-b"]
    assert sorted(stored(cache, config)) == sorted([*one, "mine:dog"])


def test_the_first_weights_that_come_into_a_new_store_count(remote, cache, config):
    """Those of a manifest that lists nothing, or what isn't there, don't."""
    parts = [some_embeddings(3 * n, 3) for n in range(3)]
    put_manifest(remote, config, [], writer="a", provenance={"weights_digest": "a"})
    absent = shard_of(config, some_embeddings(50, 3))[0]
    put_manifest(remote, config, [absent], writer="b", provenance={"weights_digest": "b"})
    share(remote, config, parts[0], writer="c", provenance={"weights_digest": "c"})
    share(remote, config, *parts[1:], writer="d", provenance={"weights_digest": "d"})
    report = pull(cache, None, remote.url)
    assert [refusal.where for refusal in report.refused] == ["d"]
    assert list(report.problems) == [absent.path]
    assert_same(stored(cache, config), parts[0])
    again = pull(cache, None, remote.url)
    assert sorted(refusal.where for refusal in again.refused) == ["b", "d"]
    assert again.bytes_fetched == 0


def test_a_disk_without_room_is_refused_before(remote, tmp_path, config):
    """Nothing is fetched where the embeddings don't fit."""
    share(remote, config, some_embeddings(0, 10))
    with small_disk(tmp_path / "disk", 40) as disk:
        fill(disk, 4 << 20)
        with pytest.raises(CacheFullError):
            pull(disk / "cache", None, remote.url)
        assert not list((disk / "cache").rglob("*.part"))


def test_a_disk_that_fills_up_keeps_what_was_imported(remote, tmp_path, config, monkeypatch):
    """Full in the middle: an error of ours, what was committed stays, and the pull goes on."""
    parts = [some_embeddings(60 * n, 60, shape=LARGE) for n in range(4)]
    share(remote, config, *parts)
    with small_disk(tmp_path / "disk", 64) as disk:
        cache = EmbeddingCache(disk / "cache")
        monkeypatch.setattr(remote_module, "CONNECTIONS", 1)
        plain, calls = LocalFolder.fetch, []

        def fetch(self, *arguments):
            calls.append(arguments)
            if len(calls) == 3:
                fill(disk, 300_000)
            return plain(self, *arguments)

        monkeypatch.setattr(LocalFolder, "fetch", fetch)
        with pytest.raises(CacheFullError):
            pull(cache, None, remote.url)
        assert len(stored(cache, config)) == 120
        empty(disk)
        assert pull(cache, None, remote.url).exit_code == 0
        assert_same(stored(cache, config), {k: v for part in parts for k, v in part.items()})


def test_a_root_that_cannot_be_written(remote, tmp_path, config):
    """A file in the place of the root is said before anything is fetched."""
    share(remote, config, some_embeddings(0, 3))
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        pull(tmp_path / "file", None, remote.url)
