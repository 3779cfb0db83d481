"""The base of what a call reports: plain values for JSON, an exit code, text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Any, ClassVar


class Report:
    """Base of the dataclasses that a call returns and a command prints.

    A subclass is a dataclass, frozen or not; it overrides what it needs otherwise. `derived` names
    the properties that `to_dict` adds to the fields; those called `is_…` say that all is well.
    """

    derived: ClassVar[tuple[str, ...]] = ()

    @property
    def exit_code(self) -> int:
        """Exit status of a command that ends with this: 0, or 1 if something is left to do."""
        return int(not all(getattr(self, name) for name in self.derived if name[:3] == "is_"))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the derived properties as plain values for JSON."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return {name: plain(getattr(self, name)) for name in (*names, *self.derived)}

    def __str__(self) -> str:
        """Return one line for each value that isn't empty."""
        values = self.to_dict().items()
        return "\n".join(
            f"{name}: {value}" for name, value in values if value not in (None, "", [], {})
        )


def plain(value: Any) -> Any:  # noqa: PLR0911
    """Return a value as JSON has it: dicts with text keys, lists, text, numbers, None.

    Args:
        value: An object with `to_dict`, a dataclass, named tuple, mapping, collection, path, time,
            enum or numpy scalar, nested at will; anything else is returned as it is.
    """
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(plain(name)): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if getattr(value, "shape", None) == ():
        return value.item()
    return value
