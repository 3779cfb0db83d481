"""The model of a run that has nothing to compute: are its weights those that filled the store?"""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import ModuleEmbedder, module_digest, moved_weights

__all__ = ["check_unbuilt_model"]

_logger: Final = logging.getLogger(__name__)


def check_unbuilt_model(cache: EmbeddingCache, config: CacheConfig, model: Any) -> str:
    """Compare the weights that a run of hits never builds with those that filled the store.

    A Hub name that stands for other weights now is a warning: the model at hand is only a name.
    Of a module at hand it is an error, as hits would pass for its embeddings.

    Args:
        cache: Where the hits are.
        config: Of their store.
        model: As `extract` takes it; None stands for the config's name.

    Returns:
        The warning; empty if there is none.

    Raises:
        ProvenanceMismatchError: A module with other weights.
    """
    name = config.model_name if model is None else model
    if not isinstance(name, (str, os.PathLike, ModuleEmbedder)) or config not in cache:
        return ""
    with cache.reader(config, track_usage=False) as reader:
        stored, store = reader.metadata, reader.path
    if isinstance(name, ModuleEmbedder):
        stored.with_provenance({"weights_digest": module_digest(name.module)}, store)
        return ""
    moved = moved_weights(name, stored.provenance, store)
    if moved:
        _logger.warning("%s", moved)
    return moved
