"""Too little memory on the device, as an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lmdbcache.errors import ExtractionError

__all__ = ["memory_errors"]


@contextmanager
def memory_errors(batch_size: int) -> Iterator[None]:
    """Around a forward pass: too little memory on the device is an error of ours.

    Args:
        batch_size: Clips of the batch.

    Raises:
        ExtractionError: Says what to do.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ExtractionError(
            f"the device has too little memory for a batch of {batch_size} clips "
            f"({str(error).splitlines()[0]}). What was computed is kept; run again with a smaller "
            "batch_size"
        ) from error
