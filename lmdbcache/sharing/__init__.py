"""Embeddings shared between machines: push, pull and verify over any file system fsspec knows."""

from lmdbcache.sharing.push_report import PushReport
from lmdbcache.sharing.pushing import push
from lmdbcache.sharing.remote_report import RemoteReport
from lmdbcache.sharing.verifying import verify_remote

__all__ = ["PushReport", "RemoteReport", "push", "verify_remote"]
