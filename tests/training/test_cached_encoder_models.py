"""CachedEncoder: embedders, modules and functions as its model, frozen and of known weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from small_ast import save_small_ast
from training.encoders import (
    OWN,
    WIDTH,
    CountingEncoder,
    ask,
    build,
    direct,
    names_of,
    stored,
    waveforms_of,
)

from lmdbcache import CacheConfig, CachedEncoder
from lmdbcache.embedders import (
    ASTEmbedder,
    ASTFrontEnd,
    find_checkpoint,
    module_digest,
    weights_digest,
)
from lmdbcache.errors import ConfigError, ProvenanceMismatchError


def test_our_embedder_with_its_front_end(cache, tmp_path):
    """Waveforms in, the embedder's own embeddings out; its weights are noted and compared."""
    checkpoint = find_checkpoint(save_small_ast(tmp_path / "ast", max_length=128))
    config = CacheConfig(model_name=checkpoint.identity, duration=0.5)
    front_end = ASTFrontEnd(checkpoint, 16000)
    waveforms = waveforms_of(range(3), config.num_samples)
    features = torch.from_numpy(np.stack([front_end(row) for row in waveforms.numpy()]))
    expected = ASTEmbedder(checkpoint, device="cpu").embed(features)

    def make():
        return ASTEmbedder(checkpoint, device="cpu")

    with CachedEncoder(cache, config, make, front_end=front_end) as encoder:
        assert torch.equal(encoder(waveforms, sample_ids=names_of(range(3))), expected)
    provenance = cache.info(config).provenance
    assert provenance["weights_digest"] == checkpoint.weights_digest
    assert "feature_extractor" in provenance
    other = find_checkpoint(save_small_ast(tmp_path / "other" / "ast", max_length=128, seed=1))
    with pytest.raises(ConfigError):
        CachedEncoder(cache, config, ASTEmbedder(other, device="cpu"))
    with pytest.raises(ConfigError):
        CachedEncoder(cache, config, ASTEmbedder(checkpoint, "mean", device="cpu"))


def test_a_transformers_model(cache, tmp_path):
    """The output named in the config is taken; the digest isn't its files', which can be told."""
    from transformers import ASTModel

    folder = save_small_ast(tmp_path / "ast", max_length=128)
    model = ASTModel.from_pretrained(folder).eval().requires_grad_(False)
    features = torch.randn(2, 128, 128)
    config = CacheConfig(model_name="own-ast")
    with CachedEncoder(cache, config, model) as encoder:
        found = encoder(input_values=features, sample_ids=names_of([0, 1]))
        assert torch.equal(found, model(features).pooler_output)
    with (
        CachedEncoder(cache, config.replace(output="other"), model) as encoder,
        pytest.raises(ConfigError),
    ):
        encoder(features, sample_ids=names_of([0, 1]))
    with CachedEncoder(
        cache, config.replace(output="mean"), model,
        select_output=lambda result: result.last_hidden_state[:, 2:].mean(1),
        provenance={"weights_digest": weights_digest(folder)},
    ) as encoder:  # fmt: skip
        assert encoder(features, sample_ids=names_of([0, 1])).shape == (2, 64)
    digest = cache.info(config.replace(output="mean")).provenance["weights_digest"]
    assert digest == weights_digest(folder)


def test_other_weights_are_refused(encoder, cache):
    """A store filled by one model isn't read or extended with another: at once, or when built."""
    ask(encoder, [1])
    encoder.close()
    with pytest.raises(ProvenanceMismatchError):
        CachedEncoder(cache, OWN, CountingEncoder(seed=1))
    with CachedEncoder(cache, OWN, lambda: CountingEncoder(seed=1)) as other:
        assert torch.equal(ask(other, [1]), direct([1]))  # nothing shows it yet
        with pytest.raises(ProvenanceMismatchError):
            ask(other, [1, 2])
    digest = module_digest(CountingEncoder())
    assert cache.info(OWN).provenance["weights_digest"] == digest == module_digest(build())
    believed = CachedEncoder(
        cache, OWN, CountingEncoder(seed=1), provenance={"weights_digest": digest}
    )
    ask(believed, [1])
    believed.close()
    assert list(stored(cache)) == ["clip_001:x"]


def test_only_a_frozen_model(cache, encoder):
    """Training mode or parameters that require grad are refused, at once and later."""
    trained = CountingEncoder().train()
    with pytest.raises(ConfigError):
        CachedEncoder(cache, OWN, trained)
    trained.eval().layer.requires_grad_(True)
    with pytest.raises(ConfigError):
        CachedEncoder(cache, OWN, trained)
    nested = CountingEncoder()
    nested.dropout.train()
    with pytest.raises(ConfigError):
        CachedEncoder(cache, OWN, nested)
    thawed = CountingEncoder()
    with CachedEncoder(cache, OWN, thawed) as later:
        later.train()
        ask(later, [1])
        thawed.train()
        with pytest.raises(ConfigError):
            ask(later, [2])
    built = torch.nn.Linear(8, WIDTH)
    with CachedEncoder(cache, OWN.replace(output="linear"), lambda: built) as from_factory:
        ask(from_factory, [1])
    assert not built.training
    assert not built.weight.requires_grad


def test_what_is_neither_model_nor_factory(cache):
    """Refused with what to write instead."""
    with pytest.raises(ConfigError):
        CachedEncoder(cache, OWN, 3)
    with pytest.raises(ConfigError):
        CachedEncoder(cache, OWN, partial(CountingEncoder, 8))
    with pytest.raises(ConfigError):
        CachedEncoder(cache, OWN, CountingEncoder)
    with CachedEncoder(cache, OWN, lambda: "no model") as encoder:
        with pytest.raises(ConfigError):
            ask(encoder, [1])
    layered = CountingEncoder()
    layered.embed = torch.nn.Embedding(2, 2).requires_grad_(False).eval()
    with CachedEncoder(cache, OWN, layered) as encoder:  # a module, whatever its layers are called
        assert torch.equal(ask(encoder, [1]), direct([1]))
