"""Embeddings as the rows of an Arrow table, for Parquet and Lance alike."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.exchange.transfer.optional import optional
from lmdbcache.exchange.transfer.parts import Embeddings
from lmdbcache.storage import split_sample_id

__all__ = ["TEXT_COLUMNS", "embedding_columns", "embedding_schema", "written_form"]

TEXT_COLUMNS: Final = "sample_id", "file_id", "class"


def embedding_schema(description: dict[str, Any]) -> Any:
    """The Arrow schema of a store's embeddings, with their config in its metadata.

    An embedding is a `fixed_size_list` of its values in C order; where the first dimension
    differs, a `large_list`.
    """
    arrow = optional("pyarrow", "writing Arrow tables")
    shape = description["embedding_shape"]
    value = arrow.float16() if description["dtype"] == "float16" else arrow.float32()
    # Nothing is ever null; saying so makes writing faster.
    element = arrow.field("element", value, nullable=False)
    kind = arrow.large_list(element) if None in shape else arrow.list_(element, math.prod(shape))
    columns = [*((name, arrow.string()) for name in TEXT_COLUMNS), ("embedding", kind)]
    return arrow.schema(
        [arrow.field(name, type_, nullable=False) for name, type_ in columns],
        metadata={"lmdbcache": json.dumps(description)},
    )


def embedding_columns(schema: Any, sample_ids: Sequence[str], embeddings: Embeddings) -> list[Any]:
    """The columns of some embeddings, in the order of `embedding_schema`."""
    arrow = optional("pyarrow", "writing Arrow tables")
    kind = schema.field("embedding").type
    arrays = [written_form(array) for array in embeddings]
    values = arrow.array(np.concatenate([array.reshape(-1) for array in arrays]))
    if arrow.types.is_fixed_size_list(kind):
        column = arrow.FixedSizeListArray.from_arrays(values, type=kind)
    else:
        ends = np.cumsum([0, *(array.size for array in arrays)])
        column = arrow.LargeListArray.from_arrays(ends, values, type=kind)
    file_ids, classes = zip(*map(split_sample_id, sample_ids), strict=True)
    texts = [list(sample_ids), list(file_ids), list(classes)]
    return [*(arrow.array(text, arrow.string()) for text in texts), column]


def written_form(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An embedding as formats take it that don't know bfloat16: that becomes float32, exactly."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
