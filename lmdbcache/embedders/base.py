"""The interface of a model: a front end, an embedder, and what identifies them.

All are structural: your class needs these methods, not this base. torch isn't imported here.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from lmdbcache.errors import AudioDecodeError, CacheError, ConfigError, FrontEndError
from lmdbcache.files import first_line
from lmdbcache.storage import has_masked_elements

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from lmdbcache.config import CacheConfig


@runtime_checkable
class FrontEnd(Protocol):
    """A function from one waveform to the model's input, called in DataLoader worker processes.

    An instance is pickled to the workers: keep it small, and build what is heavy at first use.

    It is called with the clip padded with zeros to the config's duration. A front end with an
    attribute `takes_num_valid = True` is called with `num_valid` as well: how many of the samples
    came from the file. A plain function, without these methods, gets the samples of the clip
    without padding.
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
            Array of numbers, see `as_features`. Clips whose features differ in shape or dtype go
            through the model in separate forward passes.
        """
        ...

    def provenance(self) -> dict[str, str]:
        """Return what else decides the features' last bits: implementation, library versions."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """A function from a batch of features to embeddings, called in the main process.

    An embedder with an attribute `takes_num_valid = True` is called with `num_valid` as well, where
    that is known: a list of how many samples of each clip came from its file and aren't padding.

    One that can also give several outputs of one forward pass has a method
    `embed_outputs(features, outputs)`, which returns a dict: output → what `embed` would return.
    `extract` with several outputs needs it. If the embedder has an attribute
    `takes_num_valid`, whatever it says, this method is called with `num_valid` as well.
    """

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
            features: Tensor (batch, ...), the front end's features stacked: float32, or the
                integers, bools or complex64 that it gave.

        Returns:
            float32 tensor (batch, *embedding_shape) on the CPU.
        """
        ...

    def provenance(self) -> dict[str, str]:
        """Return weights, revision, library versions, device and compute dtype."""
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
        """Check that this model can fill a store of this config.

        Raises:
            ConfigError: It can't; the message names the field.
        """
        ...

    def embedding_shape(self, config: CacheConfig) -> tuple[int, ...] | None:
        """Return the shape of one embedding, without loading weights; None if it isn't known."""
        ...

    def make_front_end(self, config: CacheConfig) -> FrontEnd:
        """Make the front end for clips of this config."""
        ...

    def make_embedder(self, config: CacheConfig, device: str | None = None) -> Embedder:
        """Load the model."""
        ...


def check_waveform(waveform: NDArray[Any]) -> None:
    """Check that a front end can take this waveform.

    Raises:
        ConfigError: It isn't one-dimensional float32.
    """
    if waveform.ndim != 1 or waveform.dtype != np.float32:
        raise ConfigError(
            f"waveform: {waveform.dtype} of shape {waveform.shape}; the front end takes one "
            "mono float32 waveform (num_samples,), as load_waveform gives it"
        )


def check_num_samples(num_samples: int, min_samples: int, sample_rate: int) -> None:
    """Check that a waveform is long enough for any features.

    Raises:
        ConfigError: It is shorter than one analysis window.
    """
    if num_samples < min_samples:
        raise ConfigError(
            f"duration: {num_samples} samples are less than one analysis window of "
            f"{min_samples} samples; use a duration of {min_samples} / {sample_rate} s or more"
        )


def as_features(found: Any) -> NDArray[Any]:
    """Convert what a front end returned to an array for the model.

    Args:
        found: Array, tensor (any device, with or without grad), number, or nested list of numbers.

    Returns:
        Contiguous array of the same shape. Floats become float32 and complex numbers complex64;
        integers and bools keep their dtype.

    Raises:
        FrontEndError: Anything else: None, text, objects, a tuple or dict of arrays, a ragged list,
            masked elements, or no element at all.
    """
    if hasattr(found, "detach"):  # a tensor; torch isn't imported here
        tensor = found.detach().cpu().resolve_conj().resolve_neg()
        found = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    if has_masked_elements(found):
        raise FrontEndError("its features have masked elements; fill them (`filled`)")
    kind = type(found).__name__
    if isinstance(found, tuple) and any(hasattr(part, "shape") for part in found):
        raise FrontEndError(f"its features are a {kind} of arrays; return one array")
    try:
        array: NDArray[Any] = np.asarray(found)
    except (ValueError, TypeError) as error:
        raise FrontEndError(
            f"its features are a {kind}, not an array ({first_line(error)}); return one array"
        ) from error
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufc":
        raise FrontEndError(
            f"its features are of type {kind} and dtype {array.dtype}; return one array of numbers"
        )
    if not array.size:
        raise FrontEndError(f"its features are empty: shape {array.shape}")
    with np.errstate(over="ignore"):  # beyond float32 is Inf, which is refused
        dtype = {"f": np.dtype(np.float32), "c": np.dtype(np.complex64)}.get(array.dtype.kind)
        array = array.astype(dtype or array.dtype.newbyteorder("="), copy=False)
    return np.require(array, requirements=["C", "W"])


def compute_features(front_end: Any, waveform: NDArray[np.float32], num_valid: int) -> NDArray[Any]:
    """Call a front end on one clip.

    Args:
        front_end: A `FrontEnd`, which gets the padded waveform, with `num_valid` if it takes it;
            or a function of the waveform, which gets the samples of the clip without padding.
        waveform: float32 array (num_samples,), padded at its end.
        num_valid: How many samples of it aren't padding.

    Returns:
        See `as_features`.

    Raises:
        FrontEndError: The front end returns no array of numbers.
    """
    if getattr(front_end, "takes_num_valid", False):
        found = front_end(waveform, num_valid=num_valid)
    elif hasattr(front_end, "provenance") or waveform.ndim != 1:
        found = front_end(waveform)
    else:
        found = front_end(waveform[:num_valid].copy())  # a function may work in place
    return as_features(found)


def clip_features(
    front_end: Any, waveform: NDArray[np.float32], num_valid: int, *, sample_rate: int, name: str
) -> NDArray[Any]:
    """Compute the features of a clip, by the rules of the extraction.

    Args:
        front_end: See `compute_features`.
        waveform: See `compute_features`.
        num_valid: See `compute_features`.
        sample_rate: Of the waveform, in Hz.
        name: What to call the clip in a message.

    Returns:
        See `as_features`.

    Raises:
        AudioDecodeError: The clip is too short for the front end, or its features hold NaN or Inf.
        FrontEndError: The front end fails on this clip, or returns no array of numbers.
    """
    shortest = max(1, getattr(front_end, "min_samples", 1))
    if num_valid < shortest:
        raise AudioDecodeError(
            f"{name}: too short: {num_valid} samples at {sample_rate} Hz; the front end needs "
            f"{shortest}"
        )
    who = front_end_name(front_end)
    try:
        features = compute_features(front_end, waveform, num_valid)
    except FrontEndError as error:
        raise FrontEndError(f"{name}: the front end {who}: {error}") from error
    except CacheError:
        raise
    except Exception as error:
        raise FrontEndError(
            f"{name}: the front end {who} failed on a waveform of {num_valid} samples "
            f"({first_line(error)}); call it on such a waveform by hand"
        ) from error
    if not np.isfinite(features).all():
        raise AudioDecodeError(f"{name}: its features hold NaN or Inf")
    return features


def front_end_name(front_end: Any) -> str:
    """Return the name of a front end for a message: its id, or the function's name."""
    own = getattr(front_end, "identity", None) or getattr(front_end, "__name__", None)
    return str(own or type(front_end).__name__)


def library_versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, or `"not installed"`."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
