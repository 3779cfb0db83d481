"""`lmdbcache doctor`: check packages, machine, root and stores; changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.command import Option
from lmdbcache.cli.console import counted, print_json, print_table, say
from lmdbcache.cli.options import Json, Root
from lmdbcache.files import readable_size

if TYPE_CHECKING:
    from lmdbcache.cli.doctor.findings import Finding


def doctor_command(
    *,
    root: Root = None,
    memory: Annotated[
        list[int] | None,
        Option(
            "--memory", metavar="PID", help="Break down this process's memory; may be repeated."
        ),
    ] = None,
    only_settings: Annotated[
        bool, Option("--settings", help="Only show the settings and where each comes from.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check packages, machine, cache directory and stores; changes nothing. Exit code 1: a problem.

    The settings follow: the cache directory, environment variables and defaults, each with where
    it comes from. With --memory only the memory of processes is shown: their own, and pages of
    stores, which are the page cache and no leak.
    """
    if memory:
        _show_memory(memory, as_json=as_json)
        return
    cache = EmbeddingCache(root)
    if only_settings:
        _show_settings(root, cache, as_json=as_json)
        return
    findings = _examine(cache)
    problems = [finding for finding in findings if finding.level == "problem"]
    if as_json:
        print_json([finding.to_dict() for finding in findings])
    else:
        for finding in findings:
            say(f"{finding.level:<8} {finding.subject}: {finding.text}")
            if finding.remedy:
                say(f"{'':<8} → {finding.remedy}")
        say("")
        _show_settings(root, cache, as_json=False)
        say("")
        notes = sum(finding.level == "note" for finding in findings)
        say(f"{counted(len(problems), 'problem')}, {counted(notes, 'note')}")
    raise click.exceptions.Exit(1 if problems else 0)


def _examine(cache: EmbeddingCache) -> list[Finding]:
    from lmdbcache.cli.doctor.machine import check_clock, check_machine
    from lmdbcache.cli.doctor.root import check_root
    from lmdbcache.cli.doctor.software import check_software
    from lmdbcache.cli.doctor.stores import check_stores, newest_file

    return [
        *check_software(),
        *check_machine(),
        check_clock(newest_file(cache)),
        *check_root(cache.root),
        *check_stores(cache),
    ]


def _show_settings(given: Path | None, cache: EmbeddingCache, *, as_json: bool) -> None:
    from lmdbcache.cli.doctor.settings import settings

    found = list(settings(given, cache.root))
    if as_json:
        print_json([setting.to_dict() for setting in found])
        return
    print_table(
        ("setting", "value", "from", "decides"),
        [(each.name, each.value or "-", each.origin, each.meaning) for each in found],
        num_text_columns=4,
        optional=("decides",),
    )


def _show_memory(processes: list[int], *, as_json: bool) -> None:
    from lmdbcache.cli.doctor.memory import memory_of

    found = [memory_of(process) for process in processes]
    if as_json:
        print_json([use.to_dict() for use in found])
        return
    print_table(
        ("process", "command", "private", "store pages", "other shared", "swapped", "resident"),
        [
            (
                use.pid,
                use.command,
                *map(
                    readable_size,
                    (use.private, use.store_pages, use.shared, use.swapped, use.resident),
                ),
            )
            for use in found
        ],
        num_text_columns=2,
    )
    say("private is the process's own; store pages are the page cache, given back when needed")
