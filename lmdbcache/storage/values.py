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

NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("lmdbcache stores little-endian buffers and runs on little-endian machines")


def as_stored(sample_id: str, embedding: Any, dtype: str, *, copy: bool = True) -> npt.NDArray[Any]:
    """An embedding as a contiguous array of the stored dtype.

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
    return stored


def from_stored(
    sample_id: str,
    value: Any,
    dtype: str,
    stored_shape: Sequence[int | None] | None,
    *,
    copy: bool = True,
) -> npt.NDArray[Any]:
    """A stored buffer in its shape: an owned, writable copy, or a view of it.

    Raises:
        IntegrityError: The buffer's length isn't that of an embedding of this store.
    """
    wanted = NUMPY_DTYPES[dtype]
    shape = stored_shape or ()
    try:
        view: npt.NDArray[Any]
        if None in shape:
            flat = np.frombuffer(value, dtype=wanted)
            view = flat.reshape([-1 if size is None else size for size in shape])
        else:
            view = np.ndarray(shape, wanted, value)  # type: ignore[arg-type]
        if view.nbytes == len(value):
            return view.copy() if copy else view
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
