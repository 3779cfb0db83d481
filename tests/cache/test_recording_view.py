"""One vector a recording, and recordings as samples of a training."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from lmdbcache import (
    CacheConfig,
    CachedAudioDataset,
    CachedEncoder,
    EmbeddingDataset,
    HiddenStateView,
    RecordingView,
    TokenLayout,
    make_dataloader,
    nearest,
    preload,
    window_id,
)
from lmdbcache.errors import ConfigError, SampleNotFoundError
from lmdbcache.storage import NUMPY_DTYPES, as_read, as_stored

NUM_WINDOWS = {"a:dog": 5, "b:cat": 1, "c:dog": 9}


@pytest.fixture(params=["float32", "float16", "bfloat16", "int8"])
def config(request):
    return CacheConfig(window=1.0, model_name="m", front_end="f", dtype=request.param)


def fill(cache, config, shape):
    """Windows of three recordings, and the rest of one; gives recording → windows."""
    values, dice = {}, np.random.default_rng(0)
    with cache.writer(config) as writer:
        for recording, number in NUM_WINDOWS.items():
            rows = as_stored("", dice.normal(size=(number, *shape)), config.dtype)
            rows = as_read(rows, config.dtype)
            values[recording] = rows.astype("f4")
            for k, row in enumerate(rows):
                writer.put(window_id(recording, 16000 * k, 16000), row)
        writer.put(window_id("part:dog", 16000, 16000), np.ones(shape))
    return values


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_one_vector_a_recording(cache, config, pool):
    """As numpy pools its windows, from a reader, a loader, RAM, and after pickling."""
    values = fill(cache, config, (7,))
    expected = {
        name: getattr(rows, pool)(0).astype(NUMPY_DTYPES[config.dtype]).astype("f4")
        for name, rows in values.items()
    }
    names = ["c:dog", "a:dog", "b:cat"]
    stacked = np.stack([expected[name] for name in names])
    with cache.reader(config) as reader:
        view = pickle.loads(pickle.dumps(RecordingView(reader, pool)))
        assert list(view) == sorted(values)
        assert (len(view), view.embedding_shape) == (3, (7,))
        assert "a:dog" in view
        assert "part:dog" not in view
        found = view.get_batch(names)
        assert found.dtype == view.dtype
        np.testing.assert_array_equal(found.astype("f4"), stacked)
        labels = {"dog": 0, "cat": 1}
        dataset = EmbeddingDataset(view, names, labels=labels)
        for source in (dataset, EmbeddingDataset(preload(view, names), names, labels=labels)):
            ((batch, targets),) = make_dataloader(source, 3)
            np.testing.assert_array_equal(batch.float().numpy(), stacked)
            assert targets.tolist() == [0, 0, 1]
        np.testing.assert_array_equal(dataset[1][0].float().numpy(), expected["a:dog"])
        with pytest.raises(SampleNotFoundError):
            view["part:dog"]
        view.reader.close()


def test_pooled_views_of_hidden_states(cache, config):
    """The mean over frames, then over windows."""
    config = config.replace(output="last_hidden_state")
    values = fill(cache, config, (6, 4))
    with cache.reader(config) as reader:
        view = RecordingView(HiddenStateView(reader, "mean", TokenLayout()))
        expected = np.stack([rows.mean(1).mean(0) for rows in values.values()])
        np.testing.assert_allclose(view.get_batch(list(values)).astype("f4"), expected, atol=2e-2)


def test_windows_are_samples_of_their_recordings(cache, config):
    """Ids and labels of recordings are those of their windows; none of another comes along."""
    values = fill(cache, config, (7,))
    with cache.reader(config) as reader:
        chosen = EmbeddingDataset(reader, ["c:dog", "b:cat"], labels=torch.tensor([3.5, 4.5]))
        assert len(chosen) == 10
        rows = torch.stack([chosen[n][0].float() for n in range(10)])
        np.testing.assert_array_equal(rows, np.concatenate([values["c:dog"], values["b:cat"]]))
        assert chosen.labels.tolist() == [3.5] * 9 + [4.5]
        by_name = EmbeddingDataset(reader, labels={"a:dog": 7, "dog": 1, "cat": 2})
        assert by_name.labels.tolist() == [7] * 5 + [2] + [1] * 9
        with pytest.raises(SampleNotFoundError):
            EmbeddingDataset(reader, ["part:dog"])


def test_what_takes_clips_refuses_windows(cache, config):
    """A dataset or encoder that embeds clips can't fill or read a store of windows."""
    for make in (
        lambda: CachedAudioDataset(cache, config, type("Empty", (), {"samples": []})()),
        lambda: CachedEncoder(cache, config, torch.nn.Linear(2, 2).requires_grad_(False)),
        lambda: RecordingView(_plain_reader(cache, config)),
        lambda: RecordingView(_plain_reader(cache, config), "median"),
    ):
        with pytest.raises(ConfigError):
            make()


def _plain_reader(cache, config):
    plain = config.replace(window=None)
    with cache.writer(plain) as writer:
        writer.put("clip:dog", np.ones(3))
    return cache.reader(plain)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_the_nearest_recordings(cache, metric):
    """A view's recordings are searched like samples, by their pooled values."""
    config = CacheConfig(window=1.0, model_name="m", front_end="f")
    means = {name: rows.mean(0) for name, rows in fill(cache, config, (7,)).items()}
    with cache.reader(config) as reader:
        ids, scores = nearest([RecordingView(reader)], "a:dog", 2, metric)
    query = means.pop("a:dog")
    scale = {name: np.linalg.norm(mean) * np.linalg.norm(query) for name, mean in means.items()}
    expected = {
        name: mean @ query / scale[name] if metric == "cosine" else np.linalg.norm(mean - query)
        for name, mean in means.items()
    }
    assert ids == sorted(expected, key=expected.__getitem__, reverse=metric == "cosine")
    np.testing.assert_allclose(scores, [expected[name] for name in ids], rtol=1e-5)


def test_nearest_by_a_window_but_not_by_a_recording(cache):
    """In a store of windows a window's id is a query; a recording's id has many vectors."""
    config = CacheConfig(window=1.0, model_name="m", front_end="f")
    fill(cache, config, (7,))
    with cache.reader(config) as reader:
        first, second = window_id("a:dog", 0, 16000), window_id("a:dog", 16000, 16000)
        for query in (first, second):
            assert query not in reader.nearest(query, 3).sample_ids
        with pytest.raises(SampleNotFoundError, match=f"one of its windows, such as '{first}'"):
            reader.nearest("a:dog")
