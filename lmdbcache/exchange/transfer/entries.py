"""What a file to import holds: embeddings that are listed first and read later."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import InvalidSampleIdError
from lmdbcache.exchange.transfer.descriptions import Description
from lmdbcache.storage import NUMPY_DTYPES, canonical_sample_id

__all__ = ["Entry", "Listing", "Refusal", "Source", "dtype_name", "identity", "numbers"]

# By numpy's names, torch's and those of safetensors.
_NO_REAL_NUMBERS: Final = re.compile(
    r"(complex|c\d|bool|str|bytes|object|datetime|timedelta|void|record|quint|qint).*"
)


@dataclass(slots=True)
class Entry:
    """One embedding of a source; its values are read by `load`.

    Args:
        name: What the source calls it, for messages.
        sample_id: In canonical form.
        shape: None if only reading tells.
        dtype: numpy's name of it; None if only reading tells.
        load: Gives an array or tensor.
    """

    name: str
    sample_id: str
    shape: tuple[int, ...] | None
    dtype: str | None
    load: Callable[[], Any]


@dataclass(frozen=True)
class Refusal:
    """Something in a source that isn't imported."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Listing:
    """Collects the embeddings of a source, each sample once."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.repeated: list[Entry] = []
        self.refused: list[Refusal] = []

    def add(
        self,
        name: str,
        sample_id: Callable[[], str] | str,
        shape: tuple[int, ...] | None,
        dtype: str | None,
        load: Callable[[], Any],
    ) -> None:
        """Add one; an unusable sample id, or what isn't real numbers, is noted as refused."""
        if dtype is not None and _NO_REAL_NUMBERS.fullmatch(dtype):
            self.refuse(name, f"dtype {dtype}; real numbers are needed")
            return
        try:
            chosen = sample_id if isinstance(sample_id, str) else sample_id()
            canonical = canonical_sample_id(chosen)
        except InvalidSampleIdError as error:
            self.refuse(name, str(error))
            return
        entry = Entry(name, canonical, shape, dtype, load)
        if canonical in self.entries:
            self.repeated.append(entry)
        else:
            self.entries[canonical] = entry

    def refuse(self, name: str, reason: object) -> None:
        """Note what can't be imported, in one line."""
        self.refused.append(Refusal(name, " ".join(str(reason).split())))


@dataclass
class Source:
    """A file or folder to import from.

    Args:
        path: Where it is.
        kind: What it is, in words.
        description: What it says about its embeddings.
        listing: The embeddings.
        notes: What was taken for granted or left out, for people.
        files: The files that it consists of.
    """

    path: Path
    kind: str
    description: Description
    listing: Listing
    notes: list[str] = field(default_factory=list)
    files: Sequence[Path] = ()


def identity(path: Path, files: Iterable[Path]) -> str:
    """Name, size and time of what is imported, to be told from another file later."""
    found = [file.stat() for file in files]
    newest = max((one.st_mtime for one in found), default=0.0)
    when = datetime.fromtimestamp(newest, timezone.utc).isoformat(timespec="seconds")
    size = sum(one.st_size for one in found)
    files_text = f"{len(found)} files, " if len(found) != 1 else ""
    return f"{path.name} ({files_text}{size} bytes, modified {when})"


def dtype_name(value: Any) -> str | None:
    """The dtype of an array or tensor as numpy names it, whatever its order of bytes."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or isinstance(dtype, np.dtype):
        return None if dtype is None else dtype.name
    return str(dtype).removeprefix("torch.")


def numbers(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array as numpy has read it, with bfloat16 as ml_dtypes knows it.

    numpy writes ml_dtypes' bfloat16 as `V2`, two bytes without a meaning.
    """
    return array.view(NUMPY_DTYPES["bfloat16"]) if array.dtype == np.dtype("V2") else array
