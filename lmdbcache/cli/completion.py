"""`--install-completion` and `--show-completion`: click's scripts, where each shell looks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import click
from click.shell_completion import get_completion_class

from lmdbcache.cli.console import say

_NAME: Final = "lmdbcache"
_VARIABLE: Final = "_LMDBCACHE_COMPLETE"
# Shell → where its script goes, the file that the shell reads at start, and what that has to say.
_PLACES: Final = {
    "bash": (
        ".bash_completions/lmdbcache.sh",
        ".bashrc",
        "source '{script}'",
    ),
    "zsh": (
        ".zfunc/_lmdbcache",
        ".zshrc",
        "fpath+=~/.zfunc; autoload -Uz compinit; compinit",
    ),
    "fish": (".config/fish/completions/lmdbcache.fish", None, ""),
}


def install_completion(context: click.Context, _: click.Parameter, shell: str | None) -> None:
    """Write the script of a shell to the user's home, and end the command."""
    if shell is None or context.resilient_parsing:
        return
    shell = _checked(shell)
    script_name, start_name, line = _PLACES[shell]
    script = Path.home() / script_name
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(_script(context, shell), "utf-8")
    if start_name is not None:
        start = Path.home() / start_name
        line = line.format(script=script)
        before = start.read_text("utf-8") if start.exists() else ""
        if line not in before.splitlines():
            with start.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")
    say(f"{shell} completion is installed in {script}; it takes effect in the next shell")
    raise click.exceptions.Exit(0)


def show_completion(context: click.Context, _: click.Parameter, shell: str | None) -> None:
    """Print the script of a shell, and end the command."""
    if shell is None or context.resilient_parsing:
        return
    say(_script(context, _checked(shell)))
    raise click.exceptions.Exit(0)


def _checked(shell: str) -> str:
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in _PLACES:
        raise click.UsageError(
            f"completion is for {', '.join(_PLACES)}, not for {name!r}: name one"
        )
    return name


def _script(context: click.Context, shell: str) -> str:
    kind = get_completion_class(shell)
    if kind is None:  # pragma: no cover - click has all three
        raise click.UsageError(f"click completes nothing in {shell}")
    return kind(context.command, {}, _NAME, _VARIABLE).source()
