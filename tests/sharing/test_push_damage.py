"""`push` where something is damaged, here or there: named, and all else is shared."""

from __future__ import annotations

import numpy as np
import pytest
from sharing.shared_samples import some_embeddings
from sharing.shared_stores import assert_shared, store

from lmdbcache import EmbeddingCache
from lmdbcache.errors import RemoteError
from lmdbcache.exchange import Remote, push, verify_remote
from lmdbcache.exchange.sharing import pushing
from lmdbcache.storage import current_generation


def test_a_damaged_value_is_never_pushed(remote, cache, config):
    """It is named; all others are pushed, and a repaired store pushes the rest."""
    values = some_embeddings(0, 30, shape=(64,))
    store(cache, config, values)
    path = current_generation(cache.path(config)) / "data.mdb"
    data = path.read_bytes()
    victim = sorted(values)[7]
    value = values[victim].tobytes()
    path.write_bytes(data.replace(value, value[:17] + bytes([value[17] ^ 4]) + value[18:]))
    report = push(cache, config, remote.url)
    assert list(report.damaged) == [victim]
    assert report.exit_code == 1
    assert_shared(remote, config, {name: v for name, v in values.items() if name != victim})


def test_a_damaged_key_is_never_pushed(remote, cache, config):
    """It is named, also where another sample is called what it should be called; others go."""
    values = {f"v:{name}": np.full(8, n, np.float32) for n, name in enumerate(["aog", "dog", "x"])}
    store(cache, config, values)
    path = current_generation(cache.path(config)) / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"v:aog", b"v:Dog"))
    report = push(cache, config, remote.url)
    assert (list(report.damaged), report.exit_code) == (["v:Dog"], 1)
    assert_shared(remote, config, {name: values[name] for name in ("v:dog", "v:x")})


def test_a_damaged_manifest_is_replaced(remote, cache, config):
    """Its samples count as missing; the shard is there already; the new one takes its place."""
    values = some_embeddings(0, 5)
    store(cache, config, values)
    first = push(cache, config, remote.url)
    remote.write(f"{config.fingerprint}/manifests/{first.manifest}.json", b"{}")
    assert not verify_remote(remote.url).is_sound
    report = push(cache, config, remote.url)
    assert (report.num_pushed, report.num_shards, report.num_uploaded) == (5, 1, 0)
    assert report.problems == {}
    assert_shared(remote, config, values)
    assert verify_remote(remote.url).is_sound


def test_what_vanished_is_pushed_again(remote, cache, config, monkeypatch):
    """A shard that a listing lacks, or has less of, is uploaded again under its name."""
    monkeypatch.setattr(pushing, "SHARD_BYTES", 32 * 10)
    values = some_embeddings(0, 30)
    store(cache, config, values)
    push(cache, config, remote.url)
    sound = remote.list_files(f"{config.fingerprint}/shards")
    names = sorted(sound)
    remote.remove(f"{config.fingerprint}/shards/{names[0]}")
    remote.write(f"{config.fingerprint}/shards/{names[1]}", b"cut")
    assert not verify_remote(remote.url).is_sound
    report = push(cache, config, remote.url)
    assert (report.num_there, report.num_pushed, report.num_uploaded) == (30, 0, 2)
    assert sorted(report.repaired) == [f"shards/{name}" for name in names[:2]]
    assert remote.list_files(f"{config.fingerprint}/shards") == sound
    assert_shared(remote, config, values)
    assert verify_remote(remote.url).is_sound


@pytest.mark.parametrize("position", [20, -1])
def test_a_flipped_bit_is_repaired_when_asked(remote, cache, config, tmp_path, position):
    """From any store that has the shard's embeddings, byte for byte; else it stays and is named."""
    values = some_embeddings(0, 30)
    store(cache, config, values)
    push(cache, config, remote.url)
    (name,) = remote.list_files(f"{config.fingerprint}/shards")
    path = tmp_path / "shared" / config.fingerprint / "shards" / name
    whole = path.read_bytes()
    data = bytearray(whole)
    data[position] ^= 4
    path.write_bytes(data)
    (store_report,) = verify_remote(remote.url).stores
    assert list(store_report.problems) == [f"shards/{name}"]
    poor, rich = EmbeddingCache(tmp_path / "poor"), EmbeddingCache(tmp_path / "rich")
    store(poor, config, some_embeddings(0, 3))
    assert push(poor, config, remote.url, repair=True, dry_run=True).repaired == []
    assert push(cache, config, remote.url, dry_run=True, repair=True).repaired == [f"shards/{name}"]
    assert path.read_bytes() == data
    store(rich, config, values)
    helper = cache if position == 20 else rich  # a damaged header is known by who has pushed it
    assert push(helper, config, remote.url, repair=True).repaired == [f"shards/{name}"]
    assert path.read_bytes() == whole
    assert verify_remote(remote.url).is_sound


def test_what_can_not_be_made_again_is_given_up_by_its_writer(remote, cache, config, tmp_path):
    """The rest of a damaged shard is pushed in another one, and the damaged one isn't listed."""
    values = some_embeddings(0, 30)
    store(cache, config, values)
    push(cache, config, remote.url)
    (name,) = remote.list_files(f"{config.fingerprint}/shards")
    remote.write(f"{config.fingerprint}/shards/{name}", b"cut")
    gone = sorted(values)[3]
    with cache.writer(config) as writer:
        writer.remove([gone])
    report = push(cache, config, remote.url)
    assert (report.num_pushed, list(report.problems)) == (29, [f"shards/{name}"])
    assert_shared(remote, config, {one: v for one, v in values.items() if one != gone})


def test_a_server_that_keeps_less_is_an_error(remote, cache, config, monkeypatch):
    """No manifest names a shard that isn't listed in its whole size; nor is a cut one accepted."""
    values = some_embeddings(0, 10)
    store(cache, config, values)
    original = Remote.write
    for kind in ("shards", "manifests"):
        monkeypatch.setattr(
            Remote,
            "write",
            lambda self, path, data, kind=kind: original(
                self, path, data[:-9] if kind in path else data
            ),
        )
        with pytest.raises(RemoteError):
            push(cache, config, remote.url)
    monkeypatch.setattr(Remote, "write", original)
    push(cache, config, remote.url)
    assert_shared(remote, config, values)
