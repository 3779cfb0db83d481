"""`nearest` against a search by hand in float64."""

from __future__ import annotations

import numpy as np
import pytest

from lmdbcache import CacheConfig, EmbeddingCache, EmbeddingReader, HiddenStateView, nearest
from lmdbcache.errors import (
    CacheError,
    ConfigError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
    SampleNotFoundError,
)
from lmdbcache.storage import similarity, statistics_of

CONFIG = CacheConfig(duration=1.0, model_name="mine")


def by_hand(stored, query, k, metric):
    """(sample ids, scores) of a search over a dict of arrays."""
    rows = np.stack(list(stored.values())).astype(np.float64)
    query = np.asarray(query, np.float64)
    if metric == "cosine":
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
        scores = (rows @ query / np.where(lengths, lengths, 1)).astype(np.float32)
    else:
        scores = -np.linalg.norm(rows - query, axis=1).astype(np.float32)
    order = sorted(zip(-scores, stored, strict=True))[:k]
    scores = np.array([-score for score, _ in order])
    return [sample_id for _, sample_id in order], scores if metric == "cosine" else -scores


def filled(root, embeddings, config=CONFIG):
    cache = EmbeddingCache(root)
    with cache.writer(config) as writer:
        writer.put_batch(embeddings, embeddings.values())
    return cache.reader(config)


@pytest.fixture
def stored():
    """Vectors of 24 numbers: random ones, close ones, copies, zeros, and large ones."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(300, 24))
    rows[100:200] = rows[0] + 1e-4 * generator.normal(size=(100, 24))
    rows[200:240] = rows[1]
    rows[250] = 0
    rows[260:270] *= 1e3
    return {f"video_{n:05d}:x": row.astype(np.float32) for n, row in enumerate(rows)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_equals_a_search_by_hand(tmp_path, monkeypatch, stored, metric, dtype):
    """Ids in order and scores, over blocks that don't divide the store, with ties by sample id."""
    monkeypatch.setattr(similarity, "_BLOCK_BYTES", 24 * 4 * 70)
    monkeypatch.setattr(similarity, "_QUERIES_AT_ONCE", 2)
    with filled(tmp_path, stored, CONFIG.replace(dtype=dtype)) as reader:
        kept = {sample_id: row.astype(np.float32) for sample_id, row in reader.items()}
        rows = list(kept.values())
        queries = [rows[0], rows[1], 3 * rows[150], rows[265], np.ones(24)]
        for k in (1, 7, 50, 1000):
            results = reader.nearest(queries, k, metric)
            for query, (sample_ids, scores) in zip(queries, results, strict=True):
                expected, by_definition = by_hand(kept, query, k, metric)
                assert sample_ids == expected
                np.testing.assert_allclose(scores, by_definition, rtol=1e-6, atol=1e-7)
                assert scores.dtype == np.float32


def test_one_vector_gives_one_result(tmp_path, stored):
    """A query of (D,) isn't a list; a stored sample is left out of its own result."""
    with filled(tmp_path, stored) as reader:
        of_vector = reader.nearest(stored["video_00005:x"], k=4)
        of_sample = reader.nearest("video_00005:x", k=3)
        assert of_vector.sample_ids == ["video_00005:x", *of_sample.sample_ids]
        assert of_vector.scores[0] == 1
        assert reader.nearest("video_00005:x", 1000, "l2").sample_ids.count("video_00005:x") == 0


def test_several_stores_are_one(tmp_path, stored):
    """Two roots that share samples give what one with all gives; each sample once."""
    samples = list(stored.items())
    with (
        filled(tmp_path / "a", dict(samples[:200])) as a,
        filled(tmp_path / "b", dict(samples[150:])) as b,
        filled(tmp_path / "all", stored) as both,
    ):
        for query in ("video_00299:x", stored["video_00120:x"]):
            expected = both.nearest(query, 60)
            for readers in ([a, b], [b, a]):
                sample_ids, scores = nearest(readers, query, 60)
                assert sample_ids == expected.sample_ids
                np.testing.assert_array_equal(scores, expected.scores)


def test_a_view_is_searched(tmp_path):
    """A view of hidden states that gives vectors; the hidden states themselves are refused."""
    config = CONFIG.replace(output="last_hidden_state", front_end="mine/ast-fbank/1")
    hidden = np.random.default_rng(0).normal(size=(9, 26, 4))
    embeddings = {f"{n}:x": states for n, states in enumerate(hidden)}
    with filled(tmp_path, embeddings, config) as reader:
        view = HiddenStateView(reader, "cls")
        found = nearest([view], "3:x", 4)
        expected, _ = by_hand(
            {i: states[0] for i, states in embeddings.items()}, hidden[3, 0], 5, "cosine"
        )
        assert found.sample_ids == expected[1:]
        with pytest.raises(ConfigError, match="HiddenStateView"):
            reader.nearest("3:x")


def test_overflow_doesn_t_hide_the_nearest(tmp_path):
    """Values whose squares no float32 holds are compared in float64."""
    embeddings = {f"{n}:x": np.array([1e25, n * 1e25, 0]) for n in range(9)}
    with filled(tmp_path, embeddings) as reader:
        for metric in ("cosine", "l2"):
            assert reader.nearest("4:x", 2, metric).sample_ids == (
                ["5:x", "3:x"] if metric == "cosine" else ["3:x", "5:x"]
            )


def test_a_search_is_no_use(tmp_path, stored):
    """A search counts no hits; what the same reader reads afterwards counts as ever."""
    with filled(tmp_path, stored) as reader:
        reader.nearest("video_00001:x")
        reader.get_batch(list(stored))
        path = reader.path
    assert statistics_of(path).hits == 300


@pytest.mark.parametrize(
    ("query", "options", "error"),
    [
        ([np.nan] * 24, {}, InvalidEmbeddingError),
        ([np.inf] * 24, {}, InvalidEmbeddingError),
        ([0.0] * 24, {}, InvalidEmbeddingError),
        ([1.0] * 23, {}, InvalidEmbeddingError),
        (np.ones((1, 1, 24)), {}, InvalidEmbeddingError),
        (1.0, {}, InvalidEmbeddingError),
        ([["a"] * 24], {}, InvalidEmbeddingError),
        ("unknown:x", {}, SampleNotFoundError),
        ("no colon", {}, InvalidSampleIdError),
        ([1.0] * 24, {"k": 0}, ConfigError),
        ([1.0] * 24, {"metric": "euclid"}, ConfigError),
    ],
)
def test_a_query_that_means_nothing_is_refused(tmp_path, stored, query, options, error):
    """NaN, no direction, another width, an unknown sample: by its own class of error."""
    with filled(tmp_path, stored) as reader, pytest.raises(CacheError) as raised:
        reader.nearest(query, **options)
    assert type(raised.value) is error


def test_stores_that_can_t_be_compared_are_refused(tmp_path, stored):
    """Stores of two configs, of two widths, of lengths that differ; no store at all."""
    narrow = {sample_id: row[:5] for sample_id, row in stored.items()}
    cache = EmbeddingCache(tmp_path / "ragged")
    with cache.writer(CONFIG, ragged=True) as writer:
        writer.put("a:x", np.ones(3))
    with (
        filled(tmp_path / "a", stored) as reader,
        filled(tmp_path / "b", narrow) as other,
        filled(tmp_path / "c", stored, CONFIG.replace(dtype="float16")) as of_another_config,
        cache.reader(CONFIG) as ragged,
    ):
        for readers in ([], [reader, other], [reader, of_another_config], [ragged]):
            with pytest.raises(ConfigError):
                nearest(readers, np.ones(24))


def test_any_reader_of_the_package_searches(tmp_path, stored):
    """The class at the top is what a cache gives, and searches nothing if nothing is left."""
    with filled(tmp_path, stored) as reader:
        assert type(reader) is EmbeddingReader
    with EmbeddingCache(tmp_path).writer(CONFIG) as writer:
        writer.remove(list(stored))
    with EmbeddingReader(reader.path) as emptied:
        assert emptied.nearest(np.ones(24)).sample_ids == []
