"""Files that list sample ids."""

from __future__ import annotations

from pathlib import Path

from lmdbcache.errors import DatasetError
from lmdbcache.storage import canonical_sample_id

__all__ = ["ids_in"]


def ids_in(path: Path) -> list[str]:
    """The sample ids in a file, one a line.

    Raises:
        DatasetError: There is no such file, it can't be read, or it isn't text.
        InvalidSampleIdError: A line isn't a sample id.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise DatasetError(
            f"--ids {path}: {error.strerror or error}; give a file that lists one sample id a line"
        ) from None
    except UnicodeDecodeError:
        raise DatasetError(f"--ids {path}: not text in UTF-8; write one sample id a line") from None
    return [canonical_sample_id(line.strip()) for line in lines if line.strip()]
