"""The forms in which scripts hold embeddings: tensors, arrays, and dicts around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmdbcache.errors import InvalidEmbeddingError, InvalidSampleIdError
from lmdbcache.storage import has_masked_elements, split_sample_id

if TYPE_CHECKING:
    import torch

__all__ = [
    "HIDDEN",
    "MEAN",
    "POOLED",
    "plain_tensor",
    "checked",
    "class_of",
    "output_of",
    "output_of_dimensions",
    "unwrapped",
]

POOLED: Final = "pooler_output"
HIDDEN: Final = "last_hidden_state"
MEAN: Final = "mean"


def plain_tensor(value: Any) -> torch.Tensor:
    """A stored value, in whichever form a script holds it, as a tensor without a graph.

    Args:
        value: Tensor, array, or a dict holding one under `embeddings` or `embedding`.

    Raises:
        InvalidEmbeddingError: It is none of these, or has masked elements.
    """
    import torch

    from lmdbcache.training.tensors import as_tensor as tensor_of_array

    value = unwrapped(value)
    if isinstance(value, torch.Tensor):
        return value.detach()
    if has_masked_elements(value):
        raise InvalidEmbeddingError(
            "an audio embedding has masked elements, which have no value; fill them (`filled`)"
        )
    if isinstance(value, np.ndarray):
        return tensor_of_array(value if value.flags.writeable else value.copy())
    raise InvalidEmbeddingError(
        f"an audio embedding is a {type(value).__name__}; expected a tensor, an array, or a dict "
        "with one under 'embeddings'"
    )


def unwrapped(value: Any) -> Any:
    """What a dict holds under `embeddings` or `embedding`; anything else as it is."""
    if isinstance(value, Mapping):
        return value.get("embeddings", value.get("embedding"))
    return value


def checked(sample_id: str, value: Any, shape: tuple[int, ...] | None) -> Any:
    """The tensor or array in a value, if it is one and has this shape.

    Raises:
        InvalidEmbeddingError: It isn't or hasn't; the message names the sample.
    """
    import torch

    embedding = unwrapped(value)
    if has_masked_elements(embedding):
        raise InvalidEmbeddingError(f"{sample_id}: an embedding with masked elements has no value")
    if not isinstance(embedding, (torch.Tensor, np.ndarray)):
        raise InvalidEmbeddingError(
            f"{sample_id}: a {type(value).__name__} without a tensor or array in it"
        )
    if shape is not None and tuple(embedding.shape) != tuple(shape):
        raise InvalidEmbeddingError(
            f"{sample_id}: shape {tuple(embedding.shape)}; embedding_shape says {tuple(shape)}"
        )
    return embedding


def output_of(embeddings: Mapping[str, Any]) -> str:
    """Which output of the model these are, by the number of dimensions of the first."""
    first = unwrapped(next(iter(embeddings.values())))
    return output_of_dimensions(getattr(first, "ndim", 1))


def output_of_dimensions(num_dimensions: int) -> str:
    """Which output of the model embeddings of so many dimensions are, as far as one can guess."""
    return HIDDEN if num_dimensions >= 2 else POOLED


def class_of(key: str, value: Any) -> str:
    """The class in a legacy value, or else in the sample id."""
    if isinstance(value, Mapping) and "class_name" in value:
        return str(value["class_name"]).lower()
    try:
        return split_sample_id(key)[1]
    except InvalidSampleIdError:
        return ""
