"""`pull`: what is shared comes into a store, bit for bit, and nothing is fetched twice."""

from __future__ import annotations

import numpy as np
import pytest
from sharing.shared_samples import ragged_embeddings, some_embeddings
from sharing.shared_stores import assert_same, shard_file, share, stored

from lmdbcache.cache import SourceRecords
from lmdbcache.errors import CacheNotFoundError, ConfigError
from lmdbcache.exchange import Remote, pull
from lmdbcache.exchange.sharing import partial
from lmdbcache.exchange.sharing.remote import without_secrets
from lmdbcache.storage import stored_checksums


@pytest.mark.parametrize("kind", ["remote", "in_memory"])
def test_a_pulled_store_is_what_was_shared(request, cache, config, kind):
    """Two shards come in bit for bit; the store is sound; again, nothing is fetched."""
    remote = request.getfixturevalue(kind)
    one, two = some_embeddings(0, 10), some_embeddings(10, 5)
    share(remote, config, one, two)
    report = pull(cache, remote.url)
    assert report.exit_code == 0
    assert (report.merged.num_new, report.num_shards) == (15, 2)
    assert_same(stored(cache, config), {**one, **two})
    assert cache.verify(config).is_sound
    again = pull(cache, remote.url, config)
    assert (again.exit_code, again.num_present, again.bytes_fetched) == (0, 15, 0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_and_hidden_states(remote, cache, config, dtype):
    """Hidden states in each dtype keep their bits."""
    config = config.replace(dtype=dtype, output="last_hidden_state")
    values = some_embeddings(0, 4, dtype=dtype, shape=(6, 5))
    share(remote, config, values)
    assert pull(cache, remote.url, config.fingerprint[:6]).exit_code == 0
    assert_same(stored(cache, config), values)


def test_ragged_hidden_states(remote, cache, config):
    """Embeddings of different lengths come into a ragged store."""
    values = ragged_embeddings(7)
    share(remote, config, values, shape=(None, 4))
    assert pull(cache, remote.url).exit_code == 0
    assert cache.info(config).embedding_shape == (None, 4)
    assert_same(stored(cache, config), values)


def test_a_store_in_use_is_added_to(remote, filled, config, embeddings):
    """A reader and a writer that were open before go on; what was stored stays as it was."""
    new = some_embeddings(0, 10)
    share(remote, config, new)
    with filled.reader(config) as reader, filled.writer(config) as writer:
        before = {name: reader[name].copy() for name in reader}
        writer.put("mine:dog", np.ones(8))
        assert pull(filled, remote.url).merged.num_new == 10
        writer.commit()
        assert_same({name: reader[name].copy() for name in before}, embeddings)
        assert new["clip_00003:dog"].tobytes() == reader["clip_00003:dog"].tobytes()
    assert len(stored(filled, config)) == len(embeddings) + len(new) + 1


def test_only_shards_with_something_missing_are_fetched(remote, cache, config):
    """After a second push, the first one's shard isn't fetched again, nor is its commit read."""
    one, two = some_embeddings(0, 10), some_embeddings(10, 3)
    share(remote, config, one)
    pull(cache, remote.url)
    commit = share(remote, config, two, writer="node-b")
    report = pull(cache, remote.url)
    assert report.bytes_fetched == report.bytes_to_fetch == commit.shards[0].num_bytes
    assert (report.merged.num_new, report.num_present) == (3, 10)


def test_what_two_shards_hold_is_fetched_once(remote, cache, config):
    """A shard of which another brings everything isn't fetched."""
    values = some_embeddings(0, 10)
    few = dict(list(values.items())[:4])
    share(remote, config, values, few)
    report = pull(cache, remote.url)
    assert (report.num_shards, report.merged.num_new, report.merged.num_same) == (1, 10, 0)


def test_a_damaged_copy_of_a_commit_costs_another_look(remote, cache, config):
    """What lies beside the store is compared with its digest, and read anew."""
    share(remote, config, some_embeddings(0, 3))
    pull(cache, remote.url)
    (copy,) = cache.root.rglob("commits/**/*.json")
    data = bytearray(copy.read_bytes())
    data[20] ^= 1
    copy.write_bytes(data)
    report = pull(cache, remote.url)
    assert (report.exit_code, report.problems, report.num_present) == (0, [], 3)


def test_commit_files_are_read_once(remote, cache, config, monkeypatch):
    """The second pull reads the new commit alone."""
    share(remote, config, some_embeddings(0, 3))
    pull(cache, remote.url)
    new = share(remote, config, some_embeddings(3, 3), writer="node-b")
    read = count_reads(monkeypatch)
    pull(cache, remote.url)
    assert {path.rpartition("/")[2] for path in read} == {f"{new.id}.json"}


def count_reads(monkeypatch):
    read, plain = [], Remote.read
    monkeypatch.setattr(
        Remote, "read", lambda self, path, size: read.append(path) or plain(self, path, size)
    )
    return read


def test_a_pinned_state_that_is_here_needs_no_network(remote, cache, config, tmp_path):
    """With a whole commit id, a second pull asks nobody: the place may be gone."""
    commit = share(remote, config, some_embeddings(0, 3))
    pull(cache, remote.url, config, commit=commit.id)
    (tmp_path / "shared").rename(tmp_path / "elsewhere")
    report = pull(cache, remote.url, config.fingerprint, commit=commit.id)
    assert (report.exit_code, report.num_present, report.commit) == (0, 3, commit.id)
    with pytest.raises(CacheNotFoundError, match="nothing is shared"):
        pull(cache, remote.url, config)


def test_a_commit_pins_a_state(remote, cache, config):
    """A commit and its ancestors are pulled, by its id, its digest or their beginnings."""
    one = share(remote, config, some_embeddings(0, 3))
    two = share(remote, config, some_embeddings(3, 3), parents=[one.id])
    share(remote, config, some_embeddings(6, 3), parents=[two.id])
    report = pull(cache, remote.url, commit=two.id[-64:-50])
    assert (report.commit, report.merged.num_new) == (two.id, 6)
    for text in (one.id, one.id[:12] + one.id[12:30], f"{one.id}.json"):
        assert pull(cache, remote.url, commit=text).num_samples == 3


def test_commits_that_cannot_be_found(remote, cache, config):
    """A commit that isn't there, and a beginning of several, are refused; nothing is stored."""
    one, two = (share(remote, config, some_embeddings(n, 1), writer="n") for n in (0, 1))
    for text, words in (("abcdefghi", "isn't a commit"), ("n-", "stands for 2 commits")):
        with pytest.raises(ConfigError, match=words) as caught:
            pull(cache, remote.url, commit=text)
        assert one.id in str(caught.value)
        assert two.id in str(caught.value)
    assert config not in cache
    assert not list(cache.root.rglob("*.json"))


def test_fingerprints_that_cannot_be_found(remote, cache, config):
    """Another fingerprint, an empty place, and no choice among several: what is there is named."""
    with pytest.raises(CacheNotFoundError, match="nothing is shared"):
        pull(cache, remote.url)
    other = config.replace(duration=2.0)
    for one in (config, other):
        share(remote, one, some_embeddings(0, 1))
    for asked in (None, config.replace(duration=7.0), "not-hex"):
        with pytest.raises(CacheNotFoundError) as caught:
            pull(cache, remote.url, asked)
        for one in (config, other):
            assert f"{one.fingerprint} ({one.slug})" in str(caught.value)
    assert pull(cache, remote.url, other).exit_code == 0
    assert list(cache) == [other]


def test_a_push_that_has_not_ended_is_no_second_store(remote, cache, config):
    """A folder without a commit, by a first push that was killed or by somebody's tool."""
    share(remote, config, some_embeddings(0, 2))
    remote.write(f"{config.replace(duration=2.0).fingerprint}/shards/one", b"1")
    assert pull(cache, remote.url).config == config


def test_a_part_of_what_is_shared(remote, cache, config):
    """Classes and sample ids choose; only shards that hold some of them are fetched."""
    one, two = some_embeddings(0, 10), some_embeddings(10, 10)
    share(remote, config, one, two)
    asked = ["clip_00001:dog", "clip_00002:DRUM", "nobody:dog"]
    report = pull(cache, remote.url, sample_ids=asked)
    assert report.absent == ["nobody:dog"]
    assert report.exit_code == 1
    assert report.num_shards == 1
    assert sorted(stored(cache, config)) == ["clip_00001:dog", "clip_00002:drum"]
    assert pull(cache, remote.url, classes=["Dog"]).exit_code == 0
    assert len(stored(cache, config)) == 11
    with pytest.raises(ConfigError, match="class cow: nobody shares .* there: dog, drum"):
        pull(cache, remote.url, classes=["cow"])


@pytest.mark.parametrize("shape", [(6, 5), (None, 4)])
def test_a_few_large_embeddings_come_without_the_rest(remote, cache, config, monkeypatch, shape):
    """Of a shard that little is wanted of, only these bytes are read, and checked."""
    monkeypatch.setattr(partial, "_GAP_BYTES", 1)
    ragged = None in shape
    values = ragged_embeddings(10) if ragged else some_embeddings(0, 10, shape=shape)
    (entry,) = share(remote, config, values, shape=shape).shards
    asked = sorted(values)[3:5] + sorted(values)[8:9]
    expected = {name: values[name] for name in asked}
    num_bytes = sum(value.nbytes for value in expected.values())
    seen = []
    assert pull(cache, remote.url, sample_ids=asked, dry_run=True).bytes_to_fetch == num_bytes
    report = pull(cache, remote.url, sample_ids=asked, progress=lambda *pair: seen.append(pair))
    assert (report.exit_code, report.bytes_fetched) == (0, num_bytes)
    assert seen[-1] == (num_bytes, num_bytes)
    assert_same(stored(cache, config), expected)
    path = shard_file(remote, config, entry)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    asked_too = [min(values), max(values)]
    report = pull(cache, remote.url, sample_ids=[*asked, *asked_too])
    assert (report.exit_code, report.lost) == (1, asked_too)
    assert_same(stored(cache, config), expected)


def test_a_dry_run_tells_the_bytes_and_stores_nothing(remote, cache, config):
    """`dry_run` counts shards and bytes, and makes no file."""
    commit = share(remote, config, some_embeddings(0, 3))
    report = pull(cache, remote.url, dry_run=True)
    assert (report.num_shards, report.bytes_to_fetch) == (1, commit.shards[0].num_bytes)
    assert not cache.root.exists()


def test_progress_ends_at_what_there_is(remote, cache, config):
    """Bytes are counted up to the size of all shards that are fetched."""
    commit = share(remote, config, some_embeddings(0, 30), some_embeddings(30, 30))
    seen = []
    pull(cache, remote.url, progress=lambda done, total: seen.append((done, total)))
    total = sum(entry.num_bytes for entry in commit.shards)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_each_sample_keeps_who_computed_it(remote, filled, config, embeddings):
    """Origins name writer, commit and place; what was computed here has none."""
    commit = share(remote, config, some_embeddings(0, 2), provenance={"weights_digest": "abc"})
    pull(filled, remote.url)
    checksums = dict(stored_checksums_of(filled, config))
    with SourceRecords(filled.path(config)) as records:
        found = records.origins(checksums)
    assert sorted(found) == ["clip_00000:drum", "clip_00001:dog"]
    origin = found["clip_00001:dog"]
    assert origin.writer == "node-a"
    assert origin.detail == {"commit": commit.id, "created": commit.created, "url": remote.url}
    assert origin.provenance == {"weights_digest": "abc"}


def stored_checksums_of(cache, config):
    with cache.reader(config) as reader:
        return [(key.decode(), found) for key, found in stored_checksums(reader)]


def test_secrets_of_a_url_are_not_kept():
    """A password or access key in a URL isn't shown, nor written to the store."""
    assert without_secrets("ssh://me:pass@host/folder") == "ssh://me@host/folder"
    for url in ("s3://bucket/folder", "ssh://me@host/a", "file:///a:b@c", "memory://x"):
        assert without_secrets(url) == url


def test_removing_a_store_removes_what_pulls_keep(remote, cache, config):
    """Copies of commits and comparisons go with the store."""
    share(remote, config, some_embeddings(0, 2))
    pull(cache, remote.url)
    assert list(cache.root.rglob("*.json"))
    cache.clear(config)
    assert list(cache.root.iterdir()) == []
