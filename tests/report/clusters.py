"""Stores of random vectors in clusters, one cluster for each class."""

from __future__ import annotations

import numpy as np

from lmdbcache import CacheConfig, EmbeddingCache

CONFIG = CacheConfig(duration=1.0, model_name="mine", namespace="vegas")


def clustered(num_per_class, classes, *, hidden_size=16, spread=0.2, seed=0):
    """(hidden_size,) float32 embeddings by sample id, near their class's centre."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(len(classes), hidden_size))
    return {
        f"video_{number:05d}:{name}": (centre + spread * generator.normal(size=hidden_size)).astype(
            np.float32
        )
        for name, centre in zip(classes, centres, strict=True)
        for number in range(num_per_class)
    }


def store(root, embeddings, config=CONFIG, **options):
    """A cache that holds the embeddings; nothing is open."""
    cache = EmbeddingCache(root)
    with cache.writer(config, **options) as writer:
        for sample_id, embedding in embeddings.items():
            writer.put(sample_id, embedding)
    return cache
