"""What typer lacks: options in groups, errors that name options, ids that begin with a dash."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shlex
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from typer.core import TyperCommand

from lmdbcache.cli.wording import in_options
from lmdbcache.errors import CacheError

__all__ = ["Command", "dashed_id", "grouped"]


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


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, which sees the fields of each parameter that is a dataclass.

    The fields, `Annotated` like any of typer's parameters, become options; the command is called
    with the dataclass made of them.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    parameters = [
        parameter
        for name, own in inspect.signature(command).parameters.items()
        for parameter in (
            _parameters_of(groups[name])
            if name in groups
            else [own.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])]
        )
    ]

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        fields = {
            name: [field.name for field in dataclasses.fields(group)]
            for name, group in groups.items()
        }
        taken = {field for names in fields.values() for field in names}
        own = {name: value for name, value in values.items() if name not in taken}
        for name, group in groups.items():
            own[name] = group(**{field: values[field] for field in fields[name]})
        command(**own)

    # Two groups may share an option.
    parameters = list({parameter.name: parameter for parameter in parameters}.values())
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    return spread


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=inspect.Parameter.empty
            if field.default is dataclasses.MISSING
            else field.default,
        )
        for field in dataclasses.fields(group)
    ]
