"""Which file each embedding was computed from, and whether it is still the same."""

from __future__ import annotations

import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeVar, get_args

import xxhash

from lmdbcache.cache.records import Source, SourceRecords, Written, forget_sources, write_sources
from lmdbcache.errors import IntegrityError
from lmdbcache.storage import EmbeddingReader, Progress, Report, class_of, recording_of, sample_key

SourceState = Literal["unchanged", "touched", "changed", "vanished", "unknown"]
STATES: Final[tuple[SourceState, ...]] = get_args(SourceState)

# Decoding reads the first seconds of a clip. Reading all of an hour-long recording for its digest
# would take longer than everything else.
LARGEST_DIGESTED_BYTES: Final = 64 << 20
# What a decoding process may keep of a clip's file: 40 s of 48 kHz stereo as 16-bit wav.
LARGEST_KEPT_BYTES: Final = 8 << 20
_CHUNK_BYTES: Final = 256 << 10
_AT_ONCE: Final = 4096
_NEWS_EVERY: Final = 64
_T = TypeVar("_T")


# ---- one file


def source_of(given: object) -> Source | None:
    """Return what to record of a clip's source.

    Args:
        given: A path, the bytes of a file, or an object whose `open_binary()` gives them.

    Returns:
        None if there is nothing to record: no such file, or none of these.
    """
    return read_source(given)[0]


def read_source(given: object) -> tuple[Source | None, bytes | None]:
    """Return what to record of a clip's source, and its content to decode.

    Decoding that content reads the file once, and embeds the bytes that were digested.
    Without it, call this before the clip is decoded.

    Args:
        given: As `source_of`.

    Returns:
        The source as `source_of` returns it; the content, None for more than
        `LARGEST_KEPT_BYTES` and where there is no source.
    """
    if isinstance(given, (bytes, bytearray, memoryview)):
        size = memoryview(given).nbytes
        source = Source("", size, None, xxhash.xxh3_128_digest(given))
        return source, bytes(given) if size <= LARGEST_KEPT_BYTES else None
    try:
        if isinstance(given, (str, os.PathLike)):
            return _read_file(os.fspath(given))
        with given.open_binary() as file:  # type: ignore[attr-defined]
            size = file.seek(0, os.SEEK_END)
            if size > LARGEST_KEPT_BYTES:  # it may be at a URL: reading it twice takes long
                return Source("", size, None, None), None
            file.seek(0)
            return read_source(file.read())
    except Exception:  # noqa: BLE001 - decoding will say what is wrong with it
        return None, None


def compare(source: Source, path: str, *, rehash: bool = False) -> SourceState:  # noqa: PLR0911
    """Return how the file at `path` compares with what is recorded.

    Args:
        source: What is recorded.
        path: Where the file should be.
        rehash: Read the content even if size and time are the same.

    Returns:
        `"touched"` if the time differs and the content doesn't; `"unknown"` if it wasn't a file,
        or can't be read now.
    """
    if not source.path:
        return "unknown"
    try:
        found = os.stat(path)  # noqa: PTH116 - once per clip
    except (FileNotFoundError, NotADirectoryError):
        return "vanished"
    except (OSError, ValueError):
        return "unknown"
    if not stat.S_ISREG(found.st_mode):
        return "vanished"
    is_same_time = found.st_mtime_ns == source.mtime_ns
    if found.st_size == source.size and (rehash or not is_same_time) and source.digest:
        now = source_of(path)
        if now is None:
            return "unknown"
        if now.digest == source.digest:
            return "unchanged" if is_same_time else "touched"
        return "changed"
    return "unchanged" if is_same_time and found.st_size == source.size else "changed"


def _read_file(path: str) -> tuple[Source | None, bytes | None]:
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - the one that fstat sees
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None, None
        digest = content = None
        if found.st_size <= min(LARGEST_KEPT_BYTES, LARGEST_DIGESTED_BYTES):
            content = file.read()
            digest = xxhash.xxh3_128_digest(content)
        elif found.st_size <= LARGEST_DIGESTED_BYTES:
            hasher = xxhash.xxh3_128()
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
            digest = hasher.digest()
    return Source(path, found.st_size, found.st_mtime_ns, digest), content


# ---- the files of a store


class FoundSource(NamedTuple):
    """One embedding and the state of its file; without a record, no `path`."""

    sample_id: str
    path: str | None
    state: SourceState


@dataclass(frozen=True)
class SourceReport(Report):
    """The files of a store's embeddings, compared with what was recorded.

    Args:
        path: The store's folder.
        by_class: Class → state → number of embeddings.
        found: The embeddings whose file isn't as it was, those with an unknown one included.
    """

    derived: ClassVar = ("is_trusted",)

    path: Path
    by_class: Mapping[str, Mapping[SourceState, int]] = field(default_factory=dict)
    found: tuple[FoundSource, ...] = ()

    def num(self, state: SourceState) -> int:
        """Embeddings in this state."""
        return sum(counts.get(state, 0) for counts in self.by_class.values())

    def ids(self, *states: SourceState) -> list[str]:
        """Sample ids in one of these states, in order."""
        return [found.sample_id for found in self.found if found.state in states]

    @property
    def is_trusted(self) -> bool:
        """Whether no file is known to have changed or vanished."""
        return not (self.num("changed") or self.num("vanished"))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the number of embeddings in each state."""
        return {**super().to_dict(), **{f"num_{state}": self.num(state) for state in STATES}}


def check_sources(
    store: str | Path,
    *,
    data_dir: str | Path | None = None,
    rehash: bool = False,
    sample_ids: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> SourceReport:
    """Compare the files of a store's embeddings with what was recorded of them.

    Size and time decide; where only the time differs, the content does.

    Args:
        store: The store's folder.
        data_dir: Where the dataset is now; None looks where it was.
        rehash: Read every file, whatever its size and time say.
        sample_ids: Only these, as far as they are stored; None takes all.
        progress: Called with (embeddings done, embeddings in all).

    Raises:
        CacheNotFoundError: Nothing is stored here.
        IntegrityError: The store or its records are damaged.
    """
    store = Path(store).absolute()
    counts: dict[str, Counter[SourceState]] = {}
    found = []
    before: tuple[Source | None, SourceState] = None, "unknown"  # windows have one file
    for sample_id, _, source in recorded_sources(store, sample_ids, progress):
        path = source.location(data_dir) if source is not None and source.path else None
        state: SourceState = "unknown"
        if source is not None and path is not None:
            state = before[1] if source == before[0] else compare(source, path, rehash=rehash)
            before = source, state
        counts.setdefault(class_of(sample_id), Counter())[state] += 1
        if state != "unchanged":
            found.append(FoundSource(sample_id, path, state))
    return SourceReport(store, dict(sorted(counts.items())), tuple(found))


def changed_clips(store: Path, paths: Mapping[str, str]) -> list[str]:
    """Return the stored samples whose file isn't the one that was embedded.

    Args:
        store: The store's folder.
        paths: Sample id → audio file, as they are to be read now.

    Raises:
        IntegrityError: The store or its records are damaged.
    """
    return [
        sample_id
        for sample_id, _, source in recorded_sources(store, paths)
        if source is not None and compare(source, paths[sample_id]) == "changed"
    ]


def num_suspects(store: Path, paths: Mapping[str, str]) -> int:
    """Return how many stored samples have a file of another size or time than recorded.

    Only sizes and times are compared: the content may be the same.

    Args:
        store: The store's folder.
        paths: Sample id → audio file, as they are to be read now.
    """
    seen: set[str] = set()
    same: set[str] = set()
    with SourceRecords(store) as records:
        for chunk in _chunks(sorted(paths)):
            for sample_id, size, mtime_ns in records.sizes_and_times(chunk):
                path = paths.get(sample_id)
                if isinstance(path, str) and mtime_ns is not None:
                    seen.add(sample_id)
                    if _has(path, size, mtime_ns):
                        same.add(sample_id)
    return len(seen - same)


def adopt_sources(
    store: str | Path,
    clips: Mapping[str, str],
    root: str | Path = "",
    progress: Progress | None = None,
) -> int:
    """Record the present files as the sources of embeddings that have no record.

    The new time of a file whose content is the same is recorded as well; a changed file stays
    changed. Damaged records are replaced.

    Args:
        store: The store's folder.
        clips: Sample id → audio file.
        root: The dataset's folder.
        progress: Called with (embeddings done, embeddings in all).

    Returns:
        How many records were written.
    """
    store = Path(store).absolute()
    try:
        with SourceRecords(store) as records:
            records.check()
    except IntegrityError:
        forget_sources(store)
    number = 0
    adopted = _adopted(store, clips, os.fspath(root), progress)
    for chunk in _chunks(adopted):
        write_sources(store, chunk, tidy=False)
        number += len(chunk)
    return number


def _adopted(
    store: Path, clips: Mapping[str, str], root: str, progress: Progress | None
) -> Iterator[Written]:
    for sample_id, checksum, source in recorded_sources(store, None, progress):
        path = clips.get(sample_id, clips.get(recording_of(sample_id)))
        if path is None:
            continue
        if source is None or not source.path or compare(source, path) == "touched":
            now = source_of(path)
            if now is not None:
                yield sample_id, checksum, checksum, now.below(root)


def recorded_sources(
    store: Path, sample_ids: Iterable[str] | None = None, progress: Progress | None = None
) -> Iterator[tuple[str, bytes, Source | None]]:
    """Yield (sample id, checksum, recorded source or None) of the stored embeddings.

    Args:
        store: The store's folder.
        sample_ids: Only these; None takes all.
        progress: Called with (embeddings done, embeddings in all).
    """
    with EmbeddingReader(store, track_usage=False) as reader, SourceRecords(store) as records:
        ids: Iterable[str] = reader
        total = len(reader)
        if sample_ids is not None:
            ids = sorted(sample_ids)
            total = len(ids)
        done = 0
        for chunk in _chunks(ids):
            checksums = _checksums(reader, chunk)
            sources = records.of(checksums)
            for number, (sample_id, checksum) in enumerate(checksums.items()):
                if progress is not None and number % _NEWS_EVERY == 0:
                    progress(done + number, total)
                yield sample_id, checksum, sources.get(sample_id)
            done += len(chunk)
        if progress is not None:
            progress(done, total)


def _has(path: str, size: int, mtime_ns: int) -> bool:
    try:
        found = os.stat(path)  # noqa: PTH116 - once per clip
    except (OSError, ValueError):
        return False
    return found.st_mtime_ns == mtime_ns and found.st_size == size


def _chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    items = iter(items)
    while chunk := list(itertools.islice(items, _AT_ONCE)):
        yield chunk


def _checksums(reader: EmbeddingReader, sample_ids: list[str]) -> dict[str, bytes]:
    keys = {sample_id: sample_key(sample_id) for sample_id in sample_ids}
    found = reader.checksums_of(keys.values())
    return {sample_id: found[key] for sample_id, key in keys.items() if key in found}
