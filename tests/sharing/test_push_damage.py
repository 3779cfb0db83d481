"""`push` where something is damaged, here or there: named, and all else is shared."""

from __future__ import annotations

import numpy as np
import pytest
from sharing.shared_samples import some_embeddings
from sharing.shared_stores import assert_shared, store

from lmdbcache.errors import RemoteError
from lmdbcache.exchange import Remote, push
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


def test_what_a_damaged_commit_listed_is_pushed_again(remote, cache, config):
    """Its samples count as missing; the shard is there already."""
    values = some_embeddings(0, 5)
    store(cache, config, values)
    first = push(cache, config, remote.url)
    path = f"{config.fingerprint}/commits/{first.commit}.json"
    remote.write(path, b"{}")
    report = push(cache, config, remote.url)
    assert (report.num_pushed, report.num_shards, report.num_uploaded) == (5, 1, 0)
    assert list(report.problems) == [f"commits/{first.commit}.json"]
    assert_shared(remote, config, values)


def test_what_vanished_is_pushed_again(remote, cache, config):
    """A commit isn't believed where a listing lacks its shard, or has less of it."""
    values = some_embeddings(0, 30)
    store(cache, config, values)
    push(cache, config, remote.url, shard_bytes=32 * 10)
    names = sorted(remote.list_files(f"{config.fingerprint}/shards"))
    remote.remove(f"{config.fingerprint}/shards/{names[0]}")
    remote.write(f"{config.fingerprint}/shards/{names[1]}", b"cut")
    report = push(cache, config, remote.url, shard_bytes=32 * 10)
    assert (report.num_there, report.num_pushed, report.num_uploaded) == (10, 20, 2)
    assert sorted(report.problems) == [f"shards/{name}" for name in names[:2]]
    assert_shared(remote, config, values)
    assert not push(cache, config, remote.url).problems


def test_a_shard_that_a_server_cut_is_uploaded_again(remote, cache, config, monkeypatch):
    """No commit names a shard that isn't listed in its whole size."""
    values = some_embeddings(0, 10)
    store(cache, config, values)
    original, cut = Remote.write, []

    def cutting(self, path, data):
        if "shards" in path and len(cut) < 2:
            cut.append(path)
            data = data[:-1]
        original(self, path, data)

    monkeypatch.setattr(Remote, "write", cutting)
    report = push(cache, config, remote.url)
    assert report.num_uploaded == 3
    assert_shared(remote, config, values)
    monkeypatch.setattr(
        Remote, "write", lambda self, path, data: original(self, path, data[: len(data) // 2])
    )
    store(cache, config, some_embeddings(10, 1))
    with pytest.raises(RemoteError, match="isn't there, or not whole"):
        push(cache, config, remote.url)


def test_a_commit_that_a_server_cut_is_told(remote, cache, config, monkeypatch):
    """A push doesn't end well unless its commit is there in its whole size."""
    store(cache, config, some_embeddings(0, 3))
    original = Remote.write

    def cutting(self, path, data):
        original(self, path, data[:-9] if "/commits/" in path else data)

    monkeypatch.setattr(Remote, "write", cutting)
    with pytest.raises(RemoteError, match=r"commit .* has \d+ of \d+ bytes.*Push again"):
        push(cache, config, remote.url)
    monkeypatch.setattr(Remote, "write", original)
    push(cache, config, remote.url)
    assert_shared(remote, config, some_embeddings(0, 3))
