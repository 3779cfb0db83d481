"""Windows of recordings: their ids sort by time, and a recording is stored in full or missing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from storage.damage import data_file, flip_value

from lmdbcache import CacheConfig, EmbeddingReader
from lmdbcache.errors import ConfigError, InvalidSampleIdError, SampleNotFoundError
from lmdbcache.storage import (
    canonical_sample_id,
    first_window,
    recording_of,
    window_id,
    window_start,
)

RATE = 16000
# Beside the recording that is meant: names that begin as it does, and its name in another class.
OTHERS = ("rec:cat", "rec@home:dog", "rec@0:dog", "re:dog", "rec1:dog", "rec:x:dog")


@pytest.fixture
def config():
    return CacheConfig(window=1.0, hop=0.5, model_name="m", front_end="f")


@pytest.fixture
def filled(cache, config):
    """Eight windows of each recording; those of `part:dog` lack the first."""
    with cache.writer(config) as writer:
        for number, recording in enumerate(("rec:dog", *OTHERS, "part:dog")):
            for k in range(recording == "part:dog", 8):
                value = np.full(600, 10 * number + k + 1, "f4")
                writer.put(window_id(recording, 8000 * k, RATE), value)
    return cache


@given(st.lists(st.integers(0, 99_999 * 44_100), min_size=2), st.integers(1, 1_000_000))
def test_ids_are_in_the_order_of_time_and_name_the_sample(starts, rate):
    """At any rate up to 1 MHz, an id gives back the sample, and sorts as it does."""
    starts = sorted({start for start in starts if start / rate < 99_999})
    ids = [window_id("a:b:Dog", start, rate) for start in starts]
    assert ids == sorted(ids) == list(dict.fromkeys(ids))
    assert [window_start(each, rate) for each in ids] == starts
    assert {recording_of(each) for each in ids} <= {"a:b:Dog"}
    assert [canonical_sample_id(each) for each in ids] == [each.lower() for each in ids]


def test_an_id_holds_a_day_and_no_more():
    """What can't be in the order of time isn't made."""
    assert window_id("rec:dog", 199_680, RATE) == "rec@00012.480000:dog"
    assert first_window("rec:dog") == window_id("rec:dog", 0, RATE) == "rec@00000.000000:dog"
    with pytest.raises(InvalidSampleIdError):
        window_id("rec:dog", 100_000 * RATE, RATE)


def test_windows_of_a_recording_in_order(filled, config):
    """With their start times, and nothing of recordings whose names look alike."""
    with filled.reader(config) as reader, filled.reader(config, verify="always") as verified:
        for found in (reader.windows("rec:dog"), verified.windows("rec:Dog")):
            np.testing.assert_array_equal(found.starts, np.arange(8) / 2)
            np.testing.assert_array_equal(found.embeddings[:, 0], np.arange(1, 9))
            assert found.sample_ids[1] == "rec@00000.500000:dog"
        assert reader.windows("rec@home:dog").embeddings[0, 0] == 21
        assert sorted(reader.recordings()) == sorted({"rec:dog", *OTHERS})
        asked = ["rec:dog", "part:dog", "other:dog", "rec@00000.500000:dog", "none"]
        assert reader.missing(asked) == verified.missing(asked) == ["part:dog", "other:dog", "none"]
        assert len(reader.window_ids("part:dog")) == 7
        for missing in ("part:dog", "other:dog", "nonsense"):
            with pytest.raises(SampleNotFoundError):
                reader.windows(missing)


def test_a_store_of_windows_holds_windows_only(cache, config, filled):
    """Whatever writes one: a clip's embedding would never be found."""
    with cache.writer(config) as writer:
        with pytest.raises(InvalidSampleIdError):
            writer.put("clip:dog", np.ones(600, "f4"))
        with pytest.raises(InvalidSampleIdError):
            writer.put_batch(["clip:dog"], np.ones((1, 600), "f4"))
    plain = config.replace(window=None)
    with cache.writer(plain) as writer:
        writer.put("clip:dog", np.ones(3))
    with cache.reader(plain) as reader, pytest.raises(ConfigError):
        reader.windows("clip:dog")


@pytest.mark.parametrize("removed", ["rec@00002.000000:dog", "rec:dog"])
def test_a_recording_that_lost_a_window_is_missing(cache, config, filled, removed):
    """The first window goes with any other; a recording's id means all of them."""
    with cache.writer(config) as writer:
        assert writer.remove([removed]) == (8 if removed == "rec:dog" else 2)
    with EmbeddingReader(cache.path(config)) as reader:
        assert reader.missing(["rec:dog", *OTHERS]) == ["rec:dog"]
        assert len(reader.window_ids("rec:dog")) == (0 if removed == "rec:dog" else 6)


@pytest.mark.parametrize("is_page", [False, True])
def test_repair_makes_a_recording_missing_that_lost_a_window(cache, config, filled, is_page):
    """A damaged value takes its recording's first window along; an unnamed loss takes all."""
    data = data_file(cache, config)
    at = flip_value(data, np.full(600, 5, "f4"))
    if is_page:  # a byte of its page's header
        with data.open("r+b") as file:
            file.seek(at // 4096 * 4096 + 10)
            file.write(b"\xff")
    assert first_window("rec:dog") in cache.repair(config).dropped
    with cache.reader(config) as reader:
        missing = reader.missing(["rec:dog", *OTHERS])
        assert missing == (["rec:dog", *OTHERS] if is_page else ["rec:dog"])
