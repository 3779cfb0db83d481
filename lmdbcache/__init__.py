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
from typing import TYPE_CHECKING, Any

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.coverage import Coverage
from lmdbcache.dataset_coverage import DatasetCoverage
from lmdbcache.errors import CacheError, MissingDependencyError
from lmdbcache.explanation import Explanation
from lmdbcache.read_figures import EpochFigures, ReadFigures
from lmdbcache.storage.reader import EmbeddingReader
from lmdbcache.storage.writer import EmbeddingWriter
from lmdbcache.store_info import StoreInfo

if TYPE_CHECKING:
    from lmdbcache.datasets.vegas import VEGASDataset
    from lmdbcache.embedders.checkpoints import model_identity
    from lmdbcache.extraction.dataset_run import extract_or_load_ast_embeddings
    from lmdbcache.extraction.pipeline import extract
    from lmdbcache.training import (
        EmbeddingDataset,
        TensorMapping,
        collate_embeddings,
        make_dataloader,
        preload,
    )

__all__ = [
    "CacheConfig",
    "CacheError",
    "Coverage",
    "DatasetCoverage",
    "EmbeddingCache",
    "EmbeddingDataset",
    "EmbeddingReader",
    "EmbeddingWriter",
    "EpochFigures",
    "Explanation",
    "ReadFigures",
    "StoreInfo",
    "TensorMapping",
    "VEGASDataset",
    "collate_embeddings",
    "extract",
    "extract_or_load_ast_embeddings",
    "make_dataloader",
    "model_identity",
    "preload",
]

_LAZY = {
    "EmbeddingDataset": "lmdbcache.training",
    "TensorMapping": "lmdbcache.training",
    "VEGASDataset": "lmdbcache.datasets.vegas",
    "collate_embeddings": "lmdbcache.training",
    "extract": "lmdbcache.extraction.pipeline",
    "extract_or_load_ast_embeddings": "lmdbcache.extraction.dataset_run",
    "make_dataloader": "lmdbcache.training",
    "model_identity": "lmdbcache.embedders.checkpoints",
    "preload": "lmdbcache.training",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("lmdbcache")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        extra = "audio" if "extraction" in _LAZY[name] else "torch"
        raise MissingDependencyError(
            f'{name} needs the package {error.name}: pip install "lmdbcache[{extra}]"'
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
