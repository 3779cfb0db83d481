"""Embeddings as the buffers that are stored, and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lmdbcache.errors import IntegrityError, InvalidEmbeddingError
from lmdbcache.storage.metadata import checksum
from lmdbcache.storage.quantization import (
    LARGEST_MAGNITUDE,
    SCALE_BYTES,
    dequantized,
    quantized,
)

# As embeddings are written and read; int8 is between that and the disk: see `stored_form`.
NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype("<f4"),
}
if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("lmdbcache stores little-endian buffers and runs on little-endian machines")


def as_stored(sample_id: str, embedding: Any, dtype: str, *, copy: bool = True) -> npt.NDArray[Any]:
    """An embedding as a contiguous array that can be stored; `encoded` gives the bytes.

    Args:
        sample_id: Named in errors.
        embedding: numpy array, torch tensor (any device, with or without grad), or a nested
            sequence of numbers.
        dtype: Name of the stored dtype.
        copy: False may return the embedding's own memory, where nothing has to be cast.

    Returns:
        An owned, C-contiguous array of `NUMPY_DTYPES[dtype]`, same shape.

    Raises:
        InvalidEmbeddingError: Not real numbers, empty, holds NaN, Inf or masked elements, or is
            too large for the stored dtype.
    """
    if has_masked_elements(embedding):
        raise InvalidEmbeddingError(
            f"{sample_id}: the embedding has masked elements, which have no value to store; fill "
            "them (`filled`) or leave the sample out"
        )
    if isinstance(embedding, np.matrix):
        raise InvalidEmbeddingError(
            f"{sample_id}: a numpy.matrix is always 2-dimensional; give an array (`.A1`, `.A`)"
        )
    try:
        is_tensor = _is_tensor(embedding)
        array = _tensor_to_array(embedding, dtype) if is_tensor else np.asarray(embedding)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidEmbeddingError(f"{sample_id}: not an array of numbers ({error})") from None
    if array.dtype.kind not in "fiu" and array.dtype != NUMPY_DTYPES["bfloat16"]:
        raise InvalidEmbeddingError(
            f"{sample_id}: an embedding of dtype {array.dtype}; real numbers are needed"
        )
    if array.size == 0:
        raise InvalidEmbeddingError(f"{sample_id}: an embedding of shape {array.shape} is empty")
    if not _all_finite(array):
        raise InvalidEmbeddingError(
            f"{sample_id}: the embedding holds NaN or Inf; such a value is never cached"
        )
    with np.errstate(over="ignore"):
        convert = np.array if copy else np.asarray
        stored: npt.NDArray[Any] = convert(array, dtype=NUMPY_DTYPES[dtype], order="C")
    if stored.dtype != array.dtype and not _all_finite(stored):
        raise InvalidEmbeddingError(
            f"{sample_id}: a value beyond {dtype}'s range (largest here "
            f"{float(np.abs(array).max()):.3g})"
            + ("; store float32 or bfloat16" if dtype == "float16" else "")
        )
    if dtype == "int8":
        stored_form(stored.shape, dtype)
        if max(stored.max(), -stored.min()) > LARGEST_MAGNITUDE:
            raise InvalidEmbeddingError(f"{sample_id}: a value beyond int8's scales; store float32")
    return stored


def stored_form(
    shape: Sequence[int | None], dtype: str
) -> tuple[np.dtype[Any], tuple[int | None, ...]]:
    """Return dtype and shape of the array that is stored of an embedding of this shape.

    Raises:
        InvalidEmbeddingError: int8 has one scale a row, and this shape has no rows of one length.
    """
    if dtype != "int8":
        return NUMPY_DTYPES[dtype], tuple(shape)
    if not shape or shape[-1] is None:
        raise InvalidEmbeddingError(
            f"embeddings of shape {tuple(shape)} have no rows of one length, which int8 has a "
            "scale for; store float16"
        )
    return np.dtype(np.int8), (*shape[:-1], shape[-1] + SCALE_BYTES)


def value_bytes(shape: Sequence[int], dtype: str) -> int:
    """Return the size of one stored embedding, without LMDB's pages."""
    stored_dtype, stored_shape = stored_form(shape, dtype)
    return stored_dtype.itemsize * math.prod(size or 0 for size in stored_shape)


def encoded(embeddings: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Return what `as_stored` gave, one embedding or several, as the array that is stored."""
    return quantized(embeddings) if dtype == "int8" else embeddings


def decoded(
    values: npt.NDArray[Any], dtype: str, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Return stored arrays, or rows of them, as embeddings; of int8 a copy, which fills `out`."""
    return dequantized(values, out) if dtype == "int8" else values


def as_read(embeddings: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Return what `as_stored` gave as it will be read back."""
    return decoded(encoded(embeddings, dtype), dtype)


def is_what_is_stored(key: bytes, embedding: npt.NDArray[Any], dtype: str, expected: bytes) -> bool:
    """Whether `encoded` makes bytes of this checksum of an embedding that was read.

    Not where bytes or embedding have changed since, nor where another program has written int8 in
    another form.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # such a scale may be anything
        return checksum(key, encoded(embedding, dtype)) == expected


def from_stored(
    sample_id: str,
    value: Any,
    dtype: str,
    stored_shape: Sequence[int | None] | None,
    *,
    copy: bool = True,
) -> npt.NDArray[Any]:
    """A stored buffer as an embedding in its shape: an owned, writable copy, or a view of it.

    Raises:
        IntegrityError: The buffer's length isn't that of an embedding of this store.
    """
    wanted, shape = stored_form((0,) if stored_shape is None else stored_shape, dtype)
    try:
        view: npt.NDArray[Any]
        if None in shape:
            flat = np.frombuffer(value, dtype=wanted)
            view = flat.reshape([-1 if size is None else size for size in shape])
        else:
            view = np.ndarray(shape, wanted, value)  # type: ignore[arg-type]
        if view.nbytes == len(value):
            embedding = decoded(view, dtype)
            return embedding.copy() if copy and embedding is view else embedding
    except (ValueError, TypeError):
        pass
    raise IntegrityError(
        f"{sample_id}: {len(value)} bytes are stored, which isn't an embedding of shape "
        f"{stored_shape} in {dtype}. Repair the store and extract again"
    )


def batch_array(
    shape: tuple[int, ...], dtype: np.dtype[Any], out: npt.NDArray[Any] | None
) -> npt.NDArray[Any]:
    """A new array for a batch, or `out` if it fits.

    Raises:
        InvalidEmbeddingError: `out` has another shape, dtype or layout.
    """
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise InvalidEmbeddingError(
            f"out has shape {out.shape} and dtype {out.dtype}; a C-contiguous array of shape "
            f"{shape} and dtype {dtype} is needed"
        )
    return out


def check_shape(
    sample_id: str, shape: tuple[int, ...], stored_shape: Sequence[int | None] | None
) -> None:
    """Refuse an embedding that doesn't belong into a store of that shape.

    Raises:
        InvalidEmbeddingError: Another number of dimensions, or another size.
    """
    if stored_shape is None:
        return
    alike = len(shape) == len(stored_shape) and all(
        there is None or here == there for here, there in zip(shape, stored_shape, strict=True)
    )
    if not alike:
        raise InvalidEmbeddingError(
            f"{sample_id}: an embedding of shape {shape}, the store holds {tuple(stored_shape)}. "
            "Another output or length needs another config"
        )


def has_masked_elements(value: Any) -> bool:
    """Whether a numpy masked array, or one in a nested sequence, masks an element.

    numpy and torch drop the mask and give what lies under it.
    """
    if isinstance(value, np.ndarray):
        # Who holds a masked array has imported this; the import takes as long as 20,000 writes.
        masked = sys.modules.get("numpy.ma")
        return masked is not None and bool(masked.is_masked(value))
    return isinstance(value, (list, tuple)) and any(map(has_masked_elements, value))


def _is_tensor(value: Any) -> bool:
    # torch is never imported for this: who holds a tensor has imported it.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _tensor_to_array(tensor: Any, dtype: str) -> npt.NDArray[Any]:
    torch = sys.modules["torch"]
    tensor = tensor.detach().resolve_neg()  # a lazily negated one, such as `x.conj().imag`
    # torch's own cast is many times faster than numpy's; overflow still shows as Inf below.
    if dtype == "float16" and tensor.is_floating_point() and bool(tensor.isfinite().all()):
        cast = tensor.to(torch.float16)
        tensor = cast if bool(cast.isfinite().all()) else tensor
    tensor = tensor.to("cpu").contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: npt.NDArray[Any] = tensor.view(torch.int16).numpy()
        return bits.view(NUMPY_DTYPES["bfloat16"])
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def _all_finite(array: npt.NDArray[Any]) -> bool:
    if array.dtype.kind in "iu":
        return True
    if array.dtype == NUMPY_DTYPES["bfloat16"]:
        return not bool(((array.view(np.uint16) & 0x7F80) == 0x7F80).any())
    # A finite sum has finite terms; only an infinite or overflowing one needs the slow look.
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(np.add.reduce(array, axis=None, dtype=np.promote_types(array.dtype, "f4")))
    return math.isfinite(total) or bool(np.isfinite(array).all())
