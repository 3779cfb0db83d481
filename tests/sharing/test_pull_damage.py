"""`pull` of shards and commits that aren't what they should be: told, and all others come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sharing.shared_samples import put_commit, shard_of, some_embeddings
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
    report = pull(cache, remote.url)
    assert report.exit_code == 1
    assert [problem.path for problem in report.problems] == [bad.path]
    assert report.lost == sorted(parts[1])
    assert_same(stored(cache, config), {**parts[0], **parts[2]})
    assert cache.verify(config).is_sound
    path.write_bytes(shard_of(config, parts[1])[1])
    assert pull(cache, remote.url).exit_code == 0
    assert len(stored(cache, config)) == 30


def test_another_shard_makes_up_for_a_bad_one(remote, cache, config):
    """What a later repair has pushed again is taken from there, also for an older state."""
    values = some_embeddings(0, 10)
    commit = share(remote, config, values)
    shard_file(remote, config, commit.shards[0]).unlink()
    first, second = (dict(list(values.items())[part]) for part in (slice(6), slice(6, 10)))
    share(remote, config, first, second, writer="repair", parents=[commit.id])
    report = pull(cache, remote.url, commit=commit.id)
    assert report.exit_code == 0
    assert [problem.path for problem in report.made_up_for] == [commit.shards[0].path]
    assert_same(stored(cache, config), values)


def test_another_shard_makes_up_for_a_bad_one_of_a_pinned_state(remote, cache, config):
    """The state is known here; what was repaired since is looked up there."""
    values = some_embeddings(0, 10)
    commit = share(remote, config, values)
    pull(cache, remote.url, config, commit=commit.id, sample_ids=list(values)[:1])
    shard_file(remote, config, commit.shards[0]).unlink()
    share(remote, config, values | some_embeddings(10, 1), writer="repair", parents=[commit.id])
    report = pull(cache, remote.url, config, commit=commit.id)
    assert (report.exit_code, report.lost) == (0, [])
    assert_same(stored(cache, config), values)


def test_a_shard_that_is_not_what_its_commit_says(remote, cache, config):
    """A shard of other samples under a right digest is refused as a whole."""
    entry, data = shard_of(config, some_embeddings(0, 3))
    liar = entry.__class__(
        entry.sha256, entry.num_bytes, ("a:dog", "b:dog", "c:dog"), entry.checksums, None
    )
    remote.write(f"{config.fingerprint}/{entry.path}", data)
    put_commit(remote, config, [liar])
    report = pull(cache, remote.url)
    assert (report.exit_code, report.lost) == (1, ["a:dog", "b:dog", "c:dog"])
    assert config not in cache
    assert not cache.path(config).exists()


def test_a_shard_without_the_digest_of_its_name(remote, cache, config):
    """A file under another digest is refused, though all checksums in it match the commit's."""
    values = some_embeddings(0, 3)
    entry, data = shard_of(config, values)
    renamed = replace(entry, sha256="0" * 64)
    remote.write(f"{config.fingerprint}/{renamed.path}", data)
    put_commit(remote, config, [renamed])
    report = pull(cache, remote.url)
    assert [problem.path for problem in report.problems] == [renamed.path]
    assert report.lost == sorted(values)
    assert config not in cache
    assert not verify_remote(remote.url).is_sound


def test_a_damaged_commit_is_reported_and_the_others_count(remote, cache, config):
    """One commit file that can't be read doesn't hide what the others list."""
    one = share(remote, config, some_embeddings(0, 3))
    share(remote, config, some_embeddings(3, 3), writer="node-b")
    path = Path(remote.url.removeprefix("file://")) / config.fingerprint / one.path
    path.write_bytes(path.read_bytes()[:-9])
    report = pull(cache, remote.url)
    assert (report.exit_code, report.merged.num_new) == (1, 3)
    assert [problem.path for problem in report.problems] == [one.path]


def test_a_commit_that_was_cut_is_told_though_there_is_a_copy(remote, cache, config):
    """A listing shows it: others have no copy."""
    commit = share(remote, config, some_embeddings(0, 3))
    pull(cache, remote.url)
    path = Path(remote.url.removeprefix("file://")) / config.fingerprint / commit.path
    path.write_bytes(path.read_bytes()[:-9])
    report = pull(cache, remote.url)
    assert [problem.path for problem in report.problems] == [commit.path]
    assert report.exit_code == 1
