"""What the extraction relies on in a front end and an embedder, as tests for pytest.

from lmdbcache.testing import EmbedderContract, ModelContract

class TestMyModel(EmbedderContract):
    def make(self):
        return MyFrontEnd(), MyEmbedder()

class TestMyModule(ModelContract):
    def make_model(self):
        return ModuleEmbedder(MyNet(), name="my-net/1", sample_rate=16000)
"""

from __future__ import annotations

import contextlib
import pickle
import wave
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import AudioModel, Embedder, FrontEnd, compute_features, config_for
from lmdbcache.errors import ConfigError, FrontEndError
from lmdbcache.extraction import extract

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_MIX: str = "the embeddings of a batch depend on more than each clip's own features"


class EmbedderContract:
    """Subclass it under a name that begins with `Test`, and say what is to be tested in `make`.

    The front end and the embedder are made once for all tests of the class.
    """

    sample_rate: ClassVar[int] = 16000
    """Of the waveforms that the front end is given, in Hz."""
    duration: ClassVar[float] = 1.0
    """Of each clip, in seconds."""
    batch_size: ClassVar[int] = 3
    """Clips per forward pass, at least 2."""
    tolerance: ClassVar[float] = 1e-4
    """How far batches of different sizes may differ, relative to the largest value."""

    def make(self) -> tuple[FrontEnd, Embedder]:
        """A new front end and the embedder that takes its features."""
        raise NotImplementedError(f"{type(self).__name__}.make: return (front_end, embedder)")

    def config(self) -> CacheConfig:
        """The config under which the clips of the last test are stored."""
        return CacheConfig(
            sample_rate=self.sample_rate,
            duration=self.duration,
            model_name="contract",
            output=self._both[1].outputs[0],
        )

    @classmethod
    def _once(cls, name: str, make: Callable[[], Any]) -> Any:
        """Kept on the class itself: pytest makes an instance for each test."""
        if name not in vars(cls):
            setattr(cls, name, make())
        return vars(cls)[name]

    @property
    def _both(self) -> tuple[FrontEnd, Embedder]:
        both: tuple[FrontEnd, Embedder] = self._once("_made", self.make)
        return both

    def _waveform(self, seed: int) -> NDArray[np.float32]:
        """A tone in noise, another one for each seed."""
        num_samples = round(self.sample_rate * self.duration)
        generator = np.random.default_rng(seed)
        time = np.arange(num_samples) / self.sample_rate
        tone = 0.3 * np.sin(2 * np.pi * (200 + 170 * seed) * time)
        return (tone + generator.uniform(-0.1, 0.1, num_samples)).astype(np.float32)

    def _features(self, seeds: range | list[int]) -> torch.Tensor:
        import torch

        front_end, _ = self._both
        features = [
            compute_features(front_end, clip, len(clip)) for clip in map(self._waveform, seeds)
        ]
        return torch.from_numpy(np.stack(features))

    def test_has_what_the_protocols_ask_for(self) -> None:
        """Both have every method and property."""
        front_end, embedder = self._both
        assert isinstance(front_end, FrontEnd), "the front end lacks a method of FrontEnd"
        assert isinstance(embedder, Embedder), "the embedder lacks a method of Embedder"
        assert embedder.outputs, "outputs is empty"
        assert all(isinstance(name, str) for name in embedder.outputs)
        assert all(type(n) is int and n > 0 for n in embedder.embedding_shape)

    def test_features_are_finite_numbers_of_one_shape(self) -> None:
        """For clips of full length, the same bits each time; the waveform isn't changed."""
        front_end, _ = self._both
        shapes = set()
        for clip in (self._waveform(0), self._waveform(1), 0 * self._waveform(0)):
            before = clip.copy()
            features = compute_features(front_end, clip, len(clip))
            assert np.isfinite(features).all(), "NaN or Inf among the features"
            np.testing.assert_array_equal(clip, before, "the front end changes its argument")
            again = compute_features(front_end, clip, len(clip))
            np.testing.assert_array_equal(features, again, "the front end isn't deterministic")
            shapes.add(features.shape)
        assert len(shapes) == 1, f"features of clips of one length have the shapes {shapes}"

    def test_a_read_only_waveform_is_taken(self) -> None:
        """Arrays from memory maps and other processes can't be written to."""
        front_end, _ = self._both
        clip = self._waveform(0)
        clip.flags.writeable = False
        compute_features(front_end, clip, len(clip))

    def test_short_clips_give_features(self) -> None:
        """Down to the shortest one allowed they give finite numbers, or are refused."""
        front_end, embedder = self._both
        clip = self._waveform(0)
        assert 1 <= front_end.min_samples <= len(clip), "min_samples is beyond the duration"
        expected = compute_features(front_end, clip, len(clip)).shape
        for num_valid in (front_end.min_samples, len(clip) // 2):
            kept = max(num_valid, front_end.min_samples)
            padded = clip.copy()
            padded[kept:] = 0
            # Features of another shape may be refused; those of the usual one are taken.
            with contextlib.suppress(FrontEndError):
                features = compute_features(front_end, padded, kept)
                assert np.isfinite(features).all(), "NaN or Inf among the features"
                with contextlib.suppress(*[] if features.shape == expected else [RuntimeError]):
                    assert np.isfinite(self._embed_one(embedder, features)).all()

    def test_the_front_end_goes_to_other_processes(self) -> None:
        """Pickled, also after use, it gives the same bits."""
        front_end, _ = self._both
        clip = self._waveform(0)
        expected = compute_features(front_end, clip, len(clip))
        again: Any = pickle.loads(pickle.dumps(front_end))
        np.testing.assert_array_equal(compute_features(again, clip, len(clip)), expected)

    def test_embeddings_have_the_shape_that_was_promised(self) -> None:
        """float32 on the CPU, without gradients, finite; the features aren't changed."""
        import torch

        _, embedder = self._both
        features = self._features(range(self.batch_size))
        before = features.clone()
        embeddings = embedder.embed(features)
        assert embeddings.dtype == torch.float32
        assert embeddings.device.type == "cpu"
        assert not embeddings.requires_grad
        assert tuple(embeddings.shape) == (self.batch_size, *embedder.embedding_shape)
        assert torch.isfinite(embeddings).all(), "NaN or Inf among the embeddings"
        assert torch.equal(features, before), "embed changes its argument"

    def test_equal_batches_give_equal_bits(self) -> None:
        """The model is deterministic: no dropout, no random crops."""
        import torch

        _, embedder = self._both
        features = self._features(range(self.batch_size))
        assert torch.equal(embedder.embed(features), embedder.embed(features))

    def test_a_clip_doesnt_depend_on_its_neighbours(self) -> None:
        """In batches of one size it has the same bits, whatever else is in them."""
        import torch

        front_end, embedder = self._both
        alike = self._features(range(self.batch_size))
        others = self._features([0, *range(7, 6 + self.batch_size)])
        short = self._waveform(5)
        kept = max(front_end.min_samples, len(short) // 3)
        short[kept:] = 0
        features = torch.from_numpy(compute_features(front_end, short, kept))
        if features.shape == others.shape[1:]:  # else it gets a forward pass of its own
            others[-1] = features
        expected, found = embedder.embed(alike)[0], embedder.embed(others)[0]
        assert torch.equal(expected, found), _MIX

    def test_batches_of_other_sizes_agree(self) -> None:
        """One clip at a time gives the same up to rounding, in the same order."""
        _, embedder = self._both
        features = self._features(range(self.batch_size))
        together = embedder.embed(features).numpy()
        alone = np.concatenate([embedder.embed(one[None]).numpy() for one in features])
        largest = float(np.abs(together).max()) or 1.0
        assert np.abs(together - alone).max() <= self.tolerance * largest, _MIX

    def test_different_clips_have_different_embeddings(self) -> None:
        """The input isn't ignored."""
        import torch

        _, embedder = self._both
        first, second = embedder.embed(self._features([0, 1]))
        assert not torch.equal(first, second)

    def test_provenance_is_text(self) -> None:
        """It is kept in the store's metadata; stores with other weights can be distinguished."""
        front_end, embedder = self._both
        for provenance in (front_end.provenance(), embedder.provenance()):
            assert all(isinstance(part, str) for item in provenance.items() for part in item)
        assert embedder.provenance().get("weights_digest"), "no weights_digest in the provenance"

    def test_stored_embeddings_are_those_of_the_model(self, tmp_path: Path) -> None:
        """From wav files through an extraction and back: every bit."""
        front_end, embedder = self._both
        clips = {
            f"clip{seed}:tone": _write_wav(
                tmp_path / f"{seed}.wav", self._waveform(seed), self.sample_rate
            )
            for seed in range(self.batch_size)
        }
        cache, config = EmbeddingCache(tmp_path / "cache"), self.config()
        summary = extract(
            cache,
            config,
            clips,
            front_end=front_end,
            make_embedder=lambda: embedder,
            batch_size=self.batch_size,
            num_workers=0,
        )
        assert not summary.failures, summary.failures[0].reason
        import torch

        features = [
            compute_features(front_end, clip, len(clip)) for clip in map(_read_wav, clips.values())
        ]
        expected = embedder.embed(torch.from_numpy(np.stack(features))).numpy()
        with cache.reader(config) as reader:
            for row, sample_id in enumerate(clips):
                np.testing.assert_array_equal(reader[sample_id], expected[row])

    def _embed_one(self, embedder: Embedder, features: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        embedding: NDArray[np.float32] = embedder.embed(torch.from_numpy(features)[None]).numpy()
        return embedding


class ModelContract(EmbedderContract):
    """The same for an `AudioModel`: one that `extract(model=...)` and `config_for` take."""

    output: ClassVar[str | None] = None
    """Which output; None takes the first one."""

    def make_model(self) -> AudioModel:
        """A new model."""
        raise NotImplementedError(f"{type(self).__name__}.make_model: return an AudioModel")

    def config(self) -> CacheConfig:
        """The model's own config."""
        return config_for(self._the_model, output=self.output, duration=self.duration)

    def make(self) -> tuple[FrontEnd, Embedder]:
        """The model's front end and embedder, on the CPU."""
        config = self.config()
        model = self._the_model
        return model.make_front_end(config), model.make_embedder(config, "cpu")

    @property
    def _the_model(self) -> AudioModel:
        model: AudioModel = self._once("_model", self.make_model)
        return model

    def _waveform(self, seed: int) -> NDArray[np.float32]:
        type(self).sample_rate = self._the_model.sample_rate
        return super()._waveform(seed)

    def test_its_own_config_is_accepted(self) -> None:
        """Identity, front end and sample rate fit, and don't change from one call to the next."""
        model = self._the_model
        assert isinstance(model, AudioModel), "the model lacks a method of AudioModel"
        model.check(self.config())
        assert (
            self.config().fingerprint
            == config_for(self.make_model(), output=self.output, duration=self.duration).fingerprint
        ), "two models made alike have different identities"

    def test_an_unknown_output_is_refused(self) -> None:
        """With an error that names those that there are."""
        config = self.config().replace(output="no_such_output")
        message = ""
        try:
            self._the_model.check(config)
        except ConfigError as error:
            message = str(error)
        assert message, "check lets an unknown output pass"
        assert all(name in message for name in self._the_model.outputs)

    def test_the_shape_is_known_before_the_model_is_loaded(self) -> None:
        """A declared shape matches what the embedder returns, for every output."""
        model = self._the_model
        for output in model.outputs:
            config = self.config().replace(output=output)
            told = model.embedding_shape(config)
            if told is not None:
                assert tuple(told) == model.make_embedder(config, "cpu").embedding_shape


def _write_wav(path: Path, waveform: NDArray[np.float32], sample_rate: int) -> str:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((waveform * 32767).astype("<i2").tobytes())
    return str(path)


def _read_wav(path: str) -> NDArray[np.float32]:
    with wave.open(path, "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    waveform: NDArray[np.float32] = np.multiply(samples, np.float32(2**-15), dtype=np.float32)
    return waveform
