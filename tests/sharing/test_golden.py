"""A place that was pushed once and is kept: every release reads it, and writes the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sharing.shared_stores import assert_same, assert_shared, store, stored

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.exchange import Remote, pull, push, verify_remote
from lmdbcache.exchange.sharing.manifests import encode_manifest
from lmdbcache.exchange.sharing.shards import encode_shard

GOLDEN = Path(__file__).with_name("golden")
POOLED = CacheConfig(namespace="vegas")
RAGGED = CacheConfig(namespace="vegas", output="last_hidden_state", dtype="float16")
VALUES = {
    POOLED: {
        name: np.arange(4, dtype=np.float32) / 4 + number
        for number, name in enumerate(["a:dog", "b:dog", "ü:hund"])
    },
    RAGGED: {f"v{number}:dog": np.full((number, 2), number, np.float16) for number in range(1, 4)},
}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_golden(folder: Path) -> None:
    """What is kept: two stores, each with a shard and a manifest."""
    remote = Remote(f"file://{folder}")
    for config, values in VALUES.items():
        shape = (4,) if config == POOLED else (None, 2)
        entry, data = encode_shard(config, shape, list(values), list(values.values()))
        manifest, record = encode_manifest(
            config,
            shape,
            "golden",
            "2026-11-30T00:00:00+00:00",
            provenance={"weights_digest": "0123456789abcdef"},
            shards=[entry],
        )
        remote.write(f"{config.fingerprint}/{entry.path}", data)
        remote.write(f"{config.fingerprint}/{manifest.path}", record)


def test_the_same_samples_are_the_same_bytes(tmp_path):
    """Names, which are digests, and contents."""
    write_golden(tmp_path)
    assert files(tmp_path) == files(GOLDEN)


@pytest.mark.parametrize("config", [POOLED, RAGGED], ids=["pooled", "ragged"])
def test_it_is_pulled_and_sound(tmp_path, config):
    """Values, origin and shape come in; the place stays as it is."""
    url, before = f"file://{GOLDEN}", files(GOLDEN)
    cache = EmbeddingCache(tmp_path / "cache")
    assert pull(cache, config, url).exit_code == 0
    assert_same(stored(cache, config), VALUES[config])
    assert cache.info(config).provenance == {"weights_digest": "0123456789abcdef"}
    assert push(cache, config, url).num_pushed == 0
    assert verify_remote(url).is_sound
    assert files(GOLDEN) == before


def test_a_push_adds_to_it(tmp_path):
    """Into a copy: the same shards, one manifest more."""
    write_golden(tmp_path / "shared")
    cache, remote = EmbeddingCache(tmp_path / "cache"), Remote(f"file://{tmp_path}/shared")
    more = {"c:dog": np.ones(4, np.float32)}
    store(cache, POOLED, {**VALUES[POOLED], **more})
    assert push(cache, POOLED, remote.url).num_pushed == 1
    assert_shared(remote, POOLED, {**VALUES[POOLED], **more})
