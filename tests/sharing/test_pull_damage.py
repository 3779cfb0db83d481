"""`pull` of shards and commits that aren't what they should be: told, and all others come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sharing.shared_samples import put_manifest, shard_of, some_embeddings
from sharing.shared_stores import assert_same, shard_file, share, stored

from lmdbcache.exchange import pull, verify_remote


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "longer", "other"])
def test_a_bad_shard_is_reported_and_all_others_come(remote, cache, config, damage):
    """Each sound shard is imported; the bad one's samples are listed; exit code 1."""
    parts = [some_embeddings(10 * n, 10) for n in range(3)]
    commit = share(remote, config, *parts)
    bad = commit.shards[1]
    path = shard_file(remote, config, bad)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    damaged = {"cut": data[:-1], "longer": data + b"\0", "other": b"x" * len(data)}
    path.unlink() if damage == "gone" else path.write_bytes(damaged.get(damage, data))
    report = pull(cache, None, remote.url)
    assert report.exit_code == 1
    assert list(report.problems) == [bad.path]
    if damage not in ("gone", "other"):  # then its header doesn't say whose they were
        assert report.lost == sorted(parts[1])
    assert_same(stored(cache, config), {**parts[0], **parts[2]})
    assert cache.verify(config).is_sound
    path.write_bytes(shard_of(config, parts[1])[1])
    assert pull(cache, None, remote.url).exit_code == 0
    assert len(stored(cache, config)) == 30


def test_another_shard_makes_up_for_a_bad_one(remote, cache, config):
    """What another writer has pushed again is taken from there; the damage is reported."""
    values = some_embeddings(0, 10)
    manifest = share(remote, config, values)
    shard_file(remote, config, manifest.shards[0]).unlink()
    first, second = (dict(list(values.items())[part]) for part in (slice(6), slice(6, 10)))
    share(remote, config, first, second, writer="node-b")
    report = pull(cache, None, remote.url)
    assert (report.exit_code, report.lost) == (1, [])
    assert list(report.problems) == [manifest.shards[0].path]
    assert_same(stored(cache, config), values)


LIES = {
    "other ends": {"first": "a:dog"},
    "another number": {"num_samples": 2},
    "another size": {"num_bytes": 1 << 20},
    "another header": {"header_sha256": "0" * 64},
    "another digest": {"sha256": "0" * 64},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_shard_that_is_not_what_its_manifest_says(remote, cache, config, lie):
    """It is refused as a whole, and costs no honest one: that comes from an honest manifest."""
    values = some_embeddings(0, 3)
    entry, data = shard_of(config, values)
    liar = replace(entry, **LIES[lie])
    for one in (entry, liar):
        remote.write(f"{config.fingerprint}/{one.path}", data)
    put_manifest(remote, config, [liar])
    report = pull(cache, None, remote.url)
    assert (report.exit_code, list(report.problems)) == (1, [liar.path])
    assert config not in cache
    assert not verify_remote(remote.url).is_sound
    put_manifest(remote, config, [entry], writer="honest")
    pull(cache, None, remote.url)
    assert_same(stored(cache, config), values)


def test_a_damaged_manifest_is_reported_and_the_others_count(remote, cache, config):
    """One manifest that can't be read doesn't hide what the others list."""
    one = share(remote, config, some_embeddings(0, 3))
    share(remote, config, some_embeddings(3, 3), writer="node-b")
    path = Path(remote.url.removeprefix("file://")) / config.fingerprint / one.path
    path.write_bytes(path.read_bytes()[:-9])
    report = pull(cache, None, remote.url)
    assert (report.exit_code, report.num_new) == (1, 3)
    assert list(report.problems) == [one.path]


def test_a_manifest_that_was_cut_is_reported_though_there_is_a_copy(remote, cache, config):
    """A listing shows it: others have no copy."""
    manifest = share(remote, config, some_embeddings(0, 3))
    share(remote, config, some_embeddings(3, 3), writer="node-b")
    pull(cache, None, remote.url)
    path = Path(remote.url.removeprefix("file://")) / config.fingerprint / manifest.path
    path.write_bytes(path.read_bytes()[:-9])
    report = pull(cache, None, remote.url)
    assert (report.exit_code, list(report.problems)) == (1, [manifest.path])
