"""Who computed an embedding that wasn't computed in its store; kept in `sources.sqlite3`.

A row belongs to one embedding, which it names by its checksum, as the records of sources do. An
embedding without a row was computed, or imported, in this store.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

__all__ = [
    "THIS_STORE",
    "Origin",
    "forget_origins",
    "has_origins",
    "put_origins",
    "read_origins",
]

_SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS origins (id INTEGER PRIMARY KEY, record TEXT NOT NULL UNIQUE)",
    """CREATE TABLE IF NOT EXISTS sample_origins (
        sample_id TEXT NOT NULL,
        embedding BLOB NOT NULL,  -- the checksum that the store keeps of it
        origin INTEGER NOT NULL,
        PRIMARY KEY (sample_id, embedding)
    ) WITHOUT ROWID""",
)


class Origin(NamedTuple):
    """Where an embedding comes from.

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
        """Plain values for JSON."""
        return {
            "writer": self.writer,
            "detail": dict(self.detail),
            "provenance": dict(self.provenance),
        }


THIS_STORE: Final = Origin("this store")


def put_origins(
    connection: sqlite3.Connection, written: Iterable[tuple[str, bytes, Origin]]
) -> None:
    """Add rows, (sample id, checksum of the embedding, origin) each, in an open transaction."""
    written = list(written)
    for statement in _SCHEMA if written else ():
        connection.execute(statement)
    numbers: dict[int, int] = {}  # by object: few stand for many samples
    rows = []
    for sample_id, embedding, origin in written:
        if id(origin) not in numbers:
            record = json.dumps(origin.to_dict(), sort_keys=True)
            connection.execute("INSERT OR IGNORE INTO origins (record) VALUES (?)", (record,))
            found = connection.execute("SELECT id FROM origins WHERE record = ?", (record,))
            numbers[id(origin)] = found.fetchone()[0]
        rows.append((sample_id, embedding, numbers[id(origin)]))
    if rows:
        connection.executemany("INSERT OR REPLACE INTO sample_origins VALUES (?, ?, ?)", rows)


def forget_origins(connection: sqlite3.Connection, kept: Iterable[tuple[str, bytes]]) -> None:
    """Remove the rows of these samples but for the embedding named with each."""
    if not has_origins(connection):
        return
    connection.executemany(
        "DELETE FROM sample_origins WHERE sample_id = ? AND embedding != ?", list(kept)
    )


def read_origins(
    connection: sqlite3.Connection, ranges: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, bytes, Origin]]:
    """(sample id, checksum of the embedding, origin) of the samples in these ranges of ids."""
    if not has_origins(connection):
        return
    known: dict[int, Origin] = {}
    for ends in ranges:
        # All at once: a cursor that stays open keeps writers waiting.
        rows = connection.execute(
            "SELECT sample_id, embedding, origin FROM sample_origins "
            "WHERE sample_id BETWEEN ? AND ?",
            ends,
        ).fetchall()
        for sample_id, embedding, number in rows:
            if number not in known:
                known[number] = _origin(connection, number)
            yield sample_id, embedding, known[number]


def has_origins(connection: sqlite3.Connection) -> bool:
    """Whether anything has ever come from elsewhere."""
    query = "SELECT count(*) FROM sqlite_master WHERE name IN ('origins', 'sample_origins')"
    return bool(connection.execute(query).fetchone()[0] == 2)


def _origin(connection: sqlite3.Connection, number: int) -> Origin:
    row = connection.execute("SELECT record FROM origins WHERE id = ?", (number,)).fetchone()
    if row is None:
        raise sqlite3.DatabaseError(f"origin {number} is missing")
    record = json.loads(row[0])
    if not isinstance(record, dict):
        raise sqlite3.DatabaseError(f"origin {number} is no record")
    detail, provenance = record.get("detail"), record.get("provenance")
    if not (isinstance(detail, dict) and isinstance(provenance, dict)):
        raise sqlite3.DatabaseError(f"origin {number} is no record")
    return Origin(str(record.get("writer")), detail, provenance)
