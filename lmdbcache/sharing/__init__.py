"""Embeddings shared between machines: push, pull and verify over any file system fsspec knows."""

from lmdbcache.sharing.pushing import PushReport, push

__all__ = ["PushReport", "push"]
