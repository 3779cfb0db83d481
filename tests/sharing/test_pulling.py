"""`pull`: what is shared comes into a store, bit for bit, and nothing is fetched twice."""

from __future__ import annotations

import pytest
from sharing.shared_samples import put_commit, ragged_embeddings, shard_of, some_embeddings

from lmdbcache.sharing.pulling import pull


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


def test_a_pulled_store_is_what_was_shared(remote, cache, config):
    """Two shards come in bit for bit; the store is sound; again, nothing is fetched."""
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
