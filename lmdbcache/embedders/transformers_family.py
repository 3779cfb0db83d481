"""What the families of transformers' audio encoders have in common.

A family is a kind of model with one feature extractor and one way of being run. transformers and
torch are imported at first use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lmdbcache.embedders.base import check_num_samples, check_waveform
from lmdbcache.embedders.checkpoints import fetch_checkpoint
from lmdbcache.embedders.devices import check_compute_dtype, move_to_device, precision
from lmdbcache.embedders.pretrained import (
    check_extractor_type,
    check_sample_rate,
    import_transformers,
    library_versions,
    load_extractor,
    read_json,
)
from lmdbcache.errors import ConfigError, ModelLoadError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from lmdbcache.config import CacheConfig
    from lmdbcache.embedders.base import Embedder, FrontEnd
    from lmdbcache.embedders.checkpoints import Checkpoint

__all__ = [
    "ModelFamily",
    "Settings",
    "TransformersEmbedder",
    "TransformersFrontEnd",
    "check_output",
]


@dataclass(frozen=True)
class Settings:
    """A checkpoint's config.json and preprocessor_config.json.

    Args:
        folder: Where they lie.
        config: The model's settings.
        preprocessor: The feature extractor's settings.
    """

    folder: Path
    config: dict[str, Any]
    preprocessor: dict[str, Any]

    @property
    def model_type(self) -> str:
        """Transformers' name of the kind of model."""
        return str(self.config.get("model_type"))

    def require(self, name: str, *, found: Any, expected: Any) -> None:
        """Refuse settings that don't fit each other.

        Raises:
            ModelLoadError: `found` in preprocessor_config.json isn't what the model expects.
        """
        if found != expected:
            raise ModelLoadError(
                f"{self.folder}: {name} is {found!r} in preprocessor_config.json, but the model of "
                f"config.json takes {expected!r}; take both from the same model"
            )


class ModelFamily(ABC):
    """One kind of model: what identifies its embeddings, and how they are computed."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    """Values of `model_type` in config.json."""
    hub_prefixes: ClassVar[tuple[str, ...]]
    """How the names of its models on the Hub begin, for where config.json can't be had."""
    extractor_type: ClassVar[str]
    front_end_id: ClassVar[str]
    sample_rate: ClassVar[int]
    """Where preprocessor_config.json says nothing else, in Hz."""
    outputs: ClassVar[tuple[str, ...]]
    """The default one first."""

    def settings(self, folder: Path) -> Settings:
        """A checkpoint's settings, checked against each other.

        Raises:
            ModelLoadError: They don't fit this family or each other.
        """
        config = read_json(folder / "config.json")
        preprocessor = read_json(folder / "preprocessor_config.json")
        settings = Settings(folder, config, preprocessor)
        if settings.model_type not in self.model_types:
            raise ModelLoadError(
                f"{folder}: config.json says model_type {settings.model_type!r}; {self.name} is "
                f"{', '.join(self.model_types)}"
            )
        check_extractor_type(folder, preprocessor, self.extractor_type)
        rate = preprocessor.get("sampling_rate", self.sample_rate)
        if type(rate) is not int or rate < 1:
            raise ModelLoadError(
                f"{folder}: sampling_rate is {rate!r} in preprocessor_config.json; expected a "
                "whole number of Hz"
            )
        try:
            self.max_samples(settings)
            self.check_settings(settings)
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ModelLoadError(
                f"{folder}: config.json or preprocessor_config.json has a value that can't be used "
                f"({type(error).__name__}: {error}); save or download the checkpoint again"
            ) from error
        return settings

    @abstractmethod
    def check_settings(self, settings: Settings) -> None:
        """Whether the two files fit each other.

        Raises:
            ModelLoadError: They don't.
        """

    def max_samples(self, settings: Settings) -> int | None:  # noqa: ARG002 - most take any length
        """The longest clip that the model takes, in samples; None if there is no limit."""
        return None

    @abstractmethod
    def embedding_shape(
        self, settings: Settings, output: str, num_samples: int
    ) -> tuple[int, ...] | None:
        """Shape of one embedding; None if the settings don't tell."""

    @abstractmethod
    def make_front_end(self, checkpoint: Checkpoint, config: CacheConfig) -> FrontEnd:
        """The front end for clips of this config."""

    @abstractmethod
    def make_embedder(
        self, checkpoint: Checkpoint, config: CacheConfig, device: str | None
    ) -> Embedder:
        """The model, loaded."""


def check_output(family: str, outputs: tuple[str, ...], output: str) -> None:
    """Whether a model has this output.

    Raises:
        ConfigError: It hasn't; the message has those that it has.
    """
    if output not in outputs:
        raise ConfigError(f"output: {output!r}; {family} gives {', '.join(outputs)}")


class TransformersFrontEnd(ABC):
    """A model's own feature extractor, one clip at a time.

    The extractor is given the clip without the zeros that fill it up to the duration, and pads by
    its own rule. Pickles as checkpoint and sample rate only; each process builds its own extractor
    at first use.

    Args:
        checkpoint: As `find_checkpoint` gives it; downloaded at first use if it isn't local.
        sample_rate: Sample rate of the waveforms to come, in Hz.

    Raises:
        ConfigError: `sample_rate` isn't the one that the checkpoint was trained with (for a
            checkpoint that isn't on this machine yet: at first use).
        ModelLoadError: The checkpoint's settings are missing or don't fit.
    """

    family: ClassVar[ModelFamily]
    implementation: ClassVar[str] = "numpy"
    takes_num_valid: ClassVar[bool] = True

    def __init__(self, checkpoint: Checkpoint, sample_rate: int) -> None:
        self.checkpoint = checkpoint
        self.sample_rate = sample_rate
        self._settings: Settings | None = None
        self._extractor: Any = None
        if checkpoint.is_local:
            self._read_settings()

    @property
    def settings(self) -> Settings:
        """The checkpoint's settings, fetched if need be."""
        return self._settings or self._read_settings()

    @property
    def min_samples(self) -> int:
        """The shortest clip that gives features, in samples."""
        return 1

    def __call__(
        self, waveform: NDArray[np.float32], num_valid: int | None = None
    ) -> NDArray[np.float32]:
        """Compute the features of one clip, equal to calling the extractor itself.

        Args:
            waveform: float32 array (num_samples,), mono.
            num_valid: How many samples of it are the clip; the rest is padding. None: all.

        Returns:
            float32 array; the shape depends on the model and `num_samples` only.

        Raises:
            ConfigError: The waveform isn't one-dimensional float32 or is too short.
            ModelLoadError: The extractor can't be loaded.
            MissingDependencyError: transformers or torch is missing.
        """
        check_waveform(waveform)
        clip = waveform[:num_valid]
        check_num_samples(len(clip), self.min_samples, self.sample_rate)
        if self._extractor is None:
            self._extractor = load_extractor(
                self.checkpoint, self.family.name, self.family.extractor_type
            )
        import torch

        # A copy: some extractors work on what they are given.
        clip = np.array(clip, dtype=np.float32)
        with torch.inference_mode():
            features = self._features(self._extractor, clip, len(waveform))
        return np.ascontiguousarray(features, dtype=np.float32)

    @abstractmethod
    def _features(
        self, extractor: Any, clip: NDArray[np.float32], num_samples: int
    ) -> NDArray[np.float32]:
        """The features of a clip that stands for `num_samples`."""

    def provenance(self) -> dict[str, str]:
        """Which implementation is in use (key `feature_extractor`), and library versions."""
        import_transformers(self.family.name)
        return {
            "feature_extractor": f"{self.family.extractor_type} ({self.implementation})",
            **library_versions("transformers", "soundfile", "soxr"),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_extractor": None}

    def _read_settings(self) -> Settings:
        self.checkpoint = fetch_checkpoint(self.checkpoint)
        settings = self.family.settings(Path(self.checkpoint.location))
        trained = settings.preprocessor.get("sampling_rate", self.family.sample_rate)
        check_sample_rate(self.checkpoint, self.sample_rate, trained)
        self._settings = settings
        return settings


class TransformersEmbedder(ABC):
    """A frozen model of transformers, with float32 parameters whatever the checkpoint holds.

    With a lower `compute_dtype` torch's autocast decides which operations run in it; with float32 a
    GPU's TF32 is switched off while the model runs.

    Args:
        checkpoint: As `find_checkpoint` gives it; downloaded now if it isn't local.
        num_samples: Length of the waveforms that the front end was given, in samples.
        output: One of `outputs`.
        device: Where the model runs; None means a CUDA GPU if there is one, else the CPU.
        compute_dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        ConfigError: An unknown output, device or compute dtype.
        ModelLoadError: Another kind of checkpoint, damaged, incomplete, or not to be had.
        MissingDependencyError: transformers or torch is missing.
    """

    family: ClassVar[ModelFamily]

    def __init__(
        self,
        checkpoint: Checkpoint,
        num_samples: int,
        output: str | None = None,
        device: str | torch.device | None = None,
        compute_dtype: str = "float32",
    ) -> None:
        output = output or self.outputs[0]
        check_output(self.family.name, self.outputs, output)
        check_compute_dtype(compute_dtype)
        import_transformers(self.family.name)
        self.output = output
        self.num_samples = num_samples
        self.compute_dtype = compute_dtype
        self.checkpoint = fetch_checkpoint(checkpoint)
        self.settings = self.family.settings(Path(self.checkpoint.location))
        self._model = self._load()
        # What config.json leaves out is known now.
        self._full_settings = Settings(
            self.settings.folder, self._model.config.to_dict(), self.settings.preprocessor
        )
        self.device = move_to_device(self._model, device)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names that `output` can take."""
        return self.family.outputs

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """Shape of one embedding."""
        shape = self.family.embedding_shape(self._full_settings, self.output, self.num_samples)
        if shape is None:
            raise ModelLoadError(
                f"{self.settings.folder}: config.json has sizes that {self.family.name} can't have"
            )
        return shape

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Embed a batch.

        Args:
            features: float32 tensor (batch, ...) of the family's front end, on any device.

        Returns:
            float32 tensor (batch, *embedding_shape) on the CPU.

        Raises:
            ConfigError: The features haven't the shape that the model takes.
        """
        import torch

        expected = self._feature_shape()
        if tuple(features.shape[1:]) != expected:
            raise ConfigError(
                f"features: shape {tuple(features.shape)}, but {self.checkpoint.identity} takes "
                f"(batch, {', '.join(map(str, expected))}); use its own front end"
            )
        with torch.no_grad(), precision(self.device, self.compute_dtype):
            embeddings = self._embed(features.to(self.device, torch.float32))
        on_cpu: torch.Tensor = embeddings.to("cpu", torch.float32)
        return on_cpu

    def provenance(self) -> dict[str, str]:
        """Weights, Hub revision where known, library versions, device type and compute dtype."""
        return {
            **self.checkpoint.provenance(),
            **library_versions("torch", "transformers"),
            "device": self.device.type,
            "compute_dtype": self.compute_dtype,
        }

    @abstractmethod
    def _load(self) -> Any:
        """The model with its weights."""

    @abstractmethod
    def _feature_shape(self) -> tuple[int, ...]:
        """Shape of one clip's features."""

    @abstractmethod
    def _embed(self, features: torch.Tensor) -> torch.Tensor:
        """The chosen output, on the model's device."""
