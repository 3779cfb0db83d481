"""The newest commit of a generation, written down outside of LMDB's file.

LMDB falls back to the commit before without a word when the newer meta page is damaged. The record
is written after LMDB has synchronised the commit and is itself never synchronised: a kill or a
power cut can leave it behind data.mdb, or garbage, never ahead. It is derived and may be removed.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from lmdbcache.storage.meta_pages import MetaPage, newest, read_meta_pages

__all__ = ["CommitRecord", "contradiction", "read_commit_record", "record_commit", "trusted_meta"]

_NAME: Final = "committed"
_MAGIC: Final = b"lmdbcache last 1"
_RECORD: Final = struct.Struct("<16sQQ8s")  # magic, transaction, entries, digest of the meta page
_CHECKSUM_BYTES: Final = 8

_Metas = tuple[MetaPage | None, MetaPage | None]


@dataclass(frozen=True)
class CommitRecord:
    """One commit.

    Args:
        transaction: Its number.
        num_entries: Entries of the main database.
        meta_digest: Of its meta page.
    """

    transaction: int
    num_entries: int
    meta_digest: bytes


def record_commit(generation: Path) -> None:
    """Write down the newest commit. The caller holds the writer lock and has just committed."""
    # A full disk or a read-only folder costs the guard, not the commit.
    with contextlib.suppress(OSError):
        data = os.open(generation / "data.mdb", os.O_RDONLY | os.O_CLOEXEC)
        try:
            meta = newest(read_meta_pages(data))
        finally:
            os.close(data)
        if meta is None:
            return
        record = _RECORD.pack(_MAGIC, meta.transaction, meta.main.num_entries, _digest(meta))
        record += xxhash.xxh3_64_digest(record)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(generation / _NAME, flags, 0o666)
        try:
            os.pwrite(descriptor, record, 0)
        finally:
            os.close(descriptor)


def read_commit_record(generation: Path) -> CommitRecord | None:
    """The record; None if there is none or it is damaged."""
    try:
        content = (generation / _NAME).read_bytes()
    except OSError:
        return None
    record = content[: _RECORD.size]
    if content[_RECORD.size :] != xxhash.xxh3_64_digest(record) or record[:16] != _MAGIC:
        return None
    _, transaction, num_entries, digest = _RECORD.unpack(record)
    return CommitRecord(transaction, num_entries, digest)


def contradiction(record: CommitRecord | None, metas: _Metas) -> str | None:
    """What is wrong with the meta pages, or None.

    Args:
        record: Read before `metas`, so that a commit in between doesn't look like a loss.
        metas: What `read_meta_pages` gave.
    """
    first, second = metas
    latest = newest(metas)
    if latest is not None and record is not None and latest.transaction < record.transaction:
        return (
            f"has lost its newest commit: {record.transaction} was written, "
            f"{latest.transaction} is the last that can be read"
        )
    if first is None or second is None:
        return f"has a damaged meta page ({0 if first is None else 1})"
    if abs(first.transaction - second.transaction) > 1:
        return (
            f"has a damaged meta page: commits {first.transaction} and {second.transaction} "
            "can't be neighbours"
        )
    for meta in metas if record else ():
        if meta and record and meta.transaction == record.transaction:
            same = (meta.main.num_entries, _digest(meta)) == (
                record.num_entries,
                record.meta_digest,
            )
            return None if same else f"has a damaged meta page, that of commit {meta.transaction}"
    return None


def trusted_meta(record: CommitRecord | None, metas: _Metas) -> MetaPage | None:
    """The newest meta page that isn't known to be damaged."""
    latest = newest(metas)
    if latest is None or record is None or latest.transaction != record.transaction:
        return latest
    other = next((meta for meta in metas if meta is not latest), None)
    return latest if _digest(latest) == record.meta_digest else other


def _digest(meta: MetaPage) -> bytes:
    return xxhash.xxh3_64_digest(meta.raw)
