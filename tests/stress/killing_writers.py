"""SIGKILL for writers, at any moment of opening, writing and resuming, and of making a store."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

from stress.batches import SHAPES, Plan, Written, write_batches
from stress.children import Child, checked
from stress.figures import Figures

KILLS_PER_STORE = 25
LONGEST_LIFE = 0.06  # seconds at first; opening takes 5 ms, a commit 2 ms


def kill_writers(seed: int, folder: str, num_kills: int) -> Figures:
    """Kill writers, one or two at once; after each the store is checked by another process."""
    figures, dice = Figures(), random.Random(seed)
    num_stores = 0
    while figures.counts["kills"] < num_kills:
        num_stores += 1
        plan = Plan(
            f"{folder}/{num_stores}", seed + num_stores, SHAPES[num_stores % 4], num_stores % 3 > 0
        )
        _kill_writers_of(plan, figures, dice, num_kills, is_watched=num_stores % 2 == 0)
    return figures


def _kill_writers_of(
    plan: Plan, figures: Figures, dice: random.Random, num_kills: int, *, is_watched: bool
) -> None:
    written, reader, life = Written(plan), None, LONGEST_LIFE
    limit = min(num_kills, figures.counts["kills"] + KILLS_PER_STORE)
    while figures.counts["kills"] < limit:
        writers = [0, 1] if dice.random() < 0.4 else [0]
        children = {
            writer: Child(write_batches, plan, writer, written.num_batches.get(writer, 0))
            for writer in writers
        }
        for writer in dice.sample(writers, len(writers)):
            time.sleep(dice.uniform(0, life))
            acknowledged = children[writer].kill()
            life *= 0.97 if acknowledged else 1.2  # some commits each, on a busy machine, too
            children[writer].report_end(figures, "a writer")
            figures.add("kills")
            figures.add("acknowledged batches", len(acknowledged))
            for number in acknowledged:
                written.acknowledge(writer, number)
        last = figures.counts["kills"] >= limit
        for writer in checked(figures, check_store, written, last or dice.random() < 0.2) or ():
            figures.add("commits found before their acknowledgement")
            written.acknowledge(writer, written.num_batches.get(writer, 0))
        if is_watched and reader is None and written.rows:
            # A survivor: LMDB then doesn't reset its table of readers by itself.
            reader = plan.cache.reader(plan.config)
            pinned, names = dict(written.rows), list(written.rows)
        if reader is not None:
            # New rows may have replaced old ones; this reader stays where it was.
            found = Written(plan, rows=pinned).is_bit_equal(names, reader.get_batch(names))
            if found:
                figures.problem("wrong", f"{found[:3]} under a pinned snapshot", len(found))
    if reader is not None:
        reader.close()


def check_store(figures: Figures, written: Written, verifies: bool) -> list[int]:
    """Compare all of a store with what was acknowledged.

    Returns:
        The writers whose next batch is there, too: committed, but killed before it said so.
    """
    plan = written.plan
    cache, config = plan.cache, plan.config
    start = time.perf_counter()
    if config not in cache:
        if written.rows:
            figures.problem("lost", f"the whole store, {len(written.rows)} samples")
        return []
    with cache.reader(config) as reader:
        length = len(reader)
        figures.at_most("slowest opening", time.perf_counter() - start)
        ahead = []
        for writer in (0, 1):
            number = written.num_batches.get(writer, 0)
            if plan.first_sample(writer, number) in reader:
                ahead.append(writer)
                written.acknowledge(writer, number)
        _check_values(figures, written, reader)
        _check_slots(figures, reader)
    if verifies:
        figures.add("verifications")
        report = cache.verify(config)
        # A commit that nobody heard of may be in the file while the lock file doesn't know it.
        if not report.is_sound or report.num_embeddings < length:
            figures.problem("unsound", str(report))
    return ahead


def _check_values(figures: Figures, written: Written, reader: Any) -> None:
    names = list(written.rows)
    if missing := reader.missing(names):
        figures.problem("lost", f"{missing[:3]} of {len(names)}", len(missing))
    elif found := names and written.is_bit_equal(names, reader.get_batch(names)):
        figures.problem("wrong", f"{found[:3]} of {len(names)}", len(found))
    figures.add("values compared", len(names))
    if len(reader) != len(names):
        # Whatever else is there belongs to a batch that is only half there.
        figures.problem("wrong", f"{len(reader)} samples, {len(names)} expected")


def _check_slots(figures: Figures, reader: Any) -> None:
    """After an opening every slot belongs to a living process."""
    lines = reader.pinned().environment.env.readers().splitlines()[1:]
    dead = {line.split()[0] for line in lines if not Path("/proc", line.split()[0]).exists()}
    if dead:
        figures.problem("stale slots", f"of {sorted(dead)} among {len(lines)}", len(dead))


# ---- making a store


def kill_creators(seed: int, folder: str, num_kills: int) -> Figures:
    """Kill whoever makes a store; it opens or is absent, and the next writer goes on."""
    figures, dice = Figures(), random.Random(seed + 1)
    life = 0.03
    for number in range(num_kills):
        plan = Plan(f"{folder}/{number}", seed + number, SHAPES[number % 4], overwrites=False)
        written = Written(plan)
        writers = [0, 1] if number % 3 == 0 else [0]
        children = {writer: Child(write_batches, plan, writer, 0) for writer in writers}
        time.sleep(dice.uniform(0, life))
        for writer, child in children.items():
            acknowledged = child.kill()
            child.report_end(figures, "a creator")
            for acknowledged_number in acknowledged:
                written.acknowledge(writer, acknowledged_number)
        figures.add("kills")
        if figures.counts["kills with nothing acknowledged"] * 3 < number:
            life *= 0.9  # stay where it is being made
        else:
            life = min(0.06, life * 1.1)
        figures.add("kills with nothing acknowledged", not written.rows)
        state = _state(plan)
        figures.add(f"left {state}")
        for writer in checked(figures, check_store, written, False) or ():
            written.acknowledge(writer, written.num_batches.get(writer, 0))
        checked(figures, _go_on, written)
        if _state(plan) != "a store":
            figures.problem("unsound", f"after {state}: {_state(plan)}")
    return figures


def _go_on(figures: Figures, written: Written) -> None:
    """The next writer commits three batches; nothing but one generation remains."""
    plan = written.plan
    first = written.num_batches.get(0, 0)
    with plan.cache.writer(plan.config) as writer:
        for number in range(first, first + 3):
            items = plan.batch(0, number)
            writer.put_batch(list(items), list(items.values()))
            writer.commit()
            written.acknowledge(0, number)
    check_store(figures, written, verifies=True)
    left = sorted(path.name for path in plan.cache.path(plan.config).iterdir())
    generation = left[1] if len(left) > 1 else ""
    if left != ["CURRENT", generation, "last_used", "statistics", "writer.lock"]:
        figures.problem("unsound", f"left behind: {left}")


def _state(plan: Plan) -> str:
    store = plan.cache.path(plan.config)
    if not store.exists():
        return "nothing"
    if (store / "CURRENT").exists():
        return "a store"
    names = {name for _, _, files in os.walk(store) for name in files}
    if "data.mdb" in names:
        return "a generation that nobody names"
    return "a lock" if "writer.lock" in names else "a folder"
