"""Where each embedding comes from: its file and who computed it, in `sources.sqlite3`.

A record belongs to one embedding, which it names by the checksum that the store keeps of it. So a
record never describes an embedding that was written later, and a run that is killed between the
two commits leaves the old embedding with its old record. An embedding without an origin was
computed, or imported, in this store.

Each call opens the file and closes it again: nothing is carried over a fork. The journal is
SQLite's rollback journal, which leaves no second file behind.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

from lmdbcache.errors import (
    CacheFullError,
    FormatVersionError,
    IntegrityError,
    NotRegularFileError,
    ReadOnlyCacheError,
    StorageError,
)
from lmdbcache.files import check_file, occupy_standard_descriptors, open_file
from lmdbcache.storage import EmbeddingReader, sample_id_of_key, sample_key

_logger: Final = logging.getLogger(__name__)

SOURCES_NAME: Final = "sources.sqlite3"
RECORD_FILES: Final = (SOURCES_NAME, f"{SOURCES_NAME}-journal")
_VERSION: Final = 1
_BUSY_SECONDS: Final = 5.0
# Inside a commit, which keeps the store's other writers waiting.
_PATIENCE_SECONDS: Final = 1.0
_AT_ONCE: Final = 4096
_FEW: Final = 256
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
# Made by the first clip whose length is recorded: older versions know no such column of `sources`.
_LENGTHS_TABLE: Final = """CREATE TABLE IF NOT EXISTS clip_lengths (
    sample_id TEXT NOT NULL,
    embedding BLOB NOT NULL,  -- the checksum that the store keeps of it
    num_valid INTEGER NOT NULL,
    PRIMARY KEY (sample_id, embedding)
) WITHOUT ROWID"""
# Made by the first embedding that comes from elsewhere.
_ORIGIN_TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS origins (id INTEGER PRIMARY KEY, record TEXT NOT NULL UNIQUE)",
    """CREATE TABLE IF NOT EXISTS sample_origins (
        sample_id TEXT NOT NULL,
        embedding BLOB NOT NULL,  -- the checksum that the store keeps of it
        origin INTEGER NOT NULL,
        PRIMARY KEY (sample_id, embedding)
    ) WITHOUT ROWID""",
)


class Source(NamedTuple):
    """The file that an embedding was computed from, as it was right before it was decoded.

    Args:
        path: The file, relative to `root` if there is one; empty if it wasn't a file.
        size: In bytes.
        mtime_ns: Time of the last modification, in nanoseconds since 1970; None if not a file.
        digest: xxh3-128 of the content, 16 bytes; None beyond `LARGEST_DIGESTED_BYTES`.
        root: The dataset's folder, or empty.
        num_valid: Samples of the clip that came from it, at the config's rate and no more than its
            duration; the rest was padding. None if that isn't recorded.
    """

    path: str
    size: int
    mtime_ns: int | None
    digest: bytes | None
    root: str = ""
    num_valid: int | None = None

    def below(self, root: str) -> Source:
        """Return the same with a path that survives a move of the dataset's folder."""
        if not self.path:
            return self
        path = os.path.abspath(self.path)  # noqa: PTH100 - a link keeps the name it was given under
        folder = os.path.join(os.path.abspath(root), "") if root else ""  # noqa: PTH100, PTH118
        if folder and path.startswith(folder):
            return self._replace(path=path[len(folder) :], root=folder.rstrip(os.sep) or os.sep)
        return self._replace(path=path, root="")

    def location(self, data_dir: str | os.PathLike[str] | None = None) -> str:
        """Return where the file should be; `data_dir` replaces the recorded root."""
        root = os.fspath(data_dir) if data_dir is not None else self.root
        return os.path.join(root, self.path) if self.root else self.path  # noqa: PTH118


class Origin(NamedTuple):
    """The origin of an embedding that wasn't computed in its store.

    Args:
        writer: Who computed it or passed it on: a host's name, the folder of a store.
        detail: When and by which way: commit, URL, folder, times (ISO 8601).
        provenance: Of the store it was computed for: weights_digest, versions and the like.
    """

    writer: str
    detail: Mapping[str, str] = {}
    provenance: Mapping[str, str] = {}

    def __hash__(self) -> int:
        return hash((self.writer, *sorted(self.detail.items()), *sorted(self.provenance.items())))

    def __str__(self) -> str:
        return " ".join([self.writer, *(f"{name}={value}" for name, value in self.detail.items())])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "writer": self.writer,
            "detail": dict(self.detail),
            "provenance": dict(self.provenance),
        }


THIS_STORE: Final = Origin("this store")

# (sample id, checksum of the embedding that is replaced or None, checksum of the new one, source)
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
        """Return the sources of these embeddings, as far as they are recorded.

        Args:
            embeddings: Sample id → the checksum that the store keeps of the embedding. Ids that
                are near each other in their order are found fastest.
        """
        columns = "sample_id, embedding, root, path, size, mtime_ns, digest"
        found = {}
        lengths = self.num_valid(embeddings)
        with _translated(self._path):
            for sample_id, embedding, root, path, *rest in self._rows(
                "sources", columns, embeddings
            ):
                size, mtime_ns, digest = rest
                if embeddings.get(sample_id) == embedding:
                    place = (os.fsdecode(path), size, mtime_ns, digest, self._roots.get(root, ""))
                    found[sample_id] = Source(*place, lengths.get(sample_id))
        return found

    def num_valid(self, embeddings: Mapping[str, bytes]) -> dict[str, int]:
        """Return how many samples of their clips these embeddings were computed from.

        Args:
            embeddings: See `of`.
        """
        found = {}
        with _translated(self._path):
            if self._connection is not None and _has_table(self._connection, "clip_lengths"):
                columns = "sample_id, embedding, num_valid"
                for sample_id, embedding, number in self._rows("clip_lengths", columns, embeddings):
                    if embeddings.get(sample_id) == embedding:
                        found[sample_id] = int(number)
        return found

    @property
    def has_origins(self) -> bool:
        """Whether anything has come from elsewhere."""
        with _translated(self._path):
            return self._connection is not None and _has_origins(self._connection)

    def origins(self, embeddings: Mapping[str, bytes]) -> dict[str, Origin]:
        """Return who computed these embeddings, of those that weren't computed in this store.

        Args:
            embeddings: See `of`.
        """
        found: dict[str, Origin] = {}
        known: dict[int, Origin] = {}
        if not self.has_origins:
            return found
        columns = "sample_id, embedding, origin"
        with _translated(self._path):
            for sample_id, embedding, number in self._rows("sample_origins", columns, embeddings):
                if embeddings.get(sample_id) == embedding:
                    if number not in known:
                        known[number] = self._origin(number)
                    found[sample_id] = known[number]
        return found

    def sizes_and_times(self, sample_ids: Collection[str]) -> list[tuple[str, int, int | None]]:
        """Return (sample id, size, mtime_ns) of what is recorded, whichever embedding it is of.

        Quicker than `of`; some of other samples come along.
        """
        with _translated(self._path):
            return list(self._rows("sources", "sample_id, size, mtime_ns", sample_ids))

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

    def _rows(
        self, table: str, columns: str, sample_ids: Collection[str]
    ) -> Iterator[tuple[Any, ...]]:
        connection = self._connection
        if not sample_ids or connection is None or not _version_of(connection, self._path):
            return
        if len(sample_ids) <= _FEW:  # they may lie far apart
            ranges = [(sample_id, sample_id) for sample_id in sample_ids]
        else:
            ranges = [(min(sample_ids), max(sample_ids))]
        for ends in ranges:
            # All at once: a cursor that stays open keeps writers waiting.
            query = f"SELECT {columns} FROM {table} WHERE sample_id BETWEEN ? AND ?"
            yield from connection.execute(query, ends).fetchall()

    def _origin(self, number: int) -> Origin:
        query = "SELECT record FROM origins WHERE id = ?"
        row = self._connection.execute(query, (number,)).fetchone() if self._connection else None
        record: Any = json.loads(row[0]) if row else None
        try:
            return Origin(str(record["writer"]), dict(record["detail"]), dict(record["provenance"]))
        except (TypeError, KeyError):
            raise sqlite3.DatabaseError(f"origin {number} isn't a record") from None


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
        tidy: Remove the records of still older embeddings of these samples; for a caller that
            holds the writer lock.
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
            kept = {row[0]: row[1] or b"" for row in (*written, *origins)} if tidy else {}
            tables = ("sources", "sample_origins", "clip_lengths") if kept else ()
            for table in [one for one in tables if _has_table(connection, one)]:
                between = f"FROM {table} WHERE sample_id BETWEEN ? AND ? LIMIT 1"
                # A look at each sample takes as long as to add it.
                if connection.execute(f"SELECT 1 {between}", (min(kept), max(kept))).fetchone():
                    connection.executemany(
                        f"DELETE FROM {table} WHERE sample_id = ? AND embedding != ?",
                        list(kept.items()),
                    )
            connection.executemany(
                "INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?, ?, ?, ?)",
                list(_source_rows(connection, written)),
            )
            lengths = [
                (sample_id, checksum, source.num_valid)
                for sample_id, _, checksum, source in written
                if source.num_valid is not None
            ]
            if lengths:
                connection.execute(_LENGTHS_TABLE)
                connection.executemany(
                    "INSERT OR REPLACE INTO clip_lengths VALUES (?, ?, ?)", lengths
                )
            if origins:
                for statement in _ORIGIN_TABLES:
                    connection.execute(statement)
                connection.executemany(
                    "INSERT OR REPLACE INTO sample_origins VALUES (?, ?, ?)",
                    list(_origin_rows(connection, origins)),
                )
            connection.execute("COMMIT")


def forget_sources(store: Path) -> None:
    """Remove all records."""
    for name in RECORD_FILES:
        (store / name).unlink(missing_ok=True)


class SourceRecorder:
    """Keeps the sources of embeddings that a writer is about to commit; its `before_commit`.

    A failure here never stops the writer: it is logged once, and the sources stay unknown.

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
        """Keep what the embedding that is given to the writer next was computed from."""
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
        records = [
            (sample_id, replaced, checksum, noted[sample_id])
            for sample_id, (replaced, checksum) in committed.items()
            if sample_id in noted
        ]
        if not records:
            return
        try:
            write_sources(self._store, records, busy_seconds=self._seconds)
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


def clip_lengths(reader: EmbeddingReader, sample_ids: Iterable[str]) -> dict[str, int]:
    """Return how many samples of each clip came from its file; the others were padding.

    Args:
        reader: Of a store.
        sample_ids: Which samples; those without a record are left out: embeddings that were
            imported, written by hand or by a `CachedEncoder` without `num_valid`, or extracted or
            pushed before lengths were recorded.

    Returns:
        Sample id → number of samples, at the config's sample rate.

    Raises:
        IntegrityError: The records are damaged.
        StorageError: They can't be read.
    """
    keys = {sample_id: sample_key(sample_id) for sample_id in sample_ids}
    checksums = reader.checksums_of(keys.values())
    names = {key: sample_id_of_key(key) for key in checksums}
    with SourceRecords(reader.path) as records:
        found = records.num_valid({names[key]: value for key, value in checksums.items()})
    return {
        sample_id: found[names[key]]
        for sample_id, key in keys.items()
        if names.get(key, "") in found
    }


def count_origins(store: Path) -> list[tuple[Origin, int]]:
    """Return who computed the embeddings of a store, and how many; the most first.

    What was computed in the store itself counts for `THIS_STORE`; if that is all, the list is
    empty.

    Args:
        store: Its folder.

    Raises:
        IntegrityError: The store or its records are damaged.
    """
    counts: Counter[str] = Counter()
    origins: dict[str, Origin] = {}
    with SourceRecords(store) as records, EmbeddingReader(store, track_usage=False) as reader:
        if not records.has_origins:
            return []
        rest = len(reader)
        pairs = ((sample_id_of_key(key), value) for key, value in reader.checksums())
        while chunk := dict(islice(pairs, _AT_ONCE)):
            found = records.origins(chunk)
            rest -= len(found)
            by_id = {id(origin): origin for origin in found.values()}  # few, of many samples
            for number, alike in Counter(map(id, found.values())).items():
                record = _record_of(by_id[number])
                origins[record] = by_id[number]
                counts[record] += alike
    if not counts:
        return []
    pairs_found = [(origins[record], number) for record, number in counts.items()]
    if rest > 0:
        pairs_found.append((THIS_STORE, rest))
    return sorted(pairs_found, key=lambda pair: -pair[1])


# ---- the file


def _record_of(origin: Origin) -> str:
    return json.dumps(origin.to_dict(), sort_keys=True)


def _has_origins(connection: sqlite3.Connection) -> bool:
    return all(_has_table(connection, name) for name in ("origins", "sample_origins"))


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
    return bool(connection.execute(query, (name,)).fetchone()[0])


def _number_of(connection: sqlite3.Connection, table: str, column: str, value: object) -> int:
    """Return the id of a row with this value, and add it if necessary."""
    connection.execute(f"INSERT OR IGNORE INTO {table} ({column}) VALUES (?)", (value,))
    found = connection.execute(f"SELECT id FROM {table} WHERE {column} = ?", (value,))
    return int(found.fetchone()[0])


def _source_rows(
    connection: sqlite3.Connection, written: Iterable[Written]
) -> Iterator[tuple[object, ...]]:
    roots: dict[str, int | None] = {"": None}
    for sample_id, _, checksum, source in written:
        if source.root not in roots:
            root = os.fsencode(source.root)
            roots[source.root] = _number_of(connection, "roots", "path", root)
        path = os.fsencode(source.path)
        rest = (source.size, source.mtime_ns, source.digest)
        yield (sample_id, checksum, roots[source.root], path, *rest)


def _origin_rows(
    connection: sqlite3.Connection, origins: Iterable[tuple[str, bytes | None, bytes, Origin]]
) -> Iterator[tuple[object, ...]]:
    numbers: dict[int, int] = {}  # by object: few, of many samples
    for sample_id, _, checksum, origin in origins:
        if id(origin) not in numbers:
            record = _record_of(origin)
            numbers[id(origin)] = _number_of(connection, "origins", "record", record)
        yield sample_id, checksum, numbers[id(origin)]


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
    """Return the file's version; 0 while nothing is in it."""
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
            f"{path} is damaged ({error}); the embeddings aren't affected. "
            "`adopt_sources(store, clips)` replaces it with records of the present files"
        ) from None
    except NotRegularFileError:
        raise
    except OSError as error:
        raise ReadOnlyCacheError(f"{path} can't be written ({error.strerror})") from None
