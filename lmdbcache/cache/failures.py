"""The list of clips that gave no embedding, kept beside a store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from lmdbcache.files import read_file, replace_file
from lmdbcache.storage import CURRENT_NAME, write_lock

__all__ = ["FAILURES_NAME", "ClipFailure", "read_failures", "update_failures"]

FAILURES_NAME: Final = "failures.json"


@dataclass(frozen=True)
class ClipFailure:
    """A clip that gave no embedding; it is never cached and tried again by the next run."""

    sample_id: str
    path: str
    reason: str


def read_failures(store: Path) -> list[ClipFailure]:
    """The clips of this store that failed when last tried; none if there is no list."""
    try:
        entries = json.loads(read_file(store / FAILURES_NAME))["failures"]
        return [ClipFailure(**{k: str(v) for k, v in entry.items()}) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []  # derived: the next run makes it anew


def update_failures(store: Path, tried: Iterable[str], failures: Sequence[ClipFailure]) -> None:
    """Replace what the list says of the tried samples; written at once or not at all.

    Several runs may do so at once: each waits for the store's writer lock. Where nothing is stored
    there is no list: a folder with nothing else in it would look like a store. The run's summary
    has the failures.

    Raises:
        OSError, ReadOnlyCacheError: It can't be written.
    """
    tried = set(tried)
    if _is_stored(store) and _updated(read_failures(store), tried, failures) is not None:
        with write_lock(store):
            # Again: somebody may have changed the list, or removed the store.
            entries = _updated(read_failures(store), tried, failures)
            if _is_stored(store) and entries is not None:
                _write(store, entries)


def _is_stored(store: Path) -> bool:
    return (store / CURRENT_NAME).exists()


def _updated(
    before: list[ClipFailure], tried: set[str], failures: Sequence[ClipFailure]
) -> list[ClipFailure] | None:
    """The new list; None if it is the one before."""
    kept = [failure for failure in before if failure.sample_id not in tried]
    entries = sorted([*kept, *failures], key=lambda failure: failure.sample_id)
    return None if entries == before else entries


def _write(store: Path, entries: list[ClipFailure]) -> None:
    path = store / FAILURES_NAME
    if not entries:
        path.unlink(missing_ok=True)
        return
    # ASCII: a file name that isn't UTF-8 holds lone surrogates.
    text = json.dumps({"failures": [asdict(entry) for entry in entries]}, indent=1)
    replace_file(path, text.encode("ascii"))
