"""Files of scripts: dicts written by `torch.save`, and the tensors, arrays or dicts in them.

torch is imported inside the functions: the names of outputs are needed without it.
"""

from __future__ import annotations

import contextlib
import importlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.lib import NumpyVersion

from lmdbcache.errors import DatasetError, InvalidEmbeddingError
from lmdbcache.storage import has_masked_elements

if TYPE_CHECKING:
    import torch

POOLED: Final = "pooler_output"
HIDDEN: Final = "last_hidden_state"
MEAN: Final = "mean"


# ---- files


def read_tensor_dict(path: str | Path, *, mmap: bool) -> dict[str, Any]:
    """Read a dict of names and tensors or numpy arrays; no pickled code is run.

    Args:
        path: File written by `torch.save`.
        mmap: Leave the tensors on disk until they are read, where the file's format allows it:
            not that of torch before 1.6. numpy arrays are always read.

    Raises:
        DatasetError: The file can't be read, or holds something else.
    """
    values = read_torch_file(path, mmap=mmap)
    if not isinstance(values, dict):
        raise DatasetError(f"{path}: holds a {type(values).__name__}; expected a dict")
    return values


def read_torch_file(path: str | Path, *, mmap: bool) -> Any:
    """Read whatever `torch.save` has kept; see `read_tensor_dict`.

    Raises:
        DatasetError: The file can't be read without running code.
    """
    import torch

    try:
        mmap = mmap and zipfile.is_zipfile(path)
        with _numpy_allowed():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise DatasetError(
            f"{path}: torch.load(weights_only=True) refuses it: {_reason(error)}. Save it again "
            "with torch.save as a dict of names and tensors"
        ) from error


def _numpy_allowed() -> contextlib.AbstractContextManager[None]:
    """Allow what rebuilds numpy arrays and scalars of numbers, while this is entered."""
    import torch

    if torch.__version__ < "2.6":  # no way to tell numpy 1's names from numpy 2's
        return contextlib.nullcontext()
    core = "numpy.core" if NumpyVersion(np.__version__) < "2.0.0b1" else "numpy._core"
    multiarray = importlib.import_module(f"{core}.multiarray")
    rebuilding = [
        (getattr(multiarray, name), f"numpy.{module}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for module in ("core", "_core")
    ]
    of_numbers = [type(np.dtype(code)) for code in "efdbBhHiIlLqQ"]
    allowed: contextlib.AbstractContextManager[None] = torch.serialization.safe_globals(
        [*rebuilding, np.ndarray, np.dtype, *of_numbers]
    )
    return allowed


def _reason(error: Exception) -> str:
    """Return torch's reason in one line, without its advice to trust the file."""
    text = str(error)
    for before in ("WeightsUnpickler error:", "from a trusted source."):
        text = text.rpartition(before)[2]
    for advice in ("Check the documentation", "Please use ", "Please file"):
        text = text.partition(advice)[0]
    return " ".join(text.split()).rstrip(" .:") or type(error).__name__


def read_text_embeddings(path: str | Path) -> dict[str, Any]:
    """Read a dict of class name → text embedding; names come in lower case.

    Raises:
        DatasetError: The file is missing, can't be read, or holds something else.
    """
    if not Path(path).is_file():
        raise DatasetError(f"embedding_file: {str(path)!r} isn't a file")
    return {str(name).lower(): value for name, value in read_tensor_dict(path, mmap=False).items()}


# ---- values


def plain_tensor(value: Any) -> torch.Tensor:
    """Convert a value, in whichever form a script holds it, to a tensor without a graph.

    Args:
        value: Tensor, array, or a dict holding one under `embeddings` or `embedding`.

    Raises:
        InvalidEmbeddingError: It is another kind of value, or has masked elements.
    """
    import torch

    from lmdbcache.training.tensors import as_tensor

    value = unwrapped(value)
    if isinstance(value, torch.Tensor):
        return value.detach()
    if has_masked_elements(value):
        raise InvalidEmbeddingError(
            "an audio embedding has masked elements, which have no value; fill them (`filled`)"
        )
    if isinstance(value, np.ndarray):
        return as_tensor(value if value.flags.writeable else value.copy())
    raise InvalidEmbeddingError(
        f"an audio embedding is a {type(value).__name__}; expected a tensor, an array, or a dict "
        "with one under 'embeddings'"
    )


def unwrapped(value: Any) -> Any:
    """Return what a dict holds under `embeddings` or `embedding`; anything else as it is."""
    if isinstance(value, Mapping):
        return value.get("embeddings", value.get("embedding"))
    return value


def output_of_dimensions(num_dimensions: int) -> str:
    """Guess which output of the model embeddings of so many dimensions are."""
    return HIDDEN if num_dimensions >= 2 else POOLED
