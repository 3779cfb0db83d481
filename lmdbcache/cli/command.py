"""The base of every command: errors name options, and sample ids may begin with a dash."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from lmdbcache.cli.wording import in_options
from lmdbcache.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Command", "dashed_id"]


class Command(TyperCommand):
    """A command that names options in its errors, and knows ids such as `---g-f_I2yQ:dog`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see click."""
        try:
            return super().invoke(ctx)
        except CacheError as error:
            error.args = (in_options(str(error), self.params), *error.args[1:])
            raise

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; see typer."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # By name, as typer brings click in some versions and imports it in others.
            sample_id = dashed_id(given) if type(error).__name__ == "NoSuchOption" else None
            if sample_id is not None:
                error.message = (  # type: ignore[attr-defined]
                    f"{sample_id} begins with a dash and was taken for an option. Put -- before a "
                    f"sample id, after all options: {ctx.command_path} … -- "
                    f"{shlex.quote(sample_id)}"
                )
            raise


def dashed_id(arguments: Sequence[str]) -> str | None:
    """Return the first argument that looks like a sample id and begins with a dash."""
    for argument in arguments:
        if argument == "--":
            return None
        option, colon, class_name = argument.rpartition(":")
        if option.startswith("-") and colon and class_name and "=" not in option:
            return argument
    return None
