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
from lmdbcache.hidden_states import HiddenStateView, TokenLayout
from lmdbcache.read_figures import EpochFigures, ReadFigures
from lmdbcache.storage.reader import EmbeddingReader
from lmdbcache.storage.writer import EmbeddingWriter
from lmdbcache.store_info import StoreInfo

if TYPE_CHECKING:
    from lmdbcache.datasets.cached_audio import CachedAudioDataset, collate_mixed
    from lmdbcache.datasets.opening import open_dataset
    from lmdbcache.datasets.vegas import VEGASDataset
    from lmdbcache.embedders.checkpoints import model_identity
    from lmdbcache.embedders.module_embedder import ModuleEmbedder
    from lmdbcache.embedders.registry import config_for
    from lmdbcache.extraction.dataset_run import extract_or_load_ast_embeddings
    from lmdbcache.extraction.launchers import share_from_environment
    from lmdbcache.extraction.pipeline import extract
    from lmdbcache.extraction.samples import clips_of
    from lmdbcache.extraction.shares import Share
    from lmdbcache.report import build_report
    from lmdbcache.training import (
        CachedEncoder,
        EmbeddingDataset,
        TensorMapping,
        collate_embeddings,
        make_dataloader,
        preload,
    )
    from lmdbcache.transfer import export_embeddings, import_embeddings

__all__ = [
    "CacheConfig",
    "CacheError",
    "CachedAudioDataset",
    "CachedEncoder",
    "Coverage",
    "DatasetCoverage",
    "EmbeddingCache",
    "EmbeddingDataset",
    "EmbeddingReader",
    "EmbeddingWriter",
    "ModuleEmbedder",
    "HiddenStateView",
    "EpochFigures",
    "Explanation",
    "ReadFigures",
    "Share",
    "StoreInfo",
    "TensorMapping",
    "TokenLayout",
    "VEGASDataset",
    "build_report",
    "clips_of",
    "collate_embeddings",
    "config_for",
    "export_embeddings",
    "collate_mixed",
    "extract",
    "extract_or_load_ast_embeddings",
    "import_embeddings",
    "make_dataloader",
    "model_identity",
    "open_dataset",
    "preload",
    "share_from_environment",
]

_LAZY = {
    "CachedAudioDataset": "lmdbcache.datasets.cached_audio",
    "CachedEncoder": "lmdbcache.training",
    "EmbeddingDataset": "lmdbcache.training",
    "ModuleEmbedder": "lmdbcache.embedders.module_embedder",
    "Share": "lmdbcache.extraction.shares",
    "TensorMapping": "lmdbcache.training",
    "VEGASDataset": "lmdbcache.datasets.vegas",
    "build_report": "lmdbcache.report",
    "clips_of": "lmdbcache.extraction.samples",
    "collate_embeddings": "lmdbcache.training",
    "config_for": "lmdbcache.embedders.registry",
    "export_embeddings": "lmdbcache.transfer",
    "collate_mixed": "lmdbcache.datasets.cached_audio",
    "extract": "lmdbcache.extraction.pipeline",
    "extract_or_load_ast_embeddings": "lmdbcache.extraction.dataset_run",
    "import_embeddings": "lmdbcache.transfer",
    "make_dataloader": "lmdbcache.training",
    "model_identity": "lmdbcache.embedders.checkpoints",
    "open_dataset": "lmdbcache.datasets.opening",
    "preload": "lmdbcache.training",
    "share_from_environment": "lmdbcache.extraction.launchers",
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
