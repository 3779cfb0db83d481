"""Rows of a file that can only be read from front to back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["ForwardRows"]


class ForwardRows:
    """Gives rows by number; in order it reads the file once, going back begins anew.

    Args:
        blocks: Starts at the front; each block is a sequence of rows.
        num_rows: Rows in all; after the last one nothing is kept in memory.
    """

    def __init__(self, blocks: Callable[[], Iterator[Sequence[Any]]], num_rows: int) -> None:
        self._blocks = blocks
        self._num_rows = num_rows
        self._following: Iterator[Sequence[Any]] | None = None
        self._first = 0
        self._block: Sequence[Any] = ()

    def __call__(self, row: int) -> Any:
        """The row of this number.

        Raises:
            IndexError: The file ends before it.
        """
        if self._following is None or row < self._first:
            self._following, self._first, self._block = self._blocks(), 0, ()
        while row >= self._first + len(self._block):
            self._first += len(self._block)
            try:
                self._block = next(self._following)
            except StopIteration:
                raise IndexError(f"row {row} of {self._first}") from None
        found = self._block[row - self._first]
        if row == self._num_rows - 1:
            self._following, self._block = None, ()
        return found
