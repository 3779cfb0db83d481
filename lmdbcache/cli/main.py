"""The command `lmdbcache`."""

from __future__ import annotations

import logging
import sys

import typer

from lmdbcache.cli import extract, inspect, maintain
from lmdbcache.cli.console import print_error, say
from lmdbcache.errors import CacheError

__all__ = ["app", "main"]

_INTERRUPTED = 130

app = typer.Typer(
    name="lmdbcache",
    help="Compute the embeddings of an audio model once, read them back at memory speed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("extract")(extract.extract_command)
app.command("ls")(inspect.ls_command)
app.command("info")(inspect.info_command)
app.command("coverage")(inspect.coverage_command)
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
    """Run the command line; errors of ours are one line and exit code 1 (2 for wrong usage)."""
    try:
        app()
    except (CacheError, OSError) as error:
        # An OSError names its file and reason: no permission, a disk that fails.
        print_error(error)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # typer's answer to Ctrl-C, without a word
            print_error("interrupted; what was committed is kept, run again to go on")
        raise


if __name__ == "__main__":
    main()
