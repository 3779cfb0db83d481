"""Embeddings shared between machines: push, pull and verify over any file system fsspec knows."""

from lmdbcache.sharing.pull_report import PullReport
from lmdbcache.sharing.pulling import pull
from lmdbcache.sharing.push_report import PushReport
from lmdbcache.sharing.pushing import push
from lmdbcache.sharing.remote_report import RemoteReport
from lmdbcache.sharing.verifying import verify_remote

__all__ = ["PullReport", "PushReport", "RemoteReport", "pull", "push", "verify_remote"]
