"""Every model that lmdbcache runs passes the contract that it gives to others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from embedders.small_folders import folder_of

from lmdbcache import ModuleEmbedder
from lmdbcache.embedders import ASTEmbedder, ASTFrontEnd, find_checkpoint, find_model
from lmdbcache.testing import EmbedderContract, ModelContract


class TestASTByHand(EmbedderContract):
    """A front end and an embedder without a model around them."""

    def make(self):
        checkpoint = find_checkpoint(folder_of("ast"))
        return ASTFrontEnd(checkpoint, 16000), ASTEmbedder(checkpoint, device="cpu")


class Pretrained(ModelContract):
    variant = ""

    def make_model(self):
        return find_model(folder_of(self.variant))


# Name of the tests → the checkpoint, and an output other than its first one.
VARIANTS = {
    "AST": ("ast", None),
    "Wav2Vec2": ("wav2vec2", None),
    "MaskedWav2Vec2": ("wav2vec2-masked", None),
    "HiddenStatesOfMaskedWav2Vec2": ("wav2vec2-masked", "last_hidden_state"),
    "Adapter": ("wav2vec2-adapter", None),
    "WavLM": ("wavlm-masked", None),
    "Conformer": ("wav2vec2-conformer", None),
    "Whisper": ("whisper", None),
    "CLAP": ("clap", None),
    "FusedCLAP": ("clap-fused", "audio_embeds"),
}
for name, (variant, output) in VARIANTS.items():
    fields = {"variant": variant, "output": output}
    globals()[f"Test{name}"] = type(f"Test{name}", (Pretrained,), fields)


def energies(waveform: np.ndarray) -> np.ndarray:
    """Log energy in frames of 10 ms."""
    frames = waveform[: len(waveform) // 160 * 160].reshape(-1, 160)
    return np.log(np.square(frames).mean(axis=1) + 1e-6)


def net(seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(100, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5)
        )


class TestModule(ModelContract):
    """In training mode, with dropout and batch norm: neither may act."""

    def make_model(self):
        return ModuleEmbedder(
            net().train(),
            name="energy-net/1",
            sample_rate=16000,
            front_end=energies,
            front_end_id="log-energy/1",
        )


class TestWaveformModule(ModelContract):
    """Without a front end the module sees the waveform."""

    def make_model(self):
        class Net(torch.nn.Module):
            def forward(self, waveforms):
                return waveforms.unfold(1, 400, 400).std(dim=2)

        return ModuleEmbedder(Net(), name="loudness/1", sample_rate=16000)


class Broken(EmbedderContract):
    """Not collected: what the contract has to find."""

    def __init__(self, embedder, front_end=None):
        self._pair = (front_end or ASTFrontEnd(find_checkpoint(folder_of("ast")), 16000), embedder)

    def make(self):
        return self._pair

    @property
    def _both(self):
        return self._pair


class Wrong(ASTEmbedder):
    """An embedder with one fault."""

    def __init__(self, change):
        super().__init__(find_checkpoint(folder_of("ast")), device="cpu")
        self._change = change

    def embed(self, features):
        return self._change(features, super().embed(features))


@pytest.mark.parametrize(
    ("change", "test"),
    [
        (lambda _, e: e + torch.rand(()), "test_equal_batches_give_equal_bits"),
        (lambda _, e: e - e.mean(dim=0), "test_a_clip_doesnt_depend_on_its_neighbours"),
        (lambda _, e: e.flip(0), "test_batches_of_other_sizes_agree"),
        (lambda _, e: 0 * e, "test_different_clips_have_different_embeddings"),
        (lambda _, e: e.double(), "test_embeddings_have_the_shape_that_was_promised"),
        (lambda _, e: e / 0, "test_embeddings_have_the_shape_that_was_promised"),
        (lambda f, e: e + f.zero_().sum(), "test_embeddings_have_the_shape_that_was_promised"),
    ],
)
def test_the_contract_finds_faults(change, test):
    """Each test fails for the fault that it is there for."""
    with pytest.raises(AssertionError):
        getattr(Broken(Wrong(change)), test)()


@pytest.mark.parametrize(
    ("front_end", "test"),
    [
        (lambda _: np.random.default_rng().normal(size=100), "features_are_finite"),
        (lambda w: np.log(np.abs(w)), "features_are_finite"),
        (lambda w: w[: 10 + int(1000 * abs(w[0]))], "features_are_finite"),
    ],
)
def test_the_contract_finds_faults_of_front_ends(front_end, test):
    """Random, infinite or ragged features."""
    model = ModuleEmbedder(
        net(), name="n", sample_rate=16000, front_end=front_end, front_end_id="x/1"
    )
    contract = Broken(None, model._front_end)
    (name,) = [name for name in dir(contract) if test in name]
    with pytest.raises(AssertionError), np.errstate(divide="ignore"):
        getattr(contract, name)()
