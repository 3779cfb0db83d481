"""Readers that forked children inherit, half of them killed in the middle of a read."""

from __future__ import annotations

import random
import time
from typing import Any

from stress.batches import SHAPES, Plan, Written
from stress.children import Child, checked
from stress.figures import Figures
from stress.killing_writers import check_store

WAVE = 12
LONGEST_LIFE = 0.05
READS, ENDLESS = 12, 10**9


def fork_readers(seed: int, folder: str, num_readers: int) -> Figures:
    """Waves of children that read through the parent's reader; a writer commits beside each."""
    figures, dice = Figures(), random.Random(seed + 6)
    num_stores = 0
    while figures.counts["forked readers"] < num_readers:
        plan = Plan(f"{folder}/{num_stores}", seed + num_stores, SHAPES[num_stores % 4], True)
        written = Written(plan)
        limit = min(num_readers, figures.counts["forked readers"] + num_readers // 4 + 1)
        _write(figures, written, 10)
        with plan.cache.reader(plan.config) as reader:
            while figures.counts["forked readers"] < limit:
                _fork_a_wave(figures, written, reader, dice)
        checked(figures, check_store, written, True)
        num_stores += 1
    return figures


def _fork_a_wave(figures: Figures, written: Written, reader: Any, dice: random.Random) -> None:
    reader.refresh()
    names = list(written.rows)
    pinned = Written(written.plan, rows=dict(written.rows))
    reader.get_batch(names)
    numbers = [READS] * (WAVE // 2) + [ENDLESS] * (WAVE // 2)
    children = [Child(_read, pinned, reader, dice.random(), number) for number in numbers]
    _write(figures, written, 3)
    for child in children[WAVE // 2 :]:
        time.sleep(dice.uniform(0, LONGEST_LIFE / WAVE))
        figures.add("killed in a read", child.is_alive())
        child.kill()
    for child in children:
        if child.status is None:
            for own in child.end():
                figures.merge(own)
        child.report_end(figures, "a forked reader")
    figures.add("forked readers", WAVE)
    _check_slots(figures, reader)
    _write(figures, written, 1)
    if found := pinned.is_bit_equal(names, reader.get_batch(names)):
        figures.problem("wrong", f"{found[:3]} in the parent", len(found))


def _read(send: Any, pinned: Written, reader: Any, seed: float, num_reads: int) -> None:
    figures, dice = Figures(), random.Random(seed)
    # New here: the child's own snapshot is newer than its parent's, where values differ by then.
    names = [name for name in pinned.rows if name.startswith("w")]
    for _ in range(num_reads):
        some = dice.choices(names, k=64)
        way = dice.randrange(3)
        if way == 0:
            found = pinned.is_bit_equal(some, reader.get_batch(some))
        elif way == 1:
            found = pinned.is_bit_equal(some, reader.select(some).get_batch(range(64)))
        else:
            found = [name for name in some if pinned.is_bit_equal([name], reader[name])]
        if found:
            figures.problem("wrong", f"{found[:3]} in a child", len(found))
        figures.add("values compared", len(some))
        time.sleep(LONGEST_LIFE / READS if num_reads == READS else 0)
    send(figures)


def _write(figures: Figures, written: Written, num_batches: int) -> None:
    """The next writer, in a process of its own."""
    first = written.num_batches.get(0, 0)
    checked(figures, _commit, written.plan, first, num_batches)
    for number in range(first, first + num_batches):
        written.acknowledge(0, number)


def _commit(figures: Figures, plan: Plan, first: int, num_batches: int) -> None:
    with plan.cache.writer(plan.config, on_duplicate="overwrite") as writer:
        for number in range(first, first + num_batches):
            items = plan.batch(0, number)
            writer.put_batch(list(items), list(items.values()))
            writer.commit()
            figures.add("acknowledged batches")


def _check_slots(figures: Figures, reader: Any) -> None:
    """The killed children's slots are cleared by the next who opens: they don't add up."""
    slots = reader.pinned().environment.env.readers().splitlines()[1:]
    figures.at_most_count("most slots in use", len(slots))
    if len(slots) > 2 * WAVE:
        figures.problem("stale slots", f"{len(slots)} of waves of {WAVE}")
