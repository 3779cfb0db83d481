"""Progress of long work, for a terminal."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["ProgressBar", "is_terminal"]


def is_terminal() -> bool:
    """Whether standard error is a terminal; it may be closed, or not be there."""
    return _is_usable() and sys.stderr.isatty()


def _is_usable() -> bool:
    return sys.stderr is not None and not sys.stderr.closed


class ProgressBar:
    """A bar with rate and time left, by tqdm.

    Args:
        total: Units of work.
        initial: Units done before.
        shown: None shows it if standard error is a terminal.
        description: What is being done.
        line: Counted from 0, for the bars of several processes on one terminal.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        shown: bool | None = None,
        description: str = "",
        line: int | None = None,
    ) -> None:
        self._bar: Any = None
        if is_terminal() if shown is None else shown and _is_usable():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                unit="clip",
                position=line,
                dynamic_ncols=True,
                smoothing=0.1,
                mininterval=0.1 if is_terminal() else 5.0,
            )

    def advance(self, steps: int) -> None:
        """Some more units are done."""
        if self._bar is not None:
            self._bar.update(steps)

    def note(self, **figures: int) -> None:
        """Show figures behind the bar; those that are 0 are left out."""
        if self._bar is not None:
            shown = {name: value for name, value in figures.items() if value}
            self._bar.set_postfix(shown, refresh=False)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
