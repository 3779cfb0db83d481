"""Views of stored hidden states: the model's own numbers, read from a few bytes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from small_ast import save_small_ast
from storage.damage import data_file, flip_value
from torch.utils.data import DataLoader
from transformers import ASTModel

from lmdbcache import (
    CacheConfig,
    EmbeddingDataset,
    HiddenStateView,
    TensorMapping,
    TokenLayout,
    collate_embeddings,
    make_dataloader,
    preload,
)
from lmdbcache.config import DEFAULT_FRONT_END
from lmdbcache.embedders import ASTEmbedder, ASTFrontEnd, find_checkpoint
from lmdbcache.errors import ConfigError, IntegrityError, InvalidEmbeddingError, SampleNotFoundError
from lmdbcache.storage import NUMPY_DTYPES, Selection, as_read, as_stored

HIDDEN = CacheConfig(output="last_hidden_state")
NAMES = [f"{n:02d}:x" for n in range(10)]


def by_hand(hidden):
    """The seven views of (n, 2 + 12 * 4, width) for a duration of 2 valid steps."""
    bands = hidden[:, 2:].reshape(len(hidden), 12, 4, -1)
    valid = bands[:, :, :2].reshape(len(hidden), 24, -1)
    return {
        "cls": hidden[:, 0],
        "distillation": hidden[:, 1],
        "pooler_output": (hidden[:, 0] + hidden[:, 1]) / 2,
        "mean": hidden[:, 2:].mean(1, dtype=np.float64),
        "valid_mean": valid.mean(1, dtype=np.float64),
        "frames": hidden[:, 2:],
        "valid": valid,
    }


# 0.275 s: 26 frames, the first step sees 0 to 15, the second 10 to 25.
def small_config(dtype="float32"):
    return HIDDEN.replace(duration=0.275, dtype=dtype)


@pytest.fixture
def hidden():
    return np.random.default_rng(0).normal(size=(10, 50, 6)).astype(np.float32)


@pytest.fixture
def reader(cache, hidden):
    with cache.writer(small_config()) as writer:
        writer.put_batch(NAMES, hidden)
    with cache.reader(small_config()) as reader:
        yield reader


@pytest.mark.parametrize("width", [6, 700])  # inside pages, and more than 64 KiB a value
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_views_are_the_rows_that_their_name_says(cache, dtype, width):
    """Single rows bit for bit, means as close as the dtype allows, in the order asked for."""
    config = small_config(dtype)
    hidden = np.random.default_rng(0).normal(size=(10, 50, width))
    hidden = as_read(as_stored("", hidden, dtype), dtype)
    with cache.writer(config) as writer:
        writer.put_batch(NAMES, hidden)
    with cache.reader(config) as reader:
        for name, expected in by_hand(hidden.astype(np.float32)).items():
            check_view(HiddenStateView(reader, name), expected)
        np.testing.assert_array_equal(reader["00:x"], hidden[0])


def check_view(view, expected):
    order, dtype = [3, 3, 9, 0], view.config.dtype
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2, "int8": 1e-6}[dtype]
    if view.name in ("cls", "distillation", "frames", "valid"):
        tolerance = 0
    assert view.embedding_shape == expected.shape[1:]
    selected = view.select(NAMES)
    for found in (
        view.get_batch([NAMES[n] for n in order]),
        np.stack([view[NAMES[n]] for n in order]),
        selected.get_batch(order),
        selected.get_batch(order),
        EmbeddingDataset(view, NAMES).fetch(order).float().numpy(),
        EmbeddingDataset(view, NAMES).fetch(order, in_background=True).float().numpy(),
        preload(view, NAMES).embeddings.float().numpy()[order],
    ):
        assert found.shape == expected[order].shape
        np.testing.assert_allclose(
            found.astype(np.float32),
            expected[order].astype(NUMPY_DTYPES[dtype]).astype(np.float32),
            rtol=tolerance,
            atol=tolerance,
        )
    assert view["00:x"].dtype == view.dtype == NUMPY_DTYPES[dtype]
    view["00:x"][...] = 0  # a copy


def test_equals_the_model_s_own_outputs(cache, tmp_path):
    """Hidden states of a real AST give its pooled output and its outputs, within 1e-6."""
    folder = save_small_ast(tmp_path / "ast", max_length=128)
    checkpoint = find_checkpoint(folder)
    config = HIDDEN.replace(model_name=checkpoint.identity, duration=0.5)
    noise = np.random.default_rng(1).normal(size=(3, 8000)).astype(np.float32)
    front_end = ASTFrontEnd(checkpoint, 16000)
    features = torch.from_numpy(np.stack([front_end(0.1 * waveform) for waveform in noise]))
    with cache.writer(config) as writer:
        hidden = ASTEmbedder(checkpoint, "last_hidden_state", "cpu").embed(features)
        writer.put_batch(NAMES[:3], hidden)
    with torch.no_grad():
        own = ASTModel.from_pretrained(folder).eval()(features)
    with cache.reader(config) as reader:
        for name in ("pooler_output", "mean"):
            expected = ASTEmbedder(checkpoint, name, "cpu").embed(features).numpy()
            found = HiddenStateView(reader, name).get_batch(NAMES[:3])
            np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
        pooled = HiddenStateView(reader, "pooler_output").get_batch(NAMES[:3])
        np.testing.assert_allclose(pooled, own.pooler_output.numpy(), atol=1e-6, rtol=0)
        cls = HiddenStateView(reader, "cls").get_batch(NAMES[:3])
        np.testing.assert_array_equal(cls, hidden[:, 0].numpy())
        # 0.5 s are 48 frames: four steps of 16 frames, every 10.
        assert HiddenStateView(reader, "valid").embedding_shape == (12 * 4, 64)


def test_patch_tokens_are_ordered_by_band_then_time(tmp_path):
    """A change of the last feature frames changes the patches of the last steps in every band."""
    model = ASTModel.from_pretrained(save_small_ast(tmp_path, max_length=128)).eval()
    features = torch.randn(1, 128, 128)
    changed = features.clone()
    changed[:, 110:] += 1  # what the last two of 12 steps see: 100 to 115, 110 to 125
    with torch.no_grad():
        patches = [model.embeddings.patch_embeddings(one)[0] for one in (features, changed)]
    differs = (patches[0] != patches[1]).any(-1).view(12, 12)
    assert differs[:, 10:].all()
    assert not differs[:, :10].any()


def test_valid_steps_of_ast():
    """Those whose 16 frames of 25 ms, 10 ms apart, fit into the duration; at least one."""
    layout = TokenLayout.ast()
    assert layout.tokens_per_step == 12
    assert layout.num_steps(1214) == 101
    seconds = {5.0: 49, 10.0: 99, 10.24: 101, 0.1: 1, 0.175: 1, 0.275: 2}
    for duration, steps in seconds.items():
        assert layout.num_valid_steps(CacheConfig(duration=duration)) == steps
    for num_tokens in (1213, 2, 1):  # no whole number of steps, and none at all
        with pytest.raises(ConfigError, match=str(num_tokens)):
            layout.num_steps(num_tokens)


@pytest.mark.parametrize("duration", [0.475, 5.0])  # exactly the four steps, and far more
def test_clip_longer_than_the_model_s_window_is_valid_throughout(cache, hidden, duration):
    """No more steps are valid than there are: all frames, and nothing behind them."""
    config = HIDDEN.replace(duration=duration)
    with cache.writer(config) as writer:
        writer.put_batch(NAMES, hidden)
    with cache.reader(config) as reader:
        valid = HiddenStateView(reader, "valid").get_batch(NAMES)
        np.testing.assert_array_equal(valid, hidden[:, 2:])
        mean = HiddenStateView(reader, "valid_mean").get_batch(NAMES)
        np.testing.assert_allclose(mean, hidden[:, 2:].mean(1), atol=1e-6)


def test_means_are_taken_in_float32(cache):
    """A sum that float16 can't hold still has its mean."""
    config = small_config("float16")
    with cache.writer(config) as writer:
        writer.put("a:x", np.full((50, 6), 30_000.0))
    with cache.reader(config) as reader:
        for name in ("mean", "valid_mean", "pooler_output"):
            assert HiddenStateView(reader, name)["a:x"].tolist() == [30_000.0] * 6
            (one,) = HiddenStateView(reader, name).get_batch(["a:x"]).tolist()
            assert one == [30_000.0] * 6


def test_padding_does_not_reach_valid_tokens_input(tmp_path):
    """The patches called valid are the same whatever stands in the padded frames."""
    model = ASTModel.from_pretrained(save_small_ast(tmp_path, max_length=128)).eval()
    front_end = ASTFrontEnd(find_checkpoint(tmp_path), 16000)
    waveform = np.random.default_rng(0).normal(size=8000).astype(np.float32)
    features = torch.from_numpy(front_end(waveform))[None]
    padding = features[0, -1]
    num_frames = int((features[0] != padding).any(-1).sum())
    assert num_frames == 48
    noisy = features.clone()
    noisy[:, num_frames:] = torch.randn(128 - num_frames, 128)
    with torch.no_grad():
        first, second = (
            model.embeddings.patch_embeddings(one)[0].view(12, 12, -1) for one in (features, noisy)
        )
    valid = TokenLayout.ast().num_valid_steps(CacheConfig(duration=0.5))
    assert torch.equal(first[:, :valid], second[:, :valid])
    assert not torch.equal(first[:, valid], second[:, valid])


@pytest.mark.parametrize(
    "front_end", ["own/1", CacheConfig().front_end.replace("ast-fbank/1", "log-mel/1")]
)
def test_another_model_s_layout(cache, front_end):
    """One token per step and none in front: mean and frames; the rest is no view of it."""
    config = small_config().replace(front_end=front_end, model_name="own", duration=0.1)
    hidden = np.random.default_rng(0).normal(size=(3, 20, 4)).astype(np.float32)
    with cache.writer(config) as writer:
        writer.put_batch(NAMES[:3], hidden)
    layout = TokenLayout(hop_milliseconds=20, window_milliseconds=25)  # wav2vec 2.0's
    with cache.reader(config) as reader:
        with pytest.raises(ConfigError):
            HiddenStateView(reader, "mean")
        mean = HiddenStateView(reader, "mean", layout).get_batch(NAMES[:3])
        np.testing.assert_allclose(mean, hidden.mean(1), atol=1e-6)
        valid = HiddenStateView(reader, "valid", layout).get_batch(NAMES[:3])
        np.testing.assert_array_equal(valid, hidden[:, :4])  # 25, 45, 65 and 85 ms
        for name in ("cls", "pooler_output", "valids"):
            with pytest.raises(ConfigError):
                HiddenStateView(reader, name, layout)


def test_special_tokens_without_a_pooled_output(cache, hidden):
    """A CLS token alone is a view by its name; a pooled output isn't made up."""
    with cache.writer(HIDDEN) as writer:
        writer.put_batch(NAMES, hidden)
    layout = TokenLayout(special_tokens=("cls",))
    with cache.reader(HIDDEN) as reader:
        np.testing.assert_array_equal(HiddenStateView(reader, "cls", layout)["03:x"], hidden[3, 0])
        frames = HiddenStateView(reader, "frames", layout)
        np.testing.assert_array_equal(frames["03:x"], hidden[3, 1:])
        with pytest.raises(ConfigError):
            HiddenStateView(reader, "pooler_output", layout)


def test_not_hidden_states(filled, config):
    """A store of pooled embeddings is refused by name, and so is a layout that doesn't fit."""
    with filled.reader(config) as reader, pytest.raises(ConfigError):
        HiddenStateView(reader, "cls")
    deeper = HIDDEN.replace(namespace="deeper")
    with filled.writer(deeper) as writer:
        writer.put("a:x", np.ones((2, 14, 3)))
    with filled.reader(deeper) as reader, pytest.raises(ConfigError):
        HiddenStateView(reader, "mean")
    with filled.writer(HIDDEN) as writer:
        writer.put("a:x", np.ones((7, 3)))
    with filled.reader(HIDDEN) as reader:
        with pytest.raises(ConfigError, match="7"):
            HiddenStateView(reader, "valid")
        with pytest.raises(InvalidEmbeddingError):
            HiddenStateView(reader, "mean", TokenLayout(special_tokens=tuple("abcdefgh")))["a:x"]


def test_ragged_hidden_states(cache):
    """Of embeddings of different lengths: single rows and means; no padding, so nothing valid."""
    values = [np.random.default_rng(n).normal(size=(n + 3, 4)).astype("f4") for n in range(5)]
    with cache.writer(HIDDEN, ragged=True) as writer:
        writer.put_batch(NAMES[:5], values)
    with cache.reader(HIDDEN) as reader:
        cls = HiddenStateView(reader, "cls")
        np.testing.assert_array_equal(cls.get_batch(NAMES[:5]), [value[0] for value in values])
        mean = HiddenStateView(reader, "mean", TokenLayout())
        assert mean.embedding_shape == (4,)
        np.testing.assert_allclose(mean["04:x"], values[4].mean(0), atol=1e-6)
        with pytest.raises(ConfigError):
            HiddenStateView(reader, "valid", TokenLayout())


@pytest.mark.parametrize("name", ["cls", "mean", "valid"])
def test_through_loaders(reader, hidden, name):
    """EmbeddingDataset under torch's DataLoader (two workers) and make_dataloader give the view."""
    view = HiddenStateView(reader, name)
    expected = torch.from_numpy(by_hand(hidden)[name].astype(np.float32))
    dataset = EmbeddingDataset(view, NAMES, labels={"x": 3})
    assert dataset[-1][1] == 3
    torch.testing.assert_close(dataset[-1][0], expected[9], atol=1e-6, rtol=0)
    loaders = [
        DataLoader(dataset, 4, num_workers=2, collate_fn=collate_embeddings),
        DataLoader(dataset, 4),
        make_dataloader(dataset, 4),
        make_dataloader(view, 4, sample_ids=NAMES, labels=[3] * 10, prefetch=2, num_threads=2),
    ]
    for loader in loaders:
        batches = list(loader)
        found = torch.cat([batch for batch, _ in batches])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert torch.cat([labels for _, labels in batches]).tolist() == [3] * 10


def test_is_a_mapping_that_pickles_and_follows_commits(reader, cache, hidden):
    """Same keys as the store; a new commit is seen; a missing sample is named."""
    view = pickle.loads(pickle.dumps(HiddenStateView(reader, "cls")))
    assert list(view) == NAMES
    assert len(view) == 10
    assert "00:X" in view
    assert "new:x" not in view
    selection = pickle.loads(pickle.dumps(view.select(NAMES)))
    np.testing.assert_array_equal(selection.get_batch([2]), hidden[2:3, 0])
    with pytest.raises(SampleNotFoundError, match="new:x"):
        view.get_batch(["00:x", "new:x"])
    with cache.writer(small_config()) as writer:
        writer.put("new:x", hidden[0] + 1)
    np.testing.assert_array_equal(view.get_batch(["00:x", "new:x"])[1], hidden[0, 0] + 1)
    assert torch.equal(TensorMapping(view)["00:x"], torch.from_numpy(hidden[0, 0]))
    assert "'cls'" in repr(view)
    view.reader.close()
    selection.rows.reader.close()


def test_a_verifying_reader_verifies_views(cache, hidden):
    """With verify="always" the whole value is compared: damage beside the view is noticed."""
    with cache.writer(small_config()) as writer:
        writer.put_batch(NAMES, hidden)
    flip_value(data_file(cache, small_config()), hidden[4, 49])
    with cache.reader(small_config(), verify="always") as reader:
        view = HiddenStateView(reader, "cls")
        np.testing.assert_array_equal(view.get_batch(NAMES[:4]), hidden[:4, 0])
        with pytest.raises(IntegrityError, match="04:x"):
            view.get_batch(NAMES)


@pytest.mark.parametrize("name", ["mean", "valid_mean"])
def test_means_where_values_cannot_be_located(reader, hidden, name, monkeypatch):
    """Read through LMDB, one by one, they are the same; nothing selected gives none."""
    view = HiddenStateView(reader, name)
    assert view.get_batch([]).shape == (0, 6)
    monkeypatch.setattr(Selection, "copy_with", lambda *_: None)
    np.testing.assert_allclose(view.get_batch(NAMES), by_hand(hidden)[name], atol=1e-6)
    assert view.get_batch([]).shape == (0, 6)


@pytest.mark.parametrize(
    ("fields", "is_known"),
    [
        ({}, True),
        ({"model_name": "MIT/ast-finetuned-speech-commands-v2"}, True),
        ({"front_end": "own-features/2"}, True),  # whatever the features, the tokens are AST's
        ({"model_name": "mine", "front_end": DEFAULT_FRONT_END}, True),
        ({"model_name": "mine"}, False),
        ({"model_name": "mine", "front_end": "own/1"}, False),
    ],
)
def test_tokens_are_asts_only_where_the_config_says_so(cache, fields, is_known):
    """A front end that isn't stated is no reason to slice another model's tokens as AST's."""
    config = CacheConfig(output="last_hidden_state", **fields)
    with cache.writer(config) as writer:
        writer.put("a:x", np.zeros((1214, 8), np.float32))
    with cache.reader(config) as reader:
        if is_known:
            assert HiddenStateView(reader, "cls").embedding_shape == (8,)
        else:
            with pytest.raises(ConfigError):
                HiddenStateView(reader, "cls")
