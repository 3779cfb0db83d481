"""How much of each clip is sound: recorded, and used by means, views, loaders and encoders."""

from __future__ import annotations

import pickle
import sqlite3

import numpy as np
import pytest
import soundfile
import torch
from embedders.small_folders import folder_of

from lmdbcache import (
    CachedEncoder,
    EmbeddingCache,
    EmbeddingDataset,
    HiddenStateView,
    clip_lengths,
    config_for,
    extract,
    make_dataloader,
)
from lmdbcache.cache import SOURCES_NAME
from lmdbcache.errors import ConfigError
from lmdbcache.exchange import merge_stores

LENGTHS = {"a:x": 16000, "b:x": 9000, "c:x": 4000, "d:x": 16000}  # the last one is cut


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for seed, (name, length) in enumerate(LENGTHS.items()):
        noise = np.random.default_rng(seed).uniform(-0.3, 0.3, length + 4000 * (name == "d:x"))
        soundfile.write(folder / f"{name[0]}.wav", noise, 16000, subtype="FLOAT")
    return {name: str(folder / f"{name[0]}.wav") for name in LENGTHS}


def stored(cache, clips, variant, output):
    config = config_for(folder_of(variant), output=output, duration=1.0)
    extract(cache, config, clips, model=folder_of(variant), num_workers=0, batch_size=3)
    return cache.reader(config)


def test_a_view_gives_what_the_model_gives(cache, clips):
    """`valid_mean` of stored hidden states is that of an extraction; merging keeps the lengths."""
    with stored(cache, clips, "ast", "valid_mean") as means:
        expected = means.get_batch(list(LENGTHS))
    with stored(cache, clips, "ast", "last_hidden_state") as reader:
        assert clip_lengths(reader, [*LENGTHS, "no:x"]) == LENGTHS
        found = HiddenStateView(reader, "valid_mean").get_batch(list(LENGTHS))
        np.testing.assert_allclose(found, expected, atol=1e-6)
        of_mean = HiddenStateView(reader, "mean").get_batch(list(LENGTHS))
        assert np.abs(found - of_mean).max(axis=1).min() > 1e-4
        path = reader.path
    with cache.reader(reader.config, verify="always") as checked:  # one by one, through LMDB
        found = HiddenStateView(checked, "valid_mean").get_batch(list(LENGTHS))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    other = EmbeddingCache(cache.root / "other")
    merge_stores(other, [path])
    with other.reader(reader.config) as merged:
        assert clip_lengths(merged, LENGTHS) == LENGTHS
    with sqlite3.connect(path / SOURCES_NAME) as connection:  # as older versions wrote it
        connection.execute("DROP TABLE clip_lengths")
    connection.close()
    with cache.reader(reader.config) as old:
        assert clip_lengths(old, LENGTHS) == {}
        by_duration = HiddenStateView(old, "valid_mean")["a:x"]
        np.testing.assert_allclose(by_duration, expected[0], atol=1e-6)
        with pytest.raises(ConfigError):
            EmbeddingDataset(old, with_num_valid=True)


def test_several_outputs_of_one_pass(cache, clips, tmp_path):
    """Layers and means of own frames: the bits of a run for each."""
    outputs = ("layer:1/valid_mean", "valid_mean", "layers/mean", "pooler_output")
    folder = folder_of("ast")
    configs = [config_for(folder, output=output, duration=1.0) for output in outputs]
    extract(cache, configs, clips, model=folder, num_workers=0, batch_size=3)
    for config in configs:
        with (
            stored(EmbeddingCache(tmp_path / "alone"), clips, "ast", config.output) as alone,
            cache.reader(config) as together,
        ):
            assert clip_lengths(together, LENGTHS) == LENGTHS
            for name in LENGTHS:
                np.testing.assert_array_equal(together[name], alone[name])


@pytest.mark.parametrize("variant", ["ast", "wav2vec2", "wav2vec2-masked", "whisper"])
def test_a_cached_encoder_computes_the_same(cache, clips, variant, tmp_path):
    """From waveforms of their own lengths, or padded ones and `num_valid`."""
    with stored(cache, clips, variant, "valid_mean") as reader:
        expected = torch.from_numpy(reader.get_batch(list(LENGTHS)))
        config = reader.config
    size = config.num_samples
    waveforms = [
        torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in clips.values()
    ]
    waveforms = [waveform[:size] for waveform in waveforms]
    padded = torch.stack([torch.nn.functional.pad(one, (0, size - len(one))) for one in waveforms])
    for given, more in (
        (waveforms, {}),
        (padded, {"num_valid": torch.tensor([*LENGTHS.values()])}),
    ):
        folder = tmp_path / str(len(more))
        with CachedEncoder(EmbeddingCache(folder), config, folder_of(variant)) as encoder:
            found = encoder(given, sample_ids=list(LENGTHS), **more)
            encoder.flush()
            with encoder.cache.reader(config) as reader:
                assert clip_lengths(reader, LENGTHS) == (LENGTHS if more else {})
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_loader_gives_lengths(cache, clips):
    """As the last part of items and batches, also in other processes."""
    with stored(cache, clips, "ast", "mean") as reader:
        dataset = EmbeddingDataset(reader, labels={"x": 3}, with_num_valid=True)
        dataset = pickle.loads(pickle.dumps(dataset))
        assert [int(part) for part in dataset[1][1:]] == [3, 9000]
        (batch,) = make_dataloader(dataset, batch_size=4)
        assert batch[2].tolist() == list(LENGTHS.values())
        assert [part.shape for part in batch] == [(4, 64), (4,), (4,)]
