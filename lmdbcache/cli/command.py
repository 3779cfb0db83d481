"""Commands from annotated functions: the parameters of a function are a command's for click."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, NewType, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

from lmdbcache.cli.console import printable
from lmdbcache.cli.wording import in_options
from lmdbcache.errors import CacheError

PathOrUrl = NewType("PathOrUrl", str)

_Given = tuple[str, Any, Any]  # name, hint, default


class Option:
    """What an annotation says of an option.

    Args:
        names: Such as `--json`; without one it is made from the parameter's name.
        panel: Heading of the help that the option stands under.
        settings: For `click.Option`; `min` and `max` bound a number, `parser` converts the text,
            `complete` returns what a shell offers: (value, help) by context and what is typed.
    """

    def __init__(self, *names: str, panel: str = "Options", **settings: Any) -> None:
        self.names, self.panel, self.settings = names, panel, settings

    def made(self, name: str, hint: Any, default: Any) -> Any:
        """Return the parameter for click."""
        names = self.names or (f"--{name.replace('_', '-')}",)
        settings = {"show_default": True, "show_envvar": True, **self._common(hint, default)}
        if _element(hint) is bool:
            settings |= {"type": None, "is_flag": True}
        elif _is_list(hint):
            settings["multiple"] = True
        return self._marked(_Option([name, *names], **settings))

    def _common(self, hint: Any, default: Any) -> dict[str, Any]:
        settings = dict(self.settings)
        kind = settings.pop("parser", None) or _click_type(
            _element(hint), settings.pop("min", None), settings.pop("max", None)
        )
        if complete := settings.pop("complete", None):
            settings["shell_complete"] = lambda context, _, typed: [
                CompletionItem(value, help=text or None) for value, text in complete(context, typed)
            ]
        if default is inspect.Parameter.empty:
            return {"type": kind, "required": True, **settings}
        value = default.value if isinstance(default, Enum) else default
        return {"type": kind, "required": False, "default": value, **settings}

    def _marked(self, parameter: Any) -> Any:
        parameter.panel = self.panel
        return parameter


class Argument(Option):
    """What an annotation says of an argument.

    Args:
        help: Shown in the command's help.
        complete: As of an option.
    """

    def __init__(
        self,
        *,
        help: str,  # noqa: A002 - as click has it
        complete: Callable[[click.Context, str], Any] | None = None,
    ) -> None:
        super().__init__(panel="Arguments", complete=complete)
        self.help = help

    def made(self, name: str, hint: Any, default: Any) -> Any:
        """Return the parameter for click."""
        settings = self._common(hint, default)
        if _is_list(hint):
            settings |= {"nargs": -1, "default": None}
        argument = self._marked(_Argument([name], **settings))
        argument.about = self.help
        return argument


class _Option(click.Option):
    panel = "Options"


class _Argument(click.Argument):
    panel = "Arguments"
    about = ""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.make_metavar(ctx), self.about


class Command(click.Command):
    """A command that names options in its errors, and knows ids such as `---g-f_I2yQ:dog`.

    Args:
        example: What its help begins with.
        settings: For `click.Command`.
    """

    def __init__(self, *, example: str = "", **settings: Any) -> None:
        super().__init__(**settings)
        self.example = example

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see click."""
        try:
            return super().invoke(ctx)
        except CacheError as error:
            error.args = (in_options(str(error), self.params), *error.args[1:])
            raise

    def get_help(self, ctx: click.Context) -> str:
        """Return the help, escaped here: click writes UTF-8 to a terminal of ASCII."""
        return printable(super().get_help(ctx))

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write an example, then what the command does; see click."""
        if self.example:
            formatter.write(f"\n  $ {self.example}\n")
        super().format_help_text(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; see click."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if sample_id := dashed_id(given):
                error.message = (  # type: ignore[misc]
                    f"{sample_id} begins with a dash and was taken for an option. Put -- before a "
                    f"sample id, after all options: {ctx.command_path} … -- "
                    f"{shlex.quote(sample_id)}"
                )
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the parameters under their headings; see click."""
        panels = defaultdict[str, list[tuple[str, str]]](list)
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                panels[getattr(parameter, "panel", "Options")].append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


def dashed_id(arguments: Sequence[str]) -> str | None:
    """Return the first argument that looks like a sample id and begins with a dash."""
    for argument in arguments:
        if argument == "--":
            return None
        option, colon, class_name = argument.rpartition(":")
        if option.startswith("-") and colon and class_name and "=" not in option:
            return argument
    return None


def command_from(
    name: str, function: Callable[..., None], text: str | None, example: str = ""
) -> Command:
    """Return the command that calls a function.

    Each parameter is `Annotated` with an `Option` or `Argument`, or a dataclass whose fields are,
    or the context.

    Args:
        name: Of the command.
        function: What it calls.
        text: Its help.
        example: What the help begins with.
    """
    hints = get_type_hints(function, include_extras=True)
    own = [
        (parameter.name, hints[parameter.name], parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    ]
    groups = {name: _fields(hint) for name, hint, _ in own if dataclasses.is_dataclass(hint)}
    given: dict[str, _Given] = {}  # two groups may share an option
    for parameter in own:
        for each in groups.get(parameter[0], [parameter]):
            given.setdefault(each[0], each)
    contexts = [key for key, hint, _ in given.values() if hint is click.Context]
    for key in contexts:
        del given[key]

    def call(**values: Any) -> None:
        values = {key: _converted(value, *given[key][1:]) for key, value in values.items()}
        values |= dict.fromkeys(contexts, click.get_current_context())
        arguments = {}
        for parameter, hint, _ in own:
            if parameter in groups:
                arguments[parameter] = hint(**{key: values[key] for key, *_ in groups[parameter]})
            else:
                arguments[parameter] = values[parameter]
        function(**arguments)

    parameters = [_said(hint).made(key, hint, default) for key, hint, default in given.values()]
    return Command(name=name, callback=call, params=parameters, help=text, example=example)


def _fields(group: Any) -> list[_Given]:
    hints = get_type_hints(group, include_extras=True)
    return [
        (field.name, hints[field.name], inspect.Parameter.empty)
        if field.default is dataclasses.MISSING
        else (field.name, hints[field.name], field.default)
        for field in dataclasses.fields(group)
    ]


def _converted(value: Any, hint: Any, default: Any) -> Any:
    """Return what click gives as what the function is annotated with."""
    if _is_list(hint):
        return list(value) if value else default
    kind = _element(hint)
    return kind(value) if inspect.isclass(kind) and issubclass(kind, Enum) else value


# ---- hints


def _annotated(hint: Any) -> Any:
    # Python 3.10 makes an optional one of each whose default is None.
    return hint if hasattr(hint, "__metadata__") else _without_none(hint)


def _said(hint: Any) -> Option:
    said: Option = _annotated(hint).__metadata__[0]
    return said


def _is_list(hint: Any) -> bool:
    return get_origin(_without_none(_annotated(hint).__origin__)) is list


def _element(hint: Any) -> Any:
    kind = _without_none(_annotated(hint).__origin__)
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _without_none(hint: Any) -> Any:
    arguments = get_args(hint)
    return next(a for a in arguments if a is not NoneType) if NoneType in arguments else hint


def _click_type(kind: Any, least: Any, most: Any) -> Any:
    if kind is PathOrUrl:
        return click.Path()
    if kind is Path:
        return click.Path(path_type=Path)
    if issubclass(kind, Enum):
        return click.Choice([one.value for one in kind])
    if least is None and most is None:
        return kind
    return {int: click.IntRange, float: click.FloatRange}[kind](least, most)
