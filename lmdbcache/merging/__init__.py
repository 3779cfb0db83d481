"""Embeddings of other stores, nodes and workers, brought into one store; nothing is computed."""

from lmdbcache.merging.merger import Merger
from lmdbcache.merging.report import Conflict, MergeReport, MergeReports, OnConflict, Refusal
from lmdbcache.merging.stores import merge_stores
from lmdbcache.sources.origins import THIS_STORE, Origin

__all__ = [
    "THIS_STORE",
    "Conflict",
    "MergeReport",
    "MergeReports",
    "Merger",
    "OnConflict",
    "Origin",
    "Refusal",
    "merge_stores",
]
