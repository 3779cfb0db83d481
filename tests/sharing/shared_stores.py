"""Whole pushes for the tests of `pull`, and what came of them."""

from __future__ import annotations

from pathlib import Path

from sharing.shared_samples import put_commit, shard_of


def share(remote, config, *parts, writer="node-a", **more):
    """Push each part as one shard, all with one commit."""
    entries, shape = [], None
    for part in parts:
        shape = more.pop("shape", shape) or next(iter(part.values())).shape
        entry, data = shard_of(config, part, shape)
        remote.write(f"{config.fingerprint}/{entry.path}", data)
        entries.append(entry)
    return put_commit(remote, config, entries, shape=shape, writer=writer, **more)


def stored(cache, config):
    with cache.reader(config) as reader:
        return {sample_id: reader[sample_id].copy() for sample_id in reader}


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for sample_id, value in expected.items():
        assert found[sample_id].dtype == value.dtype
        assert found[sample_id].tobytes() == value.tobytes(), sample_id


def shard_file(remote, config, entry):
    """The file of a shard, at a place that is a folder."""
    return Path(remote.url.removeprefix("file://")) / config.fingerprint / entry.path
