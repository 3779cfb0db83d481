"""The command `lmdbcache`."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import logging
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from lmdbcache.cli.command import Command, command_from
from lmdbcache.cli.completion import install_completion, show_completion
from lmdbcache.cli.console import DISK_FULL, LineFormatter, LineHandler, print_error, printable, say
from lmdbcache.cli.stopping import Stopped, StopSignals
from lmdbcache.errors import CacheError, CacheFullError
from lmdbcache.files import occupy_standard_descriptors

# Panel of the help → command → the module that has it, as the function `<command>_command`, and
# the arguments of the example that its help begins with.
COMMANDS: Final = {
    "Fill": {
        "extract": ("extract", "VEGAS --model ast --root VEGAS.cache"),
        "import": ("transfer", "embeddings.pt --model ast --duration 5"),
        "export": ("transfer", "257fd04a --format safetensors --out vegas.safetensors"),
        "merge": ("merge", "node1.cache node2.cache --root VEGAS.cache"),
    },
    "Look": {
        "ls": ("inspect", "--root VEGAS.cache --sort size"),
        "info": ("inspect", "257fd04a --root VEGAS.cache"),
        "coverage": ("coverage", "VEGAS --model ast --root VEGAS.cache"),
        "explain": ("coverage", "video_00001:dog --model ast"),
        "stats": ("inspect", "257fd04a"),
        "diff": ("diff", "257fd04a 65fa8934"),
        "similar": ("similar", "video_00001:dog --k 10"),
        "report": ("report", "--root VEGAS.cache --out vegas.html"),
    },
    "Trust": {
        "verify": ("verify", "--all"),
        "audit": ("audit", "257fd04a --samples 50"),
        "repair": ("maintain", "257fd04a --dry-run"),
        "doctor": ("doctor", "--root VEGAS.cache"),
    },
    "Share": {
        "push": ("push", "s3://bucket/embeddings 257fd04a"),
        "pull": ("pull", "s3://bucket/embeddings 257fd04ad08e02f3"),
    },
    "Make room": {
        "compact": ("maintain", "--all --dry-run"),
        "rm": ("remove", "257fd04a --class dog --dry-run"),
        "prune": ("prune", "--unused-since 90d --dry-run"),
    },
    "Datasets": {
        "dataset": ("dataset", "VEGAS"),
        "partition": ("dataset", "VEGAS --num-nodes 10"),
    },
}
# What a new user begins with, on a folder of audio files with one folder for each class.
_FIRST: Final = ("dataset FOLDER", "extract FOLDER --model ast", "ls")
_CLEAR: Final = "clear"  # the same as rm, and not listed
_KEPT: Final = "what was committed is kept, run the same command again to go on"
_OF_COMMAND: Final = {name: found for panel in COMMANDS.values() for name, found in panel.items()}


@contextlib.contextmanager
def _interruption() -> Iterator[None]:
    """Say what a stop leaves; of a KeyboardInterrupt click says "Aborted!"."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(_KEPT) from None


class _Commands(click.Group):
    """The group: a command's module is imported when the command is run."""

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        """Return the context; see click."""
        with _interruption():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see click."""
        with _interruption():
            return super().invoke(ctx)

    def get_help(self, ctx: click.Context) -> str:
        """Return the help, escaped as each command's; see click."""
        return printable(super().get_help(ctx))

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what to begin with, then what the program does; see click."""
        formatter.write("\n" + "".join(f"  $ lmdbcache {command}\n" for command in _FIRST))
        super().format_help_text(ctx, formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is named, or name the nearest; see click."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if near := difflib.get_close_matches(args[0], _OF_COMMAND, 1):
                raise click.UsageError(f"{error.message} Did you mean {near[0]}?", ctx) from None
            raise

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names; see click."""
        return [*_OF_COMMAND]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, with its module imported; see click."""
        return command_of(cmd_name) if cmd_name in {*_OF_COMMAND, _CLEAR} else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings; see click."""
        for panel, commands in COMMANDS.items():
            with formatter.section(panel):
                formatter.write_dl([(name, _summary_of(name)) for name in commands])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return what a shell offers: commands, or options of the group; see click."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        names = [name for name in _OF_COMMAND if name.startswith(incomplete)]
        return [CompletionItem(name, help=_summary_of(name)) for name in names]


def command_of(name: str) -> Command:
    """Return a command of `lmdbcache` with its options."""
    name = "rm" if name == _CLEAR else name
    module, arguments = _OF_COMMAND[name]
    function = getattr(import_module(f"lmdbcache.cli.{module}"), f"{name}_command")
    return command_from(name, function, _docstring_of(name), f"lmdbcache {name} {arguments}")


def _docstring_of(name: str) -> str:
    """Read it from the source: the module isn't imported, or `python -OO` has dropped it."""
    module = f"lmdbcache.cli.{_OF_COMMAND[name][0]}"
    loader: Any = find_spec(module).loader  # type: ignore[union-attr]
    _, _, text = (loader.get_source(module) or "").partition(f"\ndef {name}_command(")
    return inspect.cleandoc(text.split('"""', 2)[1]) if text else ""


def _summary_of(name: str) -> str:
    return " ".join(_docstring_of(name).partition("\n\n")[0].split())


def _show_version(_: click.Context, __: click.Parameter, wanted: bool) -> None:
    if wanted:
        from lmdbcache import __version__

        say(f"lmdbcache {__version__}")
        raise click.exceptions.Exit(0)


@click.command(
    "lmdbcache",
    cls=_Commands,
    help="Compute the embeddings of an audio model once, read them back at memory speed.",
    epilog="Exit codes: 0 done; 1 a clip failed, something is missing, damaged or different, or "
    "an error; 2 wrong usage; 3 the disk is full; 130 Ctrl-C; 143 SIGTERM.",
)
@click.option("--verbose", "-v", is_flag=True, help="Log what is done.")
@click.option(
    "--version",
    is_flag=True,
    help="Print the version.",
    callback=_show_version,
    is_eager=True,
    expose_value=False,
)
@click.option(
    "--install-completion",
    metavar="[SHELL]",
    is_flag=False,
    flag_value="",
    help="Install completion for the current shell, or for bash, zsh or fish.",
    callback=install_completion,
    is_eager=True,
    expose_value=False,
)
@click.option(
    "--show-completion",
    metavar="[SHELL]",
    is_flag=False,
    flag_value="",
    help="Show completion for the current shell, to copy it or customize the installation.",
    callback=show_completion,
    is_eager=True,
    expose_value=False,
)
def app(*, verbose: bool) -> None:
    """Set up logging, before any command."""
    handler = LineHandler()
    form = "%(levelname)s %(name)s: %(message)s" if verbose else "lmdbcache: %(message)s"
    handler.setFormatter(LineFormatter(form))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
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
        print_error(f"interrupted; {_KEPT}")
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
