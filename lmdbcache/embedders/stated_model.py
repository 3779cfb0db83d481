"""A model whose name and front end are stated by the caller: a module, a model file."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmdbcache.audio import by_soundfile
from lmdbcache.config import CacheConfig
from lmdbcache.embedders.base import (
    as_features,
    check_num_samples,
    check_waveform,
    clip_features,
    library_versions,
)
from lmdbcache.errors import AudioDecodeError, ConfigError, ModuleError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from lmdbcache.embedders.base import Embedder, FrontEnd

_DECODING: Final = "soundfile+soxr-hq+mono-mean"
_WAVEFORM: Final = "zero-pad+waveform/1"


class StatedModel(ABC):
    """An `AudioModel` by name and front end; the arguments are those of `ModuleEmbedder`.

    Raises:
        ConfigError: Something here can't identify a model.
    """

    def __init__(
        self,
        *,
        name: str,
        sample_rate: int,
        front_end: Callable[[NDArray[np.float32]], Any] | None,
        front_end_id: str | None,
        outputs: Mapping[str, Any],
        min_samples: int,
    ) -> None:
        if (front_end is None) != (front_end_id is None):
            raise ConfigError(
                "front_end_id: the features' name is part of a cache's identity; give front_end "
                "and front_end_id together, or neither for a module that takes waveforms"
            )
        # CacheConfig says what is wrong with a name.
        checked = CacheConfig(
            model_name=name,
            sample_rate=sample_rate,
            duration=max(1.0, 1 / max(1, sample_rate)),
            front_end=f"{_DECODING}+{front_end_id or _WAVEFORM}",
        )
        for output in outputs:
            checked.replace(output=output)
        self._front_end = _CallableFrontEnd(
            front_end, checked.front_end, checked.sample_rate, min_samples
        )
        self.identity: Final = checked.model_name
        """The value for `CacheConfig.model_name`."""
        self.front_end_id: Final = checked.front_end
        """The value for `CacheConfig.front_end`."""
        self.sample_rate: Final = checked.sample_rate
        """Of the waveforms that the model takes, in Hz."""
        self.outputs: Final = tuple(outputs)
        """The names that `output` can take, the default one first."""
        self._taken_by: Final = dict(outputs)

    def check(self, config: CacheConfig) -> None:
        """Check that this model can fill a store of this config.

        Raises:
            ConfigError: The config is another model's; the message names the field.
        """
        if config.output not in self.outputs:
            raise ConfigError(
                f"output: {config.output!r}; {self.identity} gives {', '.join(self.outputs)}"
            )
        for field, own in (
            ("model_name", self.identity),
            ("front_end", self.front_end_id),
            ("sample_rate", self.sample_rate),
        ):
            found = getattr(config, field)
            if (by_soundfile(found) if field == "front_end" else found) != own:
                raise ConfigError(
                    f"{field}: {getattr(config, field)!r}, but this module's is {own!r}; "
                    "config_for(embedder) makes the right config"
                )

    def embedding_shape(self, config: CacheConfig) -> tuple[int, ...] | None:
        """Return the shape of one embedding, by running the model on one clip of noise.

        None if the front end or the model fails on noise, which says little about real clips.
        """
        try:
            return self.make_embedder(config).embedding_shape
        except (AudioDecodeError, ModuleError):
            return None

    def make_front_end(self, config: CacheConfig) -> FrontEnd:
        """Return the front end; the same for every config that `check` lets pass."""
        self.check(config)
        return self._front_end

    @abstractmethod
    def make_embedder(self, config: CacheConfig, device: str | None = None) -> Embedder:
        """Make an embedder of the model."""


class StatedEmbedder(ABC):
    """An `Embedder`: one output of a `StatedModel`."""

    def __init__(self, source: StatedModel, config: CacheConfig) -> None:
        self.outputs: Final = source.outputs
        self._source = source
        self._config = config

    @functools.cached_property
    def embedding_shape(self) -> tuple[int, ...]:
        """Shape of one embedding, by embedding one clip of noise.

        Raises:
            AudioDecodeError, ModuleError: The front end or the model fails on noise.
        """
        import torch

        # Not zeros: a front end may divide by a clip's loudness.
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, self._config.num_samples)
        features = clip_features(
            self._source.make_front_end(self._config),
            noise.astype(np.float32),
            len(noise),
            sample_rate=self._config.sample_rate,
            name="a clip of noise",
        )
        return tuple(self.embed(torch.from_numpy(features)[None]).shape[1:])

    @abstractmethod
    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Embed a batch; see `Embedder`."""


class _CallableFrontEnd:
    """A front end around a function, or the waveform itself."""

    def __init__(
        self,
        function: Callable[[NDArray[np.float32]], Any] | None,
        identity: str,
        sample_rate: int,
        min_samples: int,
    ) -> None:
        self.function = function
        self.identity = identity
        self.sample_rate = sample_rate
        self.min_samples = max(1, min_samples)
        self.takes_num_valid = function is not None  # the module itself also gets the padding

    def __call__(self, waveform: NDArray[np.float32], num_valid: int | None = None) -> NDArray[Any]:
        check_waveform(waveform)
        # A copy: a function may work on what it is given.
        samples = np.array(waveform[:num_valid], dtype=np.float32)
        check_num_samples(len(samples), self.min_samples, self.sample_rate)
        return samples if self.function is None else as_features(self.function(samples))

    def provenance(self) -> dict[str, str]:
        return {
            "feature_extractor": self.identity,
            **library_versions("numpy", "soundfile", "soxr"),
        }
