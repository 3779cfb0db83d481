"""How the command line opens a dataset that was opened in Python. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["reopening_options"]


def reopening_options(
    kind: str,
    namespace: str | None,
    decoder: str = "soundfile",
    **given: str | os.PathLike[str] | None,
) -> dict[str, str]:
    """Option → value, for `lmdbcache extract` and every other command that takes a dataset.

    Args:
        kind: What `open_dataset` calls the layout.
        namespace: The one that was given, or None for the layout's own.
        decoder: What `open_dataset` was called with.
        given: More options, those that are None left out; a `Path` is made absolute.
    """
    options = {"--dataset": kind}
    if namespace is not None:
        options["--namespace"] = namespace
    if decoder != "soundfile":
        options["--decoder"] = decoder
    for name, value in given.items():
        if value is not None:
            text = str(value.absolute()) if isinstance(value, Path) else os.fspath(value)
            options[f"--{name.replace('_', '-')}"] = text
    return options
