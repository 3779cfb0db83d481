"""`lmdbcache prune`: remove what is old, unused, empty, damaged or too much."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import click

from lmdbcache.cache import (
    EmbeddingCache,
    PrunePlan,
    PrunePolicy,
    leftovers_under,
    plan_pruning,
    prune,
)
from lmdbcache.cli.command import Option
from lmdbcache.cli.console import counted, print_json, say
from lmdbcache.cli.options import DryRun, Json, Root, Yes, check_can_ask, title_of
from lmdbcache.cli.quantities import age, parse_moment, parse_size
from lmdbcache.errors import ConfigError
from lmdbcache.files import readable_size
from lmdbcache.storage import Leftover


def prune_command(
    *,
    root: Root = None,
    written_before: Annotated[
        datetime | None,
        Option(
            "--older-than",
            parser=parse_moment,
            metavar="AGE",
            help="Stores that nothing was written to for so long: 30d, 12h, 2w, 2026-01-31.",
        ),
    ] = None,
    used_before: Annotated[
        datetime | None,
        Option(
            "--unused-since",
            parser=parse_moment,
            metavar="AGE",
            help="Stores that were neither read nor written for so long.",
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        Option(
            "--max-size",
            parser=parse_size,
            metavar="SIZE",
            help="The stores unused for longest, until all fit: 50GB, 500MiB.",
        ),
    ] = None,
    empty: Annotated[bool, Option("--empty", help="Stores without embeddings.")] = False,
    damaged: Annotated[bool, Option("--damaged", help="Damaged stores (see also repair).")] = False,
    leftovers: Annotated[
        bool, Option("--leftovers", help="Files that a crash has left, in all stores.")
    ] = False,
    force: Annotated[
        bool, Option("--force", help="Also stores that a process reads or writes.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove stores that meet every age and one of the kinds given, after asking.

    --max-size and --leftovers come after that. What another process has open is kept and named.
    """
    policy = PrunePolicy(written_before, used_before, empty, damaged, max_bytes)
    has_policy = policy != PrunePolicy()
    if not (has_policy or leftovers):
        raise ConfigError(
            "say what to remove: --older-than, --unused-since, --max-size, --empty, --damaged, "
            "--leftovers"
        )
    check_can_ask(as_json=as_json, may_ask=not (yes or dry_run))
    cache = EmbeddingCache(root)
    nothing = PrunePlan((), (), 0)
    plan = plan_pruning(cache, policy, force=force) if has_policy else nothing
    found = leftovers_under(cache.root) if leftovers else []
    if not as_json and (dry_run or not yes):
        _say_plan(plan, found)
    if not dry_run and (plan.removed or found):
        if not yes:
            click.confirm(f"Remove {_summary(plan, found)} from {cache.root}?", abort=True)
        plan = prune(cache, plan, force=force)
        found = leftovers_under(cache.root, remove=True) if found else []
    if as_json:
        print_json({"dry_run": dry_run, **_as_json(plan, found)})
        return
    for verdict in plan.kept:
        say(f"kept {title_of(verdict.store)}: {verdict.reason}")
    if has_policy and max_bytes is not None and plan.bytes_left > max_bytes:
        say(f"{readable_size(plan.bytes_left)} remain, more than {readable_size(max_bytes)}")
    if not (plan.removed or found):
        say(f"nothing to remove under {cache.root}")
    else:
        say(f"{'would remove' if dry_run else 'removed'} {_summary(plan, found)}")


def _say_plan(plan: PrunePlan, leftovers: list[Leftover]) -> None:
    for verdict in plan.removed:
        store = verdict.store
        say(
            f"{title_of(store)}: {readable_size(store.size_bytes)}, "
            f"unused for {age(store.last_touched)}: {verdict.reason}"
        )
    for leftover in leftovers:
        say(f"{leftover.path}: {readable_size(leftover.size_bytes)}: {leftover.what}")


def _summary(plan: PrunePlan, leftovers: list[Leftover]) -> str:
    parts = [counted(len(plan.removed), "store")] if plan.removed or not leftovers else []
    parts += [counted(len(leftovers), "leftover")] if leftovers else []
    freed = plan.bytes_freed + sum(leftover.size_bytes for leftover in leftovers)
    return f"{' and '.join(parts)}, {readable_size(freed)}"


def _as_json(plan: PrunePlan, leftovers: list[Leftover]) -> dict[str, Any]:
    freed = plan.bytes_freed + sum(leftover.size_bytes for leftover in leftovers)
    return {
        **plan.to_dict(),
        "leftovers": [leftover.to_dict() for leftover in leftovers],
        "bytes_freed": freed,
    }
