"""VGGSound: ten-second clips of YouTube videos, of 309 classes. No torch here."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from lmdbcache.audio import shown
from lmdbcache.datasets.base import ListedDataset, checked_folder, own_split_name
from lmdbcache.datasets.namespaces import namespace_of
from lmdbcache.datasets.scanning import (
    PassedOver,
    leave_out_all,
    opened_table,
    usable_entries,
    visible_entries,
)
from lmdbcache.errors import DatasetError
from lmdbcache.files import expand_user

_LAYOUT: Final = (
    "<root>/vggsound.csv (YouTube id, start second, label, split) and "
    "<root>/<any folder>/<YouTube id>_<start, six digits>.wav"
)
_SECONDS: Final = re.compile(r"[0-9]{1,6}(\.[0-9]*)?")


class _Row(NamedTuple):
    line: int
    ytid: str
    start: int
    label: str
    split: str

    @property
    def file_id(self) -> str:
        return f"{self.ytid}_{self.start:06d}"


class VGGSoundFolder(ListedDataset):
    """VGGSound: its table, and audio files called `<YouTube id>_<start, six digits>.wav`.

    The files lie in the root or in folders right below it. Many of the listed videos are gone from
    YouTube, so a listed file that isn't there is left out. Labels are positions in the sorted list
    of the table's classes, present or not; each sample has its `split`, `ytid` and `start_second`.

    Args:
        root: Folder with the audio files.
        table: The table; None takes `vggsound.csv` of the root, or the only `vggsound*.csv`.
        namespace: Another name than `vggsound`.
        decoder: What decodes the clips: files that it doesn't read are left out.

    Raises:
        DatasetError: There is no such table or file, or the table can't be used.
    """

    kind = "vggsound"
    layout = "vggsound.csv and <YouTube id>_<start, six digits>.wav"

    def __init__(
        self,
        root: str | Path,
        *,
        table: str | Path | None = None,
        namespace: str | None = None,
        decoder: str = "soundfile",
    ) -> None:
        folder = checked_folder(root, _LAYOUT)
        path = _find_table(folder) if table is None else expand_user(table)
        if path is None:
            raise DatasetError(
                f"{shown(folder)} has no vggsound.csv; give the table with `table`. Expected is "
                f"{_LAYOUT}"
            )
        rows = list(_rows(path))
        name = namespace_of(self.kind, namespace)
        classes = sorted({row.label for row in rows})
        super().__init__(
            folder,
            name,
            {label: number for number, label in enumerate(classes)},
            passed_over=PassedOver(decoder),
        )
        labels_of_ids = {row.file_id: row.label for row in rows}
        files = self._audio_files(folder, labels_of_ids.keys())
        passed_over = self._give_classes(labels_of_ids)
        for row in rows:
            file_id = row.file_id
            if file_id in passed_over and file_id not in files:
                continue
            if file_id not in files:
                name, reason = f"{file_id}:{row.label}", "listed, but not on disk"
                self.leave_out(name, reason, class_name=row.label)
                continue
            more = {"split": own_split_name(row.split)} if row.split else {}
            self.add(
                file_id,
                row.label,
                files[file_id],
                ytid=row.ytid,
                start_second=float(row.start),
                **more,
            )
        self.finish()

    @classmethod
    def recognizes(cls, root: Path, decoder: str) -> bool:
        """Return whether its table is there."""
        del decoder
        return _find_table(root) is not None

    def _give_classes(self, labels: dict[str, str]) -> set[str]:
        """Note the classes of listed files that are passed over; the ids of these files."""
        ids = [Path(item.name).stem for item in self.left_out]
        self.left_out[:] = [
            replace(item, class_name=labels.get(file_id, ""))
            for item, file_id in zip(self.left_out, ids, strict=True)
        ]
        return set(ids)

    def _audio_files(self, folder: str, wanted: Collection[str]) -> dict[str, str]:
        """File id → path of the wanted ones, in the folder and in those right below it."""
        files: dict[str, str] = {}
        for entry in usable_entries(folder, self.passed_over):
            below = usable_entries(entry.path, self.passed_over) if entry.is_folder else [entry]
            for file in below:
                file_id = self.passed_over.file_id(file.name)
                if file.is_folder:
                    leave_out_all(file.path, self.passed_over, "deeper than one folder")
                elif file_id and file_id in wanted:
                    if files.setdefault(file_id, file.path) != file.path:
                        raise DatasetError(
                            f"{shown(files[file_id])} and {shown(file.path)} are both "
                            f"{file_id!a}; remove one of them"
                        )
                elif file_id:
                    self.leave_out(file.path, "not in the table of the dataset")
        return files


def _find_table(folder: str | Path) -> Path | None:
    """`vggsound.csv` of a folder, or its only `vggsound*.csv`, or None."""
    tables = [
        Path(entry.path)
        for entry in visible_entries(folder)
        if entry.is_file
        and entry.name.lower().startswith("vggsound")
        and entry.name.lower().endswith(".csv")
    ]
    named = [table for table in tables if table.name.lower() == "vggsound.csv"]
    return (named or tables)[0] if len(named or tables) == 1 else None


def _rows(table: Path) -> Iterator[_Row]:
    seen: set[tuple[str, str]] = set()
    with opened_table(table) as file:
        reader = csv.reader(file)
        for columns in reader:
            if not columns or (reader.line_num == 1 and not _is_number(columns)):
                continue  # an empty line, or a line of headings
            row = _row(table, reader.line_num, columns)
            if (row.file_id, row.label) not in seen:
                seen.add((row.file_id, row.label))
                yield row


def _is_number(columns: list[str]) -> bool:
    return len(columns) > 1 and _SECONDS.fullmatch(columns[1].strip()) is not None


def _row(table: Path, line: int, columns: list[str]) -> _Row:
    ytid, start, label, split = ([text.strip() for text in columns] + [""] * 4)[:4]
    if not (ytid and label and _is_number(columns)) or len(columns) not in (3, 4):
        raise DatasetError(
            f"{shown(table)}, line {line}: {columns!s:.100}; expected are YouTube id, start "
            "second, label and split"
        )
    return _Row(line, ytid, int(float(start)), label, split)
