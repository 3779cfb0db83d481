"""SIGKILL for compactions and removals while two writers and two checking readers live."""

from __future__ import annotations

import mmap
import random
import sys
import time
from typing import Any

from stress.batches import NUM_OVERWRITTEN, Plan, Written, write_batches
from stress.children import Child, checked
from stress.figures import Figures
from stress.killing_writers import check_store

from lmdbcache.cli import main
from lmdbcache.errors import CacheNotFoundError

PEER_SECONDS = 3000
KILLS_PER_STORE = 60
SHARE_OF_COMMANDS = 0.2  # start up 10 times slower than a call


def kill_compactions(seed: int, folder: str, num_kills: int) -> Figures:
    """Kill compactions, and now and then a writer, beside two writers and two readers."""
    figures, dice = Figures(), random.Random(seed + 2)
    num_stores = 0
    while figures.counts["kills of compactions"] < num_kills:
        num_stores += 1
        plan = Plan(
            f"{folder}/{num_stores}", seed + num_stores, [(64,), (900,)][num_stores % 2], True
        )
        limit = min(num_kills, figures.counts["kills of compactions"] + KILLS_PER_STORE)
        _kill_compactions_of(plan, figures, dice, limit)
    return figures


def _kill_compactions_of(plan: Plan, figures: Figures, dice: random.Random, limit: int) -> None:
    written, stop = Written(plan), mmap.mmap(-1, 1)
    for writer in (0, 1):
        checked(figures, _write_first, plan, writer)
        written.acknowledge(writer, 0)
    writers = {writer: _writer(plan, written, writer, stop) for writer in (0, 1)}
    readers = [Child(_read_on, plan, stop, n, seconds=PEER_SECONDS) for n in range(2)]
    lives = {False: 0.05, True: 0.2}
    while figures.counts["kills of compactions"] < limit:
        is_command = dice.random() < SHARE_OF_COMMANDS
        compactor = Child(_compact_on, plan, is_command)
        time.sleep(dice.uniform(0, lives[is_command]))
        num_ended = len(compactor.kill())
        compactor.report_end(figures, "a compaction")
        figures.add("compactions that ended", num_ended)
        # About every second is killed in its first compaction, on any machine.
        lives[is_command] *= 0.9 if num_ended else 1.12
        figures.add("kills of compactions")
        for writer, child in writers.items():
            _hear(figures, written, writer, child.messages())
            if dice.random() < 0.2:
                _hear(figures, written, writer, child.kill())
                child.report_end(figures, "a writer")
                figures.add("kills of writers")
                # What it committed last may be there unsaid: its successor finds out.
                if checked(figures, _is_ahead, plan, writer, written.num_batches[writer]):
                    written.acknowledge(writer, written.num_batches[writer])
                writers[writer] = _writer(plan, written, writer, stop)
            elif not child.is_alive():
                child.report_end(figures, "a writer")
    stop[0] = 1
    for writer, child in writers.items():
        _hear(figures, written, writer, child.end())
        child.report_end(figures, "a writer")
    for reader in readers:
        for own in reader.end():
            figures.merge(own)
        reader.report_end(figures, "a reader")
    checked(figures, check_store, written, True)
    checked(figures, _compact_and_check, written)


def _writer(plan: Plan, written: Written, writer: int, stop: mmap.mmap) -> Child:
    return Child(
        _write_slowly, plan, writer, written.num_batches[writer], stop, seconds=PEER_SECONDS
    )


def _hear(figures: Figures, written: Written, writer: int, acknowledged: list[int]) -> None:
    figures.add("acknowledged batches", len(acknowledged))
    for number in acknowledged:
        written.acknowledge(writer, number)


def _write_first(_: Figures, plan: Plan, writer: int) -> None:
    def send(_: Any) -> None:
        stop[0] = 1

    stop = bytearray(1)
    write_batches(send, plan, writer, 0, stop)


def _write_slowly(send: Any, plan: Plan, writer: int, number: int, stop: mmap.mmap) -> None:
    def send_and_rest(number: int) -> None:
        send(number)
        time.sleep(0.004)

    write_batches(send_and_rest, plan, writer, number, stop)


def _is_ahead(_: Figures, plan: Plan, writer: int, number: int) -> bool:
    with plan.cache.reader(plan.config) as reader:
        return plan.first_sample(writer, number) in reader


def _compact_on(send: Any, plan: Plan, is_command: bool) -> None:
    while True:
        if is_command:
            _command("compact", "--all", "--root", plan.root)
        else:
            plan.cache.compact(plan.config)
        send(1)


def _command(*arguments: str) -> None:
    sys.argv = ["lmdbcache", *arguments]
    sys.stdout = sys.stderr = open("/dev/null", "w", encoding="utf-8")
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


def _compact_and_check(figures: Figures, written: Written) -> None:
    """Nothing but one generation remains, and it holds everything."""
    plan = written.plan
    plan.cache.compact(plan.config)
    check_store(figures, written, verifies=True)
    left = list(plan.cache.path(plan.config).glob("gen-*"))
    if len(left) != 1:
        figures.problem("unsound", f"left behind: {left}")


def _read_on(send: Any, plan: Plan, stop: mmap.mmap, number: int) -> None:
    """Read until told to stop: right values only, and each look at least as new as the last."""
    figures, dice = Figures(), random.Random(plan.seed + number)
    seen = {0: 1, 1: 1}
    versions: dict[str, float] = {}
    with plan.cache.reader(plan.config) as reader:
        while not stop[0]:
            reader.refresh()
            for writer in (0, 1):
                _check_progress(figures, plan, reader, writer, seen, dice)
                _check_versions(figures, plan, reader, writer, versions)
            figures.add("looks of readers")
            time.sleep(0.004)
    send(figures)


def _check_progress(
    figures: Figures, plan: Plan, reader: Any, writer: int, seen: dict[int, int], dice: Any
) -> None:
    first = plan.first_sample
    if first(writer, seen[writer] - 1) not in reader:
        figures.problem("backwards", f"batch {seen[writer] - 1} of writer {writer} is gone")
    while first(writer, seen[writer]) in reader:
        seen[writer] += 1
    for number in (seen[writer] - 1, dice.randrange(seen[writer])):
        items = plan.batch(writer, number)
        names = [name for name in items if name.startswith("w")]
        if missing := reader.missing(names):
            figures.problem("lost", f"{missing} of batch {number}", len(missing))
            continue
        found = Written(plan, rows=items).is_bit_equal(names, reader.get_batch(names))
        if found:
            figures.problem("wrong", f"{found[:3]} beside compactions", len(found))
        figures.add("values compared", len(names))


def _check_versions(
    figures: Figures, plan: Plan, reader: Any, writer: int, versions: dict[str, float]
) -> None:
    names = [f"again{writer}_{i:02d}:x" for i in range(NUM_OVERWRITTEN)]
    names = [name for name in names if name in versions or name in reader]
    if not names:
        return
    rows = reader.get_batch(names).reshape(len(names), -1)
    for name, row in zip(names, rows, strict=True):
        if (row != row[0]).any():
            figures.problem("wrong", f"{name}: a mixture of versions")
        elif row[0] < versions.get(name, 0):
            figures.problem("backwards", f"{name}: {row[0]} after {versions[name]}")
        versions[name] = float(row[0])
    figures.add("values compared", len(names))


# ---- clear


def kill_removals(seed: int, folder: str, num_kills: int) -> Figures:
    """Kill `clear`: the store is whole or gone, its reader goes on, and so does the next writer."""
    figures, dice = Figures(), random.Random(seed + 3)
    for number in range(num_kills):
        plan = Plan(f"{folder}/{number % 4}", seed + number, (300,), overwrites=False)
        written = Written(plan)
        checked(figures, _fill, plan)
        for writer in range(20):
            written.acknowledge(0, writer)
        names = list(written.rows)
        with plan.cache.reader(plan.config) as reader:
            len(reader)
            is_command = number % 8 == 0
            child = Child(_clear, plan, is_command)
            time.sleep(dice.uniform(0, 0.02 if is_command else 0.006))
            child.kill()
            child.report_end(figures, "a removal")
            figures.add("kills of removals")
            if found := written.is_bit_equal(names, reader.get_batch(names)):
                figures.problem("wrong", f"{found[:3]} under a removed store", len(found))
        is_left = checked(figures, _look, plan)
        figures.add("stores gone", not is_left)
        if not is_left:
            written = Written(plan)
        checked(figures, check_store, written, True)
        # The next writer begins anew or skips what is there.
        checked(figures, _fill, plan)
        for writer in range(written.num_batches.get(0, 0), 20):
            written.acknowledge(0, writer)
        checked(figures, check_store, written, True)
        plan.cache.clear(plan.config)
        if plan.config in plan.cache or plan.cache.path(plan.config).exists():
            figures.problem("unsound", "something remains after `clear`")
    return figures


def _fill(_: Figures, plan: Plan) -> None:
    with plan.cache.writer(plan.config) as writer:
        for number in range(20):
            items = plan.batch(0, number)
            writer.put_batch(list(items), list(items.values()))


def _clear(_: Any, plan: Plan, is_command: bool) -> None:
    if is_command:
        _command("clear", "--all", "--yes", "--root", plan.root)
    else:
        plan.cache.clear(plan.config)


def _look(_: Figures, plan: Plan) -> bool:
    try:
        with plan.cache.reader(plan.config) as reader:
            return len(reader) > 0
    except CacheNotFoundError:
        return False
