"""The encoder behind a `CachedEncoder`: found or built when it is needed, run on the misses."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from lmdbcache.config import CacheConfig
from lmdbcache.embedders import (
    AudioModel,
    FirstBatches,
    FrontEnd,
    ModuleEmbedder,
    RunningModule,
    folder_provenance,
    moved_weights,
    no_real_numbers,
    num_repeats,
    ready_model,
    tolerance_of,
)
from lmdbcache.errors import ConfigError, InvalidEmbeddingError, ModuleError
from lmdbcache.files import few
from lmdbcache.storage import has_masked_elements
from lmdbcache.training.batch_inputs import copies_of, groups_by_shape, row_checksums


class FrozenEncoder:
    """An encoder whose weights don't change, and that is built when it has to compute.

    Whatever it is given becomes an embedder: an `AudioModel` makes one, an embedder is one, a
    module or a function of the inputs is wrapped as `RunningModule`, which is also what a
    `ModuleEmbedder` runs. Pickles without the weights where a name or an `AudioModel` is known.

    Args:
        given: See `CachedEncoder`.
        config: What its embeddings are stored under.
        select_output: Takes the embeddings from what a module or function returns.

    Raises:
        ConfigError: It isn't frozen, can't be an encoder, or can't fill a store of this config. A
            name is looked up at first use.
    """

    def __init__(
        self,
        given: Any,
        config: CacheConfig,
        select_output: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        self._given: Final = given
        self._config: Final = config
        self._select_output = select_output
        self._device: torch.device | None = None
        self._model: AudioModel | None = None
        self._front_end: FrontEnd | None = None
        self._embedder: Any = None
        self._first_batches = FirstBatches()
        self._is_name = isinstance(given, (str, os.PathLike))
        self._is_model = self._is_name or (
            not inspect.isclass(given) and isinstance(given, AudioModel)
        )
        if self._is_model:
            if not self._is_name:
                given.check(config)
            self._check_frozen()
        elif not _is_factory(given):
            self._embedder = self._embedder_of(given)
            self._check_frozen()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_model": None, "_front_end": None}
        # Where a model is known, the weights needn't travel.
        return {**state, "_embedder": None} if self._is_model else state

    @property
    def is_built(self) -> bool:
        """Whether the embedder is there, or would have to be built."""
        return self._embedder is not None

    @property
    def takes_num_valid(self) -> bool:
        """Whether the embedder, which is built, takes the lengths of the clips."""
        return bool(getattr(self._embedder, "takes_num_valid", False))

    @property
    def front_end(self) -> FrontEnd | None:
        """That of a model known by its name; None for anything else.

        Raises:
            ConfigError: The model can't fill a store of this config.
            ModelLoadError: The model can't be found or downloaded.
        """
        if self._is_model and self._front_end is None:
            self._front_end = self._ready().make_front_end(self._config)
        return self._front_end

    @property
    def device(self) -> torch.device | None:
        """Where a module's weights are; None if that isn't known."""
        return self._embedder.device if isinstance(self._embedder, RunningModule) else None

    def move(self, device: torch.device) -> None:
        """Move a module, or have it built there. An embedder that was given has its own device."""
        self._device = device
        if self._is_model:
            self._embedder = None  # and built there at the next miss
        elif isinstance(self._module, torch.nn.Module):
            self._module.to(device)

    def build(self) -> None:
        """Build the embedder if it isn't there, and check that it is still frozen.

        Raises:
            ConfigError: It is being trained, or doesn't fit the config.
        """
        if self._is_model:
            self._check_frozen()
            if self._embedder is None:
                device = None if self._device is None else str(self._device)
                self._embedder = self._ready().make_embedder(self._config, device)
            return
        if self._embedder is None:
            built = self._given()
            if isinstance(built, torch.nn.Module):
                built.eval()
                for parameter in built.parameters():  # a script has no requires_grad_
                    parameter.requires_grad = False
            self._embedder = self._embedder_of(built)
            if self._device is not None:
                self.move(self._device)
        self._check_frozen()

    def check_written(self) -> None:
        """Refuse weights that were written since the last look, without a computation.

        Raises:
            ProvenanceMismatchError: They are others than before.
        """
        if isinstance(self._embedder, RunningModule) and self._embedder.weights is not None:
            self._embedder.weights.check_written()

    def provenance(self) -> dict[str, str]:
        """Return what is known of the weights, and the model's folder, as `extract` notes it."""
        folder = folder_provenance(self._given) if self._is_name else {}
        return {**folder, **self._embedder.provenance()}

    def moved_weights(self, provenance: Mapping[str, str], store: object) -> str:
        """Describe how its Hub name means other weights than a store's, else nothing."""
        return moved_weights(self._given, provenance, store) if self._is_name else ""

    def run(
        self, inputs: Sequence[Any], named: Mapping[str, Any], sample_ids: Sequence[str]
    ) -> torch.Tensor:
        """Run one forward pass for each shape of the features; after the first a few more.

        Args:
            inputs: Positional inputs, each of one row for each sample. The first one may be a list
                of tensors, whose shapes may differ.
            named: Further inputs by name.
            sample_ids: Of the rows.

        Returns:
            `(num_samples, *embedding_shape)`, without grad.

        Raises:
            ConfigError: The encoder returns no tensor that could be meant.
            InvalidEmbeddingError: Another number of embeddings, or embeddings of several shapes;
                or, in the first batches, the encoder answers differently for the same sample, or
                alike for different ones.
            ModuleError: The encoder fails.
        """
        rows: dict[int, torch.Tensor] = {}
        for group, positional, further in groups_by_shape(inputs, named, len(sample_ids)):
            names = few([sample_ids[row] for row in group], 3)
            try:
                found = self._forward(positional, further, len(group))
            except ModuleError as error:
                raise ModuleError(
                    f"{names}: {error}; front end {self._config.front_end}"
                ) from error
            self._look(positional, further, found)
            expected = next(iter(rows.values()), found[0] if len(found) else found).shape
            if len(found) and found[0].shape != expected:
                raise InvalidEmbeddingError(
                    f"{names}: an embedding of shape {tuple(found[0].shape)}, others of this batch "
                    f"have {tuple(expected)}; a store holds embeddings of one shape"
                )
            if len(group) == len(sample_ids):
                return found
            rows.update(zip(group, found, strict=True))
        return torch.stack([rows[row] for row in range(len(sample_ids))])

    @property
    def _module(self) -> Any:
        """The module that may be trained, where there is one."""
        if isinstance(self._given, ModuleEmbedder):
            return self._given.module
        return self._embedder.module if isinstance(self._embedder, RunningModule) else None

    def _ready(self) -> AudioModel:
        if self._model is None:
            self._model = ready_model(self._given, self._config)
        return self._model

    def _embedder_of(self, model: Any) -> Any:
        if not _is_embedder(model):
            if not callable(model):
                raise ConfigError(
                    f"encoder: a {type(model).__name__} can't be called and has no `embed`; give a "
                    "module, an embedder, a function of its inputs, or a function that builds one"
                )
            name = f"{type(model).__name__} ({self._config.model_name})"
            return RunningModule(
                model, self._config.compute_dtype, self._taken, name=name, allow_tf32=True
            )
        checkpoint = getattr(model, "checkpoint", None)
        known = {
            "output": getattr(model, "output", None),
            "compute_dtype": getattr(model, "compute_dtype", None),
            "model_name": getattr(checkpoint, "identity", None),
        }
        for name, value in known.items():
            asked = getattr(self._config, name)
            if isinstance(value, str) and value != asked:
                raise ConfigError(f"{name}: {asked!r} in the config, {value!r} in the embedder")
        return model

    def _check_frozen(self) -> None:
        """Refuse a module that may be trained.

        Raises:
            ConfigError: It has parameters that require grad, or is in training mode. A
                `ModuleEmbedder`'s mode doesn't matter: it runs in eval mode.
        """
        module = self._module
        if not isinstance(module, torch.nn.Module):
            return
        trained = [name for name, one in module.named_parameters() if one.requires_grad]
        reason = ""
        if trained:
            reason = f"has {len(trained)} parameters that require grad ({few(trained, 1)})"
        elif not self._is_model and any(map(_is_in_training_mode, module.modules())):
            reason = "is in training mode"
        if reason:
            raise ConfigError(
                f"encoder: {type(module).__name__} {reason}; only a frozen encoder's embeddings "
                "can be cached: module.eval().requires_grad_(False)"
            )

    def _forward(
        self, inputs: Sequence[Any], named: Mapping[str, Any], num_samples: int
    ) -> torch.Tensor:
        with torch.no_grad(), _without_autocast():
            embeddings: torch.Tensor = self._embedder.embed(*inputs, **named)
        found = len(embeddings) if embeddings.ndim else 0
        if found != num_samples:
            raise InvalidEmbeddingError(
                f"the encoder returned {found} embeddings for {num_samples} samples"
            )
        return embeddings

    def _taken(self, result: Any) -> torch.Tensor:
        """Take the embeddings from what a module or function returns."""
        output = self._config.output
        if self._select_output is not None:
            result = self._select_output(result)
        elif isinstance(result, Mapping):
            result = result.get(output, result)
        elif not isinstance(result, (torch.Tensor, np.ndarray)):
            result = getattr(result, output, result)
        if has_masked_elements(result):
            raise InvalidEmbeddingError(
                "the encoder returned embeddings with masked elements, which have no value to store"
            )
        if isinstance(result, np.ndarray) and result.dtype.kind in "biufc":
            result = torch.from_numpy(np.ascontiguousarray(result))
        if not isinstance(result, torch.Tensor):
            has = f" with {', '.join(result)}" if isinstance(result, Mapping) else ""
            raise ConfigError(
                f"output: the encoder returned a {type(result).__name__}{has}, without a tensor "
                f"{output!r}; give `select_output=`, a function that takes the embeddings from it"
            )
        if kind := no_real_numbers(result):
            raise InvalidEmbeddingError(
                f"the encoder returned {kind}, and a store holds arrays of real numbers; give "
                "`select_output=`, a function that makes one of it, such as torch.view_as_real, "
                "to_dense or dequantize"
            )
        return result

    def _look(
        self, inputs: Sequence[Any], named: Mapping[str, Any], embeddings: torch.Tensor
    ) -> None:
        """Check that the embeddings of the first batches belong to their samples."""
        if self._first_batches.are_enough:
            return
        module = self._module
        if module is None:
            module = getattr(self._embedder, "module", None)
        encoder = self._embedder if module is None else module
        name = f"{type(encoder).__name__} ({self._config.model_name})"
        checksums = row_checksums(inputs[0]) if inputs else []
        heard = {one: embeddings[row] for row, one in enumerate(checksums) if one is not None}
        self._first_batches.compare(heard, name)
        repeats = num_repeats(embeddings[0])
        number = min(repeats, len(embeddings))

        def embed_again(row: int) -> torch.Tensor:
            copies = [copies_of(value, row, number) for value in inputs]
            further = {key: copies_of(value, row, number) for key, value in named.items()}
            times = range(-(-repeats // number))
            return torch.cat([self._forward(copies, further, number) for _ in times])

        on_gpu = self.device is not None and self.device.type == "cuda"
        self._first_batches.repeat(
            dict(enumerate(embeddings)),
            [row for row, one in enumerate(checksums) if one is None],
            embed_again,
            tolerance_of(module, self._config.compute_dtype, may_use_tf32=on_gpu),
            name,
        )


_QUANTIZED: Final = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def _is_embedder(model: Any) -> bool:
    """Return whether it follows `Embedder`; a module may have a layer called embed."""
    asked = ("embed", "embedding_shape", "provenance")
    # Of the class first: an embedder may have to run to know its shape.
    return not inspect.isclass(model) and all(
        hasattr(type(model), name) or hasattr(model, name) for name in asked
    )


def _is_factory(model: Any) -> bool:
    """Return whether this is called without arguments, to build the encoder."""
    if _is_embedder(model) or isinstance(model, torch.nn.Module) or not callable(model):
        return False
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return False
    builds, takes_input = _binds(signature), _binds(signature, None)
    if builds and takes_input:
        raise ConfigError(
            f"encoder: {model} can be called with an input as well as without any: is it the "
            "encoder, or does it build one? Wrap it: `lambda inputs: encoder(inputs)` or "
            "`lambda: build()`"
        )
    return builds


def _binds(signature: inspect.Signature, *arguments: Any) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _is_in_training_mode(part: torch.nn.Module) -> bool:
    # The quantized parts of a module in eval mode are made in training mode, which changes nothing
    # in them but dropout between the layers of a recurrent one. A frozen script has no mode.
    is_quantized = type(part).__module__.startswith(_QUANTIZED) and not getattr(part, "dropout", 0)
    return getattr(part, "training", False) and not is_quantized


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Leave the precision to the embedder, whatever autocast the training loop is in."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
