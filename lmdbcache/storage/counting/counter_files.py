"""Files that processes count their hits and misses in, kept in a store's folder `statistics`.

Each process has one, mapped, and counts in place: a kill loses nothing and nothing is done at its
end. It holds a lock (flock) on its file for as long as it lives, so a file that can be locked is of
a process that has ended. Whoever makes a new file takes over that of a dead sibling, or adds dead
files to `totals.json`; those of processes with a living ancestor stay, for that one to sum up.

All of it is derived: it may be removed at any time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.files import check_folder, open_file, opened_for_flock, read_file, replace_file
from lmdbcache.storage.layout import class_of

__all__ = [
    "MAX_ANCESTORS",
    "CounterTable",
    "Counts",
    "Record",
    "open_table",
    "read_records",
    "reset_records",
]

_MAX_CLASSES: Final = 1024
_OTHER: Final = "(other)"  # classes beyond the limit
_MAGIC: Final = b"lmdbcache counts 1\n"
_HEADER: Final = struct.Struct("<20s4xQ16s256s")  # magic, bytes of names, owner, its ancestors
_TOKEN_BYTES: Final = 16
MAX_ANCESTORS: Final = 16
_ROW_BYTES: Final = 8 * _MAX_CLASSES
_HITS_AT: Final = 512
_NAMES_AT: Final = _HITS_AT + 2 * _ROW_BYTES
_FILE_BYTES: Final = 64 << 10
_TOTALS_NAME: Final = "totals.json"
# What reading JSON of another form ends in.
_MALFORMED: Final = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError)
# A stopped process may hold the folder's lock for ever: figures are no reason to wait for it.
_LOCK_SECONDS: Final = 2.0
_LOCK_POLL_SECONDS: Final = 0.005


@dataclass
class Counts:
    """Hits and misses by class."""

    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts, sign: int = 1) -> None:
        """Add another's, or take them away."""
        for own, theirs in ((self.hits, other.hits), (self.misses, other.misses)):
            for name, number in theirs.items():
                own[name] += sign * number


@dataclass(frozen=True)
class Record:
    """What one process has counted.

    Args:
        owner: Token of the process.
        ancestors: Tokens of the processes that it descends from.
        counts: Its hits and misses.
    """

    owner: str
    ancestors: tuple[str, ...]
    counts: Counts


class CounterTable:
    """Hits and misses per class, of this process: in a mapped file, or in memory.

    A class has a code from 1; `hits` and `misses` are by code.
    """

    def __init__(self, raw: Any, path: Path | None = None) -> None:
        self._raw = raw
        self._path = path
        self._naming = threading.Lock()
        self.hits: npt.NDArray[np.int64] = np.frombuffer(raw, np.int64, _MAX_CLASSES, _HITS_AT)
        self.misses: npt.NDArray[np.int64] = np.frombuffer(
            raw, np.int64, _MAX_CLASSES, _HITS_AT + _ROW_BYTES
        )
        # One number of it is counted up faster than one of the array.
        self.hit_cells = memoryview(raw)[_HITS_AT : _HITS_AT + _ROW_BYTES].cast("q")
        _, self._names_bytes, _, _ = _HEADER.unpack_from(raw)
        self._codes: dict[str, int] = {"": 0}
        for name in (_OTHER, *_names(bytes(raw[_NAMES_AT : _NAMES_AT + self._names_bytes]))):
            self._codes[name] = len(self._codes)
        # By what follows the last colon of a sample id, in any spelling.
        self.codes_by_suffix = _CodesBySuffix(self)

    @classmethod
    def in_memory(cls) -> CounterTable:
        """A table that nobody else sees."""
        raw = bytearray(_FILE_BYTES)
        _HEADER.pack_into(raw, 0, _MAGIC, 0, b"", b"")
        return cls(raw)

    @property
    def is_removed(self) -> bool:
        """Whether its file is gone: the store was cleared."""
        # Not `Path.exists`, which raises where the folder can't be looked into any more.
        return self._path is not None and not os.path.exists(self._path)  # noqa: PTH110

    def code_of(self, class_name: str) -> int:
        """The code of a class, given now if it has none."""
        code = self._codes.get(class_name)
        return self._new_code(class_name) if code is None else code

    def _new_code(self, class_name: str) -> int:
        with self._naming:
            if class_name in self._codes:
                return self._codes[class_name]  # another thread was faster
            text = json.dumps(class_name).encode() + b"\n"
            start = _NAMES_AT + self._names_bytes
            if len(self._codes) == _MAX_CLASSES or start + len(text) > _FILE_BYTES:
                return self._codes[_OTHER]
            self._raw[start : start + len(text)] = text
            self._names_bytes += len(text)
            struct.pack_into("<Q", self._raw, 24, self._names_bytes)
            code = self._codes[class_name] = len(self._codes)
            return code

    def counts(self) -> Counts:
        """What is counted so far."""
        return _counts(list(self._codes), self.hits, self.misses)

    def take(self, counts: Counts) -> None:
        """Count what was counted elsewhere."""
        for name, number in counts.hits.items():
            self.hits[self.code_of(name)] += number
        for name, number in counts.misses.items():
            self.misses[self.code_of(name)] += number


class _CodesBySuffix(dict[str, int]):
    def __init__(self, table: CounterTable) -> None:
        self._table_codes = table.code_of

    def __missing__(self, suffix: str) -> int:
        code = self._table_codes(class_of(f"x:{suffix}"))
        if len(self) < _MAX_CLASSES:
            self[suffix] = code
        return code


def open_table(folder: Path, owner: str, ancestors: tuple[str, ...]) -> CounterTable:
    """This process's file: that of a dead sibling, or a new one.

    Args:
        folder: The store's `statistics`; made if need be.
        owner: Token of this process.
        ancestors: Tokens of those it descends from.

    Raises:
        OSError: The folder can't be written, is locked for seconds, or the disk is full.
    """
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    with _locked(folder, fcntl.LOCK_EX):
        taken = _take_over(folder, owner, ancestors)
        path, descriptor = taken or _create(folder, owner, ancestors)
        try:
            raw = mmap.mmap(descriptor, _FILE_BYTES)
            struct.pack_into(f"<{_TOKEN_BYTES}s", raw, 32, owner.encode())
            return CounterTable(raw, path)
        finally:
            os.close(descriptor)  # the map has a copy, which keeps the lock


def read_records(folder: Path) -> tuple[Counts, list[Record]]:
    """What was added up of ended processes, and what each of the others has counted."""
    if folder.is_symlink() or not folder.is_dir():
        return Counts(), []
    try:
        with _locked(folder, fcntl.LOCK_SH):
            return _read_all(folder)
    except OSError:
        return _read_all(folder)  # not to be locked by this user


def reset_records(folder: Path) -> None:
    """Begin again at zero; living processes go on counting.

    Raises:
        OSError: The folder can't be written, or somebody has held its lock for seconds.
    """
    check_folder(folder)
    if not folder.is_dir():
        return
    with _locked(folder, fcntl.LOCK_EX):
        _, records = _read_all(folder)
        totals = Counts()
        for record in records:
            totals.add(record.counts, -1)
        _write_totals(folder, totals, _read_totals(folder)[1])


def _take_over(folder: Path, owner: str, ancestors: tuple[str, ...]) -> tuple[Path, int] | None:
    """Add up the files of the dead; one of a dead sibling, locked, is this process's from now."""
    totals, folded = _read_totals(folder)
    for path in folder.iterdir():
        if path.suffix == ".tmp" or path.name in folded:
            _remove(path)
    live, dead = _survey(folder)
    live.add(owner)
    try:
        fresh = [path for path in dead if path.name not in folded]
        orphans = [path for path in fresh if not live.intersection(dead[path][1].ancestors)]
        for path in orphans:
            totals.add(dead[path][1].counts)
        if orphans:
            # Before they go: whoever is killed in between has them named as added already.
            # So is what is named already and couldn't be removed.
            left = {name for name in folded if os.path.lexists(folder / name)}
            _write_totals(folder, totals, left | {path.name for path in orphans})
        for path in orphans:
            _remove(path)
        for path in fresh:
            if path not in orphans and dead[path][1].ancestors == ancestors:
                _fill_holes(dead[path][0])
                return path, dead.pop(path)[0]
        return None
    finally:
        for descriptor, _ in dead.values():
            os.close(descriptor)


def _remove(path: Path) -> None:
    # Another user's, in a folder that shields them: named as added, it counts no more.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _fill_holes(descriptor: int) -> None:
    """A copy of a store may have holes here; writing into one on a full disk would be SIGBUS.

    Raises:
        OSError: The disk is full.
    """
    content = os.pread(descriptor, _FILE_BYTES, 0)
    if os.pwrite(descriptor, content, 0) != _FILE_BYTES:
        raise OSError(errno.ENOSPC, "no room for the counters")


def _survey(folder: Path) -> tuple[set[str], dict[Path, tuple[int, Record]]]:
    """Tokens of the living; files of the dead, locked."""
    live: set[str] = set()
    dead: dict[Path, tuple[int, Record]] = {}
    for path in sorted(folder.glob("*.counts")):
        descriptor = _lock_if_dead(path)
        if descriptor is None:
            record = _read_record(path)
            live.update([record.owner] if record else ())
        elif record := _parsed(os.pread(descriptor, _FILE_BYTES + 1, 0)):
            dead[path] = descriptor, record
        else:
            os.close(descriptor)
    return live, dead


def _lock_if_dead(path: Path) -> int | None:
    try:
        descriptor = open_file(path, os.O_RDWR)
    except OSError:
        return None  # another user's, or just removed with its store
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _create(folder: Path, owner: str, ancestors: tuple[str, ...]) -> tuple[Path, int]:
    temporary = folder / f"{owner}.tmp"
    temporary.unlink(missing_ok=True)
    descriptor = open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        head = _HEADER.pack(_MAGIC, 0, owner.encode(), "".join(ancestors[-MAX_ANCESTORS:]).encode())
        # All of it now: a page that finds no room later would be SIGBUS.
        if os.pwrite(descriptor, head.ljust(_FILE_BYTES, b"\0"), 0) != _FILE_BYTES:
            raise OSError(errno.ENOSPC, "no room for the counters", str(temporary))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = folder / f"{owner}.counts"
        temporary.replace(path)
    except BaseException:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
        raise
    return path, descriptor


def _read_all(folder: Path) -> tuple[Counts, list[Record]]:
    totals, folded = _read_totals(folder)
    paths = (path for path in sorted(folder.glob("*.counts")) if path.name not in folded)
    found = map(_read_record, paths)
    return totals, [record for record in found if record is not None]


def _read_record(path: Path) -> Record | None:
    """What another process has counted; None if it isn't such a file."""
    try:
        return _parsed(read_file(path, _FILE_BYTES + 1))
    except OSError:
        return None


def _parsed(raw: bytes) -> Record | None:
    if len(raw) != _FILE_BYTES or not raw.startswith(_MAGIC):
        return None
    _, names_bytes, owner, ancestors = _HEADER.unpack_from(raw)
    names = ["", _OTHER, *_names(raw[_NAMES_AT : _NAMES_AT + names_bytes])]
    rows = np.frombuffer(raw, np.int64, 2 * _MAX_CLASSES, _HITS_AT).reshape(2, -1)
    tokens = ancestors.rstrip(b"\0").decode("ascii", "replace")
    return Record(
        owner.decode("ascii", "replace"),
        tuple(tokens[i : i + _TOKEN_BYTES] for i in range(0, len(tokens), _TOKEN_BYTES)),
        _counts(names, *rows),
    )


def _names(text: bytes) -> list[str]:
    try:
        return [str(json.loads(line)) for line in text.splitlines()][: _MAX_CLASSES - 2]
    except _MALFORMED:
        return []


def _counts(names: list[str], hits: npt.NDArray[np.int64], misses: npt.NDArray[np.int64]) -> Counts:
    return Counts(
        *(
            Counter({name: int(row[code]) for code, name in enumerate(names) if row[code]})
            for row in (hits, misses)
        )
    )


def _read_totals(folder: Path) -> tuple[Counts, set[str]]:
    try:
        content = json.loads(read_file(folder / _TOTALS_NAME))
        counts = Counts(
            *(
                Counter({str(k): int(v) for k, v in content[part].items()})
                for part in ("hits", "misses")
            )
        )
        return counts, {str(name) for name in content["folded"]}
    except (OSError, AttributeError, *_MALFORMED):
        return Counts(), set()


def _write_totals(folder: Path, totals: Counts, folded: set[str]) -> None:
    content = {"hits": totals.hits, "misses": totals.misses, "folded": sorted(folded)}
    replace_file(folder / _TOTALS_NAME, json.dumps(content).encode("ascii"))


@contextlib.contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    with opened_for_flock(folder / "lock", os.O_RDWR | os.O_CREAT) as descriptor:
        _wait_for(descriptor, kind)
        yield


def _wait_for(descriptor: int, kind: int) -> None:
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(_LOCK_POLL_SECONDS)
