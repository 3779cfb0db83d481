"""Damage anywhere in data.mdb: no signal, no wrong value with verification on, nothing called sound
that isn't; and what `repair` keeps is right.
"""

from __future__ import annotations

import numpy as np
import pytest
from storage.damage import cuts, data_file, flips, look, mend, outcomes

NUM_SAMPLES = 30


@pytest.fixture(params=[900, 20])
def damageable(request, cache, config):
    """A cache whose samples were all written twice, in several commits; and what it holds."""
    generator = np.random.default_rng(request.param)
    expected = {
        f"clip_{n:03d}:dog": generator.normal(size=request.param).astype(np.float32)
        for n in range(NUM_SAMPLES)
    }
    with cache.writer(config, on_duplicate="overwrite", commit_records=8) as writer:
        for is_last in (False, True):
            for sample_id in generator.permutation(list(expected)).tolist():
                writer.put(sample_id, expected[sample_id] if is_last else expected[sample_id] * 0)
    return cache, config, expected


def unexpected(counted):
    return [outcome for outcome in counted if outcome.startswith(("WRONG", "SIGNAL"))]


@pytest.mark.parametrize("reach", [None, 32])
def test_flipped_bytes(damageable, reach):
    """Anywhere, and in the headers and pointers of pages."""
    content = data_file(damageable[0], damageable[1]).read_bytes()
    counted = outcomes(*damageable, flips(content, 30, seed=11, reach=reach), look)
    assert not unexpected(counted)
    assert counted["damaged"] > 9


def test_truncations(damageable):
    """At every page's beginning and at odd places."""
    content = data_file(damageable[0], damageable[1]).read_bytes()
    counted = outcomes(*damageable, cuts(content, 6, seed=12), look)
    assert not unexpected(counted)
    assert counted["sound"] == 0


def test_repaired_after_flips_and_cuts(damageable):
    """What is kept is what was written last; most of it is kept."""
    content = data_file(damageable[0], damageable[1]).read_bytes()
    counted = outcomes(*damageable, flips(content, 10, seed=13), mend)
    assert not unexpected(counted)
    kept = [int(outcome.split()[1]) for outcome in counted.elements() if "kept" in outcome]
    assert len(kept) > 4  # a small store: its metadata record lies on one of a few pages
    assert np.mean(kept) > 0.8 * NUM_SAMPLES
    assert not unexpected(outcomes(*damageable, cuts(content, 3, seed=14), mend))
