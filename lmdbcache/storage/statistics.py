"""Hits and misses: how often the samples that were asked for were stored.

A hit is an embedding that a reader has handed out; a miss is a sample that it was asked for and
doesn't have. Questions (`in`, `missing`, coverage) count nothing.

A process counts in memory. While it reads, a thread adds what is new to `statistics/totals.json`
in the store's folder, at most once a second; so do `close` and the end of the process.
No read waits for the disk, and a killed process loses what it hasn't added yet. All of it is
derived and may be removed at any time.

An `EpochStatistics` has to see what its worker processes read at once, not a second later: they
count in mapped files in a temporary folder, the family's, which each finds by its parent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import multiprocessing.util
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import CacheError, ReadOnlyCacheError
from lmdbcache.files import check_folder, flocked, read_file, replace_file
from lmdbcache.machine import STATISTICS_VARIABLE, is_alive
from lmdbcache.storage.filesystems import network_mount
from lmdbcache.storage.forking import no_fork
from lmdbcache.storage.last_use import touch
from lmdbcache.storage.layout import STATISTICS_NAME, class_of, sample_id_of_key
from lmdbcache.storage.report import Report

_logger: Final = logging.getLogger(__name__)

_TOTALS_NAME: Final = "totals.json"
_MAX_TOTALS_BYTES: Final = 1 << 20
_SECONDS_BETWEEN: Final = 1.0
_SECONDS_AFTER_FAILURE: Final = 60.0
# A stopped process may hold the folder's lock for ever: statistics are no reason to wait for it.
_SECONDS_FOR_LOCK: Final = 2.0
_LOCK_POLL_SECONDS: Final = 0.005

_MAX_CLASSES: Final = 1024
_OTHER: Final = "(other)"  # classes beyond that
# A process's counts: hits and misses by code of the class, then the names by code, a line each.
_MISSES_AT: Final = 8 * _MAX_CLASSES
_NAMES_AT: Final = 2 * _MISSES_AT
_NUM_BYTES: Final = 64 << 10
# numpy adds so few numbers without letting another thread in between.
_ADDED_AT_ONCE: Final = 256


@dataclass(frozen=True)
class ReadStatistics(Report):
    """How often samples were found.

    Args:
        by_class: Class → (hits, misses).
    """

    derived: ClassVar = ("hits", "misses", "hit_rate")

    by_class: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def hits(self) -> int:
        """Embeddings that were handed out."""
        return sum(hits for hits, _ in self.by_class.values())

    @property
    def misses(self) -> int:
        """Samples that were asked for and not there."""
        return sum(misses for _, misses in self.by_class.values())

    @property
    def hit_rate(self) -> float:
        """Share of hits, 0 to 1; 1.0 if nothing was asked for."""
        return _rate(self.hits, self.misses)

    def metrics(self, prefix: str = "cache") -> dict[str, float]:
        """Return `cache/hits`, `/misses`, `/hit_rate` and `/hit_rate/<class>`, for a logger."""
        metrics = {
            f"{prefix}/hits": self.hits,
            f"{prefix}/misses": self.misses,
            f"{prefix}/hit_rate": self.hit_rate,
        }
        for name, counts in self.by_class.items():
            metrics[f"{prefix}/hit_rate/{name}"] = _rate(*counts)
        return metrics

    def __add__(self, other: ReadStatistics) -> ReadStatistics:
        return self._combined(other, 1)

    def __sub__(self, other: ReadStatistics) -> ReadStatistics:
        return self._combined(other, -1)

    def _combined(self, other: ReadStatistics, sign: int) -> ReadStatistics:
        sums = {}
        for name in sorted({*self.by_class, *other.by_class}):
            (hits, misses), (more_hits, more_misses) = (
                counts.by_class.get(name, (0, 0)) for counts in (self, other)
            )
            sums[name] = (hits + sign * more_hits, misses + sign * more_misses)
        return ReadStatistics({name: pair for name, pair in sums.items() if any(pair)})


class ReadCounts:
    """What this process has read of one store.

    Args:
        store: The store's folder.
        memory: Where to count, `_NUM_BYTES` writable bytes of zero.
    """

    def __init__(self, store: Path, memory: Any) -> None:
        self.store = store
        self.lock = threading.RLock()
        self.hits: npt.NDArray[np.int64] = np.frombuffer(memory, np.int64, _MAX_CLASSES)
        # One number of it is counted up faster than one of the array.
        self.hit_cells = memoryview(memory)[:_MISSES_AT].cast("q")
        self.misses: npt.NDArray[np.int64] = np.frombuffer(
            memory, np.int64, _MAX_CLASSES, _MISSES_AT
        )
        self._memory = memory
        self._names_end = _NAMES_AT
        self._codes: dict[str, int] = {"": 0, _OTHER: 1}
        self._adding = threading.Lock()
        self._added = ReadStatistics()
        self.due = monotonic() + _SECONDS_BETWEEN

    def code_of(self, class_name: str) -> int:
        """Return the code of a class, from 1."""
        with self.lock:
            code = self._codes.get(class_name)
            if code is not None:
                return code
            line = json.dumps(class_name).encode() + b"\n"
            end = self._names_end + len(line)
            if len(self._codes) == _MAX_CLASSES or end > _NUM_BYTES:
                return self._codes[_OTHER]
            self._memory[self._names_end : end] = line
            self._names_end = end
            self._codes[class_name] = len(self._codes)
            return self._codes[class_name]

    def count(self, sample_ids: Iterable[str], *, are_there: bool) -> None:
        """Count samples that were handed out, or aren't there."""
        numbers = self.hits if are_there else self.misses
        with self.lock:
            for sample_id in sample_ids:
                numbers[self.code_of(class_of(sample_id))] += 1
        self.look_at_clock()

    def statistics(self) -> ReadStatistics:
        """Return what is counted so far."""
        with self.lock:
            return _by_class(list(self._codes), self.hits, self.misses)

    def look_at_clock(self) -> None:
        """Have a thread add what is new to the store's totals, if a second has passed."""
        if monotonic() > self.due:
            self.due = monotonic() + _SECONDS_BETWEEN
            with contextlib.suppress(RuntimeError):  # no thread to be had: the next time
                threading.Thread(target=self.add_to_totals, name="lmdbcache-statistics").start()

    def add_to_totals(self, patience: float = 0.0) -> None:
        """Add what is new to the store's totals; what can't be written now is kept.

        Args:
            patience: How many seconds to wait for other processes that do so.
        """
        with no_fork, self._adding:
            counted = self.statistics()
            new = counted - self._added
            try:
                if network_mount(self.store) is not None:
                    return
                touch(self.store)
                if new.by_class:
                    _add(self.store / STATISTICS_NAME, new, patience)
                    self._added = counted
            except BlockingIOError:
                pass
            except (OSError, CacheError) as error:
                _logger.debug("%s: hits and misses stay in memory (%s)", self.store, error)
                self.due = monotonic() + _SECONDS_AFTER_FAILURE

    def left(self) -> ReadStatistics:
        """Return what isn't in the store's totals yet."""
        with self._adding:
            return self.statistics() - self._added


class HitCounter:
    """Counts hits by the rows of a table, whose classes are learned as they are read.

    Args:
        counts: Where to count.
        keys: The table's keys, (n,).
    """

    def __init__(self, counts: ReadCounts, keys: npt.NDArray[np.bytes_]) -> None:
        self._counts = counts
        self._keys = keys
        self._codes = np.zeros(len(keys), np.uint16)
        self._code_cells = memoryview(self._codes)  # type: ignore[arg-type]
        self._known: dict[bytes, int] = {}  # the codes of classes, as keys spell them
        self._cells = counts.hit_cells
        self._hits = counts.hits[:1]

    def count_one(self, row: int) -> None:
        """Count the value of this row as handed out."""
        # One store in between the switches of threads: no lock, which would cost twice as much.
        self._cells[self._code_cells[row] or self._learn([row])] += 1
        if monotonic() > self._counts.due:  # here, not in a call: it is most of the cost
            self._counts.look_at_clock()

    def count(self, rows: npt.NDArray[np.int64]) -> None:
        """Count the values of these rows as handed out, (n,)."""
        hits = self._hits
        found = np.bincount(self._codes[rows], None, len(hits))
        if found[0] or len(found) != len(hits):
            self._learn(rows[self._codes[rows] == 0])
            hits = self._hits
            found = np.bincount(self._codes[rows], None, len(hits))
        if len(hits) < _ADDED_AT_ONCE:
            np.add(hits, found, hits)
        else:
            with self._counts.lock:
                np.add(hits, found, hits)
        self._counts.look_at_clock()

    def _learn(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> int:
        """Note the classes of these rows; the code of the last one."""
        codes, known = [], self._known
        with self._counts.lock:
            for key in self._keys[rows].tolist():
                name = key.rpartition(b":")[2]
                code = known.get(name)
                if code is None:
                    code = known[name] = self._counts.code_of(sample_id_of_key(name))
                    if code >= len(self._hits):
                        self._hits = self._counts.hits[: code + 1]
                codes.append(code)
            self._codes[rows] = codes
        return codes[-1] if codes else 0  # none: another thread was faster


# ---- this process

_stores: Final[dict[Path, ReadCounts]] = {}
_by_file: Final[dict[tuple[int, ...], ReadCounts]] = {}  # a folder may have several names
_lock = threading.Lock()
# The folder in which processes count that an `EpochStatistics` of this one, or of one above it,
# sums up; and what those that have ended had counted, by the beginning of their files' names.
_family: Path | None = None
_is_head = False
_ended: Final[dict[str, ReadStatistics]] = {}


def counts_of(store: Path) -> ReadCounts | None:
    """Return this process's counts of a store; None if counting is switched off.

    From then on, the end of this process is noted as a use of the store.
    """
    counts = _stores.get(store)
    if counts is None:
        with _lock:
            if not _stores:
                # Unlike atexit's, it is called at the end of workers, too.
                multiprocessing.util.Finalize(None, _add_all, exitpriority=1)
            counts = _known(store)  # by another name, or another thread's by now
            if counts is None:
                counts = ReadCounts(store, _memory(store))
                _stores[store] = _by_file[_file(store)] = counts
    return None if os.environ.get(STATISTICS_VARIABLE) == "0" else counts


def _known(store: Path) -> ReadCounts | None:
    """Return this process's counts of a store, under whatever name it has counted."""
    counts = _stores.get(store)
    if counts is None:
        file = _file(store)
        found = _by_file.get(file) if file else None
        if found is not None and _file(found.store) == file:  # not of a store that is gone
            counts = _stores[store] = found
    return counts


def _file(store: Path) -> tuple[int, ...]:
    """Return which folder it is; nothing if it isn't there yet."""
    try:
        status = os.stat(store)  # noqa: PTH116 - a sixth of the calls
    except OSError:
        return ()
    return status.st_dev, status.st_ino


def statistics_of(store: str | Path) -> ReadStatistics:
    """Return what all processes have read of a store, since it was made or last reset.

    Other processes' counts are up to a second old.
    """
    path = Path(store).absolute()
    counts = _known(path)
    left = counts.left() if counts else ReadStatistics()
    return _read_totals(path / STATISTICS_NAME) + left


def reset_statistics(store: str | Path) -> None:
    """Begin again at zero. Processes that are reading go on counting from there.

    Raises:
        ReadOnlyCacheError: The store can't be written.
    """
    folder = Path(store).absolute() / STATISTICS_NAME
    add_reads(folder.parent)  # what this process has read belongs to what goes
    try:
        check_folder(folder)
        if folder.is_dir():
            with _locked(folder, _SECONDS_FOR_LOCK):
                (folder / _TOTALS_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise ReadOnlyCacheError(
            f"the statistics of {store} can't be written ({error.strerror}). Check its permissions"
        ) from None


def add_reads(store: Path) -> None:
    """Add what this process has read of a store to its totals now."""
    counts = _known(store)
    if counts is not None:
        counts.add_to_totals(_SECONDS_FOR_LOCK)


def family() -> str | None:
    """Return where processes count that this one starts; None where nothing sums them up."""
    return None if _family is None else str(_family)


def join_family(folder: str | None) -> None:
    """Count in this folder, if this process isn't in such a family yet."""
    global _family  # noqa: PLW0603 - module state of one process
    if _family is None and folder is not None:
        _family = Path(folder)


def _add_all() -> None:
    for counts in set(_stores.values()):
        counts.add_to_totals(_SECONDS_FOR_LOCK)


def _memory(store: Path) -> Any:
    if _family is not None and not _is_head:
        path = _family / f"{_prefix(store)}{os.getpid()}.{os.urandom(4).hex()}"
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                # All of it now: a page that finds no room later would be SIGBUS.
                if os.write(descriptor, bytes(_NUM_BYTES)) == _NUM_BYTES:
                    return mmap.mmap(descriptor, _NUM_BYTES)
                path.unlink()
            finally:
                os.close(descriptor)
    return bytearray(_NUM_BYTES)


def _prefix(store: Path) -> str:
    name = os.path.realpath(store)
    return hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest() + "."


def _after_fork_in_child() -> None:
    global _lock, _is_head
    _lock, _is_head = threading.Lock(), False
    _stores.clear()
    _by_file.clear()
    _ended.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


# ---- epochs


class EpochStatistics:
    """Hits and misses of this process and its workers, epoch by epoch.

    An epoch is what was counted between two calls of `end_epoch`, whatever the start method of
    the workers and whether they persist. Make it before the workers start. Other processes that
    read the store aren't counted; in a distributed run, each rank has its statistics.

    Args:
        source: An `EmbeddingCache`, an `EmbeddingReader`, or an `EmbeddingDataset`.
        config: One store of a cache; None sums over all that are under its root.
        prefix: In front of the metrics' names.
    """

    def __init__(self, source: Any, config: Any = None, *, prefix: str = "cache") -> None:
        self._source = source
        self._config = config
        self.prefix = prefix
        _found_family()
        self._before = self._sums()

    def end_epoch(self) -> dict[str, float]:
        """Return the metrics since the last call, or since this was made.

        See `ReadStatistics.metrics`.
        """
        return self.end_epoch_statistics().metrics(self.prefix)

    def end_epoch_statistics(self) -> ReadStatistics:
        """Return the same as `ReadStatistics`."""
        now, before = self._sums(), self._before
        self._before = now
        return now - before

    def _sums(self) -> ReadStatistics:
        return sum(map(_family_statistics, self._stores()), ReadStatistics())

    def _stores(self) -> list[Path]:
        if self._config is not None:
            return [self._source.path(self._config)]
        if hasattr(self._source, "folders"):
            return list(self._source.folders())
        reader = getattr(self._source, "reader", self._source)
        return [Path(os.fspath(reader.path))]


def _found_family() -> None:
    global _family, _is_head  # noqa: PLW0603 - module state of one process
    with _lock:
        if _is_head:
            return
        try:
            _family = Path(tempfile.mkdtemp(prefix="lmdbcache-epochs-"))
        except OSError as error:
            _logger.warning("reads of worker processes aren't counted by epoch (%s)", error)
            return
        _is_head = True
        multiprocessing.util.Finalize(None, shutil.rmtree, (_family, True), exitpriority=-1)


def _family_statistics(store: Path) -> ReadStatistics:
    prefix, counts = _prefix(store), _known(store)
    total = counts.statistics() if counts else ReadStatistics()
    with _lock:
        for file in sorted(_family.glob(f"{prefix}*")) if _family else ():
            goes_on = is_alive(int(file.name.split(".")[1]))  # before its last count is read
            found = _parsed(file.read_bytes())
            if goes_on:
                total += found
            else:
                _ended[prefix] = _ended.get(prefix, ReadStatistics()) + found
                file.unlink()
        return total + _ended.get(prefix, ReadStatistics())


def _parsed(content: bytes) -> ReadStatistics:
    """Return what another process of the family counts, which may go on."""
    lines = content[_NAMES_AT:].rstrip(b"\0").splitlines(keepends=True)
    names = ["", _OTHER, *(json.loads(line) for line in lines if line.endswith(b"\n"))]
    hits, misses = np.frombuffer(content, np.int64, 2 * _MAX_CLASSES).reshape(2, -1)
    return _by_class(names, hits, misses)


def _by_class(
    names: Sequence[str], hits: npt.NDArray[np.int64], misses: npt.NDArray[np.int64]
) -> ReadStatistics:
    rows = zip(names, hits.tolist(), misses.tolist(), strict=False)
    return ReadStatistics({name: pair for name, *pair in sorted(rows) if any(pair)})  # type: ignore[misc]


# ---- the store's totals


def _add(folder: Path, new: ReadStatistics, patience: float) -> None:
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    with _locked(folder, patience):
        totals = _read_totals(folder) + new
        pairs = totals.by_class.items()
        hits, misses = ({name: pair[side] for name, pair in pairs} for side in (0, 1))
        content = json.dumps({"hits": hits, "misses": misses}).encode("ascii")
        replace_file(folder / _TOTALS_NAME, content)


def _read_totals(folder: Path) -> ReadStatistics:
    """Return the totals; none where the file is missing, damaged or of another form."""
    with contextlib.suppress(
        *(OSError, ArithmeticError, AttributeError, LookupError, RecursionError),
        *(TypeError, ValueError),
    ):
        check_folder(folder)
        content = json.loads(read_file(folder / _TOTALS_NAME, _MAX_TOTALS_BYTES))
        hits, misses = (dict.items(content[part]) for part in ("hits", "misses"))
        return ReadStatistics({name: (int(number), 0) for name, number in hits}) + ReadStatistics(
            {name: (0, int(number)) for name, number in misses}
        )
    return ReadStatistics()


@contextlib.contextmanager
def _locked(folder: Path, patience: float) -> Iterator[None]:
    end = monotonic() + patience
    with contextlib.ExitStack() as stack:
        while True:
            try:
                lock = flocked(folder / "lock", os.O_RDWR | os.O_CREAT, wait=False)
                stack.enter_context(lock)
                break
            except BlockingIOError:
                if monotonic() > end:
                    raise
            time.sleep(_LOCK_POLL_SECONDS)
        yield


def _rate(hits: int, misses: int) -> float:
    return hits / (hits + misses) if hits + misses else 1.0
