"""The command `lmdbcache`."""

from __future__ import annotations

import ast
import io
import logging
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import typer
from typer.core import TyperGroup

from lmdbcache.cli.command import Command
from lmdbcache.cli.console import DISK_FULL, print_error, say
from lmdbcache.cli.stopping import Stopped, StopSignals
from lmdbcache.errors import CacheError, CacheFullError
from lmdbcache.files import occupy_standard_descriptors

__all__ = ["app", "command_of", "main"]

# Panel of the help → command → the module that has it, as the function `<command>_command`.
_COMMANDS: Final = {
    "Fill": {
        "extract": "extract",
        "import": "transfer",
        "export": "transfer",
        "merge": "merge",
    },
    "Look": {
        "ls": "inspect",
        "info": "inspect",
        "coverage": "coverage",
        "explain": "coverage",
        "stats": "inspect",
        "diff": "diff",
        "report": "report",
    },
    "Trust": {
        "verify": "verify",
        "audit": "audit",
        "repair": "maintain",
        "doctor": "doctor",
    },
    "Share": {
        "push": "push",
        "pull": "pull",
    },
    "Make room": {
        "compact": "maintain",
        "rm": "remove",
        "prune": "prune",
    },
    "Datasets": {
        "dataset": "dataset",
        "partition": "dataset",
    },
}
_MODULES: Final = {name: module for panel in _COMMANDS.values() for name, module in panel.items()}


class _Commands(TyperGroup):
    """The group: a command's module is imported when the command is run.

    Until then it stands in the list of commands without its options.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names; the commands are about to be described. See click."""
        for name in _MODULES:
            self.commands[name].help = _docstring_of(name)
        return super().list_commands(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command that is meant, and its arguments; see click."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, command_of(name) if found and name else found, rest


def command_of(name: str) -> Any:
    """Return a command of `lmdbcache` with its options."""
    name = "rm" if name == "clear" else name
    function = getattr(import_module(f"lmdbcache.cli.{_MODULES[name]}"), f"{name}_command")
    alone = typer.Typer(add_completion=False)
    alone.command(name, cls=Command, help=_docstring_of(name))(function)
    return typer.main.get_command(alone)


def _docstring_of(name: str) -> str | None:
    """Read it from the source: the module isn't imported, or `python -OO` has dropped it."""
    module = f"lmdbcache.cli.{_MODULES[name]}"
    loader: Any = find_spec(module).loader  # type: ignore[union-attr]
    for node in ast.parse(loader.get_source(module) or "").body:
        if isinstance(node, ast.FunctionDef) and node.name == f"{name}_command":
            return ast.get_docstring(node)
    return None


app = typer.Typer(
    name="lmdbcache",
    cls=_Commands,
    help="Compute the embeddings of an audio model once, read them back at memory speed.",
    epilog="Exit codes: 0 done; 1 a clip failed, something is missing, damaged or different, or "
    "an error; 2 wrong usage; 3 the disk is full; 130 Ctrl-C; 143 SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _panel, _names in _COMMANDS.items():
    for _name in _names:
        app.command(_name, rich_help_panel=_panel)(lambda: None)
app.command("clear", hidden=True)(lambda: None)  # the same as rm


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
