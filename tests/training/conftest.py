"""A frozen model that counts its passes, and an encoder around it."""

from __future__ import annotations

import pytest
from training.encoders import OWN, CountingEncoder

from lmdbcache import CachedEncoder


@pytest.fixture
def model():
    return CountingEncoder()


@pytest.fixture
def encoder(cache, model):
    with CachedEncoder(cache, OWN, model) as encoder:
        yield encoder
