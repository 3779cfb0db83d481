"""What the beginning of an .npy file says, wherever that is kept."""

from __future__ import annotations

import tokenize
from typing import Any

import numpy as np

from lmdbcache.storage import NUMPY_DTYPES

__all__ = ["meant_dtype", "read_npy_header"]


def read_npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether it is in Fortran order, dtype), read from a file at its beginning.

    The dtype is as the file has it, which is `V2` for bfloat16: see `meant_dtype`.

    Raises:
        ValueError: It isn't one, or of a version that isn't known here.
    """
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of numpy's format")
    try:
        shape, is_fortran, dtype = read(file)
    except (tokenize.TokenError, SyntaxError) as error:  # numpy lets these through
        raise ValueError(f"its header can't be read ({error})") from None
    return shape, is_fortran, dtype


def meant_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the numbers: numpy writes bfloat16 as two bytes without a meaning."""
    return NUMPY_DTYPES["bfloat16"] if dtype == np.dtype("V2") else dtype
