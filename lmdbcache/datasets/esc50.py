"""ESC-50: 2,000 clips of 50 classes in 5 folds. No torch here."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lmdbcache.audio import shown
from lmdbcache.datasets.base import ListedDataset, checked_folder
from lmdbcache.datasets.namespaces import namespace_of
from lmdbcache.datasets.scanning import (
    Entry,
    PassedOver,
    entries_of,
    leave_out_all,
    opened_table,
    pass_over,
    usable_entries,
)
from lmdbcache.errors import DatasetError

_TABLE: Final = Path("meta", "esc50.csv")
_UNLISTED: Final = "not in the table of the dataset"
_LAYOUT: Final = "<root>/meta/esc50.csv and <root>/audio/1-100032-A-0.wav"


class ESC50Folder(ListedDataset):
    """ESC-50 as it is published: `meta/esc50.csv` and `audio/*.wav`.

    A file id is the file's name without suffix, such as `1-100032-A-0`; label and class are the
    table's `target` and `category`. Each sample has its `fold`, 1 to 5, and `esc10` (bool). A
    listed file that isn't there is left out.

    Args:
        root: Folder with `meta` and `audio`.
        namespace: Another name than `esc50`.
        decoder: What decodes the clips: files that it doesn't read are left out.

    Raises:
        DatasetError: The folder isn't ESC-50, or its table can't be used.
    """

    kind = "esc50"
    layout = "meta/esc50.csv and audio/*.wav"

    def __init__(
        self, root: str | Path, *, namespace: str | None = None, decoder: str = "soundfile"
    ) -> None:
        folder = checked_folder(root, _LAYOUT)
        table = Path(folder, _TABLE)
        rows = list(_rows(table))
        labels: dict[str, int] = {}
        for line, row in rows:
            label = _whole(table, line, "target", row["target"])
            if labels.setdefault(row["category"], label) != label:
                raise DatasetError(
                    f"{table}, line {line}: {row['category']!r} has target {label}; it had "
                    f"{labels[row['category']]} before"
                )
        name = namespace_of(self.kind, namespace)
        classes = dict(sorted(labels.items(), key=lambda pair: pair[1]))
        super().__init__(folder, name, classes, passed_over=PassedOver(decoder))
        audio = Path(folder, "audio")
        there = {entry.name: entry for entry in entries_of(audio)}
        for line, row in rows:
            name, category = row["filename"], row["category"]
            path = os.path.join(audio, name)  # noqa: PTH118
            entry = there.get(name)
            if entry is None:
                self.leave_out(path, "listed, but not on disk", class_name=category)
                continue
            if not entry.is_file or not self.passed_over.file_id(name):
                if not pass_over(entry, self.passed_over, category):
                    self.leave_out(path, "listed, but no audio file", class_name=category)
                continue
            self.add(
                self.passed_over.file_id(name) or name,
                category,
                path,
                fold=_whole(table, line, "fold", row["fold"]),
                esc10=(row.get("esc10") or "").strip().lower() == "true",
            )
        listed = {row["filename"] for _, row in rows}
        unlisted = [entry for name, entry in there.items() if name not in listed]
        self._leave_out_the_rest(folder, unlisted)
        self.finish()

    @classmethod
    def recognizes(cls, root: Path, decoder: str) -> bool:
        """Return whether its table is there."""
        del decoder
        return (root / _TABLE).is_file()

    def _leave_out_the_rest(self, folder: str, unlisted: list[Entry]) -> None:
        """Note audio that the table doesn't list."""
        unlisted = [entry for entry in unlisted if not pass_over(entry, self.passed_over)]
        for entry in (*unlisted, *usable_entries(folder, self.passed_over, skipped=("audio",))):
            if entry.is_folder:
                leave_out_all(entry.path, self.passed_over, _UNLISTED)
            elif self.passed_over.file_id(entry.name):
                self.leave_out(entry.path, _UNLISTED)


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of the table."""
    needed = ("filename", "fold", "target", "category")
    if not table.exists():
        raise DatasetError(f"{shown(table)}: no such file; expected is {_LAYOUT}")
    with opened_table(table) as file:
        reader = csv.DictReader(file)
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            raise DatasetError(f"{shown(table)} has no column {', '.join(missing)}")
        for row in reader:
            if not all(row[name] for name in needed):
                raise DatasetError(
                    f"{shown(table)}, line {reader.line_num}: not every one of "
                    f"{', '.join(needed)} is given"
                )
            yield reader.line_num, row


def _whole(table: Path, line: int, column: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DatasetError(
            f"{shown(table)}, line {line}: {column} {text!r} isn't a whole number"
        ) from None
