"""Import into a cache of this test, and look at what came."""

from __future__ import annotations

import numpy as np
import pytest
from transfer.old_caches import FACTS

from lmdbcache import import_embeddings


@pytest.fixture
def bring(cache):
    """Import with FACTS given, if nothing else is; gives the report."""

    def bring(source, config=FACTS, **options):
        return import_embeddings(source, cache, config, **options)

    return bring


@pytest.fixture
def stored(cache):
    """What the store of a report holds, by sample id."""

    def stored(report):
        with cache.reader(report.config) as reader:
            return {sample_id: reader[sample_id] for sample_id in reader}

    return stored


@pytest.fixture
def came_along(bring, stored):
    """Import, and compare the store with arrays: same names, shapes and bits."""

    def came_along(source, arrays, config=FACTS, **options):
        report = bring(source, config, **options)
        assert report.refused == []
        assert report.exit_code == 0
        assert report.num_imported == report.num_verified == len(arrays)
        found = stored(report)
        assert found.keys() == arrays.keys()
        for sample_id, array in arrays.items():
            np.testing.assert_array_equal(found[sample_id], array, strict=True)
        return report

    return came_along
