"""The rows of a streamed Hugging Face dataset as clips. No torch here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Final

from lmdbcache.audio import AudioSource, BytesSource, as_source
from lmdbcache.errors import DatasetError
from lmdbcache.machine import needing
from lmdbcache.storage import canonical_class

_logger: Final = logging.getLogger(__name__)


def stream_clips(
    stream: Any, *, id_column: str, audio_column: str = "audio", label_column: str = "label"
) -> Iterator[tuple[str, str | AudioSource]]:
    """Yield (sample id, source) of each row of a dataset loaded with `streaming=True`.

    Nothing is decoded, and no row is kept. Rows without a label are left out, with a warning at the
    end that says how many.

    Args:
        stream: An `IterableDataset` of the package `datasets`.
        id_column: Holds each row's file id: a stream has no other name for a row that stays.
        audio_column: Holds encoded audio, as bytes or as a path or URL.
        label_column: A `ClassLabel`, text or a whole number.

    Raises:
        DatasetError: Not a streamed dataset, or a row lacks a column.
        MissingDependencyError: The package `datasets` isn't installed.
    """
    with needing("a Hugging Face dataset", "huggingface"):
        import datasets
    if not isinstance(stream, datasets.IterableDataset):
        raise DatasetError(
            f"{type(stream).__name__} isn't a streamed dataset of one split; `open_dataset` takes "
            "others"
        )
    feature = (stream.features or {}).get(label_column)
    names = getattr(feature, "names", None)
    num_without = 0
    for number, row in enumerate(stream.cast_column(audio_column, datasets.Audio(decode=False))):
        for name in (id_column, audio_column, label_column):
            if name not in row:
                raise DatasetError(f"row {number}: no column {name!r}, but {', '.join(row)}")
        label = row[label_column]
        if label is None or (names and not 0 <= label < len(names)):
            num_without += 1
            continue
        class_name = canonical_class(str(names[label] if names else label))
        yield f"{row[id_column]}:{class_name}", _source(row[audio_column], f"row {number}")
    if num_without:
        _logger.warning("%d rows of the stream have no label and are left out", num_without)


def _source(value: Any, name: str) -> str | AudioSource:
    value = value or {}
    if value.get("bytes") is not None:
        return BytesSource(
            value["bytes"], f"{name}, {value['path']}" if value.get("path") else name
        )
    return as_source(value["path"]) if value.get("path") else BytesSource(b"", name)
