"""The newest commit of a generation, written down outside of LMDB's file: a copy of its meta page.

LMDB falls back to the commit before without a word when the newer meta page is damaged. The record
is written after LMDB has synchronised the commit and is itself never synchronised: a kill or a
power cut can leave it behind data.mdb, or garbage, never ahead. It is derived and may be removed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

import xxhash

from lmdbcache.errors import NotRegularFileError
from lmdbcache.files import open_file, read_file
from lmdbcache.storage.pages.meta_pages import (
    META_BYTES,
    MetaPage,
    newest,
    parse_meta,
    read_meta_pages,
)

_NAME: Final = "committed"
_MAGIC: Final = b"lmdbcache last 1"
_RESERVED: Final = b"\1"
_MAX_BYTES: Final = 4096

_Metas = tuple[MetaPage | None, MetaPage | None]


def record_commit(generation: Path) -> None:
    """Write down the newest commit. The caller holds the writer lock and has just committed."""
    # A full disk or a read-only folder costs the guard, not the commit.
    with contextlib.suppress(OSError):
        data = open_file(generation / "data.mdb")
        try:
            meta = newest(read_meta_pages(data))
        finally:
            os.close(data)
        if meta is None:
            return
        record = _MAGIC + meta.raw + _RESERVED
        descriptor = open_file(generation / _NAME, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(descriptor, record + xxhash.xxh3_64_digest(record), 0)
        finally:
            os.close(descriptor)


def read_commit_record(generation: Path) -> MetaPage | None:
    """The meta page of the recorded commit; None if there is no record or it is damaged.

    Raises:
        NotRegularFileError: Something else than a file has its name.
    """
    try:
        content = read_file(f"{generation}/{_NAME}", _MAX_BYTES)
    except NotRegularFileError:
        raise
    except OSError:
        return None
    end = len(_MAGIC) + META_BYTES + len(_RESERVED)
    record, digest = content[:end], content[end:]
    if not record.startswith(_MAGIC) or digest != xxhash.xxh3_64_digest(record):
        return None
    raw = record[len(_MAGIC) : -len(_RESERVED)]
    return parse_meta(raw, raw[0])


def contradiction(record: MetaPage | None, metas: _Metas) -> str | None:
    """What is wrong with the meta pages, or None.

    Args:
        record: Read before `metas`, so that a commit in between doesn't look like a loss.
        metas: What `read_meta_pages` gave.
    """
    first, second = metas
    latest = newest(metas)
    if latest is not None and record is not None and is_older_copy(record, metas):
        return (
            f"is older than what was written here: commit {latest.transaction} is its last one, "
            f"{record.transaction} was written. An older copy was put in its place"
        )
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
    for meta in (first, second) if record else ():
        if record and meta.transaction == record.transaction and meta.raw != record.raw:
            return f"has a damaged meta page, that of commit {meta.transaction}"
    return None


def is_older_copy(record: MetaPage | None, metas: _Metas) -> bool:
    """Return whether data.mdb is sound and of an earlier commit than the record: a copy.

    A damaged meta page can't be read, or isn't the other one's neighbour.
    """
    first, second = metas
    if record is None or first is None or second is None:
        return False
    neighbours = abs(first.transaction - second.transaction) == 1
    return neighbours and max(first.transaction, second.transaction) < record.transaction


def trusted_meta(record: MetaPage | None, metas: _Metas) -> MetaPage | None:
    """The newest meta page that isn't known to be damaged; the record's if data.mdb's is."""
    latest = newest(metas)
    if record is None or (latest and contradiction(record, metas) is None):
        return latest
    if is_older_copy(record, metas):
        return latest  # the record's pages were used for something else then
    if latest and record.transaction + 1 == latest.transaction:
        return latest  # killed between its commit and the record
    return record
