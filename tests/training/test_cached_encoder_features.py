"""Features of any shape and dtype in an encoder, and models that it has to refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_modules import Pooled, frames
from training.encoders import names_of, waveforms_of

from lmdbcache import CacheConfig, CachedEncoder, EmbeddingCache, ModuleEmbedder, config_for
from lmdbcache.datasets import collate_mixed
from lmdbcache.errors import CacheError, FrontEndError, InvalidEmbeddingError, ModuleError

CONFIG = CacheConfig(model_name="own", front_end="own/1", output="embedding", duration=0.2)
LENGTHS = (3200, 1700, 3200, 900)
IDS = ["a:x", "b:x", "c:x", "d:x"]
WAVEFORMS = [
    torch.from_numpy(np.random.default_rng(n).uniform(-0.5, 0.5, size).astype(np.float32))
    for n, size in enumerate(LENGTHS)
]


def by_hand(module=None):
    module = module or Pooled()
    return torch.stack([module(torch.from_numpy(frames(w.numpy()))[None])[0] for w in WAVEFORMS])


@pytest.fixture
def encode(tmp_path):
    def encode(model, front_end=frames, waveforms=WAVEFORMS, **options):
        with CachedEncoder(tmp_path / "cache", CONFIG, model, front_end=front_end) as encoder:
            return encoder(waveforms, sample_ids=IDS, **options)

    return encode


@pytest.mark.parametrize("way", ["list", "table", "promises"])
def test_clips_of_different_lengths(encode, way):
    """A front end gets each clip without padding; the module's values are those by hand."""
    table = torch.nn.utils.rnn.pad_sequence(WAVEFORMS, batch_first=True)
    given = {"list": WAVEFORMS, "table": table, "promises": [w.clone for w in WAVEFORMS]}
    options = {"num_valid": list(LENGTHS)} if way == "table" else {}
    found = encode(Pooled(), waveforms=given[way], **options)
    torch.testing.assert_close(found, by_hand(), rtol=0, atol=1e-6)


def test_a_module_embedder_continues_what_extract_would_store(tmp_path):
    """Known by its `AudioModel`, the same values come out."""
    embedder = ModuleEmbedder(
        Pooled(), name="own", sample_rate=16000, front_end=frames, front_end_id="own/1"
    )
    with CachedEncoder(tmp_path, config_for(embedder, duration=0.2), embedder) as encoder:
        found = encoder(WAVEFORMS, sample_ids=IDS)
    torch.testing.assert_close(found, by_hand(), rtol=0, atol=1e-6)


def test_a_mixed_batch_of_features_of_different_shapes(tmp_path):
    """Collated as a list, and completed in order."""
    items = [
        {"sample_id": i, "label": 0, "features": torch.from_numpy(frames(w.numpy()))}
        for i, w in zip(IDS, WAVEFORMS, strict=True)
    ]
    batch = collate_mixed(items)
    with CachedEncoder(tmp_path, CONFIG, Pooled()) as encoder:
        torch.testing.assert_close(encoder.complete(batch), by_hand(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_modules_of_another_precision(encode, dtype):
    """Inputs are cast to the dtype of the weights, embeddings to the config's."""
    found = encode(Pooled().to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(), rtol=0, atol=1e-2)


class Random(Pooled):
    def forward(self, features):
        return torch.nn.functional.dropout(super().forward(features), 0.5, training=True)


class MixesTheBatch(Pooled):
    def forward(self, features):
        return super().forward(features) - super().forward(features).mean(dim=0)


class Constant(Pooled):
    def forward(self, features):
        return torch.ones(len(features), 8)


class KeepsTime(Pooled):
    def forward(self, features):
        return features[:, :, :4]


class Masked(Pooled):
    def forward(self, features):
        return np.ma.masked_greater(super().forward(features).numpy(), 0)


class Complex(Pooled):
    def forward(self, features):
        return torch.fft.fft(super().forward(features))


@pytest.mark.parametrize("model", [Random, MixesTheBatch, Constant, KeepsTime, Masked, Complex])
def test_embeddings_that_cannot_be_cached(encode, tmp_path, model):
    """Our error, and nothing is stored."""
    with pytest.raises(InvalidEmbeddingError):
        encode(model())
    assert EmbeddingCache(tmp_path / "cache").stores() == []


def test_samples_one_by_one_cost_one_look(tmp_path):
    """The model runs a few more times for the first one, and not for each."""
    sizes = []

    class Counting(Pooled):
        def forward(self, features):
            sizes.append(len(features))
            return super().forward(features)

    with CachedEncoder(tmp_path, CONFIG, Counting(), front_end=frames) as encoder:
        for waveform, sample_id in zip(WAVEFORMS, IDS, strict=True):
            encoder([waveform], sample_ids=[sample_id])
    assert sizes == [1] * (8 + len(IDS))


def test_a_constant_model_shows_at_its_second_sample(tmp_path):
    """Though it never sees two in one batch."""
    with CachedEncoder(tmp_path, CONFIG, Constant(), front_end=frames) as encoder:
        encoder(WAVEFORMS[:1], sample_ids=IDS[:1])
        with pytest.raises(InvalidEmbeddingError, match="Constant"):
            encoder(WAVEFORMS[1:2], sample_ids=IDS[1:2])


def test_a_front_end_that_fails_names_the_sample(encode):
    """So does one that returns no numbers."""

    def fails(waveform):
        return frames(waveform) if len(waveform) > 1000 else {}["missing"]

    with pytest.raises(FrontEndError, match="d:x"):
        encode(Pooled(), fails)
    with pytest.raises(FrontEndError, match="a:x"):
        encode(Pooled(), lambda _: None)


def test_a_module_of_one_length_names_sample_and_shape(encode):
    """Where features differ in shape, the one that fails is named."""

    class OneLength(Pooled):
        def forward(self, features):
            return features.flatten(1)[:, :3200].unflatten(1, (40, 80)).mean(dim=1)

    with pytest.raises(ModuleError, match=r"b:x.*own/1"):
        encode(OneLength())


def test_masked_waveforms_are_refused(encode):
    """What lies under a mask isn't sound."""
    masked = [np.ma.masked_greater(waveform.numpy(), 0.4) for waveform in WAVEFORMS]
    with pytest.raises(CacheError):
        encode(Pooled(), waveforms=masked)


def test_the_look_at_a_model_is_once(tmp_path):
    """At its first batch of several samples, a few passes over one of them."""
    passes = []

    def model(waveforms):
        passes.append(len(waveforms))
        return waveforms + 1

    with CachedEncoder(tmp_path, CONFIG, model) as encoder:
        for start in (0, 3, 6):
            numbers = range(start, start + 3)
            encoder(waveforms_of(numbers), sample_ids=names_of(numbers))
    assert passes == [3, *[3] * 3, 3, 3]
