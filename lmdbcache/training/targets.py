"""Targets of samples as one tensor: labels, numbers, multi-hot rows, of any dtype and rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.errors import ConfigError, InvalidSampleIdError, MissingLabelError
from lmdbcache.files import few
from lmdbcache.storage import canonical_sample_id, class_of, recording_of
from lmdbcache.training.tensors import as_tensor

# One target for each sample, in order, or by sample id or class. Each is a number or an array.
Targets: TypeAlias = "Sequence[Any] | torch.Tensor | npt.NDArray[Any] | Mapping[str, Any]"


def target_tensor(sample_ids: Sequence[str], targets: Targets) -> torch.Tensor:
    """Return the targets of the samples, in order.

    Integers become int64, whatever their width. Floats and bools stay what they are: those of an
    array or tensor in its dtype, Python's in torch's default, float32.

    Args:
        sample_ids: The samples.
        targets: A sequence, array or tensor with one row for each sample; or a Mapping by sample
            id or by class, where a sample's id comes first; of a window its recording's follows.

    Returns:
        `(len(sample_ids), *shape of one target)` on the CPU.

    Raises:
        ConfigError: The targets aren't numbers, differ in shape, or aren't one for each sample.
        MissingLabelError: A sample has no target; also a `KeyError`.
    """
    if isinstance(targets, Mapping):
        targets = _by_name(sample_ids, targets)
    if np.isscalar(targets) or not getattr(targets, "shape", True):
        raise ConfigError(f"labels: {targets!r:.80}; give one for each sample")
    if len(targets) != len(sample_ids):
        raise ConfigError(f"{len(targets)} labels for {len(sample_ids)} samples")
    tensor = _tensor(targets)
    is_integer = not (tensor.is_floating_point() or tensor.is_complex())
    return tensor.long() if is_integer and tensor.dtype != torch.bool else tensor


def _by_name(sample_ids: Sequence[str], targets: Mapping[str, Any]) -> list[Any]:
    found, missing = [], []
    for sample_id in sample_ids:
        for name in _names(sample_id):
            if name in targets:
                found.append(targets[name])
                break
        else:
            missing.append(sample_id)
    if missing:
        by_sample = any(":" in str(name) for name in targets)
        names = missing if by_sample else sorted(set(map(class_of, missing)))
        raise MissingLabelError(
            f"labels: none for {few(list(map(repr, names)))}; give a label for every class of the "
            "samples or for every sample, or sample_ids with those that have one"
        )
    return found


def _names(sample_id: str) -> tuple[str, ...]:
    try:
        canonical = canonical_sample_id(sample_id)
        return sample_id, canonical, recording_of(canonical), class_of(sample_id)
    except InvalidSampleIdError:
        return (sample_id,)


def _tensor(targets: Any) -> torch.Tensor:
    if isinstance(targets, torch.Tensor):
        return targets.detach().cpu()
    if isinstance(targets, np.ma.MaskedArray) and np.ma.is_masked(targets):
        raise ConfigError("labels: some are masked; fill them in, or leave these samples out")
    if not isinstance(targets, np.ndarray) and not hasattr(targets, "__array__"):
        return _of_sequence(targets)
    array = np.asarray(targets)
    if array.dtype.kind not in "biufcV":
        return _of_sequence(array.tolist())  # such as a column of Python objects
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    try:
        if array.dtype.kind in "iu":
            if array.size and int(array.max()) > np.iinfo(np.int64).max:
                raise ConfigError(f"labels: {array.max()} is more than int64 holds")
            return torch.from_numpy(array.astype(np.int64))
        return as_tensor(array if array.flags.writeable else array.copy())
    except TypeError:
        raise ConfigError(f"labels: {array.dtype} can't be a tensor; use numbers") from None


def _of_sequence(targets: Sequence[Any]) -> torch.Tensor:
    if not len(targets):
        return torch.zeros(0, dtype=torch.long)
    try:
        if isinstance(targets[0], torch.Tensor):
            return torch.stack([torch.as_tensor(target) for target in targets]).detach().cpu()
        if isinstance(targets[0], (np.ndarray, np.generic)) or hasattr(targets[0], "__array__"):
            return _tensor(np.stack([np.asarray(target) for target in targets]))
        return torch.tensor(list(targets))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"labels: they can't be one tensor ({reason:.200}). Give numbers, or arrays of one "
            "shape; for names, a Mapping of class → number"
        ) from None
