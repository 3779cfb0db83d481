"""Groups of options that several commands share: a dataclass whose fields are the options."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

__all__ = ["grouped", "help_of"]


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


def help_of(command: Callable[..., None]) -> str | None:
    """Return a command's docstring, from the source where `python -OO` has dropped it."""
    if command.__doc__ is not None:
        return command.__doc__
    try:
        (function,) = ast.parse(inspect.getsource(command)).body
    except OSError:  # no source either
        return None
    return ast.get_docstring(function)  # type: ignore[arg-type]


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
