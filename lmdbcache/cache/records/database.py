"""The records of sources beside a store: `sources.sqlite3`.

A record belongs to one embedding, which it names by the checksum that the store keeps of it. So a
record never speaks for an embedding that somebody wrote later, and a run that is killed between
the two commits leaves the old embedding with its old record.

Each call opens the file and closes it again: nothing is carried over a fork. The journal is
SQLite's rollback journal, which leaves no second file behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from lmdbcache.cache.records.files import Source
from lmdbcache.cache.records.origins import (
    Origin,
    forget_origins,
    has_origins,
    put_origins,
    read_origins,
)
from lmdbcache.errors import (
    CacheFullError,
    FormatVersionError,
    IntegrityError,
    NotRegularFileError,
    ReadOnlyCacheError,
    StorageError,
)
from lmdbcache.files import check_file, occupy_standard_descriptors, open_file

__all__ = ["SOURCES_NAME", "SourceRecorder", "SourceRecords", "forget_sources", "write_sources"]

_logger: Final = logging.getLogger(__name__)

SOURCES_NAME: Final = "sources.sqlite3"
_VERSION: Final = 1
_BUSY_SECONDS: Final = 5.0
# Inside a commit, which keeps the store's other writers waiting.
_PATIENCE_SECONDS: Final = 1.0
_FEW: Final = 256
_COLUMNS: Final = "sample_id, embedding, root, path, size, mtime_ns, digest"
_SCHEMA: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS roots (id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS sources (
    sample_id TEXT NOT NULL,
    embedding BLOB NOT NULL,  -- the checksum that the store keeps of it
    root INTEGER,
    path BLOB NOT NULL,       -- relative to the root, if there is one; empty: wasn't a file
    size INTEGER NOT NULL,
    mtime_ns INTEGER,
    digest BLOB,              -- xxh3-128 of the content
    PRIMARY KEY (sample_id, embedding)
) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
COMMIT;
"""

Written = tuple[str, bytes | None, bytes, Source]


class SourceRecords:
    """The records of one store, to be read in a `with` block; there may be none.

    Args:
        store: The store's folder.

    Raises:
        IntegrityError: The file is damaged; here or at any call.
        FormatVersionError: Written by a newer lmdbcache.
        StorageError: It can't be opened, or is locked for seconds.
    """

    def __init__(self, store: Path) -> None:
        self._path = store / SOURCES_NAME
        self._connection: sqlite3.Connection | None = None
        self._roots: dict[int, str] = {}

    def __enter__(self) -> SourceRecords:
        with _translated(self._path):
            check_file(self._path)
            if self._path.exists():
                connection = _connect(self._path)
                try:
                    if _version_of(connection, self._path):
                        rows = connection.execute("SELECT id, path FROM roots")
                        self._roots = {number: os.fsdecode(path) for number, path in rows}
                except BaseException:
                    connection.close()
                    raise
                self._connection = connection
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def of(self, embeddings: Mapping[str, bytes]) -> dict[str, Source]:
        """The sources of these embeddings, as far as they are recorded.

        Args:
            embeddings: Sample id → the checksum that the store keeps of the embedding. Ids that
                are near each other in their order are found fastest.
        """
        found = {}
        with _translated(self._path):
            for sample_id, embedding, root, path, *rest in self._rows(_COLUMNS, embeddings):
                size, mtime_ns, digest = rest
                if embeddings.get(sample_id) == embedding:
                    folder = self._roots.get(root, "")
                    found[sample_id] = Source(os.fsdecode(path), size, mtime_ns, digest, folder)
        return found

    @property
    def has_origins(self) -> bool:
        """Whether anything has come from elsewhere."""
        with _translated(self._path):
            return self._connection is not None and has_origins(self._connection)

    def origins(self, embeddings: Mapping[str, bytes]) -> dict[str, Origin]:
        """Who computed these embeddings, of those that weren't computed in this store.

        Args:
            embeddings: See `of`.
        """
        connection = self._connection
        if not embeddings or connection is None or not _version_of(connection, self._path):
            return {}
        with _translated(self._path):
            return {
                sample_id: origin
                for sample_id, embedding, origin in read_origins(connection, _ranges(embeddings))
                if embeddings.get(sample_id) == embedding
            }

    def sizes_and_times(self, sample_ids: Collection[str]) -> list[tuple[str, int, int | None]]:
        """(sample id, size, mtime_ns) of what is recorded of these, whichever embedding it is of.

        Quicker than `of`; some of other samples come along.
        """
        with _translated(self._path):
            return list(self._rows("sample_id, size, mtime_ns", sample_ids))

    def check(self) -> None:
        """Look at every page of the file.

        Raises:
            IntegrityError: It is damaged.
        """
        if self._connection is not None:
            with _translated(self._path):
                (finding,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
                if finding != "ok":
                    raise sqlite3.DatabaseError(finding)

    def _rows(self, columns: str, sample_ids: Collection[str]) -> Iterator[tuple[Any, ...]]:
        connection = self._connection
        if not sample_ids or connection is None or not _version_of(connection, self._path):
            return
        query = f"SELECT {columns} FROM sources WHERE sample_id BETWEEN ? AND ?"
        for ends in _ranges(sample_ids):
            # All at once: a cursor that stays open keeps writers waiting.
            yield from connection.execute(query, ends).fetchall()


def write_sources(
    store: Path,
    written: Iterable[Written],
    *,
    origins: Iterable[tuple[str, bytes | None, bytes, Origin]] = (),
    tidy: bool = True,
    busy_seconds: float = _BUSY_SECONDS,
) -> None:
    """Add records, all or none.

    Args:
        store: The store's folder.
        written: (sample id, checksum of the embedding that is replaced or None, checksum of the
            new one, source) of each.
        origins: The same with who computed it, of those that weren't computed in this store.
        tidy: Remove the records of still older embeddings of these samples; for whoever holds the
            writer lock.
        busy_seconds: How long to wait for others, if need be once to begin and once to end.

    Raises:
        IntegrityError, StorageError: It can't be done.
    """
    path = store / SOURCES_NAME
    written, origins = list(written), list(origins)
    with _translated(path):
        _create(path)
        with contextlib.closing(_connect(path, busy_seconds)) as connection:
            if not _version_of(connection, path):
                connection.executescript(_SCHEMA)
            connection.execute("BEGIN IMMEDIATE")
            if tidy:
                kept = {row[0]: row[1] or b"" for row in (*written, *origins)}
                connection.executemany(
                    "DELETE FROM sources WHERE sample_id = ? AND embedding != ?", list(kept.items())
                )
                forget_origins(connection, kept.items())
            connection.executemany(
                "INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?, ?, ?, ?)",
                list(_rows(connection, written)),
            )
            put_origins(connection, [(name, new, origin) for name, _, new, origin in origins])
            connection.execute("COMMIT")


def forget_sources(store: Path) -> None:
    """Remove all records."""
    for name in (SOURCES_NAME, f"{SOURCES_NAME}-journal"):
        (store / name).unlink(missing_ok=True)


class SourceRecorder:
    """Keeps the sources of embeddings that a writer is about to commit; its `before_commit`.

    What goes wrong here never stops the writer: it is said once, and the sources stay unknown.

    Args:
        store: The store's folder.
        root: The dataset's folder, or empty.
    """

    def __init__(self, store: Path, root: str | Path = "") -> None:
        self._store = store
        self._root = os.fspath(root)
        self._noted: dict[str, Source] = {}
        self._written: set[str] = set()
        self._has_failed = False
        self._seconds = _PATIENCE_SECONDS

    def note(self, sample_id: str, source: Source | None) -> None:
        """Say what the embedding that is given to the writer next was computed from."""
        if source is not None:
            self._noted[sample_id] = source.below(self._root)

    def __call__(self, committed: Mapping[str, tuple[bytes | None, bytes]]) -> None:
        """Write the records of what is committed right after.

        Args:
            committed: Sample id → checksums of the embedding that is replaced and of the new one.
        """
        # A commit that failed comes again with the next: only then are its sources let go.
        for sample_id in self._written.difference(committed):
            self._noted.pop(sample_id, None)
        self._written = set(committed)
        noted = self._noted
        try:
            write_sources(
                self._store,
                [
                    (sample_id, replaced, checksum, noted[sample_id])
                    for sample_id, (replaced, checksum) in committed.items()
                    if sample_id in noted
                ],
                busy_seconds=self._seconds,
            )
            self._seconds = _PATIENCE_SECONDS
        except (IntegrityError, StorageError) as error:
            self._seconds = 0.0  # until it works again
            if not self._has_failed:
                self._has_failed = True
                _logger.warning(
                    "the embeddings are stored, but which files they were computed from isn't "
                    "recorded: %s",
                    error,
                )


def _rows(
    connection: sqlite3.Connection, written: Iterable[Written]
) -> Iterator[tuple[object, ...]]:
    roots: dict[str, int | None] = {"": None}
    for sample_id, _, checksum, source in written:
        if source.root not in roots:
            root = os.fsencode(source.root)
            connection.execute("INSERT OR IGNORE INTO roots (path) VALUES (?)", (root,))
            found = connection.execute("SELECT id FROM roots WHERE path = ?", (root,))
            roots[source.root] = found.fetchone()[0]
        yield (
            sample_id,
            checksum,
            roots[source.root],
            os.fsencode(source.path),
            source.size,
            source.mtime_ns,
            source.digest,
        )


def _ranges(sample_ids: Collection[str]) -> list[tuple[str, str]]:
    if len(sample_ids) <= _FEW:  # they may lie far apart
        return [(sample_id, sample_id) for sample_id in sample_ids]
    return [(min(sample_ids), max(sample_ids))]


def _create(path: Path) -> None:
    # SQLite would make it 0644 whatever the umask is: a group shares its stores.
    with contextlib.suppress(FileExistsError):
        os.close(open_file(path, os.O_CREAT | os.O_EXCL | os.O_RDWR))


def _connect(path: Path, busy_seconds: float = _BUSY_SECONDS) -> sqlite3.Connection:
    """Open the file; without permission to write, for reading."""
    occupy_standard_descriptors()
    for suffix in ("", "-journal", "-wal", "-shm"):
        check_file(path.with_name(path.name + suffix))
    uri = f"{path.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(uri, uri=True, timeout=busy_seconds, isolation_level=None)


def _version_of(connection: sqlite3.Connection, path: Path) -> int:
    """0 while nothing is in it."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > _VERSION:
        raise FormatVersionError(
            f"{path} is in version {version}; this lmdbcache reads up to {_VERSION}. Upgrade "
            "lmdbcache"
        )
    return version


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        # Locked, no permission, a full disk, an I/O error: the file itself may be sound.
        if "disk is full" in str(error):
            raise CacheFullError(f"{path}: the disk is full. Free space and go on") from None
        raise StorageError(
            f"{path}: {error}. Check its permissions and the space on its disk"
        ) from None
    except (sqlite3.Error, TypeError, ValueError, OverflowError) as error:
        raise IntegrityError(
            f"{path} is damaged ({error}); the embeddings aren't concerned. `lmdbcache verify "
            f"{path.parent.name} --sources --data-dir DATA_DIR --adopt` makes it anew"
        ) from None
    except NotRegularFileError:
        raise
    except OSError as error:
        raise ReadOnlyCacheError(f"{path} can't be written ({error.strerror})") from None
