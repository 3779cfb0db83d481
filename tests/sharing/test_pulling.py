"""`pull`: what is shared comes into a store, bit for bit, and nothing is fetched twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sharing.shared_samples import put_manifest, ragged_embeddings, some_embeddings
from sharing.shared_stores import assert_same, shard_file, share, stored

from lmdbcache import CacheConfig, EmbeddingCache, clip_lengths
from lmdbcache.cache import Source, SourceRecorder, SourceRecords
from lmdbcache.errors import CacheNotFoundError, ConfigError, IntegrityError
from lmdbcache.exchange import Remote, merge_stores, pull, push
from lmdbcache.exchange.sharing import pulling


@pytest.mark.parametrize("kind", ["remote", "in_memory"])
def test_a_pulled_store_is_what_was_shared(request, cache, config, kind):
    """Two shards come in bit for bit; the store is sound; again, nothing is fetched."""
    remote = request.getfixturevalue(kind)
    one, two = some_embeddings(0, 10), some_embeddings(10, 5)
    share(remote, config, one, two)
    report = pull(cache, None, remote.url)
    assert report.exit_code == 0
    assert (report.num_new, report.num_shards) == (15, 2)
    assert_same(stored(cache, config), {**one, **two})
    assert cache.verify(config).is_sound
    again = pull(cache, config, remote.url)
    assert (again.exit_code, again.num_same, again.bytes_fetched) == (0, 15, 0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_and_hidden_states(remote, cache, config, dtype):
    """Hidden states in each dtype keep their bits."""
    config = config.replace(dtype=dtype, output="last_hidden_state")
    values = some_embeddings(0, 4, dtype=dtype, shape=(6, 5))
    share(remote, config, values)
    assert pull(cache, config.fingerprint[:6], remote.url).exit_code == 0
    assert_same(stored(cache, config), values)


def test_ragged_hidden_states(remote, cache, config):
    """Embeddings of different lengths come into a ragged store."""
    values = ragged_embeddings(7)
    share(remote, config, values, shape=(None, 4))
    assert pull(cache, None, remote.url).exit_code == 0
    assert cache.info(config).embedding_shape == (None, 4)
    assert_same(stored(cache, config), values)


def test_a_store_in_use_is_added_to(remote, filled, config, embeddings):
    """A reader and a writer that were open before go on; what was stored stays as it was."""
    new = some_embeddings(0, 10)
    share(remote, config, new)
    with filled.reader(config) as reader, filled.writer(config) as writer:
        before = {name: reader[name].copy() for name in reader}
        writer.put("mine:dog", np.ones(8))
        assert pull(filled, None, remote.url).num_new == 10
        writer.commit()
        assert_same({name: reader[name].copy() for name in before}, embeddings)
        assert new["clip_00003:dog"].tobytes() == reader["clip_00003:dog"].tobytes()
    assert len(stored(filled, config)) == len(embeddings) + len(new) + 1


def test_only_shards_with_something_missing_are_fetched(remote, cache, config, monkeypatch):
    """After a second push, the first one's shard isn't read again, nor is its manifest."""
    one, two = some_embeddings(0, 10), some_embeddings(10, 3)
    share(remote, config, one)
    pull(cache, None, remote.url)
    (entry,) = share(remote, config, two, writer="node-b").shards
    read = count_reads(monkeypatch)
    report = pull(cache, None, remote.url)
    # The header is read to see what is missing, and not a second time.
    assert report.bytes_fetched == report.bytes_to_fetch == entry.num_bytes - entry.header_bytes
    assert {path.rpartition("/")[2][:64] for path in read if "shards" in path} == {entry.sha256}
    assert sum("manifests" in path for path in read) == 1
    assert (report.num_new, report.num_same) == (3, 10)


def test_what_two_shards_hold_is_fetched_once(remote, cache, config):
    """A shard of which another brings everything isn't fetched."""
    values = some_embeddings(0, 10)
    few = dict(list(values.items())[:4])
    share(remote, config, values, few)
    report = pull(cache, None, remote.url)
    assert (report.num_shards, report.num_new, report.num_same) == (1, 10, 0)


def count_reads(monkeypatch):
    read, plain = [], Remote.read
    monkeypatch.setattr(
        Remote, "read", lambda self, path, *ends: read.append(path) or plain(self, path, *ends)
    )
    return read


def test_damaged_copies_cost_another_look(remote, cache, config):
    """What lies alongside the store is compared with its digest, and read anew."""
    share(remote, config, some_embeddings(0, 3))
    pull(cache, None, remote.url)
    copies = list(cache.root.rglob("*.copy"))
    assert len(copies) == 2
    for copy in copies:
        data = bytearray(copy.read_bytes())
        data[20] ^= 1
        copy.write_bytes(data)
    report = pull(cache, None, remote.url)
    assert (report.exit_code, report.problems, report.num_same) == (0, {}, 3)


def test_a_pinned_state_that_is_here_needs_no_network(remote, cache, config, tmp_path):
    """With a whole manifest id, a second pull asks nobody: the place may be gone."""
    manifest = share(remote, config, some_embeddings(0, 3))
    pull(cache, config, remote.url, manifest=manifest.id)
    (tmp_path / "shared").rename(tmp_path / "elsewhere")
    report = pull(cache, config.fingerprint, remote.url, manifest=manifest.id)
    assert (report.exit_code, report.num_same, report.manifest) == (0, 3, manifest.id)
    with pytest.raises(CacheNotFoundError):
        pull(cache, config, remote.url)


def test_a_manifest_pins_a_state(remote, cache, config):
    """A manifest and those alongside it are pulled, by its id or the beginning."""
    one = share(remote, config, some_embeddings(0, 3))
    two = share(remote, config, some_embeddings(3, 3), alongside=[one.id])
    share(remote, config, some_embeddings(6, 3), alongside=[one.id, two.id])
    report = pull(cache, None, remote.url, manifest=two.id[:20])
    assert (report.manifest, report.num_new) == (two.id, 6)
    assert pull(cache, None, remote.url, manifest=one.id).num_samples == 3
    assert pull(cache, None, remote.url).num_new == 3


def test_manifests_that_cannot_be_found(remote, cache, config):
    """A manifest that isn't there, and a beginning of several, are refused; nothing is stored."""
    one, two = (share(remote, config, some_embeddings(n, 1), writer="n") for n in (0, 1))
    for text in ("abcdefghi", "n-", f"n-{'0' * 64}"):
        with pytest.raises(ConfigError) as caught:
            pull(cache, None, remote.url, manifest=text)
        assert one.id in str(caught.value)
        assert two.id in str(caught.value)
    assert config not in cache


def test_a_manifest_takes_the_place_of_those_it_withdraws(remote, cache, config):
    """Of the same writer alone; and a sample may count no more in a shard that is listed again."""
    values = some_embeddings(0, 4)
    first, second, _, fourth = values
    one = share(remote, config, {first: values[first], second: values[second]})
    share(remote, config, {fourth: values[fourth]}, writer="node-b", withdraws=[])
    kept = [replace(one.shards[0], without=(second,))]
    put_manifest(remote, config, kept, withdraws=[one.id])
    with pytest.raises(IntegrityError):
        put_manifest(remote, config, [], withdraws=[one.id], writer="node-b")
    assert pull(cache, None, remote.url).exit_code == 0
    assert sorted(stored(cache, config)) == [first, fourth]


def test_fingerprints_that_cannot_be_found(remote, cache, config):
    """Another fingerprint, an empty place, and no choice among several: what is there is named."""
    with pytest.raises(CacheNotFoundError):
        pull(cache, None, remote.url)
    other = config.replace(duration=2.0)
    for one in (config, other):
        share(remote, one, some_embeddings(0, 1))
    for asked in (None, config.replace(duration=7.0), "not-hex"):
        with pytest.raises(CacheNotFoundError) as caught:
            pull(cache, asked, remote.url)
        for one in (config, other):
            assert f"{one.fingerprint} ({one.slug})" in str(caught.value)
    assert pull(cache, other, remote.url).exit_code == 0
    assert list(cache) == [other]


def test_a_push_that_has_not_ended_is_no_second_store(remote, cache, config):
    """A folder without a manifest, by a first push that was killed or by somebody's tool."""
    share(remote, config, some_embeddings(0, 2))
    remote.write(f"{config.replace(duration=2.0).fingerprint}/shards/one", b"1")
    assert pull(cache, None, remote.url).config == config


def test_a_part_of_what_is_shared(remote, cache, config):
    """Classes and sample ids choose; only shards that hold some of them are fetched."""
    one, two = some_embeddings(0, 10), some_embeddings(10, 10)
    share(remote, config, one, two)
    asked = ["clip_00001:dog", "clip_00002:DRUM", "nobody:dog"]
    report = pull(cache, None, remote.url, sample_ids=asked)
    assert report.absent == ["nobody:dog"]
    assert report.exit_code == 1
    assert report.num_shards == 1
    assert sorted(stored(cache, config)) == ["clip_00001:dog", "clip_00002:drum"]
    assert pull(cache, None, remote.url, classes=["Dog"]).exit_code == 0
    assert len(stored(cache, config)) == 11
    with pytest.raises(ConfigError, match="dog, drum"):
        pull(cache, None, remote.url, classes=["cow"])


def test_a_part_that_is_damaged_on_the_way_is_read_again(remote, cache, config, monkeypatch):
    """A bit flips once: nothing is reported."""
    monkeypatch.setattr(pulling, "_GAP_BYTES", 1)
    values = some_embeddings(0, 10, shape=(6, 5))
    (entry,) = share(remote, config, values, shape=(6, 5)).shards
    plain, flipped = Remote.read, []

    def read(self, path, first, *rest):
        data = plain(self, path, first, *rest)
        if first >= entry.header_bytes and not flipped:
            flipped.append(path)
            data = bytes([data[0] ^ 1]) + data[1:]
        return data

    monkeypatch.setattr(Remote, "read", read)
    asked = sorted(values)[3:5]
    assert pull(cache, None, remote.url, sample_ids=asked).exit_code == 0
    assert flipped
    assert_same(stored(cache, config), {name: values[name] for name in asked})


@pytest.mark.parametrize("shape", [(6, 5), (None, 4)])
def test_a_few_large_embeddings_come_without_the_rest(remote, cache, config, monkeypatch, shape):
    """Of a shard that little is wanted of, only these bytes are read, and checked."""
    monkeypatch.setattr(pulling, "_GAP_BYTES", 1)
    ragged = None in shape
    values = ragged_embeddings(10) if ragged else some_embeddings(0, 10, shape=shape)
    (entry,) = share(remote, config, values, shape=shape).shards
    asked = sorted(values)[3:5] + sorted(values)[8:9]
    expected = {name: values[name] for name in asked}
    num_bytes = sum(value.nbytes for value in expected.values())
    seen = []
    looked = pull(cache, None, remote.url, sample_ids=asked, dry_run=True)
    assert looked.bytes_to_fetch == num_bytes
    report = pull(
        cache, None, remote.url, sample_ids=asked, progress=lambda *pair: seen.append(pair)
    )
    assert (report.exit_code, report.bytes_fetched) == (0, num_bytes)
    assert seen[-1] == (num_bytes, num_bytes)
    assert_same(stored(cache, config), expected)
    path = shard_file(remote, config, entry)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    asked_too = [min(values), max(values)]
    report = pull(cache, None, remote.url, sample_ids=[*asked, *asked_too])
    assert (report.exit_code, report.lost) == (1, asked_too)
    assert_same(stored(cache, config), expected)


def test_a_dry_run_tells_the_bytes_and_stores_nothing(remote, cache, config):
    """`dry_run` counts shards and bytes, and makes no file."""
    (entry,) = share(remote, config, some_embeddings(0, 3)).shards
    report = pull(cache, None, remote.url, dry_run=True)
    num_bytes = entry.num_bytes - entry.header_bytes
    assert (report.num_shards, report.bytes_to_fetch) == (1, num_bytes)
    assert not cache.root.exists()


def test_progress_ends_at_what_there_is(remote, cache, config):
    """Bytes are counted up to the size of all shards that are fetched."""
    manifest = share(remote, config, some_embeddings(0, 30), some_embeddings(30, 30))
    seen = []
    pull(cache, None, remote.url, progress=lambda done, total: seen.append((done, total)))
    total = sum(entry.num_bytes - entry.header_bytes for entry in manifest.shards)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_each_sample_keeps_who_computed_it(remote, filled, config, embeddings):
    """Origins name writer, manifest and place; what was computed here has none."""
    shared = share(remote, config, some_embeddings(0, 2), provenance={"weights_digest": "abc"})
    pull(filled, None, remote.url)
    checksums = dict(stored_checksums_of(filled, config))
    with SourceRecords(filled.path(config)) as records:
        found = records.origins(checksums)
    assert sorted(found) == ["clip_00000:drum", "clip_00001:dog"]
    origin = found["clip_00001:dog"]
    assert origin.writer == "node-a"
    detail = {"manifest": shared.id, "created": shared.created, "url": remote.url}
    assert origin.detail == detail
    assert origin.provenance == {"weights_digest": "abc"}


def stored_checksums_of(cache, config):
    with cache.reader(config) as reader:
        return [(key.decode(), found) for key, found in reader.checksums()]


def test_removing_a_store_removes_what_pulls_keep(remote, cache, config):
    """Copies of manifests go with the store."""
    share(remote, config, some_embeddings(0, 2))
    pull(cache, None, remote.url)
    assert list(cache.root.rglob("*.copy"))
    cache.clear(config)
    assert list(cache.root.iterdir()) == []


@pytest.mark.parametrize("window", [None, 1.0])
def test_lengths_of_clips_come_along(remote, cache, config, tmp_path, window):
    """Where they are known; neither a damaged list of them nor a missing one costs an embedding."""
    config = CacheConfig(window=window) if window else config
    names = [f"rec@0000{n}.000000:dog" if window else f"clip_{n}:dog" for n in range(5)]
    lengths = {name: 16000 - 100 * number for number, name in enumerate(names) if number != 3}
    here = EmbeddingCache(tmp_path / "here")
    recorder = SourceRecorder(here.path(config))
    with here.writer(config, before_commit=recorder) as writer:
        for name in names[::-1]:
            recorder.note(name, Source("", 0, None, None, num_valid=lengths.get(name)))
            writer.put(name, np.ones(8))
    push(here, config, remote.url)
    assert pull(cache, config, remote.url).exit_code == 0
    merged = EmbeddingCache(tmp_path / "merged")
    merge_stores(merged, [cache.path(config)])
    for each in (here, cache, merged):
        with each.reader(config) as reader:
            assert clip_lengths(reader, names) == lengths
    (path,) = (tmp_path / "shared" / config.fingerprint / "lengths").iterdir()
    for content, num_problems in ((path.read_bytes().replace(b"16", b"15"), 1), (None, 0)):
        path.unlink() if content is None else path.write_bytes(content)
        other = EmbeddingCache(tmp_path / f"other-{num_problems}")
        report = pull(other, config, remote.url)
        assert (report.num_new, len(report.problems)) == (5, num_problems)
        with other.reader(config) as reader:
            assert clip_lengths(reader, names) == {}
