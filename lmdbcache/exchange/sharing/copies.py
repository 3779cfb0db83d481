"""Copies of commit files beside a store."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from lmdbcache.exchange.sharing.commits import COMMIT_NAME
from lmdbcache.files import check_folder, read_file, replace_file
from lmdbcache.storage import COMMIT_COPIES_NAME

__all__ = ["CommitCopies"]


class CommitCopies:
    """Copies of one place's commit files: they never change, so each is read once.

    They lie in the store's folder and may be removed at any time.

    Args:
        store: The store's folder; None keeps nothing.
        url: Of the place.
    """

    def __init__(self, store: Path | None, url: str = "") -> None:
        place = hashlib.blake2b(url.encode("utf-8", "replace"), digest_size=8).hexdigest()
        self._folder = None if store is None else store / COMMIT_COPIES_NAME / place

    def get(self, commit_id: str) -> bytes | None:
        """The bytes of a commit file, if a sound copy is there."""
        return None if self._folder is None else _sound(self._folder, commit_id)

    def find(self, commit_id: str) -> bytes | None:
        """The same, also of what was read by another URL: an id tells the bytes wherever they are.

        A repair asks this: the place may have been pushed to by ssh and be repaired as a folder.
        """
        if self._folder is None:
            return None
        found = self.get(commit_id)
        with contextlib.suppress(OSError):
            for folder in sorted(self._folder.parent.iterdir()):
                found = found or _sound(folder, commit_id)
        return found

    def keep(self, commit_id: str, data: bytes) -> None:
        """Keep a copy, if that is possible."""
        if self._folder is None or not self._folder.parent.parent.is_dir():
            return
        path = self._folder / f"{commit_id}.json"
        with contextlib.suppress(OSError):
            check_folder(self._folder.parent)
            check_folder(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)

    def ids(self) -> list[str]:
        """What there are copies of, sorted."""
        try:
            names = [path.name for path in self._folder.iterdir()] if self._folder else []
        except OSError:
            return []
        return sorted(match[1] for name in names if (match := COMMIT_NAME.fullmatch(name)))


def _sound(folder: Path, commit_id: str) -> bytes | None:
    try:
        data = read_file(folder / f"{commit_id}.json")
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == commit_id[-64:] else None
