"""The command `lmdbcache`."""

from __future__ import annotations

import logging
import sys

import typer

from lmdbcache.cli import extract, finding, inspect, maintain
from lmdbcache.cli.console import DISK_FULL, print_error, say
from lmdbcache.cli.stopping import Stopped, StopSignals
from lmdbcache.errors import CacheError, CacheFullError

__all__ = ["app", "main"]

app = typer.Typer(
    name="lmdbcache",
    help="Compute the embeddings of an audio model once, read them back at memory speed.",
    epilog="Exit codes: 0 done; 1 a clip failed, something is missing or damaged, or an error; "
    "2 wrong usage; 3 the disk is full; 130 Ctrl-C; 143 SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("extract")(extract.extract_command)
app.command("ls")(inspect.ls_command)
app.command("info")(inspect.info_command)
app.command("coverage")(inspect.coverage_command)
app.command("explain")(finding.explain_command)
app.command("stats")(finding.stats_command)
app.command("clear")(maintain.clear_command)
app.command("compact")(maintain.compact_command)
app.command("verify")(maintain.verify_command)
app.command("repair")(maintain.repair_command)


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


def main() -> None:
    """Run the command line and end the process; docs/command_line.md lists the exit codes."""
    stop = StopSignals()
    stop.install()
    code = _run(stop)
    stop.finish()
    sys.exit(code)


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
