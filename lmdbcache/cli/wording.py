"""Errors in the words of the command line: library code names arguments, users type options."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable
from typing import Any, Final

_ARGUMENT: Final = re.compile(r"`(?P<name>[a-z_]+)(?:=(?P<value>[^`]*))?`")
_SUBJECT: Final = re.compile(r"\A(?P<name>[a-z_]+)(?=: )")  # what an error begins with
_CALL: Final = re.compile(r"`cache\.(?P<method>[a-z]+)\(config\)`")
# Arguments whose option has another name.
_OTHER_NAMES: Final = {
    "sample_ids": ("ids",),
    "classes": ("class_",),
    "namespace": ("given_namespace",),
    "table": ("csv",),
    "format": ("format_",),
}
_AST: Final = "`model_name='ast'`", "`model='ast'`"


def in_options(message: str, parameters: Iterable[Any]) -> str:
    """Return a message with the arguments that it names as the options of a command.

    `num_workers=0` in backticks becomes --num-workers 0, an argument that the message begins with
    (`duration: …`) its option, and `cache.repair(config)` becomes `lmdbcache repair`. Arguments
    that the command lacks stay as they are.

    Args:
        message: Of a CacheError.
        parameters: The command's parameters, as click has them.
    """
    options = {parameter.name: parameter for parameter in parameters if parameter.opts}

    def option_of(name: str) -> Any:
        names = (name, *_OTHER_NAMES.get(name, ()))
        found = next((options[each] for each in names if each in options), None)
        return found if found is not None and found.opts[0].startswith("--") else None

    def typed(match: re.Match[str]) -> str:
        found = option_of(match["name"])
        return match[0] if found is None else _typed(found, match["value"])

    def subject(match: re.Match[str]) -> str:
        found = option_of(match["name"])
        return match[0] if found is None else _typed(found, None)

    message = _CALL.sub(r"`lmdbcache \g<method>`", message.replace(*_AST))
    return _ARGUMENT.sub(typed, _SUBJECT.sub(subject, message))


def _typed(option: Any, value: str | None) -> str:
    name = option.opts[0]
    if value is None or value == "True":
        return str(name)
    if value == "False":
        return str(max(option.secondary_opts, key=len, default=name))
    try:
        value = str(ast.literal_eval(value))
    except (ValueError, SyntaxError):  # a placeholder such as FOLDER
        return f"{name} {value}"
    return f"{name} {shlex.quote(value)}"
