"""The model that an encoder stands for: built when it is needed, frozen, run on the misses."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from lmdbcache.config import CacheConfig
from lmdbcache.embedders.weights_watch import WatchedWeights
from lmdbcache.errors import ConfigError, InvalidEmbeddingError
from lmdbcache.training.model_by_name import ModelByName

__all__ = ["FrozenModel"]


class FrozenModel:
    """A model whose weights don't change, or the function that builds it.

    Args:
        model: See `CachedEncoder`.
        config: What its embeddings are stored under.
        select_output: Takes the embeddings from what the model returns.
    """

    def __init__(
        self,
        model: Any,
        config: CacheConfig,
        select_output: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        self._config = config
        self._select_output = select_output
        self._device: torch.device | None = None
        self.by_name: Final = ModelByName(model, config) if ModelByName.is_one(model) else None
        self._factory: Any = model if self.by_name is None and _is_factory(model) else None
        self._model: Any = None
        self._weights: WatchedWeights | None = None
        if self._factory is None and self.by_name is None:
            _check_frozen(model)
            self._take(model)

    def __getstate__(self) -> dict[str, Any]:
        # Where a name is known, the weights needn't travel.
        return self.__dict__ if self.by_name is None else {**self.__dict__, "_model": None}

    @property
    def is_built(self) -> bool:
        """Whether the model is there, or would have to be built."""
        return self._model is not None

    @property
    def device(self) -> torch.device | None:
        """Where its parameters are; None if that isn't known."""
        if not isinstance(self._model, torch.nn.Module):
            return None
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return tensors[0].device if tensors else None

    def move(self, device: torch.device) -> None:
        """Move the model, or have it built there. An embedder that was given has its own device."""
        self._device = device
        if self.by_name is not None:
            self._model = None  # and built there at the next miss
        if isinstance(self._model, torch.nn.Module):
            self._model.to(device)

    def build(self) -> None:
        """Build the model if it isn't there, and look whether it is still frozen.

        Raises:
            ConfigError: It is being trained, or doesn't fit the config.
            ProvenanceMismatchError: Its weights changed.
        """
        if self.by_name is not None:
            self.by_name.check_frozen()
            if self._model is None:
                self._model = self.by_name.make_embedder(self._device)
            return
        if self._model is None:
            model = self._factory()
            if isinstance(model, torch.nn.Module):
                model.eval().requires_grad_(requires_grad=False)
            self._take(model)
            if self._device is not None:
                self.move(self._device)
        _check_frozen(self._model)
        if self._weights is not None:
            self._weights.check()

    def _take(self, model: Any) -> None:
        if not callable(model) and not _is_embedder(model):
            raise ConfigError(
                f"model: a {type(model).__name__} can't be called and has no `embed`; give a "
                "module, an embedder, a function of its inputs, or a function that builds one"
            )
        checkpoint = getattr(model, "checkpoint", None)
        known = {
            "output": getattr(model, "output", None),
            "compute_dtype": getattr(model, "compute_dtype", None),
            "model_name": getattr(checkpoint, "identity", None),
        }
        for name, value in known.items():
            asked = getattr(self._config, name)
            if isinstance(value, str) and _is_embedder(model) and value != asked:
                raise ConfigError(f"{name}: {asked!r} in the config, {value!r} in the embedder")
        self._model = model
        if isinstance(model, torch.nn.Module) and not _is_embedder(model):
            self._weights = WatchedWeights(model)

    def provenance(self) -> dict[str, str]:
        """What is known of the weights: an embedder's own words, a module's digest."""
        if _is_embedder(self._model):
            folder = {} if self.by_name is None else self.by_name.provenance()
            return {**folder, **self._model.provenance()}
        return {} if self._weights is None else {"weights_digest": self._weights.digest}

    def run(
        self, inputs: Sequence[Any], named: Mapping[str, Any], num_samples: int
    ) -> torch.Tensor:
        """One forward pass.

        Args:
            inputs: Positional inputs, each of `num_samples` rows.
            named: Further inputs by name.
            num_samples: How many embeddings are expected.

        Returns:
            `(num_samples, *embedding_shape)`, without grad.

        Raises:
            ConfigError: The model returns no tensor that could be meant.
            InvalidEmbeddingError: Another number of embeddings.
        """
        device = self.device
        inputs = [_moved(value, device) for value in inputs]
        named = {name: _moved(value, device) for name, value in named.items()}
        is_embedder = _is_embedder(self._model)
        dtype = "float32" if is_embedder else self._config.compute_dtype
        with torch.no_grad(), _own_precision(device, dtype):
            result = (self._model.embed if is_embedder else self._model)(*inputs, **named)
            embeddings = self._embeddings_of(result).detach()
        if self._weights is not None:
            self._weights.computed()
        found = len(embeddings) if embeddings.ndim else 0
        if found != num_samples:
            raise InvalidEmbeddingError(
                f"the model returned {found} embeddings for {num_samples} samples"
            )
        return embeddings

    def _embeddings_of(self, result: Any) -> torch.Tensor:
        output = self._config.output
        if self._select_output is not None:
            result = self._select_output(result)
        elif isinstance(result, Mapping):
            result = result.get(output, result)
        elif not isinstance(result, (torch.Tensor, np.ndarray)):
            result = getattr(result, output, result)
        if isinstance(result, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(result))
        if isinstance(result, torch.Tensor):
            return result
        has = f" with {', '.join(result)}" if isinstance(result, Mapping) else ""
        raise ConfigError(
            f"output: the model returned a {type(result).__name__}{has}, without a tensor "
            f"{output!r}; give select_output=, a function that takes the embeddings from it"
        )


_AMBIGUOUS: Final = (
    "model: {} can be called with an input as well as without any: is it the model, or does it "
    "build one? Wrap it: `lambda inputs: model(inputs)` or `lambda: build()`"
)


def _is_embedder(model: Any) -> bool:
    """Whether it follows `lmdbcache.embedders.Embedder`; a module may have a layer called embed."""
    asked = ("embed", "embedding_shape", "provenance")
    # Of the class first: an embedder may have to run to tell its shape.
    return not inspect.isclass(model) and all(
        hasattr(type(model), name) or hasattr(model, name) for name in asked
    )


def _is_factory(model: Any) -> bool:
    """Whether this is called without arguments, to build the model."""
    if _is_embedder(model) or isinstance(model, torch.nn.Module) or not callable(model):
        return False
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return False
    builds, takes_input = _binds(signature), _binds(signature, None)
    if builds and takes_input:
        raise ConfigError(_AMBIGUOUS.format(model))
    return builds


def _binds(signature: inspect.Signature, *arguments: Any) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _check_frozen(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        return
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trained or any(module.training for module in model.modules()):
        reason = "is in training mode"
        if trained:
            reason = f"has {len(trained)} parameters that require grad ({trained[0]}, …)"
        raise ConfigError(
            f"model: {type(model).__name__} {reason}; only a frozen encoder's embeddings can be "
            "cached: model.eval().requires_grad_(False)"
        )


def _moved(value: Any, device: torch.device | None) -> Any:
    if device is None:
        return value
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def _own_precision(device: torch.device | None, compute_dtype: str) -> Iterator[None]:
    """Compute as the config says, whatever autocast the training loop is in."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if compute_dtype != "float32":
            kind = "cpu" if device is None else device.type
            stack.enter_context(torch.autocast(kind, dtype=getattr(torch, compute_dtype)))
        yield
