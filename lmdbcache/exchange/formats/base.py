"""What the formats have in common: embeddings of a file to import, and one file of an export."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from lmdbcache.config import WINDOW_FIELDS, CacheConfig
from lmdbcache.errors import InvalidSampleIdError, TransferError
from lmdbcache.exchange.formats.keys import KeyChoice, KeyReader, sample_id_in_class
from lmdbcache.exchange.intake import Refusal
from lmdbcache.machine import needing
from lmdbcache.storage import NUMPY_DTYPES, canonical_sample_id

# Under one of these names lies what a dict holds among other things.
EMBEDDINGS: Final = ("embeddings", "audio_embs", "embedding", "features")
IDS: Final = ("sample_ids", "keys", "ids", "file_ids", "filenames", "file_names", "names")
CLASSES: Final = ("classes", "class_names", "labels")
METADATA: Final = ("metadata", "meta", "config")

# By numpy's names, torch's and those of safetensors.
_NO_REAL_NUMBERS: Final = re.compile(
    r"(complex|c\d|bool|str|bytes|object|datetime|timedelta|void|record|quint|qint).*"
)


def optional(module: str, purpose: str, *, extra: str = "formats") -> Any:
    """Import a module of an extra.

    Raises:
        MissingDependencyError: It isn't installed.
    """
    with needing(purpose, extra):
        return importlib.import_module(module)


# ---- what a file says about its embeddings


@dataclass(frozen=True)
class Description:
    """What a file says about its embeddings, in its words or in ours.

    Args:
        facts: Fields of a `CacheConfig`, as far as they are stated; not checked yet.
        embedding_shape: Of an export: shape of one embedding, None in front if it may differ.
        num_embeddings: How many there should be.
        provenance: Of an export: what the store knew of its embeddings.
        is_export: Written by `export_embeddings`: names are sample ids, and nothing is guessed.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    embedding_shape: tuple[int | None, ...] | None = None
    num_embeddings: int | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    is_export: bool = False

    @staticmethod
    def of_export(
        config: CacheConfig,
        embedding_shape: Sequence[int | None],
        num_embeddings: int,
        provenance: Mapping[str, str],
    ) -> dict[str, Any]:
        """Return what an export writes into its files' metadata: plain values, ready for JSON."""
        return {
            _MARK: _VERSION,
            **config.to_dict(),
            "embedding_shape": list(embedding_shape),
            "num_embeddings": num_embeddings,
            "provenance": dict(provenance),
        }


# In a file's metadata: it was written by an export, in this version of its form.
_MARK: Final = "lmdbcache_export"
_VERSION: Final = 1
# The first of these that a file has counts.
_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "sample_rate": ("sample_rate", "sampling_rate", "audio_sample_rate", "sr"),
    "duration": ("duration", "audio_duration", "clip_duration", "duration_seconds"),
    "model_name": ("model_name", "model", "ast_model_name", "model_id"),
    "output": ("output",),
    "namespace": ("namespace", "dataset"),
    "front_end": ("front_end",),
    "compute_dtype": ("compute_dtype",),
}
_NUMBERS: Final = ("sample_rate", "duration")


def describe(metadata: Mapping[Any, Any]) -> Description:
    """Return what a file's metadata says; unknown fields are ignored."""
    is_export = metadata.get(_MARK) == _VERSION
    facts: dict[str, Any] = {"dtype": metadata.get("dtype")} if is_export else {}
    for name, words in _WORDS.items():
        for word in words:
            value = _plain(metadata.get(word))
            if value is not None and (is_export or value != ""):
                facts[name] = _number(value) if name in _NUMBERS else value
                break
    if is_export:
        facts |= {name: metadata[name] for name in WINDOW_FIELDS if metadata.get(name) is not None}
    count = _plain(metadata.get("num_embeddings"))
    count = count if type(count) is int else None
    if not is_export:
        return Description(facts, num_embeddings=count)
    shape, provenance = metadata.get("embedding_shape"), metadata.get("provenance")
    return Description(
        facts,
        tuple(shape) if isinstance(shape, (list, tuple)) else None,
        count,
        {str(k): str(v) for k, v in provenance.items()} if isinstance(provenance, dict) else {},
        is_export=True,
    )


def description_of_json(text: str | bytes | None) -> Description:
    """Return what metadata in JSON says; of anything else an empty description."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return Description()
    return describe(values) if isinstance(values, dict) else Description()


def _plain(value: Any) -> Any:
    """The Python value of a numpy or torch scalar."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return value


def _number(value: Any) -> Any:
    """Numbers in metadata that can only hold text."""
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except ValueError:
            pass
    return value


# ---- the embeddings of a file to import


@dataclass(slots=True)
class Entry:
    """One embedding of a source; its values are read by `load`.

    Args:
        name: What the source calls it, for messages.
        sample_id: In canonical form.
        shape: None if it isn't known before reading.
        dtype: numpy's name of it; None if it isn't known before reading.
        load: Gives an array or tensor.
    """

    name: str
    sample_id: str
    shape: tuple[int, ...] | None
    dtype: str | None
    load: Callable[[], Any]


@dataclass
class Source:
    """A file or folder to import from: embeddings that are listed first and read later.

    Args:
        path: Where it is.
        kind: What it is, in words.
        files: The files that it consists of.
        description: What it says about its embeddings.
        entries: The embeddings by sample id.
        repeated: Further ones of the same samples.
        refused: What can't be imported.
        notes: What was taken for granted or left out, for people.
    """

    path: Path
    kind: str
    files: Sequence[Path] = ()
    description: Description = field(default_factory=Description)
    entries: dict[str, Entry] = field(default_factory=dict)
    repeated: list[Entry] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        sample_id: Callable[[], str],
        shape: tuple[int, ...] | None,
        dtype: str | None,
        load: Callable[[], Any],
    ) -> None:
        """Add one; an unusable sample id, or what isn't real numbers, is refused."""
        if dtype is not None and _NO_REAL_NUMBERS.fullmatch(dtype):
            self.refuse(name, f"dtype {dtype}; real numbers are needed")
            return
        try:
            canonical = canonical_sample_id(sample_id())
        except InvalidSampleIdError as error:
            self.refuse(name, error)
            return
        entry = Entry(name, canonical, shape, dtype, load)
        if canonical in self.entries:
            self.repeated.append(entry)
        else:
            self.entries[canonical] = entry

    @property
    def dtypes(self) -> Counter[str | None]:
        """Numpy's name → number of embeddings; None where it isn't known before reading."""
        return Counter(entry.dtype for entry in self.entries.values())

    def refuse(self, name: str, reason: object) -> None:
        """Note what can't be imported, in one line."""
        self.refused.append(Refusal(name, None, " ".join(str(reason).split())))

    def add_named(
        self,
        names: Iterable[str],
        choice: KeyChoice,
        shape_and_dtype: Callable[[str], tuple[tuple[int, ...], str]],
        load: Callable[[str], Any],
    ) -> None:
        """Add embeddings that lie under a name each."""
        names = list(names)
        reader = KeyReader(names, choice, is_exact=self.description.is_export)
        self.notes += reader.notes
        for name in names:
            shape, dtype = shape_and_dtype(name)
            self.add(name, partial(reader.sample_id, name), shape, dtype, partial(load, name))

    def add_rows(self, rows: Rows, choice: KeyChoice) -> None:
        """Add the rows of an array.

        Raises:
            TransferError: Names are missing, or not as many as rows.
        """
        if rows.ids is None:
            raise TransferError(
                f"{rows.name} is one array of {rows.num_rows} embeddings without a list of their "
                f"names; expected one under {', '.join(repr(name) for name in IDS[:3])}"
            )
        for what, names in (("names", rows.ids), ("classes", rows.classes)):
            if names is not None and len(names) != rows.num_rows:
                raise TransferError(
                    f"{rows.name}: {rows.num_rows} embeddings and {len(names)} {what}; one for "
                    "each is needed"
                )
        # Rows may share a name where the class distinguishes them.
        classes: Sequence[str | None] = rows.classes or [None] * rows.num_rows
        classes = [None if ":" in name else c for name, c in zip(rows.ids, classes, strict=True)]
        unclassed = [name for name, c in zip(rows.ids, classes, strict=True) if c is None]
        reader = KeyReader(unclassed, choice, is_exact=rows.is_exact)
        self.notes += reader.notes
        for number, (name, class_name) in enumerate(zip(rows.ids, classes, strict=True)):
            sample_id = partial(reader.sample_id, name)
            shown = name
            if class_name is not None:
                sample_id = partial(sample_id_in_class, name, class_name)
                shown = f"{name}:{class_name}"
            self.add(shown, sample_id, rows.shape(number), rows.dtype, partial(rows.load, number))


@dataclass(frozen=True)
class Rows:
    """Embeddings that lie in one array, and where their names are.

    Args:
        name: Of the array, for messages.
        num_rows: Its length.
        ids: Their names.
        classes: Their classes, where the names don't say.
        shape: Of one of them; None if they differ.
        dtype: numpy's name.
        load: Gives the row of a number.
        is_exact: The names are sample ids.
    """

    name: str
    num_rows: int
    ids: Sequence[str] | None
    classes: Sequence[str | None] | None
    shape: Callable[[int], tuple[int, ...] | None]
    dtype: str | None
    load: Callable[[int], Any]
    is_exact: bool = False


def read_files(
    path: Path,
    kind: str,
    files: Sequence[Path],
    add_file: Callable[[Source, Path], Description],
) -> Source:
    """Return the embeddings of one file or of several shards.

    Args:
        path: The file or folder.
        kind: What it is, in words.
        files: Its files.
        add_file: Adds the embeddings of a file to the source, and returns its description.

    Raises:
        TransferError: The files have different configs.
    """
    source = Source(path, kind, files)
    descriptions = [add_file(source, file) for file in files]
    source.description = descriptions[0]
    if any(one.facts != source.description.facts for one in descriptions):
        raise TransferError(f"{path}: its files name different configs; import them one by one")
    return source


class ForwardRows:
    """Gives rows by number; in order it reads the file once, going back begins anew.

    Args:
        blocks: Starts at the front; each block is a sequence of rows.
        num_rows: Rows in all; after the last one nothing is kept in memory.
    """

    def __init__(self, blocks: Callable[[], Iterator[Sequence[Any]]], num_rows: int) -> None:
        self._blocks = blocks
        self._num_rows = num_rows
        self._following: Iterator[Sequence[Any]] | None = None
        self._first = 0
        self._block: Sequence[Any] = ()

    def __call__(self, row: int) -> Any:
        """Return the row of this number.

        Raises:
            IndexError: The file ends before it.
        """
        if self._following is None or row < self._first:
            self._following, self._first, self._block = self._blocks(), 0, ()
        while row >= self._first + len(self._block):
            self._first += len(self._block)
            try:
                self._block = next(self._following)
            except StopIteration:
                raise IndexError(f"row {row} of {self._first}") from None
        found = self._block[row - self._first]
        if row == self._num_rows - 1:
            self._following, self._block = None, ()
        return found


def first_of(values: Mapping[Any, Any], names: Sequence[str]) -> str | None:
    """Return the first of these names that the mapping has."""
    return next((name for name in names if name in values), None)


def text_list(value: Any) -> list[str] | None:
    """Return a list or array of text as a list; None for anything else."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return list(value)
    return None


def dtype_name(value: Any) -> str | None:
    """Return the dtype of an array or tensor as numpy names it, whatever its order of bytes."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or isinstance(dtype, np.dtype):
        return None if dtype is None else dtype.name
    return str(dtype).removeprefix("torch.")


def numbers(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array as numpy has read it, with bfloat16 as ml_dtypes knows it.

    numpy writes ml_dtypes' bfloat16 as `V2`, two bytes without a meaning.
    """
    return array.view(NUMPY_DTYPES["bfloat16"]) if array.dtype == np.dtype("V2") else array


# ---- one file of an export

# One array of them, or several of different lengths.
Embeddings = Sequence[npt.NDArray[Any]] | npt.NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """What goes into the files of an export.

    Args:
        sample_ids: The samples, in order.
        lengths: First dimension of each embedding, where that differs.
        description: Plain values for the files' metadata.
    """

    sample_ids: list[str]
    lengths: list[int] | None
    description: dict[str, Any]


class Part(ABC):
    """One file that embeddings are added to in order; whole once it is closed.

    Args:
        path: The file.
        samples: What is added, in order.
    """

    @abstractmethod
    def __init__(self, path: Path, samples: Samples) -> None: ...

    @abstractmethod
    def add(self, sample_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Add some embeddings."""

    @abstractmethod
    def close(self) -> None:
        """Finish the file, and release it in any case."""

    def abandon(self) -> None:
        """Release the file, which is about to be removed; errors don't matter any more."""
        with contextlib.suppress(Exception):
            self.close()


CHECKSUM: Final = "checksum"  # the column or field, in formats that have no checksums


def checksum_in_file(sample_id: str, array: npt.NDArray[Any]) -> int:
    """Return xxh3-64 of a sample id's UTF-8, a zero byte, and the embedding's bytes in the file.

    Those are little-endian, in C order.
    """
    digest = xxhash.xxh3_64(sample_id.encode() + b"\0")
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.intdigest()


def check(sample_id: str, array: npt.NDArray[Any], expected: Any) -> npt.NDArray[Any]:
    """Return the array, if it is what was exported for this sample.

    Raises:
        TransferError: It isn't.
    """
    if checksum_in_file(sample_id, array) != expected:
        raise TransferError("the value doesn't have its checksum; restore the file from a copy")
    return array


def without_bfloat16(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an embedding for formats that don't know bfloat16, which becomes float32, exactly."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
