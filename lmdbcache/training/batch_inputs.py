"""From a batch's inputs to those of its misses; what is a promise is only kept for these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.audio import fit
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import clip_features
from lmdbcache.errors import ConfigError
from lmdbcache.storage import has_masked_elements

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
        return [_kept(inputs[position]) for position in positions]
    if callable(inputs):
        loaded = inputs(list(sample_ids))
        _check_number(len(loaded), len(positions))
        return loaded
    return inputs


def _kept(one: Any) -> Any:
    """What a function of one sample's input gives; anything else as it is."""
    if not callable(one):
        return one
    if hasattr(one, "decode"):  # a `DeferredAudio`, which knows what of its waveform is padding
        waveform, num_valid = one.decode()
        return waveform if num_valid is None else waveform[..., :num_valid]
    return one()


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


def features_of(
    waveforms: Any,
    front_end: Callable[..., Any],
    config: CacheConfig,
    sample_ids: Sequence[str],
    num_valid: Any = None,
) -> Any:
    """Compute the features of some waveforms, as an extraction does.

    Args:
        waveforms: A list of n, each `(num_samples,)` or shorter; or a tensor or array of them.
        front_end: See `lmdbcache.embedders.base.compute_features`.
        config: Sample rate and duration.
        sample_ids: Of these waveforms.
        num_valid: How many samples of each aren't padding, `(n,)`; None: all of them.

    Returns:
        A tensor `(n, ...)`, or a list of n tensors where their shapes or dtypes differ.

    Raises:
        ConfigError: A waveform is longer than the duration, or isn't of floats; or nobody can tell
            what of it is padding.
        AudioDecodeError: One is too short for the front end, or its features hold NaN or Inf.
        FrontEndError: The front end fails on one, or returns no array of numbers.
    """
    rows = [_as_row(one) for one in waveforms]
    needs_num_valid = getattr(front_end, "takes_num_valid", False)
    if num_valid is not None:
        valid = _counts(num_valid)
    else:
        valid = [row.shape[-1] if row.ndim else 0 for row in rows]
        is_table = isinstance(waveforms, (torch.Tensor, np.ndarray))
        if needs_num_valid and is_table and valid and valid[0] < config.num_samples:
            raise ConfigError(
                f"num_valid: a batch of {valid[0]} samples, the config says {config.num_samples}: "
                "its rows may be padded to the longest of them, and this front end needs to know. "
                "Give num_valid= (samples of each that aren't padding), or a list of waveforms"
            )
    features = []
    for row, count, name in zip(rows, valid, sample_ids, strict=True):
        # A front end of your own may take something else than waveforms.
        waveform = row
        if row.ndim == 1:
            _check_lengths(name, row, count, config)
            waveform = fit(row[:count], config.num_samples)
        features.append(
            clip_features(front_end, waveform, count, sample_rate=config.sample_rate, name=name)
        )
    if len({(one.dtype, one.shape) for one in features}) > 1:
        return [torch.from_numpy(one) for one in features]
    return stacked(features)


def _as_row(waveform: Any) -> npt.NDArray[np.float32]:
    if isinstance(waveform, torch.Tensor) and waveform.is_floating_point():
        waveform = waveform.detach().to("cpu", torch.float32)
    _check_mask(waveform)
    row = np.asarray(waveform)
    if row.dtype.kind != "f":
        raise ConfigError(
            f"inputs: waveforms of {row.dtype}; the front end takes float32 in -1 .. 1, as "
            "load_waveform gives it"
        )
    return row.astype(np.float32, copy=False)


def _check_mask(inputs: Any) -> None:
    if has_masked_elements(inputs):
        raise ConfigError("inputs: an array with masked elements; fill them (`filled`)")


def _counts(num_valid: Any) -> list[int]:
    counts = torch.as_tensor(num_valid).tolist()
    if not isinstance(counts, list) or any(type(count) is not int for count in counts):
        raise ConfigError(
            "num_valid: expected one whole number for each sample, how many samples of its "
            "waveform aren't padding"
        )
    return counts


def _check_lengths(
    name: str, row: npt.NDArray[np.float32], num_valid: int, config: CacheConfig
) -> None:
    if len(row) > config.num_samples:
        raise ConfigError(
            f"duration: {name} is a waveform of {len(row)} samples, the config says "
            f"{config.num_samples} ({config.duration} s at {config.sample_rate} Hz); resample and "
            "cut it to the config's values, as load_waveform does"
        )
    if not 0 <= num_valid <= len(row):
        raise ConfigError(f"num_valid: {num_valid} for {name}, a waveform of {len(row)} samples")


def stacked(inputs: Any) -> Any:
    """One tensor of a list of tensors or arrays; anything else as it is.

    Raises:
        ConfigError: Their shapes differ.
    """
    if isinstance(inputs, Mapping):
        return {name: stacked(part) for name, part in inputs.items()}
    _check_mask(inputs)
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
