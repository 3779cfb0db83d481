"""Why a config or a sample isn't found, in a sentence and as fields; and how much the log says."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing

import numpy as np
import pytest

from lmdbcache import CacheConfig
from lmdbcache.cache import FAILURES_NAME, ClipFailure, read_failures, update_failures
from lmdbcache.errors import CacheNotFoundError, SampleNotFoundError

OTHER = CacheConfig(duration=10)


def explained(cache, config, sample_id=None):
    """The explanation; its dict is plain JSON and names the same reason."""
    found = cache.explain(config, sample_id)
    content = json.loads(json.dumps(found.to_dict()))
    assert content["reason"] == found.reason
    assert content["text"] == str(found)
    assert "\n" not in str(found)
    return found


def test_config_that_is_stored_or_was_never(cache, filled, config, tmp_path):
    """Stored: the number of embeddings. An empty root: nothing is stored yet."""
    found = explained(filled, config)
    assert (found.reason, found.is_stored) == ("stored", True)
    assert "20 embeddings" in str(found)
    empty = type(cache)(tmp_path / "empty")
    found = explained(empty, config)
    assert (found.reason, found.is_stored, found.nearest) == ("nothing_stored", False, None)


def test_config_names_the_nearest_and_the_fields_that_differ(filled, config):
    """The store with the fewest differences, each with both values, and its size."""
    with filled.writer(config.replace(dtype="float16", duration=3)) as writer:
        writer.put("a:x", np.ones(3))
    found = explained(filled, OTHER)
    assert found.reason == "config_absent"
    assert found.nearest.config == config
    assert found.differences == {"duration": (10.0, 5.0)}
    assert "`duration=10.0` asked, 5.0 stored; 20 embeddings there" in str(found)
    with pytest.raises(CacheNotFoundError, match=r"10\.0.*5\.0"):
        filled.reader(OTHER)


@pytest.mark.parametrize("fuller", ["float16", "bfloat16"])
def test_of_two_as_near_the_fuller_store_is_named(cache, config, fuller):
    """Two stores differ in one field each: the one with more embeddings is the likelier."""
    for dtype in ("float16", "bfloat16"):
        with cache.writer(config.replace(dtype=dtype)) as writer:
            for number in range(3 if dtype == fuller else 2):
                writer.put(f"{number}:x", np.ones(3))
    with cache.writer(config.replace(dtype="float16", duration=9)) as writer:
        for number in range(9):  # fuller, but farther away
            writer.put(f"{number}:x", np.ones(3))
    found = explained(cache, config)
    assert found.nearest.config.dtype == fuller
    assert found.differences == {"dtype": ("float32", fuller)}


@pytest.mark.parametrize(
    ("changes", "is_told"),
    [
        ({"duration": 10.0}, True),
        ({"duration": 10.0, "dtype": "float16"}, True),
        ({"duration": 10.0, "dtype": "float16", "output": "mean"}, False),
        ({"model_name": "another"}, False),
        ({"namespace": "another"}, False),
    ],
)
def test_new_store_that_differs_little_is_told(filled, config, caplog, changes, is_told):
    """One or two fields look like a slip and are named; not three, a model or a dataset."""
    filled.explain(config.replace(**changes)).log_new_store()
    assert len(caplog.records) == is_told
    assert all(name in record.getMessage() for record in caplog.records for name in changes)
    caplog.clear()
    filled.explain(config).log_new_store()
    assert not caplog.records


def test_damaged_stores_are_named(filled, config):
    """A store that can't be read may be the one: both for itself and for its neighbour."""
    next(filled.path(config).rglob("data.mdb")).write_bytes(b"broken")
    found = explained(filled, config)
    assert found.reason == "damaged"
    assert str(next(filled.path(config).rglob("data.mdb"))) in str(found)
    found = explained(filled, OTHER)
    assert found.damaged == (filled.path(config),)
    assert filled.path(config).name in str(found)


@pytest.mark.parametrize(
    ("sample_id", "reason", "nearest"),
    [
        ("video_00001:dog", "stored", ()),
        ("video_00001:DOG", "stored", ()),
        ("video_00001:drum", "other_class", ("video_00001:dog",)),
        ("video_00100:dogs", "class_absent", ("dog",)),
        ("video_00111:dog", "file_absent", ("video_00011:dog",)),
        ("no class", "invalid_sample_id", ()),
    ],
)
def test_sample(filled, config, sample_id, reason, nearest):
    """What is absent of it, and what is there instead."""
    found = explained(filled, config, sample_id)
    assert (found.reason, found.is_stored) == (reason, reason == "stored")
    assert found.nearest_names[:1] == nearest
    assert all(name in str(found) for name in nearest)


def test_sample_that_failed_or_is_stored_elsewhere(filled, config):
    """A clip that gave no embedding: its reason. Another config that has it: which."""
    update_failures(filled.path(config), [], [ClipFailure("x:dog", "x.wav", "not a WAV file")])
    found = explained(filled, config, "x:dog")
    assert (found.reason, found.failure) == ("failed", "not a WAV file")
    with filled.writer(OTHER) as writer:
        writer.put("y:dog", np.ones(3))
    found = explained(filled, config, "y:dog")
    assert found.stored_elsewhere == (OTHER,)
    assert "`duration=10.0`" in str(found)
    found = explained(filled, config.replace(duration=7), "y:dog")
    assert (found.reason, len(found.stored_elsewhere)) == ("config_absent", 1)


def test_28000_misses_are_a_few_lines(filled, config, caplog):
    """The first of each class are explained, then only counted."""
    caplog.set_level(logging.DEBUG, "lmdbcache")
    with filled.reader(config) as reader:
        for number in range(28_000):
            with contextlib.suppress(SampleNotFoundError):  # pytest.raises takes longer by far
                reader[f"new_{number}:{('dog', 'cat', 'drum')[number % 3]}"]
    lines = [record.getMessage() for record in caplog.records if record.name == "lmdbcache"]
    assert len(lines) <= 15
    assert sum("nearest class" in line for line in lines) == 3
    assert "10,000 misses" in lines[-1]
    assert "cat: 3,333" in lines[-1]


@pytest.mark.timeout(
    60
)  # the explanation reads too: under a lock of the batch it would wait for ever
@pytest.mark.parametrize("asked", [["bad"], ["video_00001:dog", "bad"]])
def test_a_bad_id_in_a_batch_is_a_miss_that_is_explained(filled, config, caplog, asked):
    """What can't be a sample id is a miss by id and by position alike, and counted once."""
    with filled.reader(config) as reader:
        for read in (reader.get_batch, lambda ids: reader.select(ids).get_batch(range(len(ids)))):
            with pytest.raises(SampleNotFoundError, match="'bad'"):
                read(asked)
    assert len(caplog.records) == 2
    assert filled.statistics(config).misses == 2


def test_many_classes_are_a_few_dozen_lines(filled, config, caplog):
    """The number of classes doesn't matter."""
    with filled.reader(config) as reader:
        for number in range(500):
            assert reader.get(f"a:class {number}") is None
    assert len(caplog.records) <= 40


def test_get_or_compute_counts_and_explains_once(filled, config, caplog):
    """What was stored is a hit, what is computed a miss; another config is named in the log."""
    asked = ["video_00001:dog", "new:dog", "new:cat", "new:cat"]
    filled.get_or_compute(config, asked, lambda missing: np.ones((len(missing), 8)))
    filled.get_or_compute(config, asked, pytest.fail)
    figures = filled.statistics(config)
    assert figures.by_class == {"cat": (2, 2), "dog": (3, 1)}
    assert not caplog.records
    filled.get_or_compute(OTHER, ["a:dog"], lambda missing: np.ones((len(missing), 8)))
    (record,) = caplog.records
    assert "`duration=10.0` here, 5.0 there" in record.getMessage()
    assert filled.statistics(OTHER).by_class == {"dog": (0, 1)}
    metrics = filled.statistics(config).metrics()
    assert metrics["cache/hits"] == 5
    assert metrics["cache/hit_rate"] == pytest.approx(5 / 8)
    assert metrics["cache/hit_rate/cat"] == 0.5


_context = multiprocessing.get_context("fork")


def _fail(store, rank, barrier, rounds):
    for number in range(rounds):
        barrier.wait(240)
        update_failures(store, [], [ClipFailure(f"{rank}-{number}:dog", "x.wav", "empty")])
    barrier.wait(240)
    update_failures(store, [f"{rank}-0:dog"], [])


def test_simultaneous_runs_keep_each_others_failures(filled, config):
    """What one run adds or takes away stays so, whoever writes at the same moment."""
    store, ranks, rounds = filled.path(config), range(4), 15
    barrier = _context.Barrier(len(ranks))
    runs = [_context.Process(target=_fail, args=(store, r, barrier, rounds)) for r in ranks]
    for run in runs:
        run.start()
    for run in runs:
        run.join(240)
        assert run.exitcode == 0
    expected = {f"{rank}-{number}:dog" for rank in ranks for number in range(1, rounds)}
    assert {failure.sample_id for failure in read_failures(store)} == expected
    assert not list(store.glob(f"{FAILURES_NAME}.*"))


def test_no_list_where_nothing_is_stored(cache, config):
    """A folder with nothing but a list in it would look like a store."""
    update_failures(cache.path(config), [], [ClipFailure("x:dog", "x.wav", "empty")])
    assert not cache.root.exists()
