"""From a batch's inputs to those of its misses; what is a promise is only kept for these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lmdbcache.errors import ConfigError

__all__ = ["check_precision", "features_of", "select_inputs", "stacked"]


def select_inputs(
    inputs: Any, positions: Sequence[int], sample_ids: Sequence[str], batch_size: int
) -> Any:
    """The inputs of some samples of a batch.

    Args:
        inputs: A tensor or array `(batch, ...)`; a list of one input, or of one function without
            arguments that gives it, for each sample; a function of the sample ids that are needed;
            a Mapping of these by name. Anything else is handed on as it is.
        positions: The samples that are needed.
        sample_ids: Their sample ids.
        batch_size: Samples of the batch.

    Returns:
        A tensor or array `(len(positions), ...)`, or a list of so many.

    Raises:
        ConfigError: Not as many inputs as samples.
    """
    if isinstance(inputs, Mapping):
        return {
            name: select_inputs(part, positions, sample_ids, batch_size)
            for name, part in inputs.items()
        }
    if isinstance(inputs, (torch.Tensor, np.ndarray)) and inputs.ndim:
        _check_number(len(inputs), batch_size)
        return inputs if len(positions) == batch_size else inputs[list(positions)]
    if isinstance(inputs, (list, tuple)):
        _check_number(len(inputs), batch_size)
        chosen = [inputs[position] for position in positions]
        return [one() if callable(one) else one for one in chosen]
    if callable(inputs):
        loaded = inputs(list(sample_ids))
        _check_number(len(loaded), len(positions))
        return loaded
    return inputs


def check_precision(inputs: Any) -> None:
    """Refuse inputs that were rounded on their way, as a trainer in half precision does.

    Raises:
        ConfigError: One is float16 or bfloat16.
    """
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, (list, tuple)):
        for one in inputs:
            check_precision(one)
    dtype = str(getattr(inputs, "dtype", "")).removeprefix("torch.")
    if dtype in ("float16", "bfloat16"):
        raise ConfigError(
            f"inputs: {dtype}, and the config says compute_dtype 'float32': the embeddings of "
            "rounded inputs would be stored. Hand over float32, or functions that load it, or "
            "set the config's compute_dtype"
        )


def features_of(waveforms: Any, front_end: Callable[[Any], Any]) -> torch.Tensor:
    """The features of some waveforms, `(n, ...)`.

    Args:
        waveforms: Tensor or array `(n, num_samples)`, or a list of n.
        front_end: One float32 array `(num_samples,)` → its features.
    """
    rows = [one.detach().cpu() if isinstance(one, torch.Tensor) else one for one in waveforms]
    features: torch.Tensor = stacked([front_end(np.asarray(row, dtype=np.float32)) for row in rows])
    return features


def stacked(inputs: Any) -> Any:
    """One tensor of a list of tensors or arrays; anything else as it is.

    Raises:
        ConfigError: Their shapes differ.
    """
    if isinstance(inputs, Mapping):
        return {name: stacked(part) for name, part in inputs.items()}
    if isinstance(inputs, np.ndarray):
        return torch.from_numpy(np.require(inputs, requirements=["C", "W"]))
    kinds = (torch.Tensor, np.ndarray)
    if not isinstance(inputs, (list, tuple)) or not all(isinstance(one, kinds) for one in inputs):
        return inputs
    tensors = [torch.as_tensor(one) for one in inputs]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ConfigError(
            f"inputs: of different shapes ({', '.join(map(str, sorted(shapes)[:3]))}); cut or pad "
            "them to one length, as load_waveform does"
        )
    return torch.stack(tensors)


def _check_number(found: int, expected: int) -> None:
    if found != expected:
        raise ConfigError(f"inputs: {found} of them for {expected} samples")
