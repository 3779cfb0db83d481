"""What can still be read of stores that are damaged, or that lost their `CURRENT`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lmdbcache.errors import IntegrityError
from lmdbcache.storage.layout import GENERATION_NAME, NUM_RESERVED_KEYS, sample_id_of_key
from lmdbcache.storage.maintenance.repair import generation_to_repair
from lmdbcache.storage.maintenance.salvage import salvage
from lmdbcache.storage.metadata import StoreMetadata
from lmdbcache.storage.pages.page_file import PageFile

__all__ = ["DamagedStore", "data_file", "unnamed_generations"]


class DamagedStore:
    """What is sound in a damaged store, read without LMDB; use it in a `with` block.

    Args:
        path: The store's folder.

    Raises:
        CacheError: Nothing of it can be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = PageFile(data_file(path))
        except OSError as error:
            raise IntegrityError(f"data.mdb can't be read ({error.strerror})") from None
        try:
            self._saved = salvage(self._file, path)
            self.metadata = StoreMetadata.unpack(self._saved.metadata, path)
        except BaseException:
            self.__exit__()
            raise
        self.dropped = tuple(map(sample_id_of_key, self._saved.dropped))

    def __enter__(self) -> DamagedStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def __len__(self) -> int:
        return len(self._saved.values)

    def checksums(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, checksum) of what is sound, by key."""
        yield from sorted(self._saved.checksums.items())

    def read(self, key: bytes) -> bytes | None:
        """Return the stored bytes of a key; None if they can't be read."""
        entry = self._saved.values[key]
        return self._file.read(entry.offset, entry.length)


def data_file(store: Path) -> Path:
    """Return the file that holds a store's embeddings.

    Raises:
        IntegrityError: `CURRENT` is garbage, and there are several generations or none.
    """
    return generation_to_repair(store) / "data.mdb"


def unnamed_generations(folder: Path) -> dict[str, bool]:
    """Return the generations of a folder without `CURRENT`, and whether each may hold embeddings.

    By the format, nothing is stored there. A process that is killed while it makes a store leaves
    such a folder, with a generation that holds nothing.
    """
    return {
        child.name: _may_hold_embeddings(child / "data.mdb")
        for child in sorted(folder.iterdir())
        if GENERATION_NAME.fullmatch(child.name)
    }


def _may_hold_embeddings(path: Path) -> bool:
    try:
        with PageFile(path) as file:
            if file.meta is None:
                return file.size > 0
            return file.meta.main.num_entries > NUM_RESERVED_KEYS
    except OSError:
        return False
