"""The extraction of clips that come one after the other, such as rows of a streamed dataset."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

from lmdbcache.audio import AudioSource
from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import AudioModel, device_of_rank, ready_model
from lmdbcache.errors import ConfigError
from lmdbcache.extraction.one_pass import configs_of_one_pass, for_one_or_several
from lmdbcache.extraction.pipeline import check_duration, extract
from lmdbcache.extraction.summary import ExtractionSummary

Stream: TypeAlias = Iterable[tuple[str, "str | os.PathLike[str] | AudioSource"]]

_ADDED: Final = (
    *("num_samples", "num_cached", "num_extracted", "num_suspects"),
    *("seconds", "compute_seconds", "silent", "cancelled", "equal", "failures"),
)


@for_one_or_several  # type: ignore[arg-type]  # `options` has neither cache nor config
def extract_stream(
    cache: EmbeddingCache,
    config: CacheConfig | Sequence[CacheConfig],
    clips: Stream,
    *,
    model: str | os.PathLike[str] | AudioModel | None = None,
    chunk_size: int = 256,
    device: str | None = None,
    **options: Any,
) -> list[ExtractionSummary]:
    """Run `extract` on clips that come one after the other and aren't kept.

    They are taken chunk by chunk; a chunk is extracted and committed before the next one is
    fetched. The model is loaded once, for the first clip that isn't stored. A run that was killed,
    or whose source broke, is run again with the same clips: what is stored is skipped. As long as
    the order of the clips and `chunk_size` stay, the embeddings have the bits of one whole run.

    Args:
        cache: Where to store.
        config: See `extract`.
        clips: (sample id, audio file, URL or `AudioSource`) of each clip, such as
            `stream_clips(dataset)` gives them; passed over once.
        model: See `extract`.
        chunk_size: How many clips are in memory at a time; a multiple of `batch_size`.
        device: See `extract`.
        options: Others of `extract`. `progress` gets the clips of the chunks so far.

    Returns:
        What was done, over all chunks: one for each config, without a list for one by itself.

    Raises:
        ConfigError: See `extract`, or `chunk_size` isn't a multiple of `batch_size`.
        CacheError: See `extract`.
    """
    configs = configs_of_one_pass(config)
    batch_size = options.get("batch_size", 8)
    if chunk_size < 1 or chunk_size % max(1, batch_size):
        raise ConfigError(
            f"chunk_size: {chunk_size}; it must be a multiple of `batch_size`, {batch_size}, so "
            "that all batches are whole"
        )
    found = ready_model(configs[0].model_name if model is None else model, configs[0])
    for one in configs:
        found.check(one)
    front_end = found.make_front_end(configs[0])
    check_duration(configs[0], front_end)
    share = options.get("share")
    chosen = device or device_of_rank(share.local_rank if share else 0)
    make_embedder = functools.cache(lambda: found.make_embedder(configs[0], chosen))
    progress = options.pop("progress", None)
    total: list[ExtractionSummary] = []
    num_before = 0
    for chunk in _chunks(clips, chunk_size):
        report = None
        if progress is not None:
            report = functools.partial(_further, progress, num_before)
        summaries = extract(
            cache,
            configs,
            chunk,
            model=model,
            front_end=front_end,
            make_embedder=make_embedder,
            progress=report,
            **options,
        )
        num_before += summaries[0].num_samples
        total = list(map(_sum, total, summaries)) or summaries
    return total or extract(cache, configs, {}, model=model, **options)


def _chunks(clips: Stream, size: int) -> Iterator[list[Any]]:
    clips = iter(clips)
    while chunk := list(itertools.islice(clips, size)):
        yield chunk


def _further(progress: Any, before: int, done: int, total: int) -> None:
    progress(before + done, before + total)


def _sum(first: ExtractionSummary, second: ExtractionSummary) -> ExtractionSummary:
    """Return what two chunks of one run did."""
    added = {name: getattr(first, name) + getattr(second, name) for name in _ADDED}
    if second.num_windows is not None:
        added["num_windows"] = second.num_windows + (first.num_windows or 0)
    return replace(
        second,
        **added,
        built_model=first.built_model or second.built_model,
        moved_model=second.moved_model or first.moved_model,
    )
