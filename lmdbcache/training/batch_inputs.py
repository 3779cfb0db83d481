"""The inputs of a batch: cut to its misses, which alone are loaded, and grouped by shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from lmdbcache.audio import fit
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import clip_features
from lmdbcache.errors import ConfigError
from lmdbcache.storage import has_masked_elements

# Rows of a batch, their positional inputs, their named inputs.
Group = tuple[list[int], Sequence[Any], Mapping[str, Any]]


def select_inputs(
    inputs: Any, positions: Sequence[int], sample_ids: Sequence[str], batch_size: int
) -> Any:
    """Return the inputs of some samples of a batch.

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
        return [one() if callable(one) else one for one in (inputs[p] for p in positions)]
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
        front_end: See `lmdbcache.embedders.FrontEnd`.
        config: Sample rate and duration.
        sample_ids: Of these waveforms.
        num_valid: How many samples of each aren't padding, `(n,)`; None: all of them.

    Returns:
        A tensor `(n, ...)`, or a list of n tensors where their shapes or dtypes differ.

    Raises:
        ConfigError: A waveform is longer than the duration, or isn't of floats; or which part of it
            is padding isn't known.
        AudioDecodeError: One is too short for the front end, or its features hold NaN or Inf.
        FrontEndError: The front end fails on one, or returns no array of numbers.
    """
    rows = [_as_row(one) for one in waveforms]
    needs_num_valid = getattr(front_end, "takes_num_valid", False)
    valid = valid_counts(rows, num_valid)
    if num_valid is None:
        is_table = isinstance(waveforms, (torch.Tensor, np.ndarray))
        if needs_num_valid and is_table and valid and valid[0] < config.num_samples:
            raise ConfigError(
                f"num_valid: a batch of {valid[0]} samples, the config says {config.num_samples}: "
                "its rows may be padded to the longest of them, and this front end needs to know. "
                "Give `num_valid=` (samples of each that aren't padding), or a list of waveforms"
            )
    features = []
    for row, count, name in zip(rows, valid, sample_ids, strict=True):
        # A front end of the user's may take something else than waveforms.
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


def valid_counts(waveforms: Any, num_valid: Any) -> list[int]:
    """Return how many samples of each waveform aren't padding; all, unless `num_valid` is given.

    Raises:
        ConfigError: `num_valid` isn't one whole number for each.
    """
    if num_valid is None:
        shapes = [np.shape(one) for one in waveforms]
        return [int(shape[-1]) if shape else 0 for shape in shapes]
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
    """Return one tensor of a list of tensors or arrays; anything else as it is.

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


# ---- parts of a batch


def groups_by_shape(
    inputs: Sequence[Any], named: Mapping[str, Any], num_samples: int
) -> list[Group]:
    """Return the samples whose features have one shape and dtype, for each of these.

    Args:
        inputs: Positional inputs of all samples. Where the first one is a list of tensors, these
            are features, whose shapes may differ; anything else is one group.
        named: Further inputs by name.
        num_samples: How many samples these are.
    """
    first = inputs[0] if inputs else None
    if not isinstance(first, list) or not all(isinstance(one, torch.Tensor) for one in first):
        return [(list(range(num_samples)), inputs, named)]
    alike: dict[Any, list[int]] = {}
    for row, one in enumerate(first):
        alike.setdefault((one.dtype, tuple(one.shape)), []).append(row)
    return [
        (
            rows,
            [stacked(_rows_of(one, rows)) for one in inputs],
            {name: _rows_of(one, rows) for name, one in named.items()},
        )
        for rows in alike.values()
    ]


def _rows_of(value: Any, rows: Sequence[int]) -> Any:
    """Return an input of these rows; anything but one for each sample as it is."""
    if isinstance(value, Mapping):
        return {name: _rows_of(part, rows) for name, part in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim:
        return value[list(rows)]
    if isinstance(value, (list, tuple)):
        return [value[row] for row in rows]
    return value


def copies_of(value: Any, row: int, number: int) -> Any:
    """Return an input in which every sample is this one."""
    return _rows_of(value, [row] * number)


def row_checksums(value: Any) -> list[int | None]:
    """Return a checksum of each row of a tensor, None for zeros; empty for anything else."""
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return []
    rows = value.detach().cpu().contiguous().flatten(1) if value.ndim > 1 else value[:, None].cpu()
    return [
        xxhash.xxh3_64_intdigest(row.view(torch.uint8).numpy().data) if row.any() else None
        for row in rows
    ]
