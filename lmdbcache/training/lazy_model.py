"""A model known by name, folder or `AudioModel`: looked up and loaded when it is needed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, Final

import torch

from lmdbcache.config import CacheConfig
from lmdbcache.embedders import (
    AudioModel,
    Embedder,
    FrontEnd,
    ModuleEmbedder,
    folder_provenance,
    moved_weights,
    ready_model,
)
from lmdbcache.errors import ConfigError

__all__ = ["LazyModel"]


class LazyModel:
    """What an extraction would run for this name and config, built in the same way.

    Pickles as name and config: front end and weights are built again where they are needed.

    Args:
        model: Alias, Hub name, checkpoint folder, or an `AudioModel`.
        config: What its embeddings are stored under.

    Raises:
        ConfigError: An `AudioModel` that can't fill a store of this config, or isn't frozen. A
            name is looked up at first use.
    """

    def __init__(self, model: str | os.PathLike[str] | AudioModel, config: CacheConfig) -> None:
        self.model: Final = model
        self._config = config
        self._found: AudioModel | None = None
        self._front_end: FrontEnd | None = None
        if not isinstance(model, (str, os.PathLike)):
            model.check(config)
        self.check_frozen()

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyModel, (self.model, self._config)

    @staticmethod
    def is_one(model: Any) -> bool:
        """Whether this is a name, a folder or an `AudioModel`."""
        if isinstance(model, (str, os.PathLike)):
            return True
        return not inspect.isclass(model) and isinstance(model, AudioModel)

    @property
    def front_end(self) -> FrontEnd:
        """The model's front end.

        Raises:
            ConfigError: The model can't fill a store of this config.
            ModelLoadError: There is no such model, or it can't be downloaded.
        """
        if self._front_end is None:
            self._front_end = self._ready().make_front_end(self._config)
        return self._front_end

    def make_embedder(self, device: torch.device | None) -> Embedder:
        """The model, loaded; see `front_end` for errors.

        Args:
            device: Where it runs; None: a module of your own where it is, else a CUDA GPU if there
                is one.
        """
        return self._ready().make_embedder(self._config, None if device is None else str(device))

    def check_frozen(self) -> None:
        """Whether a module of your own may be trained.

        Raises:
            ConfigError: It has parameters that require grad.
        """
        if isinstance(self.model, ModuleEmbedder):
            trained = sum(p.requires_grad for p in self.model.module.parameters())
            if trained:
                raise ConfigError(
                    f"model: {self.model.identity} has {trained} parameters that require grad; "
                    "only a frozen encoder's embeddings can be cached: "
                    "module.requires_grad_(False)"
                )

    def provenance(self) -> dict[str, str]:
        """Where its folder is, as an extraction notes it."""
        if isinstance(self.model, (str, os.PathLike)):
            return folder_provenance(self.model)
        return {}

    def moved_weights(self, provenance: Mapping[str, str], store: object) -> str:
        """How its Hub name stands for other weights than a store's; see `moved_weights`."""
        if isinstance(self.model, (str, os.PathLike)):
            return moved_weights(self.model, provenance, store)
        return ""

    def _ready(self) -> AudioModel:
        if self._found is None:
            self._found = ready_model(self.model, self._config)
        return self._found
