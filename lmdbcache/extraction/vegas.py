"""The extraction for a whole dataset, in one call."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from lmdbcache.audio import Clips
from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.datasets import Sample
from lmdbcache.extraction.clips import to_clips
from lmdbcache.extraction.pipeline import extract
from lmdbcache.extraction.summary import ExtractionSummary
from lmdbcache.training import TensorMapping


class _ASTCachedDataset(Protocol):
    """What `VEGASDataset` offers; another dataset may offer the same."""

    samples: list[Sample]
    root_dir: str
    ast_cache_dir: str
    enable_ast_cache: bool
    audio_sample_rate: int
    audio_duration: float
    audio_embs_from_file: Any

    def stored_config(
        self, sample_rate: int, duration: float, model_name: str, output: str | None
    ) -> CacheConfig: ...

    def load_ast_embeddings_from_cache(
        self, sample_rate: int, duration: float, model_name: str, output: str | None
    ) -> bool: ...

    def filter_audio_embeddings_from_file(self) -> None: ...


def extract_or_load_ast_embeddings(
    dataset: _ASTCachedDataset,
    sample_rate: int | None = None,
    duration: float | None = None,
    model_name: str = "ast",
    *,
    output: str | None = None,
    **options: Any,
) -> ExtractionSummary:
    """Give a dataset its embeddings: load what is cached, extract and save only the rest.

    Afterwards `dataset.audio_embs` holds those of its active classes and `dataset[i]` carries
    `audio_emb`. The model isn't loaded when nothing is missing. With `enable_ast_cache=False` the
    embeddings are computed into memory and nothing is stored.

    Args:
        dataset: A `VEGASDataset`, or one with its calls.
        sample_rate: In Hz; None takes the dataset's.
        duration: In seconds; None takes the dataset's.
        model_name: Alias, Hub name, or checkpoint folder.
        output: `"pooler_output"`, `"last_hidden_state"` or `"mean"`; None takes what is stored
            for this model, else `"pooler_output"`.
        options: Passed to `extract`: model, batch_size, num_workers, device, progress, …

    Returns:
        What was done. Look at `failures`: a clip that can't be decoded has no embedding.

    Raises:
        ModelLoadError, ProvenanceMismatchError, CacheFullError: See `extract`.
    """
    rate = dataset.audio_sample_rate if sample_rate is None else sample_rate
    seconds = dataset.audio_duration if duration is None else duration
    config = dataset.stored_config(rate, seconds, model_name, output)
    options.setdefault("model", model_name)
    options.setdefault("dataset_root", Path(dataset.root_dir).absolute())
    clips = to_clips(dataset.samples)
    if not dataset.enable_ast_cache:
        dataset.audio_embs_from_file, summary = _extract_to_memory(config, clips, options)
    else:
        summary = extract(EmbeddingCache(dataset.ast_cache_dir), config, clips, **options)
        dataset.load_ast_embeddings_from_cache(rate, seconds, model_name, config.output)
    dataset.filter_audio_embeddings_from_file()
    return summary


def _extract_to_memory(
    config: CacheConfig, clips: Clips, options: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], ExtractionSummary]:
    with tempfile.TemporaryDirectory(prefix="lmdbcache-") as folder:
        cache = EmbeddingCache(folder)
        summary = replace(extract(cache, config, clips, **options), store=None)
        if config not in cache:
            return {}, summary
        with cache.reader(config) as reader:
            return dict(TensorMapping(reader)), summary
