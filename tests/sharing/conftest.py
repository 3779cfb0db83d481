"""A store to be shared, and a place to share it through."""

from __future__ import annotations

import uuid

import pytest
from sharing.server_fixtures import (  # noqa: F401 - fixtures
    command_forks,
    kept,
    moto,
    nodes_at,
    on_file,
    on_moto,
    on_sftp,
    sftp,
)

from lmdbcache.exchange import Remote


@pytest.fixture
def remote(tmp_path):
    """An empty folder on this machine."""
    return Remote(f"file://{tmp_path}/shared")


@pytest.fixture
def in_memory():
    """An empty place in this process's memory."""
    return Remote(f"memory://{uuid.uuid4().hex}")
