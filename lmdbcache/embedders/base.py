"""What a model has to offer to be run by the extraction: a front end and an embedder.

All are structural: a class of your own needs these methods, not this base. The module stays free
of torch at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from lmdbcache.errors import AudioDecodeError, ConfigError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from lmdbcache.config import CacheConfig

__all__ = [
    "AudioModel",
    "Embedder",
    "FrontEnd",
    "check_num_samples",
    "check_waveform",
    "clip_features",
    "compute_features",
]


@runtime_checkable
class FrontEnd(Protocol):
    """Turns one waveform into the model's input, inside DataLoader worker processes.

    An instance is pickled to the workers: keep it small, and build what is heavy at first use.

    A front end with an attribute `takes_num_valid = True` is called with `num_valid`, too: how many
    samples came from the file; the rest are the zeros that the clip was padded with.
    """

    @property
    def min_samples(self) -> int:
        """The shortest waveform that gives features, in samples."""
        ...

    def __call__(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute the features of one clip.

        Args:
            waveform: float32 array (num_samples,), mono.

        Returns:
            float32 array of one shape for all clips of equal length.
        """
        ...

    def provenance(self) -> dict[str, str]:
        """What else decides the features' last bits: implementation, library versions."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Turns a batch of features into embeddings, in the main process."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names that `output` can take for this model."""
        ...

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """Shape of one embedding."""
        ...

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Embed a batch.

        Args:
            features: float32 tensor (batch, ...), the front end's features stacked.

        Returns:
            float32 tensor (batch, *embedding_shape) on the CPU.
        """
        ...

    def provenance(self) -> dict[str, str]:
        """Weights, revision, library versions, device and compute dtype."""
        ...


@runtime_checkable
class AudioModel(Protocol):
    """A model before its weights are loaded: what identifies it, and how to build it."""

    @property
    def identity(self) -> str:
        """The value for `CacheConfig.model_name`."""
        ...

    @property
    def front_end_id(self) -> str:
        """The value for `CacheConfig.front_end`: decoder, resampler, padding rule, features."""
        ...

    @property
    def sample_rate(self) -> int:
        """Of the waveforms that it was trained with, in Hz."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names that `output` can take, the default one first."""
        ...

    def check(self, config: CacheConfig) -> None:
        """Whether this model can fill a store of this config.

        Raises:
            ConfigError: It can't; the message names the field.
        """
        ...

    def embedding_shape(self, config: CacheConfig) -> tuple[int, ...] | None:
        """Shape of one embedding, without loading weights; None if that can't be told."""
        ...

    def make_front_end(self, config: CacheConfig) -> FrontEnd:
        """The front end for clips of this config."""
        ...

    def make_embedder(self, config: CacheConfig, device: str | None = None) -> Embedder:
        """The model, loaded."""
        ...


def check_waveform(waveform: NDArray[Any]) -> None:
    """Whether a front end can take this waveform.

    Raises:
        ConfigError: It isn't one-dimensional float32.
    """
    if waveform.ndim != 1 or waveform.dtype != np.float32:
        raise ConfigError(
            f"waveform: {waveform.dtype} of shape {waveform.shape}; the front end takes one "
            "mono float32 waveform (num_samples,), as load_waveform gives it"
        )


def check_num_samples(num_samples: int, min_samples: int, sample_rate: int) -> None:
    """Whether a waveform is long enough for any features.

    Raises:
        ConfigError: It is shorter than one analysis window.
    """
    if num_samples < min_samples:
        raise ConfigError(
            f"duration: {num_samples} samples are less than one analysis window of "
            f"{min_samples} samples; use a duration of {min_samples} / {sample_rate} s or more"
        )


def compute_features(
    front_end: Any, waveform: NDArray[np.float32], num_valid: int
) -> NDArray[np.float32]:
    """The features of one clip, by any front end.

    Args:
        front_end: A `FrontEnd`.
        waveform: float32 array (num_samples,), padded at its end.
        num_valid: How many samples of it aren't padding.
    """
    features: NDArray[np.float32]
    if getattr(front_end, "takes_num_valid", False):
        features = front_end(waveform, num_valid=num_valid)
    else:
        features = front_end(waveform)
    return features


def clip_features(
    front_end: Any, waveform: NDArray[np.float32], num_valid: int, *, sample_rate: int, name: str
) -> NDArray[np.float32]:
    """The features of a clip, by the rules of the extraction.

    Args:
        front_end: A `FrontEnd`, or a function of the waveform.
        waveform: float32 array (num_samples,), padded at its end.
        num_valid: How many samples of it aren't padding.
        sample_rate: Of the waveform, in Hz.
        name: What to call the clip in a message.

    Raises:
        AudioDecodeError: The clip is too short for the front end, or its features hold NaN or Inf.
    """
    shortest = max(1, getattr(front_end, "min_samples", 1))
    if num_valid < shortest:
        raise AudioDecodeError(
            f"{name}: too short: {num_valid} samples at {sample_rate} Hz; the front end needs "
            f"{shortest}"
        )
    features = compute_features(front_end, waveform, num_valid)
    if not np.isfinite(np.asarray(features)).all():
        raise AudioDecodeError(f"{name}: its features hold NaN or Inf")
    return features
