"""The embeddings of one node: pulled to its disk, or its share of a cache on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context

from lmdbcache import EmbeddingCache, EmbeddingReader
from lmdbcache.datasets import partition_samples, sample_id_of
from lmdbcache.exchange import pull

__all__ = ["open_node", "settings_of"]


def settings_of(context: Context) -> dict[str, Any]:
    """What the run says, and what this node says otherwise (--node-config)."""
    return {**context.run_config, **context.node_config}


def open_node(settings: Mapping[str, Any]) -> tuple[EmbeddingReader, list[str]]:
    """A reader of the store, and the sample ids that are this node's.

    With a URL, what is missing here is pulled; a second call moves nothing. Without one, the store
    is there already: all clients of a simulation read one cache.
    """
    cache = EmbeddingCache(settings["cache-root"])
    fingerprint = settings["fingerprint"]
    listed = settings["samples"] and Path(settings["samples"]).read_text("utf-8").split()
    if settings["url"]:
        report = pull(
            cache,
            fingerprint,
            settings["url"],
            manifest=settings["manifest"] or None,
            sample_ids=listed or None,
        )
        if report.exit_code:
            raise RuntimeError(str(report))
    config = next(config for config in cache if config.fingerprint == fingerprint)
    reader = cache.reader(config)
    return reader, listed or _share_of(reader, settings)


def _share_of(reader: EmbeddingReader, settings: Mapping[str, Any]) -> list[str]:
    """This node's share of all that is stored; the nodes agree on it without talking."""
    parts = [sample_id.rpartition(":") for sample_id in reader]
    samples = [{"file_id": file_id, "class_name": name} for file_id, _, name in parts]
    shares = partition_samples(samples, settings["num-partitions"])
    return [sample_id_of(sample) for sample in shares[settings["partition-id"]]]
