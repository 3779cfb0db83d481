"""Embeddings, shards and manifests for the tests of sharing."""

from __future__ import annotations

import numpy as np

from lmdbcache.exchange.sharing.manifests import encode_manifest
from lmdbcache.exchange.sharing.shards import encode_shard
from lmdbcache.storage import NUMPY_DTYPES


def some_embeddings(first, number, *, dtype="float32", shape=(8,), seed=0):
    """Sample id → embedding; the same numbers for the same id and seed."""
    found = {}
    for index in range(first, first + number):
        values = np.random.default_rng([seed, index]).normal(size=shape)
        found[f"clip_{index:05d}:{'dog' if index % 2 else 'drum'}"] = values.astype(
            NUMPY_DTYPES[dtype]
        )
    return found


def ragged_embeddings(number, width=4):
    """Sample id → embedding of shape (1 to 5, width)."""
    return {
        f"clip_{index:05d}:dog": np.random.default_rng(index)
        .normal(size=(1 + index % 5, width))
        .astype(np.float32)
        for index in range(number)
    }


def shard_of(config, embeddings, shape=None):
    """The shard of these, and its bytes."""
    values = list(embeddings.values())
    return encode_shard(config, shape or values[0].shape, list(embeddings), values)


def put_manifest(remote, config, entries, *, shape=(8,), writer="node-a", **more):
    """Write a manifest that lists these shards."""
    manifest, data = encode_manifest(
        config, shape, writer, "2026-01-01T00:00:00+00:00", shards=entries, **more
    )
    remote.write(f"{config.fingerprint}/{manifest.path}", data)
    return manifest
