"""What the commands print: tables for people, JSON for scripts, errors in one line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

import click

from lmdbcache.cli.tables import Table
from lmdbcache.cli.wording import in_options

DISK_FULL: Final = 3  # exit code
_FEW: Final = 10  # lines of a list
_speaker: Final[list[str]] = []


def say(text: str) -> None:
    """Print text, on a terminal with lines that fit; what can't be shown is escaped."""
    sys.stdout.write(_fitted(printable(text), sys.stdout) + "\n")


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
        say(with_options(str(report)))
    else:
        show(report)
    raise click.exceptions.Exit(report.exit_code)


def with_options(text: str) -> str:
    """Return text of the library with the options of the running command for its arguments."""
    context = click.get_current_context(silent=True)
    return text if context is None else in_options(text, context.command.params)


def speak_for(who: str) -> None:
    """Put a name in front of errors and log lines: several processes share one output."""
    _speaker.append(f"{who}: ")


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # has no [] in Python 3.10


class LineHandler(_StreamHandler):
    """Writes to standard error as it is then: a bar takes it over and stays below the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Standard error."""
        return sys.stderr


class LineFormatter(logging.Formatter):
    """Log lines as the errors of a command: with the speaker's name, options, whole words."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = super().format(record)
        return _fitted("".join(_speaker) + with_options(text), sys.stderr)


def print_error(error: object) -> None:
    """One error, on standard error, in one line."""
    text = f"lmdbcache: {''.join(_speaker)}{' '.join(str(error).splitlines())}"
    encoding = sys.stderr.encoding or "utf-8"
    with contextlib.suppress(OSError):  # standard error is full, or its pipe is closed
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        sys.stderr.write(_fitted(text, sys.stderr) + "\n")


def print_json(value: Any) -> None:
    """A value for scripts."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    num_text_columns: int = 1,
    optional: Sequence[str] = (),
    last: Sequence[str] = (),
) -> None:
    """A table as wide as the terminal; in a pipe as wide as it needs. Numbers go to the right.

    Args:
        headings: Of the columns.
        rows: Cells of each row.
        num_text_columns: How many columns, from the left, are text.
        optional: Headings of what a narrow terminal leaves out, the least important first.
        last: The same of what is left out where not even wrapped text fits.
    """
    table = Table(
        headings,
        [[printable(cell) for cell in row] for row in rows],
        num_text_columns=num_text_columns,
        optional=optional,
        last=last,
        room=_columns_of(sys.stdout),
    )
    heading, *lines = table.lines()
    is_styled = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    sys.stdout.write("\n".join([click.style(heading, bold=True) if is_styled else heading, *lines]))
    sys.stdout.write("\n")
    if table.hidden:
        hidden = ", ".join(heading for heading in headings if heading in table.hidden)
        say(f"not shown: {hidden} (a wider terminal or --json has them)")


def _columns_of(stream: TextIO) -> int | None:
    """Return the width of a terminal; None for a pipe or file, where lines may have any length."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def _fitted(text: str, stream: TextIO) -> str:
    """Return text with lines broken between words where a terminal would break them anywhere."""
    columns = _columns_of(stream)
    if columns is None or len(text) <= columns:
        return text
    lines = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line,
            columns,
            subsequent_indent=indent + "  ",
            break_long_words=False,  # a path is there to be copied
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


@contextlib.contextmanager
def progress_bar(
    label: str, *, shown: bool | None = None, in_bytes: bool = False, first: str = ""
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error for (done, in all); shown on a terminal if that isn't decided.

    Args:
        label: What is done.
        shown: Whether to show it; None on a terminal.
        in_bytes: Whether the numbers are bytes.
        first: The label until the first step is done.

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
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn(),
        TransferSpeedColumn() if in_bytes else RateColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=shown is None, expand=True) as bar:
        task = bar.add_task(printable(first or label), total=None)
        start: int | None = None

        def report(done: int, total: int) -> None:
            nonlocal start
            start = done if start is None else start
            waits = first and done == start < total
            bar.update(task, completed=done, total=total, description=first if waits else label)

        yield report


def counted(number: int, noun: str) -> str:
    """`1 store`, `2 stores`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
