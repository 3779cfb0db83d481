"""lmdbcache: compute the embeddings of an audio model once, read them back at memory speed.

    from lmdbcache import CacheConfig, EmbeddingCache

    cache = EmbeddingCache("VEGAS.cache")
    config = CacheConfig(sample_rate=16000, duration=5.0, model_name="ast-finetuned")
    with cache.writer(config) as writer:
        writer.put("video_00001:dog", embedding)
    cache.reader(config)["video_00001:dog"]

What needs torch is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("lmdbcache")
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        from lmdbcache.errors import MissingDependencyError
        from lmdbcache.machine import install_line

        extra = "torch" if error.name == "torch" else "audio"
        raise MissingDependencyError(
            f"{name} needs the package {error.name}: {install_line(extra)}"
        ) from error
