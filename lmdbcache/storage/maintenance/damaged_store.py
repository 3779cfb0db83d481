"""What can still be read of stores that are damaged, or that lost their `CURRENT`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmdbcache.errors import IntegrityError
from lmdbcache.files import check_folder
from lmdbcache.storage.checks.checking import (
    IntegrityReport,
    check_values,
    metadata_findings,
    placed_values,
    structure_findings,
)
from lmdbcache.storage.engine_errors import LOSS_REMEDY
from lmdbcache.storage.generations import current_generation
from lmdbcache.storage.layout import (
    CURRENT_NAME,
    GENERATION_NAME,
    METADATA_KEY,
    NUM_RESERVED_KEYS,
    sample_id_of_key,
)
from lmdbcache.storage.metadata import StoreMetadata, checksum
from lmdbcache.storage.pages.page_file import PageFile
from lmdbcache.storage.windows import first_window, is_first_window, recording_of


class DamagedStore:
    """What is sound in a damaged store, read without LMDB; use it in a `with` block.

    That is each value which the newest commit leads to and which matches its checksum.

    Args:
        path: The store's folder.

    Raises:
        IntegrityError: Nothing of it can be read, or the metadata record is lost.
    """

    def __init__(self, path: Path) -> None:
        generation = generation_to_repair(path)
        structure = structure_findings(generation)
        try:
            self._file = PageFile(generation / "data.mdb")
        except OSError as error:
            raise IntegrityError(f"data.mdb can't be read ({error.strerror})") from None
        try:
            self.metadata = _metadata(self._file, path)
            self._values = placed_values(self._file, is_sound=not structure)
            self.findings: IntegrityReport = check_values(self._file, self._values, structure)
        except BaseException:
            self.__exit__()
            raise
        sample_ids = list(map(sample_id_of_key, self._values.table.keys.tolist()))
        damaged = {*self.findings.damaged, *self._unfinished(sample_ids)}
        self.dropped = tuple(sorted({*damaged, *self.findings.missing}))
        is_sound = [sample_id not in damaged for sample_id in sample_ids]
        self._rows = np.flatnonzero(is_sound)

    def _unfinished(self, sample_ids: list[str]) -> set[str]:
        """The first windows of the recordings that have lost others, or may have.

        A recording counts as stored if its first window is. What a lost page held can't be named.
        """
        if self.metadata.config.window is None:
            return set()
        if self.findings.structure:
            return set(filter(is_first_window, sample_ids))
        lost = {*self.findings.damaged, *self.findings.missing}
        return {first_window(recording_of(one)) for one in lost}.intersection(sample_ids)

    def __enter__(self) -> DamagedStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of all sound values."""
        return int(self._values.table.lengths[self._rows].sum())

    def checksums(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, checksum) of what is sound, by key."""
        for row in self._rows:
            yield bytes(self._values.table.keys[row]), self._values.checksums[row].tobytes()

    def read(self, key: bytes) -> bytes | None:
        """Return the stored bytes of a key; None if they can't be read."""
        table, (row,) = self._values.table, self._values.table.find([key])
        return self._file.read(int(table.offsets[row]), int(table.lengths[row]))


def _metadata(file: PageFile, store: Path) -> StoreMetadata:
    entry = file.find(file.meta.main, METADATA_KEY) if file.meta else None
    if entry is None or metadata_findings(file):
        return _older_metadata(file, store)
    return StoreMetadata.unpack(file.read(entry.offset, entry.length) or b"", store)


def _older_metadata(file: PageFile, store: Path) -> StoreMetadata:
    """A copy of the metadata record that an earlier commit has left.

    All commits have the same one, but for the first, whose shape isn't known yet, and for the
    provenance, which grows.
    """
    # The database of checksums has the key too.
    read = (file.read(entry.offset, entry.length) for entry in file.scan(METADATA_KEY))
    values = {value for value in read if value is not None}
    fitting = []
    for record in values:
        with contextlib.suppress(IntegrityError):
            metadata = StoreMetadata.unpack(record, store)
            has_name = store.name.endswith(f"-{metadata.config.fingerprint}")
            has_shape = metadata.embedding_shape is not None
            if has_name and has_shape and checksum(METADATA_KEY, record) in values:
                fitting.append(metadata)
    if not fitting:
        raise IntegrityError(
            f"{store}: the metadata record is lost, and nothing can be kept without it. "
            f"{LOSS_REMEDY}"
        )
    return max(fitting, key=lambda metadata: len(metadata.provenance))


def generation_to_repair(store: Path) -> Path:
    """Return the live generation, or the only one there is if `CURRENT` holds garbage.

    Raises:
        IntegrityError: It holds garbage, and there are several or none.
        NotRegularFileError: See `current_generation`.
    """
    try:
        if (generation := current_generation(store)) is not None:
            return generation
    except IntegrityError:
        pass
    folders = [child for child in store.iterdir() if GENERATION_NAME.fullmatch(child.name)]
    if len(folders) != 1:
        raise IntegrityError(
            f"{store / CURRENT_NAME} is garbage and there are {len(folders)} generations. Write "
            "the name of the right one there (the one with the lower number, if in doubt), and "
            "repair again"
        )
    check_folder(folders[0])
    return folders[0]


def data_file(store: Path) -> Path:
    """Return the file that holds a store's embeddings.

    Raises:
        IntegrityError: See `generation_to_repair`.
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
            if file.size <= 2 * file.page_size:
                return False  # nothing beyond the meta pages
            return file.meta is None or file.meta.main.num_entries > NUM_RESERVED_KEYS
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # nobody can tell
