"""The model that an encoder stands for: built when it is needed, frozen, run on the misses."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from lmdbcache.config import CacheConfig
from lmdbcache.embedders import (
    NUM_REPEATS,
    FirstBatches,
    WatchedWeights,
    first_line,
    input_dtype,
    no_real_numbers,
    tolerance_of,
)
from lmdbcache.errors import CacheError, ConfigError, InvalidEmbeddingError, ModuleError
from lmdbcache.storage import has_masked_elements
from lmdbcache.training.batch_groups import copies_of, groups_by_shape, row_checksums
from lmdbcache.training.batch_inputs import stacked
from lmdbcache.training.lazy_model import LazyModel

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
        self.by_name: Final = LazyModel(model, config) if LazyModel.is_one(model) else None
        self._factory: Any = model if self.by_name is None and _is_factory(model) else None
        self._model: Any = None
        self._weights: WatchedWeights | None = None
        self._first_batches = FirstBatches()
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
                model.eval()
                for parameter in model.parameters():  # a script has no requires_grad_
                    parameter.requires_grad = False
            self._take(model)
            if self._device is not None:
                self.move(self._device)
        _check_frozen(self._model)
        if self._weights is not None:
            self._weights.check()

    def check_written(self) -> None:
        """Refuse weights that were written since the last look, without a computation.

        Raises:
            ProvenanceMismatchError: They are others than before.
        """
        if self._weights is not None:
            self._weights.check_written()

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
        """Run one forward pass; after the first one a few more of a single sample.

        Args:
            inputs: Positional inputs, each of `num_samples` rows.
            named: Further inputs by name.
            num_samples: How many embeddings are expected.

        Returns:
            `(num_samples, *embedding_shape)`, without grad.

        Raises:
            ConfigError: The model returns no tensor that could be meant.
            InvalidEmbeddingError: Another number of embeddings; or, in the first batches, the model
                answers differently for the same sample, or alike for different ones.
        """
        embeddings = self._forward(inputs, named, num_samples)
        self._look(inputs, named, embeddings)
        return embeddings

    def run_by_shape(
        self, inputs: Sequence[Any], named: Mapping[str, Any], sample_ids: Sequence[str]
    ) -> torch.Tensor:
        """Run one forward pass for each shape of the features.

        Args:
            inputs: Positional inputs, each of one row for each sample; the first one a list of
                tensors, the features.
            named: Further inputs by name.
            sample_ids: Of the rows.

        Returns:
            `(num_samples, *embedding_shape)`, without grad.

        Raises:
            InvalidEmbeddingError: Features of another shape give an embedding of another shape;
                and see `run`.
            ModuleError: The model fails on features of one shape.
        """
        rows: dict[int, torch.Tensor] = {}
        for group, positional, further in groups_by_shape(inputs, named):
            given = [stacked(one) for one in positional]
            who = (
                f"{', '.join(sample_ids[row] for row in group[:3])}: features of shape "
                f"{tuple(given[0].shape[1:])} by the front end {self._config.front_end}"
            )
            try:
                found = self.run(given, further, len(group))
            except CacheError:
                raise
            except Exception as error:
                raise ModuleError(f"{who}: the model fails ({first_line(error)})") from error
            expected = next(iter(rows.values()), found[0]).shape
            if found[0].shape != expected:
                raise InvalidEmbeddingError(
                    f"{who} give an embedding of shape {tuple(found[0].shape)}, others of this "
                    f"batch {tuple(expected)}; a store holds embeddings of one shape"
                )
            rows.update(zip(group, found, strict=True))
        return torch.stack([rows[row] for row in range(len(sample_ids))])

    def _look(
        self, inputs: Sequence[Any], named: Mapping[str, Any], embeddings: torch.Tensor
    ) -> None:
        """Look whether the embeddings of the first batches belong to their samples."""
        if self._first_batches.are_enough:
            return
        model = self._model
        name = f"{type(model).__name__} ({self._config.model_name})"
        checksums = row_checksums(inputs[0]) if inputs else []
        heard = {one: embeddings[row] for row, one in enumerate(checksums) if one is not None}
        self._first_batches.compare(heard, name)
        number = min(NUM_REPEATS, len(embeddings))

        def embed_again(row: int) -> torch.Tensor:
            copies = [copies_of(value, row, number) for value in inputs]
            further = {key: copies_of(value, row, number) for key, value in named.items()}
            times = range(-(-NUM_REPEATS // number))
            return torch.cat([self._forward(copies, further, number) for _ in times])

        module = model if isinstance(model, torch.nn.Module) else getattr(model, "module", None)
        on_gpu = self.device is not None and self.device.type == "cuda"
        self._first_batches.repeat(
            dict(enumerate(embeddings)),
            [row for row, one in enumerate(checksums) if one is None],
            embed_again,
            tolerance_of(module, self._config.compute_dtype, may_use_tf32=on_gpu),
            name,
        )

    def _forward(
        self, inputs: Sequence[Any], named: Mapping[str, Any], num_samples: int
    ) -> torch.Tensor:
        device = self.device
        inputs = [self._moved(value, device) for value in inputs]
        named = {name: self._moved(value, device) for name, value in named.items()}
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

    def _moved(self, value: Any, device: torch.device | None) -> Any:
        if isinstance(value, Mapping):
            return {name: self._moved(part, device) for name, part in value.items()}
        if not isinstance(value, torch.Tensor) or device is None:
            return value
        dtype = input_dtype(self._model, value) if value.is_floating_point() else value.dtype
        # float32 weights take what they are given, as autocast may be on.
        return value.to(device) if dtype == torch.float32 else value.to(device, dtype)

    def _embeddings_of(self, result: Any) -> torch.Tensor:
        output = self._config.output
        if self._select_output is not None:
            result = self._select_output(result)
        elif isinstance(result, Mapping):
            result = result.get(output, result)
        elif not isinstance(result, (torch.Tensor, np.ndarray)):
            result = getattr(result, output, result)
        if has_masked_elements(result):
            raise InvalidEmbeddingError(
                "the model returned embeddings with masked elements, which have no value to store"
            )
        if isinstance(result, np.ndarray) and result.dtype.kind in "biufc":
            result = torch.from_numpy(np.ascontiguousarray(result))
        if isinstance(result, torch.Tensor):
            if kind := no_real_numbers(result):
                raise InvalidEmbeddingError(
                    f"the model returned {kind}, and a store holds arrays of real numbers; give "
                    "select_output=, a function that makes one of it, such as torch.view_as_real, "
                    "to_dense or dequantize"
                )
            return result
        has = f" with {', '.join(result)}" if isinstance(result, Mapping) else ""
        raise ConfigError(
            f"output: the model returned a {type(result).__name__}{has}, without a tensor "
            f"{output!r}; give select_output=, a function that takes the embeddings from it"
        )


_QUANTIZED: Final = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
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
    if trained or any(map(_is_in_training_mode, model.modules())):
        reason = "is in training mode"
        if trained:
            reason = f"has {len(trained)} parameters that require grad ({trained[0]}, …)"
        raise ConfigError(
            f"model: {type(model).__name__} {reason}; only a frozen encoder's embeddings can be "
            "cached: model.eval().requires_grad_(False)"
        )


def _is_in_training_mode(part: torch.nn.Module) -> bool:
    # The quantized parts of a module in eval mode are made in training mode, which changes nothing
    # in them but dropout between the layers of a recurrent one. A frozen script has no mode.
    is_quantized = type(part).__module__.startswith(_QUANTIZED) and not getattr(part, "dropout", 0)
    return getattr(part, "training", False) and not is_quantized


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
