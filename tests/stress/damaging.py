"""Flipped bytes and cut files: each damaged store is verified and read in a child process."""

from __future__ import annotations

import inspect
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stress.batches import Plan, Written
from stress.children import Child
from stress.figures import Figures
from stress.page_kinds import byte_ranges

from lmdbcache.errors import CacheError, SampleNotFoundError
from lmdbcache.storage import EmbeddingReader

CASES_PER_CHILD = 25
CASE_SECONDS = 120  # a guard against what hangs, on any machine
REFUSALS = 3
SHAPES = [(300,), (600,), (4,), (2, 900)]
VERIFYING = "verify" in inspect.signature(EmbeddingReader).parameters
MODES = ("never", "first_read", "always") if VERIFYING else ("never",)


@dataclass(frozen=True)
class Damage:
    """One damaged file: bytes to flip, or where it is cut."""

    kind: str
    flips: tuple[tuple[int, int], ...] = ()
    cut: int | None = None

    def apply(self, content: bytes) -> bytes:
        damaged = bytearray(content)
        for at, mask in self.flips:
            damaged[at] ^= mask
        return bytes(damaged[: self.cut])


class Victim:
    """A sound store, its file's content, and the folder where damaged ones are put."""

    def __init__(self, folder: str, seed: int, shape: tuple[int, ...], *, in_place: bool) -> None:
        self.plan = Plan(f"{folder}/sound", seed, shape, overwrites=True)
        self.written = Written(self.plan)
        # A fifth at a time, with some overwritten each time: the free list isn't empty.
        with self.plan.cache.writer(self.plan.config, on_duplicate="overwrite") as writer:
            for number in range(30):
                items = self.plan.batch(0, number)
                writer.put_batch(list(items), list(items.values()))
                self.written.acknowledge(0, number)
                if number % 6 == 5:
                    writer.commit()
        self.names = sorted(self.written.rows, key=str.encode)
        sound = self.plan.cache.path(self.plan.config)
        self.content = (sound / "gen-000001" / "data.mdb").read_bytes()
        self.in_place = in_place
        self.store = sound if in_place else Path(folder, "copies", sound.name)
        self.data = self.store / "gen-000001" / "data.mdb"

    def put(self, content: bytes) -> None:
        """Damage the file that this machine wrote, or make a damaged copy of the store."""
        if self.in_place:
            with self.data.open("r+b") as file:  # the same inode
                file.write(content)
                file.truncate()
            return
        shutil.rmtree(self.store, ignore_errors=True)
        sound = self.plan.cache.path(self.plan.config)
        shutil.copytree(sound, self.store, ignore=shutil.ignore_patterns("*.mdb"))
        self.data.write_bytes(content)


def flip_bytes(seed: int, folder: str, num_cases: int, in_place: bool) -> Figures:
    """Flip one to four bits, spread evenly over all kinds of pages."""
    figures, dice = Figures(), random.Random(seed + 4)
    for number, shape in enumerate(SHAPES):
        victim = Victim(f"{folder}/{number}", seed + number, shape, in_place=in_place)
        ranges = byte_ranges(victim.content)
        cases = [_flips(ranges, dice) for _ in range(-(-num_cases // len(SHAPES)))]
        _examine_all(figures, victim, cases, dice)
    return figures


def _flips(ranges: dict[str, list[tuple[int, int]]], dice: random.Random) -> Damage:
    kind = dice.choice(sorted(ranges))
    start, end = dice.choice(ranges[kind])
    num_flips = dice.choice((1, 1, 1, 2, 4))
    flips = [(dice.randrange(start, end), 1 << dice.randrange(8)) for _ in range(num_flips)]
    return Damage(kind, tuple(flips))


def cut_files(seed: int, folder: str, num_boundaries: int, num_odd: int, in_place: bool) -> Figures:
    """Cut at page boundaries (all of them if there are no more than asked for) and anywhere."""
    figures, dice = Figures(), random.Random(seed + 5)
    victim = Victim(folder, seed, (600,), in_place=in_place)
    size = len(victim.content)
    boundaries = list(range(0, size, 4096))
    if len(boundaries) > num_boundaries:
        boundaries = boundaries[:4] + dice.sample(boundaries[4:], num_boundaries - 4)
    cases = [Damage("cut at a page", cut=cut) for cut in boundaries]
    cases += [Damage("odd cut", cut=dice.randrange(1, size)) for _ in range(num_odd)]
    _examine_all(figures, victim, cases, dice)
    return figures


def _examine_all(
    figures: Figures, victim: Victim, cases: list[Damage], dice: random.Random
) -> None:
    remaining = iter(cases)
    while some := [case for _, case in zip(range(CASES_PER_CHILD), remaining, strict=False)]:
        while some:
            child = Child(_examine_some, victim, some, dice.random())
            finished, step = 0, ""
            for message in child.end():
                if isinstance(message, Figures):
                    figures.merge(message)
                    finished += 1
                else:
                    step = message
            if child.status != 0:
                _report_end(figures, child, victim, some[finished], step)
                finished += 1
            some = some[finished:]
    victim.put(victim.content)
    figures.add("damaged files", len(cases))


def _report_end(figures: Figures, child: Child, victim: Victim, case: Damage, step: str) -> None:
    # No look at the structure of what this machine wrote itself, before it is read.
    is_unchecked = step in MODES and (victim.in_place or not VERIFYING)
    if is_unchecked and child.status in (-signal.SIGBUS, -signal.SIGABRT, -signal.SIGSEGV):
        figures.add("signals where nothing is checked")
        figures.add(f"of these in a {case.kind} page")
    else:
        child.report_end(figures, f"{step}: {case} of {victim.plan.shape}")


def _examine_some(send: Any, victim: Victim, cases: list[Damage], seed: float) -> None:
    dice = random.Random(seed)
    for case in cases:
        figures = Figures()
        signal.alarm(CASE_SECONDS)
        victim.put(case.apply(victim.content))
        findings: set[str] | None = None
        # Whoever opens a store first may be told that it isn't known to be sound.
        for step in dice.sample(("verify", *MODES), 1 + len(MODES)):
            send(step)
            if step == "verify":
                findings = _verify(figures, victim, case)
            else:
                _read(figures, victim, case, step)
        if findings is not None:
            send("reading what is sound")
            _read(figures, victim, case, "after verify", findings)
        send(figures)


def _verify(figures: Figures, victim: Victim, case: Damage) -> set[str] | None:
    """The samples that `verify` finds damaged; None if it warns of the store as a whole."""
    cache = type(victim.plan.cache)(victim.store.parent)
    try:
        report = cache.verify(victim.plan.config)
    except CacheError:
        figures.add("refused by verify")
        return None
    figures.add("found by verify", not report.is_sound)
    figures.add("sound to verify", report.is_sound)
    if report.is_sound and report.num_embeddings != len(victim.names):
        # An older commit's meta page took over.
        if VERIFYING:
            figures.problem("lost", f"an older commit is taken for the newest, {case}")
        figures.add("rolled back in silence")
    if report.structure or getattr(report, "lost", 0):
        return None
    return set(report.damaged) | set(getattr(report, "missing", ()))


def _read(
    figures: Figures, victim: Victim, case: Damage, mode: str, damaged: set[str] | None = None
) -> None:
    options = {"verify": mode} if VERIFYING and mode in MODES else {}
    try:
        with EmbeddingReader(victim.store, victim.plan.config, **options) as reader:
            found = _found(reader, victim.names)
            if options and mode != "never" and (hidden := _called_absent(reader, victim.names)):
                figures.problem("hidden", f"{hidden} ({mode}), {case}")
    except CacheError:
        found = {}
    figures.add("reads with values" if found else "reads refused")
    wrong = [
        name
        for name, rows in found.items()
        if any(row.tobytes() != victim.written.rows[name].tobytes() for row in rows)
    ]
    rolled_back = case.kind == "meta" and len(found) < len(victim.names) and not VERIFYING
    if damaged is not None:
        wrong = [name for name in wrong if name not in damaged]
        missing = set(victim.names) - set(found) - damaged
        # A copy is refused as a whole while anything of it is damaged.
        is_refused = bool(damaged) and not found
        if missing and not rolled_back and not is_refused:
            figures.problem("lost", f"{sorted(missing)[:3]} of a sound store, {case}")
    if wrong and mode == "never":
        figures.add("values wrong where nothing is checked", len(wrong))
    elif wrong and rolled_back:
        figures.add("values of an older commit", len(wrong))
    elif wrong:
        figures.problem("wrong", f"{wrong[:3]} ({mode}), {case}", len(wrong))


def _found(reader: Any, names: list[str]) -> dict[str, list[Any]]:
    """Every value that any way of reading gives, by sample."""
    found: dict[str, list[Any]] = {}

    def take(sample_ids: list[str], rows: Any) -> None:
        for name, row in zip(sample_ids, rows, strict=True):
            found.setdefault(name, []).append(np.asarray(row))

    for number, name in enumerate(names):
        if number == REFUSALS and not found:
            break  # the store as a whole is refused, after a look at its structure each time
        try:
            take([name], [reader[name]])
        except (CacheError, SampleNotFoundError):
            continue
    for sample_ids in (names, list(found)) if found else (names,):
        for ways in _batches(reader, sample_ids):
            take(sample_ids, ways)
    _walk(reader)
    return found


def _called_absent(reader: Any, names: list[str]) -> list[str]:
    """The ways of asking by which something stored is said never to have been stored."""
    ways = {
        "one by one": lambda: [reader[name] for name in names],
        "batch": lambda: reader.get_batch(names),
        "in": lambda: _assert_found(all(name in reader for name in names)),
        "missing": lambda: _assert_found(not reader.missing(names)),
        "all": lambda: _assert_found(set(names) <= set(reader)),
        "number": lambda: _assert_found(len(reader) == len(names)),
        "select": lambda: _assert_found(set(names) <= set(reader.select().sample_ids)),
    }
    return [way for way, ask in ways.items() if _says_absent(ask)]


def _assert_found(is_found: bool) -> None:
    if not is_found:
        raise SampleNotFoundError


def _says_absent(ask: Callable[[], Any]) -> bool:
    try:
        ask()
    except SampleNotFoundError:
        return True
    except CacheError:
        pass
    return False


def _batches(reader: Any, sample_ids: list[str]) -> Iterator[Any]:
    for way in (
        lambda: reader.get_batch(sample_ids),
        lambda: reader.select(sample_ids).get_batch(range(len(sample_ids))),
    ):
        try:
            yield way()
        except CacheError:
            continue


def _walk(reader: Any) -> None:
    """Everything else that looks into the pages; its answers may be incomplete."""
    for look in (len, list, reader.missing, lambda it: it.select().sample_ids):
        try:
            look(["nobody:x"] if look == reader.missing else reader)
        except CacheError:
            continue
