"""Embeddings shared between machines: push, pull and verify over any file system fsspec knows."""

from lmdbcache.sharing.pull_report import PullReport
from lmdbcache.sharing.pulling import pull
from lmdbcache.sharing.pushing import PushReport, push

__all__ = ["PullReport", "PushReport", "pull", "push"]
