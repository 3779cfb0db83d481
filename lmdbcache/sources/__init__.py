"""Which file each embedding was computed from, and whether that file is still the same."""

from lmdbcache.sources.checking import (
    FoundSource,
    SourceReport,
    adopt_sources,
    check_sources,
    recorded_sources,
)
from lmdbcache.sources.files import Source, source_of
from lmdbcache.sources.origin_counts import count_origins
from lmdbcache.sources.origins import THIS_STORE, Origin
from lmdbcache.sources.records import SOURCES_NAME, SourceRecorder

__all__ = [
    "SOURCES_NAME",
    "THIS_STORE",
    "FoundSource",
    "Origin",
    "Source",
    "SourceRecorder",
    "SourceReport",
    "adopt_sources",
    "check_sources",
    "count_origins",
    "recorded_sources",
    "source_of",
]
