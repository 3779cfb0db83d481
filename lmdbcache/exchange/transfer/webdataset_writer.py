"""A tar file of embeddings, as the webdataset library reads it."""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lmdbcache.exchange.transfer.arrow_table import written_form
from lmdbcache.exchange.transfer.checksums import CHECKSUM, checksum
from lmdbcache.exchange.transfer.optional import optional
from lmdbcache.exchange.transfer.parts import Embeddings
from lmdbcache.exchange.transfer.webdataset_keys import webdataset_key
from lmdbcache.storage import split_sample_id

__all__ = ["WebDatasetPart"]

# Fixed, so that the same embeddings give the same bytes: 2020-01-01.
_TIME: Final = 1577836800


class WebDatasetPart:
    """Writes `KEY.json` (sample_id, file_id, class, checksum) and `KEY.npy` for each embedding.

    KEY is the sample id as `webdataset_key` gives it. bfloat16 is written as float32.

    Args:
        path: The file.
        description: As JSON in the comment of the archive, which readers pass over.
    """

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        library = optional("webdataset", "writing webdataset shards")
        self._file = path.open("wb")
        # A file among the others would be a sample to some readers.
        self._file.write(
            tarfile.TarInfo.create_pax_global_header({"comment": json.dumps(description)})
        )
        self._writer = library.TarWriter(self._file, mtime=_TIME, mode=0o644, format="PAX_FORMAT")

    def add(self, sample_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Write some embeddings."""
        for sample_id, embedding in zip(sample_ids, embeddings, strict=True):
            file_id, class_name = split_sample_id(sample_id)
            array = written_form(embedding)
            names = {"sample_id": sample_id, "file_id": file_id, "class": class_name}
            self._writer.write(
                {
                    "__key__": webdataset_key(sample_id),
                    "json": {**names, CHECKSUM: f"{checksum(sample_id, array):016x}"},
                    "npy": array,
                }
            )

    def close(self) -> None:
        """Write the archive's end."""
        try:
            self._writer.close()
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close the file; what goes wrong with that doesn't matter any more."""
        with contextlib.suppress(Exception):
            self.close()
