"""What the commands print: tables for people, JSON for scripts, errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_error", "print_json", "print_table", "say", "sizes"]


def say(text: str) -> None:
    """Print text as it is; what the terminal can't show is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def print_error(error: object) -> None:
    """One error, on standard error."""
    text = f"lmdbcache: {error}"
    encoding = sys.stderr.encoding or "utf-8"
    sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def print_json(value: Any) -> None:
    """A value for scripts."""
    say(json.dumps(value, indent=2))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table as wide as the terminal; in a pipe as wide as it needs."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(_printable(cell) for cell in row))
    width = None if sys.stdout.isatty() else 240
    Console(width=width, highlight=False, markup=False, soft_wrap=False).print(table)


def sizes(num_bytes: float) -> str:
    """A size with a unit of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _printable(cell: object) -> str:
    return str(cell).encode("utf-8", "backslashreplace").decode("utf-8")
