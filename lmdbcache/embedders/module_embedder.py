"""Any `torch.nn.Module` as a model whose embeddings can be cached. torch is imported when used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmdbcache.config import CacheConfig
from lmdbcache.embedders.base import library_versions
from lmdbcache.embedders.devices import check_compute_dtype, move_to_device, precision
from lmdbcache.embedders.module_weights import WatchedWeights
from lmdbcache.embedders.stated_model import StatedEmbedder, StatedModel
from lmdbcache.errors import (
    CacheError,
    ConfigError,
    ModuleError,
)
from lmdbcache.files import first_line
from lmdbcache.machine import needing

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from lmdbcache.embedders.base import Embedder

_DEFAULT_OUTPUT: Final = "embedding"


class ModuleEmbedder(StatedModel):
    """A `torch.nn.Module` and the front end that it needs.

        embedder = ModuleEmbedder(my_cnn, name="my-cnn/2", sample_rate=22050,
                                  front_end=log_mel, front_end_id="log-mel-64/1")
        config = config_for(embedder, duration=2.0, namespace="esc50")
        extract(cache, config, clips, model=embedder)

    The module is called with a batch of features, in eval mode and without gradients; afterwards
    each of its submodules is in the mode it was in before. It stays on its device unless
    `extract` is given another one. Floating-point features are cast to the dtype of the module's
    weights (float16 for `module.half()`); integers and bools stay as they are. Embeddings are
    float32.

    A store's identity has `name` and the front end's id; a digest of the weights is kept in its
    provenance, and a store filled with other weights is refused. The digest doesn't see code: give
    another name when `forward` changes, and another id when the front end does.

    Args:
        module: (batch, ...) → tensor (batch, *embedding_shape), or whatever `outputs` takes.
        name: The model's name in caches.
        sample_rate: Of the waveforms that it takes, in Hz.
        front_end: float32 waveform (num_valid,), the samples of the clip, cut at the config's
            duration and not padded → array of features: floats (handed on as float32), complex
            numbers (as complex64), integers or bools (as they are). Clips whose features differ in
            shape go through the module in separate forward passes. Called in worker processes: a
            function or an object that pickles, where processes are spawned. None gives the module
            the waveform itself, padded with zeros to the config's duration, (num_samples,).
        front_end_id: Names the front end and its version; wanted with `front_end`.
        outputs: Name of each output → what takes it from the module's result, which it doesn't
            change: all outputs of a pass get the same one. None: the result is a tensor, and is
            called `"embedding"`.
        min_samples: The shortest clip that makes sense, in samples; shorter ones are reported.

    Raises:
        ConfigError: Something here can't identify a model.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        name: str,
        sample_rate: int,
        front_end: Callable[[NDArray[np.float32]], Any] | None = None,
        front_end_id: str | None = None,
        outputs: Mapping[str, Callable[[Any], torch.Tensor]] | None = None,
        min_samples: int = 1,
    ) -> None:
        if isinstance(module, type) or not callable(getattr(module, "state_dict", None)):
            raise ConfigError(f"module: a {type(module).__name__}; give a torch.nn.Module")
        if outputs is not None and not outputs:
            raise ConfigError("outputs: empty; give at least one, or None")
        self.module = module
        super().__init__(
            name=name,
            sample_rate=sample_rate,
            front_end=front_end,
            front_end_id=front_end_id,
            outputs=outputs or {_DEFAULT_OUTPUT: _as_it_is},
            min_samples=min_samples,
        )

    def make_embedder(self, config: CacheConfig, device: str | None = None) -> Embedder:
        """Make an embedder of the module.

        Args:
            config: Says which output, and the precision.
            device: Where to move the module; None leaves it where it is.

        Raises:
            ConfigError: The config is another model's, or the device doesn't exist.
            MissingDependencyError: torch isn't installed.
        """
        self.check(config)
        return _OutputEmbedder(self, config, device)


class RunningModule:
    """A module or a function that is run for its embeddings: frozen, watched, on its device.

    A module runs in eval mode, and each part of it is afterwards in the mode that it was in. Inputs
    are copied, moved to its device, and cast to the dtype of its weights if they are floats. A
    function gets its inputs as they are.

    Args:
        module: The `torch.nn.Module`, or a function of the same inputs.
        compute_dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        take: Takes the embeddings, a tensor (batch, ...), from what the module returns.
        name: Its name in messages.
        device: Where to move the module; None leaves it where it is.
        allow_tf32: Leave a GPU's TF32 as the program has set it; it is switched off otherwise.

    Raises:
        ConfigError: An unknown device or dtype, or weights that can't be digested.
        MissingDependencyError: torch isn't installed.
    """

    def __init__(
        self,
        module: Any,
        compute_dtype: str,
        take: Callable[[Any], torch.Tensor],
        *,
        name: str,
        device: str | torch.device | None = None,
        allow_tf32: bool = False,
    ) -> None:
        check_compute_dtype(compute_dtype)
        with needing("running a module", "audio"):
            import torch
        self.module: Final = module
        self._compute_dtype = compute_dtype
        self._allow_tf32 = allow_tf32
        self._take = take
        self._name = name
        is_module = isinstance(module, torch.nn.Module)
        self._given_device = None
        if device is not None and is_module:
            self._given_device = move_to_device(module, device)
        self.weights: Final = WatchedWeights(module) if is_module else None

    @property
    def device(self) -> torch.device | None:
        """Where its weights are; None for a function."""
        import torch

        if not isinstance(self.module, torch.nn.Module):
            return None
        first = next(_tensors(self.module), None)
        return self._given_device or torch.device("cpu") if first is None else first.device

    def embed(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """Embed a batch.

        Args:
            inputs: What the module takes, for the whole batch.
            named: Further inputs by name.

        Returns:
            float32 tensor (batch, *embedding_shape) on the CPU.

        Raises:
            ModuleError: The module fails.
            ProvenanceMismatchError: Its weights changed.
        """
        embeddings: torch.Tensor = self._run(self._take, *inputs, **named)
        return embeddings

    def _run(self, take: Callable[[Any], Any], *inputs: Any, **named: Any) -> Any:
        """Return what is taken from the result of a batch, on the CPU; see `embed`."""
        import torch

        if self.weights is not None:
            self.weights.check()
        device = self.device
        used = device or torch.device("cpu")
        with (
            contextlib.nullcontext() if device is None else _in_eval_mode(self.module),
            torch.no_grad(),
            precision(used, self._compute_dtype, allow_tf32=self._allow_tf32),
        ):
            inputs = tuple(self._placed(one, device) for one in inputs)
            named = {key: self._placed(one, device) for key, one in named.items()}
            try:
                result = take(self.module(*inputs, **named))
            except (CacheError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if type(error).__name__ == "AcceleratorError":  # the device can't go on
                    raise
                kinds = [
                    f"{one.dtype} {tuple(one.shape)}"
                    for one in (*inputs, *named.values())
                    if isinstance(one, torch.Tensor)
                ]
                raise ModuleError(
                    f"{self._name} fails on inputs of {', '.join(kinds)}, on {used} "
                    f"({first_line(error)}); call it on such a batch by hand"
                ) from error
        if self.weights is not None:
            self.weights.computed()
        if isinstance(result, dict):
            return {key: one.detach().to("cpu", torch.float32) for key, one in result.items()}
        return result.detach().to("cpu", torch.float32)

    def provenance(self) -> dict[str, str]:
        """Return the digest of the weights; empty for a function."""
        return {} if self.weights is None else {"weights_digest": self.weights.digest}

    def _placed(self, value: Any, device: torch.device | None) -> Any:
        import torch

        if isinstance(value, Mapping):
            return {key: self._placed(part, device) for key, part in value.items()}
        if not isinstance(value, torch.Tensor) or device is None:
            return value
        return value.to(device, _input_dtype(self.module, value), copy=True)


class _OutputEmbedder(StatedEmbedder, RunningModule):
    """An `Embedder`: one output of a `ModuleEmbedder`."""

    def __init__(self, source: ModuleEmbedder, config: CacheConfig, device: str | None) -> None:
        StatedEmbedder.__init__(self, source, config)
        RunningModule.__init__(
            self,
            source.module,
            config.compute_dtype,
            lambda result: self._taken(result, config.output),
            name=source.identity,
            device=device,
        )
        self._num_clips = 0

    def embed(self, *inputs: Any, **named: Any) -> torch.Tensor:
        self._num_clips = len(inputs[0])
        return RunningModule.embed(self, *inputs, **named)

    def embed_outputs(
        self, features: torch.Tensor, outputs: Collection[str]
    ) -> dict[str, torch.Tensor]:
        """Return several outputs of one forward pass, each as `embed` returns it."""
        self._num_clips = len(features)
        found: dict[str, torch.Tensor] = self._run(
            lambda result: {output: self._taken(result, output) for output in outputs}, features
        )
        return found

    def provenance(self) -> dict[str, str]:
        kind = type(self.module)
        return {
            **RunningModule.provenance(self),
            "module": f"{kind.__module__}.{kind.__qualname__}",
            **library_versions("torch"),
            "device": "cpu" if self.device is None else self.device.type,
            "compute_dtype": self._config.compute_dtype,
        }

    def _taken(self, result: Any, output: str) -> Any:
        import torch

        result = self._source._taken_by[output](result)  # noqa: SLF001
        what = f"outputs: {output!r} of {self._source.identity} is"
        is_tensor = isinstance(result, torch.Tensor)
        if is_tensor and (kind := no_real_numbers(result)):
            raise ConfigError(
                f"{what} {kind}; a store holds arrays of real numbers. Give "
                "`outputs={name: function}` that makes one of it, such as torch.view_as_real, "
                "to_dense or dequantize"
            )
        if not is_tensor or result.shape[:1] != (self._num_clips,):
            kind = type(result).__name__
            found = f"a tensor of shape {tuple(result.shape)}" if is_tensor else f"a {kind}"
            raise ConfigError(
                f"{what} {found} for {self._num_clips} clips; give `outputs={{name: function}}` "
                "that takes a tensor (batch, ...) from the module's result"
            )
        return result


@contextlib.contextmanager
def _in_eval_mode(module: torch.nn.Module) -> Iterator[None]:
    # A frozen script has no mode.
    modes = [(part, getattr(part, "training", False)) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        # Not module.train(): a frozen part of a model in training stays in eval mode.
        for part, training in modes:
            part.training = training


def _input_dtype(module: torch.nn.Module, features: torch.Tensor) -> torch.dtype:
    """Return the dtype to cast features to: that of the weights, unless they aren't floats."""
    import torch

    known = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    weights = next((part.dtype for part in _tensors(module) if part.dtype in known), torch.float32)
    if features.is_complex():
        return torch.complex128 if weights == torch.float64 else torch.complex64
    return weights if features.is_floating_point() else features.dtype


def no_real_numbers(result: torch.Tensor) -> str:
    """Return what kind of tensor this is; empty for a plain array of real numbers."""
    import torch

    if result.is_nested:
        return "a nested tensor"
    if result.layout is not torch.strided:
        return f"a tensor of layout {result.layout}"
    if result.is_quantized or result.is_complex() or result.dtype == torch.bool:
        return str(result.dtype)
    return ""


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _as_it_is(result: Any) -> Any:
    return result
