"""The command `lmdbcache`."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Final

import typer

from lmdbcache.cli import (
    audit,
    dataset,
    diff,
    doctor,
    extract,
    finding,
    inspect,
    maintain,
    merge,
    prune,
    pull,
    push,
    remove,
    report,
    transfer,
)
from lmdbcache.cli.command import Command
from lmdbcache.cli.console import DISK_FULL, print_error, say
from lmdbcache.cli.parameters import help_of
from lmdbcache.cli.stopping import Stopped, StopSignals
from lmdbcache.errors import CacheError, CacheFullError
from lmdbcache.files import occupy_standard_descriptors

__all__ = ["app", "main"]

app = typer.Typer(
    name="lmdbcache",
    help="Compute the embeddings of an audio model once, read them back at memory speed.",
    epilog="Exit codes: 0 done; 1 a clip failed, something is missing, damaged or different, or "
    "an error; 2 wrong usage; 3 the disk is full; 130 Ctrl-C; 143 SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_COMMANDS: Final[dict[str, dict[str, Callable[..., None]]]] = {
    "Fill": {
        "extract": extract.extract_command,
        "import": transfer.import_command,
        "export": transfer.export_command,
        "merge": merge.merge_command,
    },
    "Look": {
        "ls": inspect.ls_command,
        "info": inspect.info_command,
        "coverage": inspect.coverage_command,
        "explain": finding.explain_command,
        "stats": finding.stats_command,
        "diff": diff.diff_command,
        "report": report.report_command,
    },
    "Trust": {
        "verify": maintain.verify_command,
        "audit": audit.audit_command,
        "repair": maintain.repair_command,
        "doctor": doctor.doctor_command,
    },
    "Share": {
        "push": push.push_command,
        "pull": pull.pull_command,
    },
    "Make room": {
        "compact": maintain.compact_command,
        "rm": remove.rm_command,
        "prune": prune.prune_command,
    },
    "Datasets": {
        "dataset": dataset.dataset_command,
        "partition": dataset.partition_command,
    },
}
for _panel, _commands in _COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, cls=Command, help=help_of(_command), rich_help_panel=_panel)(_command)
app.command("clear", help="The same as rm.", hidden=True)(remove.rm_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from lmdbcache import __version__

        say(f"lmdbcache {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    *,
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what is done."),
    version: bool = typer.Option(  # noqa: ARG001
        False, "--version", help="Print the version.", callback=_show_version, is_eager=True
    ),
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s" if verbose else "lmdbcache: %(message)s",
        stream=sys.stderr,
    )
    if not verbose:
        # Its summary says the same, on standard output.
        logging.getLogger("lmdbcache.extraction").setLevel(logging.ERROR)
        logging.getLogger("lmdbcache.extraction.decoding").setLevel(logging.WARNING)


def main() -> None:
    """Run the command line and end the process; docs/command_line.md lists the exit codes."""
    _prepare_streams()
    stop = StopSignals()
    stop.install()
    code = _run(stop)
    stop.finish()
    sys.exit(_flush_output() or code)


def _prepare_streams() -> None:
    # Python has None for a stream whose descriptor was closed (daemons, `>&-`).
    occupy_standard_descriptors()
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an ASCII terminal can't show is escaped
            stream.reconfigure(errors="backslashreplace")


def _flush_output() -> int:
    """Write what is left to standard output; here, as Python would end with a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # whoever reads has enough
            print_error(f"standard output can't be written: {error.strerror}")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return 1
    return 0


def _run(stop: StopSignals) -> int | str | None:
    try:
        app()
    except Stopped as stopped:
        print_error(f"interrupted; {stopped}")
    except BaseException as error:  # noqa: BLE001 - what a stop leaves behind is no news
        if stop.number is None:
            return _code_of(error)
        print_error("interrupted; what was committed is kept, run the same command again to go on")
    return stop.exit_code


def _code_of(error: BaseException) -> int | str | None:
    if isinstance(error, SystemExit):
        return error.code
    if not isinstance(error, (CacheError, OSError)):
        raise error
    # An OSError names its file and reason: no permission, a disk that fails.
    print_error(error)
    return DISK_FULL if isinstance(error, CacheFullError) else 1


if __name__ == "__main__":
    main()
