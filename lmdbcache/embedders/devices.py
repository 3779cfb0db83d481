"""Where a model runs, and in which precision. torch is imported inside the functions."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lmdbcache.config import COMPUTE_DTYPES
from lmdbcache.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def check_compute_dtype(compute_dtype: str) -> None:
    """Check that models can compute in it.

    Raises:
        ConfigError: An unknown one.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise ConfigError(
            f"compute_dtype: {compute_dtype!r}; known are {', '.join(COMPUTE_DTYPES)}"
        )


def move_to_device(module: torch.nn.Module, device: str | torch.device | None) -> torch.device:
    """Move a model.

    Args:
        module: What is to be moved.
        device: Where to; None means a CUDA GPU if there is one, else the CPU.

    Raises:
        ConfigError: No such device here.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        module.to(chosen)
    except (RuntimeError, AssertionError) as error:
        usable = "'cpu', 'cuda' or 'cuda:0'" if torch.cuda.is_available() else "'cpu'"
        raise ConfigError(
            f"device: {str(device)!r} can't be used here ({str(error).splitlines()[0]}); "
            f"use {usable}"
        ) from error
    return chosen


def device_of_rank(local_rank: int) -> str | None:
    """Return the GPU of one of several processes on this machine.

    Args:
        local_rank: Which of them, from 0. More processes than GPUs share them in turn.

    Returns:
        None where there are fewer than two to choose from: a launcher often shows each process
        only one GPU. Also without torch: the model says what it needs.
    """
    try:
        import torch
    except ImportError:
        return None
    num_gpus = torch.cuda.device_count()
    return f"cuda:{local_rank % num_gpus}" if num_gpus > 1 else None


@contextlib.contextmanager
def precision(
    device: torch.device, compute_dtype: str, *, allow_tf32: bool = False
) -> Iterator[None]:
    """Compute in `compute_dtype` inside: by autocast, or in float32.

    Args:
        device: Where the computation runs.
        compute_dtype: One of the names in `COMPUTE_DTYPES`.
        allow_tf32: Leave a GPU's TF32 as the program has set it; it is switched off otherwise.
    """
    import torch

    if compute_dtype != "float32":
        with torch.autocast(device.type, dtype=getattr(torch, compute_dtype)):
            yield
    elif allow_tf32 or device.type != "cuda":
        yield
    else:
        # cuDNN's convolutions use TF32 (10 bits of mantissa) by default.
        cudnn: Any = torch.backends.cudnn
        backends: tuple[Any, ...] = (cudnn.conv, torch.backends.cuda.matmul)
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, was in zip(backends, before, strict=True):
                backend.fp32_precision = was
