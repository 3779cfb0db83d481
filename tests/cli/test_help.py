"""Help, and what the command line imports."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lmdbcache.cli.main import COMMANDS as ALL, command_of

COMMANDS = ["extract", "ls", "info", "coverage", "rm", "prune", "diff", "doctor"]
COMMANDS += ["compact", "verify", "repair", "audit", "import", "export", "report", "similar"]


def test_help_lists_every_command(cli):
    """`lmdbcache --help` names all commands; `--version` the version."""
    text = cli("--help").stdout
    assert all(f" {command} " in text for command in COMMANDS)
    assert cli("--version").stdout.startswith("lmdbcache ")


def test_exit_codes_of_each_command_are_documented():
    """docs/command_line.md tells for every command what 1 and 3 mean."""
    text = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text("utf-8")
    table = text.partition("| command | 1 | 3 |")[2].partition("\n\n")[0]
    assert all(f"`{command}`" in table for command in COMMANDS)


def test_without_arguments_help_is_shown(cli):
    """A bare `lmdbcache` shows the help and says that something was missing."""
    result = cli()
    assert result.returncode == 2
    assert "extract" in result.stdout + result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(cli, command):
    """Every command has a help text, with --json and --root in it."""
    result = cli(command, "--help", COLUMNS="200")
    assert result.returncode == 0
    assert "--json" in result.stdout
    assert "LMDBCACHE_ROOT" in result.stdout


@pytest.mark.parametrize("name", [name for panel in ALL.values() for name in panel])
def test_help_begins_with_an_example(name):
    """A line to type, with a command, options and arguments that there are."""
    command = command_of(name)
    program, named, *arguments = shlex.split(command.example)
    assert (program, named) == ("lmdbcache", name)
    context = command.make_context(name, arguments)
    assert f"\n\n  $ {command.example}\n\n" in command.get_help(context)
    assert len(command.example) < 76


LIBRARIES = ["torch", "transformers", "torchaudio", "soundfile", "soxr", "tqdm"]
ROOMS = ["datasets", "embedders", "exchange", "extraction", "report", "training"]


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        (["--help"], ["numpy", "lmdb", "rich", "lmdbcache.cache", "lmdbcache.storage"]),
        (["ls"], ["rich.markdown", "pydantic", *(f"lmdbcache.{room}" for room in ROOMS)]),
        (["stats"], [f"lmdbcache.{room}" for room in ROOMS]),
        (["coverage", "VEGAS"], ["lmdbcache.exchange", "lmdbcache.training"]),
        (["verify", "--all"], []),
        (["audit", "--help"], []),
        (["rm", "--all", "--yes"], ["lmdbcache.exchange", "lmdbcache.extraction"]),
    ],
)
def test_a_command_imports_what_it_needs(imported, arguments, unneeded, tmp_path):
    """Looking needs neither torch nor an audio library; a command no room that only others use."""
    (tmp_path / "VEGAS" / "dog" / "audios").mkdir(parents=True)
    _, found = imported([*LIBRARIES, *unneeded], *arguments)
    assert not found


def test_unknown_command_and_missing_argument(cli):
    """Wrong usage: exit code 2, what is wrong, where help is; no traceback."""
    for arguments, word in (
        (["frobnicate"], "frobnicate"),
        (["info"], "STORE"),
        (["extrct"], "mean extract?"),
    ):
        result = cli(*arguments)
        assert result.returncode == 2
        assert word in result.stderr
        assert "--help" in result.stderr
        assert "Traceback" not in result.stderr
