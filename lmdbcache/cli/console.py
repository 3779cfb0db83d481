"""What the commands print: tables for people, JSON for scripts, errors in one line."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Literal, NoReturn

import click

__all__ = [
    "DISK_FULL",
    "counted",
    "finish",
    "is_wide",
    "print_error",
    "print_json",
    "print_table",
    "printable",
    "progress_bar",
    "say",
    "say_some",
    "speak_for",
]

DISK_FULL: Final = 3  # exit code
_FINGERPRINT_WIDTH: Final = 16
_FEW: Final = 10  # lines of a list
_speaker: Final[list[str]] = []


def say(text: str) -> None:
    """Print text as it is; what the terminal can't show is escaped."""
    sys.stdout.write(printable(text) + "\n")


def printable(cell: object) -> str:
    """Return the text with what standard output can't show escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return str(cell).encode(encoding, "backslashreplace").decode(encoding)


def say_some(
    lines: Sequence[str],
    *,
    what: str = "",
    printed: Callable[[str], None] = say,
) -> None:
    """Print the first lines of a list, and how many more there are.

    Args:
        lines: The list.
        what: What the others are.
        printed: Prints a line.
    """
    for line in lines[:_FEW]:
        printed(line)
    if len(lines) > _FEW:
        printed(f"… and {len(lines) - _FEW} more{what and f' {what}'}; see --json")


def finish(report: Any, show: Callable[[Any], None] | None = None, *, as_json: bool) -> NoReturn:
    """Print a report and end the command with its exit code.

    Args:
        report: A `Report`.
        show: Prints it in words; None prints its text.
        as_json: Print JSON instead.
    """
    if as_json:
        print_json(report.to_dict())
    elif show is None:
        say(str(report))
    else:
        show(report)
    raise click.exceptions.Exit(report.exit_code)


def speak_for(who: str) -> None:
    """Put a name in front of errors and log lines: several processes share one output."""
    _speaker.append(f"{who}: ")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Named(handler.formatter or logging.Formatter(), f"{who}: "))


class _Named(logging.Formatter):
    def __init__(self, formatter: logging.Formatter, name: str) -> None:
        super().__init__()
        self._formatter, self._name = formatter, name

    def format(self, record: logging.LogRecord) -> str:
        return self._name + self._formatter.format(record)


def print_error(error: object) -> None:
    """One error, on standard error, in one line."""
    text = f"lmdbcache: {''.join(_speaker)}{' '.join(str(error).splitlines())}"
    encoding = sys.stderr.encoding or "utf-8"
    with contextlib.suppress(OSError):  # standard error is full, or its pipe is closed
        sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def print_json(value: Any) -> None:
    """A value for scripts."""
    say(json.dumps(value, indent=2))


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, num_text_columns: int = 1
) -> None:
    """A table as wide as the terminal; in a pipe as wide as it needs. Numbers go to the right."""
    from rich.console import Console
    from rich.table import Table

    cells = [[printable(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if number < num_text_columns else "right"
        widest = max([len(heading), *(len(row[number]) for row in cells)])
        table.add_column(
            heading,
            overflow="fold",
            justify=justify,
            # A narrow terminal folds other columns first: a fingerprint is there to be copied.
            min_width=min(widest, _FINGERPRINT_WIDTH) if number == 0 else None,
        )
    for row in cells:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 240
    Console(width=width, highlight=False, markup=False, soft_wrap=False).print(table)


def is_wide(columns: int) -> bool:
    """Whether standard output shows so many columns; what isn't a terminal shows any number."""
    return not sys.stdout.isatty() or shutil.get_terminal_size().columns >= columns


@contextlib.contextmanager
def progress_bar(
    label: str, *, shown: bool | None = None, in_bytes: bool = False
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error for (done, in all); shown on a terminal if that isn't decided.

    Yields:
        To be called with what is done and what there is in all; None if no bar is shown.
    """
    is_open = sys.stderr is not None and not sys.stderr.closed  # a daemon may have closed it
    if not is_open or not (sys.stderr.isatty() if shown is None else shown):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        """Steps per second."""

        def render(self, task: Task) -> Text:
            """Return the rate; nothing before there is one."""
            return Text(f"{task.speed:.1f}/s" if task.speed else "", "progress.data.speed")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TransferSpeedColumn() if in_bytes else RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=shown is None) as bar:
        task = bar.add_task(printable(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted(number: int, noun: str) -> str:
    """`1 store`, `2 stores`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
