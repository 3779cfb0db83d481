"""Stores of one config under several roots, and imports into one."""

from __future__ import annotations

import numpy as np
import pytest
from exchange.old_caches import FACTS

from lmdbcache import EmbeddingCache, import_embeddings


def numbered(first, last, size=8, seed=0):
    """Embeddings that depend on their number alone."""
    return {
        f"clip_{n:05d}:{'dog' if n % 2 else 'drum'}": np.random.default_rng([seed, n])
        .normal(size=size)
        .astype(np.float32)
        for n in range(first, last)
    }


@pytest.fixture
def store(tmp_path, config):
    """Makes a root of this name that holds these embeddings."""

    def store(name, embeddings, *, config=config, **options):
        cache = EmbeddingCache(tmp_path / name)
        with cache.writer(config, **options) as writer:
            writer.put_batch(embeddings, list(embeddings.values()))
        return cache

    return store


@pytest.fixture
def target(tmp_path):
    """The root to merge into; it doesn't exist yet."""
    return EmbeddingCache(tmp_path / "target")


def contents(cache, config):
    """All that a store holds, checked."""
    assert cache.verify(config).is_sound
    with cache.reader(config) as reader:
        return dict(reader)


def same(found, expected):
    """Whether both hold the same samples, bit for bit."""
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name].view(np.uint8), expected[name].view(np.uint8)) for name in found
    )


@pytest.fixture
def bring(cache):
    """Import with FACTS given, if nothing else is; gives the report."""

    def bring(source, config=FACTS, **options):
        return import_embeddings(cache, config, source, **options)

    return bring


@pytest.fixture
def stored(cache):
    """What the store of a report holds, by sample id."""

    def stored(report):
        with cache.reader(report.config) as reader:
            return {sample_id: reader[sample_id] for sample_id in reader}

    return stored


@pytest.fixture
def came_along(bring, stored):
    """Import, and compare the store with arrays: same names, shapes and bits."""

    def came_along(source, arrays, config=FACTS, **options):
        report = bring(source, config, **options)
        assert report.refused == []
        assert report.exit_code == 0
        assert report.num_new == len(arrays)
        found = stored(report)
        assert found.keys() == arrays.keys()
        for sample_id, array in arrays.items():
            np.testing.assert_array_equal(found[sample_id], array, strict=True)
        return report

    return came_along
