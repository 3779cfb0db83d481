"""A checksum beside each embedding, for formats that have none of their own."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from lmdbcache.errors import TransferError

__all__ = ["CHECKSUM", "check", "checksum"]

CHECKSUM: Final = "checksum"  # the name of the column or field


def checksum(sample_id: str, array: npt.NDArray[Any]) -> int:
    """xxh3-64 of a sample id's UTF-8, a zero byte, and the embedding's bytes in the file.

    Those are little-endian, in C order.
    """
    digest = xxhash.xxh3_64(sample_id.encode() + b"\0")
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.intdigest()


def check(sample_id: str, array: npt.NDArray[Any], expected: Any) -> npt.NDArray[Any]:
    """The array, if it is what was exported for this sample.

    Raises:
        TransferError: It isn't.
    """
    if checksum(sample_id, array) != expected:
        raise TransferError("the value doesn't have its checksum; restore the file from a copy")
    return array
