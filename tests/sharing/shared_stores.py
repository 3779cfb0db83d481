"""Whole pushes for the tests of `pull`, and what came of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sharing.shared_samples import put_manifest, shard_of

from lmdbcache.exchange.sharing.local_folder import LocalFolder
from lmdbcache.exchange.sharing.manifests import read_state
from lmdbcache.exchange.sharing.shards import decode_header


def share(remote, config, *parts, writer="node-a", **more):
    """Push each part as one shard, all with one manifest."""
    entries, shape = [], None
    for part in parts:
        shape = more.pop("shape", shape) or next(iter(part.values())).shape
        entry, data = shard_of(config, part, shape)
        remote.write(f"{config.fingerprint}/{entry.path}", data)
        entries.append(entry)
    return put_manifest(remote, config, entries, shape=shape, writer=writer, **more)


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


def store(cache, config, values, **options):
    """Put these into the store."""
    with cache.writer(config, **options) as writer:
        for sample_id, value in values.items():
            writer.put(sample_id, value)


def state_of(remote, config):
    """What is shared of a store, as a stranger reads it."""
    return read_state(remote, config.fingerprint, LocalFolder(None))


def shared(remote, config):
    """Sample id → the values that are shared."""
    found = {}
    for offer in state_of(remote, config).offers():
        entry = offer.entry
        data = remote.read(f"{config.fingerprint}/{entry.path}", 0, entry.num_bytes)
        assert hashlib.sha256(data).hexdigest() == entry.sha256
        header = decode_header(data[: entry.header_bytes], entry.path)
        assert header.config == config
        values = header.values(data)
        for row in offer.rows(header):
            found.setdefault(header.sample_ids[row], []).append(values[row])
    return found


def assert_shared(remote, config, values):
    """Exactly these are shared, bit for bit, each once."""
    found = shared(remote, config)
    assert found.keys() == values.keys()
    for sample_id, (value,) in found.items():
        assert value.dtype == values[sample_id].dtype
        assert value.tobytes() == values[sample_id].tobytes()
