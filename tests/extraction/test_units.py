"""The batches of an extraction depend on the samples asked for alone."""

from __future__ import annotations

import random

from hypothesis import given, strategies as st

from lmdbcache.extraction.pipeline import units_of

_samples = st.sets(st.integers(0, 999).map(lambda number: f"{number:03d}:dog"), max_size=60)


@given(_samples, _samples, st.integers(1, 9), st.integers(1, 5))
def test_every_missing_sample_is_in_one_share(asked, stored, unit_size, world_size):
    """Ranks that look at different moments leave nothing out and compute nothing twice."""
    missing = asked - stored
    shares = []
    for rank in range(world_size):
        # Each rank sees the store as the others have left it so far.
        seen = missing - set(shares)
        units = units_of(random.sample(sorted(asked), len(asked)), seen, unit_size)
        shares += [sample_id for unit in units[rank::world_size] for sample_id in unit]
    assert sorted(shares) == sorted(missing)


@given(_samples, _samples, st.integers(1, 9))
def test_what_is_stored_moves_nothing_to_another_unit(asked, stored, unit_size):
    """A sample is computed beside the same others, whatever is stored already."""
    whole = units_of(asked, asked, unit_size)
    rest = units_of(asked, asked - stored, unit_size)
    assert rest == [[i for i in unit if i not in stored] for unit in whole]
