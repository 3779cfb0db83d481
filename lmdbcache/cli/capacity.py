"""What `lmdbcache extract --plan` shows."""

from __future__ import annotations

import typer

from lmdbcache.cli.console import DISK_FULL, print_json, print_table, say
from lmdbcache.extraction import CapacityPlan, Choice
from lmdbcache.files import readable_size

__all__ = ["show_capacity"]


def show_capacity(found: CapacityPlan, *, as_json: bool) -> None:
    """Print it and end the command: exit code 3 if the chosen one doesn't fit."""
    plan = found.chosen.plan
    if as_json:
        print_json(found.to_dict())
        raise typer.Exit(0 if plan.fits else DISK_FULL)
    print_table(
        ("", "output", "dtype", "shape", "all clips", "missing", "needed", "fits"),
        [_row(choice, is_chosen=choice is found.chosen) for choice in found.choices],
        num_text_columns=4,
    )
    say("")
    say(f"{plan}\n{plan.store}")
    say(_time(found))
    for warning in found.warnings:
        say(str(warning))
    raise typer.Exit(0 if plan.fits else DISK_FULL)


def _row(choice: Choice, *, is_chosen: bool) -> tuple[object, ...]:
    plan = choice.plan
    shape = "?" if plan.embedding_shape is None else " x ".join(map(str, plan.embedding_shape))
    return (
        "*" if is_chosen else "",
        choice.output,
        choice.dtype,
        shape,
        "?" if choice.bytes_for_all is None else readable_size(choice.bytes_for_all),
        plan.num_missing,
        "?" if plan.bytes_needed is None else readable_size(plan.bytes_needed),
        "?" if plan.bytes_needed is None else "yes" if plan.fits else "NO",
    )


def _time(found: CapacityPlan) -> str:
    speed = found.speed
    if speed is None:
        return f"time not known: {found.no_speed}"
    workers = f"{speed.num_workers} processes" if speed.num_workers != 1 else "1 process"
    rates = (
        f"on trial, {speed.num_clips} clips: front end {speed.front_end:.1f} clips/s and process "
        f"({workers}), model {speed.model:.1f} clips/s on {speed.device or 'its device'}, both "
        f"together {speed.together:.1f} clips/s"
    )
    missing, everything = found.seconds or 0.0, found.seconds_for_all or 0.0
    return (
        f"about {readable_time(missing)} for what is missing, {readable_time(everything)} for all "
        f"clips; {rates}"
    )


def readable_time(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
