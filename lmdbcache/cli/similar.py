"""`lmdbcache similar`: the stored samples most like one, like an audio file, or like a text."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from lmdbcache.cache import (
    ROOT_VARIABLE,
    EmbeddingCache,
    EmbeddingReader,
    HiddenStateView,
    info_or_damage,
    nearest,
)
from lmdbcache.cli.command import Argument, Option
from lmdbcache.cli.console import finish, print_table, say
from lmdbcache.cli.options import Device, Json, complete_store, find_folder, title_of
from lmdbcache.errors import CacheNotFoundError, ConfigError
from lmdbcache.files import expand_user
from lmdbcache.storage import Report


class Metric(str, Enum):
    """What is compared."""

    COSINE = "cosine"
    L2 = "l2"


@dataclass(frozen=True)
class SimilarSamples(Report):
    """The stored samples nearest to a query, nearest first.

    Args:
        query: Sample id, audio file or text.
        stores: Where was searched.
        metric: Of the scores.
        samples: Sample id → score.
    """

    query: str
    stores: list[Path]
    metric: Metric
    samples: dict[str, float]


def similar_command(
    query: Annotated[
        str | None, Argument(help="A stored sample (file_id:class), or an audio file.")
    ] = None,
    *,
    text: Annotated[
        str | None,
        Option(
            help="Search by a text instead; for stores of CLAP's audio_embeds.", show_default=False
        ),
    ] = None,
    stored: Annotated[
        str | None,
        Option(
            "--config",
            metavar="STORE",
            help="Fingerprint (its first digits do) or folder name of the store; default: the only "
            "one that can be searched.",
            complete=complete_store,
            show_default=False,
        ),
    ] = None,
    root: Annotated[
        list[Path] | None,
        Option(
            "--root",
            envvar=ROOT_VARIABLE,
            help="Cache directory; may be given several times, to search its stores as one.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, Option("-k", "--k", min=1, help="How many samples.")] = 10,
    metric: Annotated[
        Metric, Option(help="cosine similarity, or l2: Euclidean distance.")
    ] = Metric.COSINE,
    view: Annotated[
        str | None,
        Option(
            help="Search this view of hidden states: cls, mean, valid_mean, …", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        Option(
            help="Hub name or checkpoint folder that embeds the file or text; default: the one "
            "that the store was filled from.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the stored samples most like a sample, an audio file, or a text.

    Every embedding is compared. A file or a text is embedded by the model that filled the store.
    """
    if (query is None) == (text is None):
        raise ConfigError("give one of: a sample id, an audio file, --text")
    if query is not None and ":" not in query and not expand_user(query).is_file():
        raise ConfigError(f"{query} is neither a file that is there nor a sample id, file_id:class")
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(EmbeddingReader(folder, track_usage=False))
            for folder in _chosen(root or [None], stored, is_view=view is not None)
        ]
        if not view and len(readers[0].embedding_shape or ()) > 1:
            kind = "hidden states; search a view of them: --view mean"
            if readers[0].config.output.startswith("layers"):
                kind = "every layer; search a store of one, --output layer:6/mean"
            raise ConfigError(f"{readers[0].path} holds {kind}")
        sources = [HiddenStateView(reader, view) for reader in readers] if view else readers
        wanted: Any = query
        if text is not None:
            from lmdbcache.extraction import embed_text

            wanted = embed_text(readers[0], text, model=model)
        elif query is not None and expand_user(query).is_file():
            if view:
                raise ConfigError("--view is searched by sample id; this is a file")
            from lmdbcache.extraction import embed_clip

            wanted = embed_clip(readers[0], expand_user(query), model=model, device=device)
        found: Any = nearest(sources, wanted, k, metric.value)
        samples = dict(zip(found.sample_ids, found.scores.tolist(), strict=True))
        report = SimilarSamples(
            text or query or "", [reader.path for reader in readers], metric, samples
        )
    finish(report, _show, as_json=as_json)


def _chosen(roots: Sequence[Path | None], name: str | None, *, is_view: bool) -> list[Path]:
    """Return the stores of one config to search: those that are named, or the only ones."""
    caches = [EmbeddingCache(root) for root in roots]
    if name is not None:
        named = []
        for cache in caches:
            with contextlib.suppress(CacheNotFoundError):
                named.append(find_folder(cache, name))
        return named or [find_folder(caches[0], name)]
    num_dimensions = 2 if is_view else 1
    found = defaultdict[str, list[Path]](list)
    for info in map(info_or_damage, (folder for cache in caches for folder in cache.folders())):
        if info.config is not None and len(info.embedding_shape or ()) == num_dimensions:
            found[title_of(info)].append(info.path)
    where = ", ".join(str(cache.root) for cache in caches)
    if not found:
        kind = "hidden states" if is_view else "one vector a sample (hidden states: --view mean)"
        raise CacheNotFoundError(f"no store under {where} holds {kind}; is --root right?")
    if len(found) > 1:
        raise ConfigError(
            f"{len(found)} stores under {where} can be searched: {'; '.join(found)}. Choose one: "
            "--config"
        )
    return next(iter(found.values()))


def _show(report: SimilarSamples) -> None:
    heading = "cosine" if report.metric is Metric.COSINE else "L2 distance"
    rows = [(sample_id, f"{score:.4f}") for sample_id, score in report.samples.items()]
    if rows:
        print_table(("sample", heading), rows)
    else:
        say("nothing else is stored")
