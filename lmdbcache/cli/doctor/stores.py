"""The stores under a root: damage, locks, readers, leftovers. No store is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lmdbcache.cache import EmbeddingCache, leftovers_under, read_store_info
from lmdbcache.cli.doctor.findings import Finding, note, ok, problem
from lmdbcache.errors import CacheError, FormatVersionError, IntegrityError
from lmdbcache.storage import (
    check_data_file,
    current_generation,
    is_known,
    others,
    slot_use,
    writers_of,
)

_MANY: Final = 0.8  # of the slots


def check_stores(cache: EmbeddingCache) -> Iterator[Finding]:
    """One line per store for what is wrong with it or who uses it; then the leftovers."""
    try:
        folders = cache.folders()
    except CacheError as error:
        yield problem("stores", str(error), "check the permissions of the root")
        return
    num_sound = 0
    for store in folders:
        findings = list(_check_store(store))
        num_sound += not any(finding.level == "problem" for finding in findings)
        yield from findings
    yield ok("stores", f"{num_sound} of {len(folders)} open and say what they hold")
    found = leftovers_under(cache.root)
    if found:
        size = sum(leftover.size_bytes for leftover in found) / (1 << 20)
        text = f"{len(found)} of crashes, {size:.1f} MiB: {found[0].path}"
        yield note(
            "leftovers", f"{text}{', …' if len(found) > 1 else ''}", "lmdbcache prune --leftovers"
        )


def newest_file(cache: EmbeddingCache) -> Path | None:
    """The data file that was written last."""
    try:
        files = [f for store in cache.folders() for f in store.glob("gen-*/data.mdb")]
        return max(files, key=lambda file: file.stat().st_mtime, default=None)
    except (CacheError, OSError):
        return None


def _check_store(store: Path) -> Iterator[Finding]:
    try:
        generation = current_generation(store)
        if generation is None:
            return
        yield from _users(store, generation)
        check_data_file(generation)
        if not is_known(generation):
            text = "not written or checked on this machine: all of it is read at the first opening"
            yield note(store.name, text, f"lmdbcache verify {store.name}")
            return
        read_store_info(store)
    except FormatVersionError as error:
        yield problem(store.name, str(error), "pip install --upgrade lmdbcache")
    except IntegrityError as error:
        yield problem(store.name, f"damaged: {error}", f"lmdbcache repair {store.name}")
    except (CacheError, OSError) as error:
        yield problem(store.name, f"can't be opened: {error}", "as the message says")


def _users(store: Path, generation: Path) -> Iterator[Finding]:
    if writers := writers_of(store):
        yield note(store.name, f"written to now by {', '.join(writers)}")
    slots = slot_use(generation)
    taken = len(slots.alive) + len(slots.dead) if slots else 0
    if users := others(store):
        counted = f"; {taken} of {slots.num_slots} reader slots are taken" if slots else ""
        yield note(store.name, f"open in {', '.join(users)}{counted}")
    if slots is None:
        return
    if slots.dead:
        ended = ", ".join(sorted({str(process) for process in slots.dead}))
        text = f"reader slots of ended processes ({ended}) keep old pages from reuse"
        remedy = "nothing to do: whoever opens the store next clears them"
        yield note(store.name, text, remedy)
    if taken > _MANY * slots.num_slots:
        text = f"{taken} of {slots.num_slots} reader slots are taken; a reader needs one"
        yield problem(store.name, text, "close readers, or end such a process")
