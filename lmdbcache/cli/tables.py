"""Tables that fit a terminal: columns are left out and text is wrapped, words stay whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

FINGERPRINT: Final = "fingerprint"  # a heading; its cells may be cut to their first digits
_FEWEST_DIGITS: Final = 8
_FEWEST_LETTERS: Final = 6
_GAP: Final = "  "
# A word and what ends it, as a reader divides names; the second, where nothing else fits.
_WORDS: Final = re.compile(r"[^\s/+@:-]*[\s/+@:-]*"), re.compile(r"[^\s/_+@:-]*[\s/_+@:-]*")


@dataclass
class _Column:
    heading: str
    cells: list[str]
    is_text: bool
    width: int = 0
    words: re.Pattern[str] = _WORDS[0]

    def __post_init__(self) -> None:
        self.width = max(map(width_of, (self.heading, *self.cells)))

    @property
    def least(self) -> int:
        """The width below which a word would be divided."""
        if not self.is_text:
            return self.width
        words = (word.rstrip() for cell in self.cells for word in self.words.findall(cell))
        return max(map(width_of, (self.heading, *words)))

    def wrapped(self, row: int) -> Iterator[str]:
        """Yield the lines of a cell."""
        line = ""
        for word in self.words.findall(self.cells[row]):
            if width_of((line + word).rstrip()) > self.width and line:
                yield line.rstrip()
                line = ""
            line += word
            while width_of(line.rstrip()) > self.width:  # a word wider than the column
                yield line[: self.width]
                line = line[self.width :]
        if line.rstrip():
            yield line.rstrip()

    def padded(self, text: str) -> str:
        """Return a line of a cell in this column's width."""
        space = " " * (self.width - width_of(text))
        return text + space if self.is_text else space + text


class Table:
    """Columns made to fit.

    What is too wide is made narrower: fingerprints first, then columns are left out, then text is
    continued on the next line.

    Args:
        headings: Of the columns.
        rows: Cells of each row.
        num_text_columns: How many columns, from the left, are text; numbers go to the right.
        optional: Headings of what may be left out, the least important first.
        last: The same of what is left out where not even wrapped text fits.
        room: Columns of the terminal; None for any number.
    """

    def __init__(
        self,
        headings: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        num_text_columns: int = 1,
        optional: Sequence[str] = (),
        last: Sequence[str] = (),
        room: int | None = None,
    ) -> None:
        rows = [[" ".join(cell.splitlines()) for cell in row] for row in rows]
        self._columns = [
            _Column(heading, [row[number] for row in rows], number < num_text_columns)
            for number, heading in enumerate(headings)
        ]
        self._num_rows = len(rows)
        self.hidden: list[str] = []
        if room is not None:
            self._fit(room, optional, last)

    def lines(self) -> Iterator[str]:
        """Yield the headings, then the rows."""
        yield self._line([column.heading for column in self._columns])
        for row in range(self._num_rows):
            for parts in zip_longest(*(c.wrapped(row) for c in self._columns), fillvalue=""):
                yield self._line(parts)

    def _line(self, parts: Sequence[str]) -> str:
        padded = (c.padded(part) for c, part in zip(self._columns, parts, strict=True))
        return _GAP.join(padded).rstrip()

    def _excess(self, room: int) -> int:
        width = sum(column.width for column in self._columns)
        return width + len(_GAP) * (len(self._columns) - 1) - room

    def _fit(self, room: int, optional: Sequence[str], last: Sequence[str]) -> None:
        for column in self._columns:
            if self._excess(room) > 0 and column.heading == FINGERPRINT:
                _shorten(column)
        self._leave_out(optional, lambda: self._excess(room) > 0)
        texts = [c for c in self._columns if c.is_text and c.heading != FINGERPRINT]
        spare = sum(column.width - column.least for column in texts)
        self._leave_out(last, lambda: self._excess(room) > spare)
        for words in _WORDS:
            for column in texts:
                column.words = words
            self._narrow(room, [(column.least, column) for column in texts])
        self._narrow(room, [(_FEWEST_LETTERS, column) for column in texts])

    def _leave_out(self, headings: Sequence[str], is_too_wide: Callable[[], bool]) -> None:
        for heading in headings:
            if is_too_wide():
                self._columns = [c for c in self._columns if c.heading != heading]
                self.hidden.append(heading)

    def _narrow(self, room: int, columns: list[tuple[int, _Column]]) -> None:
        """Take from the widest, down to a least width of each."""
        while self._excess(room) > 0:
            wide = [column for least, column in columns if column.width > least]
            if not wide:
                break
            max(wide, key=lambda column: column.width).width -= 1


def _shorten(column: _Column) -> None:
    """Leave enough digits to distinguish the fingerprints."""
    digits = _FEWEST_DIGITS
    while len({cell[:digits] for cell in column.cells}) < len(set(column.cells)):
        digits += 1
    column.cells = [cell[:digits] for cell in column.cells]
    column.width = max(digits, len(column.heading))


def width_of(text: str) -> int:
    """Return how many columns a terminal shows text in."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
