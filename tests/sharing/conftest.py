"""A store to be shared, and a place to share it through."""

from __future__ import annotations

import uuid

import pytest

from lmdbcache.sharing.remote import Remote


@pytest.fixture
def remote(tmp_path):
    """An empty folder on this machine."""
    return Remote(f"file://{tmp_path}/shared")


@pytest.fixture
def in_memory():
    """An empty place in this process's memory."""
    return Remote(f"memory://{uuid.uuid4().hex}")
