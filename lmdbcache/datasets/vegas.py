"""The VEGAS folder on disk: its classes and its files. No torch here."""

from __future__ import annotations

import csv
import difflib
import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lmdbcache.audio import shown
from lmdbcache.datasets.base import ListedDataset
from lmdbcache.datasets.namespaces import namespace_of
from lmdbcache.datasets.scanning import (
    Entry,
    PassedOver,
    leave_out_all,
    opened_table,
    summary_of,
    usable_entries,
    visible_entries,
)
from lmdbcache.errors import DatasetError
from lmdbcache.files import expand_user

CLASS_LABELS: Final[dict[str, int]] = {
    "baby_cry": 0,
    "chainsaw": 1,
    "dog": 2,
    "drum": 3,
    "fireworks": 4,
    "helicopter": 5,
    "printer": 6,
    "rail_transport": 7,
    "snoring": 8,
    "water_flowing": 9,
}
LABEL_TO_CLASS: Final[dict[int, str]] = {label: name for name, label in CLASS_LABELS.items()}

NAMESPACE: Final = "vegas"

_IMAGE_EXTENSIONS: Final = (".jpg", ".jpeg", ".png")
_VIDEO_EXTENSIONS: Final = (".mp4",)
_NO_AUDIO: Final = ("img", "videos")
_LAYOUT: Final = "<root_dir>/<class>/audios/video_00001.wav"

_logger = logging.getLogger(__name__)


class VEGASFolder(ListedDataset):
    """The clips of VEGAS below a folder, `<class>/audios/video_00001.wav`.

    A sample needs its audio file only. It has `image_path` and `video_path`, None where there is no
    file, and by `video_info.csv` its `ytid`, `start_second` and `end_second`. Other audio is in
    `left_out`.

    Args:
        root: Folder that holds one folder per class.
        namespace: Another name than `vegas`.
        decoder: What decodes the clips: files that it doesn't read are left out.
        classes: Which of the ten classes to list; None for those that are there.

    Raises:
        DatasetError: The root or all class folders are missing, there are no clips but others
            that are left out, or two files have one file id.
    """

    kind = NAMESPACE
    layout = "<class>/audios/video_00001.wav"

    def __init__(
        self,
        root: str | Path,
        *,
        namespace: str | None = None,
        decoder: str = "soundfile",
        classes: Sequence[str] | None = None,
    ) -> None:
        folder = expand_user(root).absolute()
        super().__init__(
            str(folder),
            namespace_of(self.kind, namespace),
            CLASS_LABELS,
            passed_over=PassedOver(decoder),
        )
        if not folder.is_dir():
            raise DatasetError(f"root_dir: {str(folder)!r} isn't a folder; expected is {_LAYOUT}")
        _pass_over_others(folder, self.passed_over)
        wanted = list(CLASS_LABELS if classes is None else classes)
        missing = [name for name in wanted if not _has_class(folder, name)]
        if missing and len(missing) == len(wanted):
            raise DatasetError(
                f"root_dir: {str(folder)!r} has no folder <class>/audios for any of "
                f"{', '.join(missing)}; expected is {_LAYOUT}"
                + (f"; {summary_of(self.left_out)}" if self.left_out else "")
            )
        if missing and classes is not None:
            _logger.warning("%s has no folder <class>/audios for: %s", folder, ", ".join(missing))
        for name in wanted:
            if name not in missing:
                self._add_class(folder / name, name)
        if self.samples or classes is None:
            self.finish()

    @classmethod
    def recognizes(cls, root: Path, decoder: str) -> bool:
        """Return whether there is a class folder of VEGAS."""
        del decoder
        return any(_has_class(root, name) for name in CLASS_LABELS)

    def _add_class(self, folder: Path, class_name: str) -> None:
        images = _files_by_stem(folder / "img", _IMAGE_EXTENSIONS)
        videos = _files_by_stem(folder / "videos", _VIDEO_EXTENSIONS)
        clips = _read_video_info(folder / "video_info.csv")
        for stem, path in _audio_files(folder, class_name, self.passed_over):
            file_id = unicodedata.normalize("NFC", stem)
            self.add(
                file_id,
                class_name,
                path,
                image_path=images.get(file_id),
                video_path=videos.get(file_id),
                **(_place_of(clips[file_id]) if file_id in clips else {}),
            )


def _has_class(root: Path, name: str) -> bool:
    """Return whether there is a folder `<name>/audios`."""
    return os.path.isdir(root / name / "audios")  # noqa: PTH112 - False for a link in a circle


def _meant_class(name: str) -> str | None:
    """Return the class that a folder's name seems to mean: baby_cry for `Baby-cry `."""
    plain = re.sub(r"[\W_]+", "_", unicodedata.normalize("NFKC", name).lower()).strip("_")
    squeezed = {known.replace("_", ""): known for known in CLASS_LABELS}
    found = difflib.get_close_matches(plain.replace("_", ""), squeezed, n=1, cutoff=0.85)
    return squeezed[found[0]] if found else None


def check_spelling(root: Path) -> None:
    """Refuse a folder of VEGAS all of whose class folders have other names than in VEGAS.

    Raises:
        DatasetError: It is one; the message says what to rename.
    """
    meant = {
        entry.name: _meant_class(entry.name)
        for entry in visible_entries(root)
        if entry.is_folder and _has_class(root, entry.name)
    }
    renamed = [f"{shown(name)!a} to {known!r}" for name, known in meant.items() if known]
    if renamed:
        raise DatasetError(
            f"{shown(root)} looks like VEGAS with other names of classes: rename "
            f"{', '.join(renamed)}. If it is another dataset, open it with kind 'folder'"
        )


def _pass_over_others(root: Path, leave_out: PassedOver) -> None:
    """Note the audio that lies in no folder of a class."""
    for entry in usable_entries(root, leave_out):
        if entry.is_file and entry.name in CLASS_LABELS:
            leave_out(entry.path, "a file in place of a class folder", class_name=entry.name)
        elif entry.is_file and leave_out.file_id(entry.name):
            leave_out(entry.path, "not in a class folder")
        elif entry.is_folder and entry.name not in CLASS_LABELS:
            _pass_over_folder(entry, leave_out)
        elif entry.is_folder and not _has_class(root, entry.name):
            for inside in usable_entries(entry.path, leave_out, entry.name, _NO_AUDIO):
                _pass_over_beside(inside, entry.name, leave_out)


def _pass_over_folder(entry: Entry, leave_out: PassedOver) -> None:
    meant = _meant_class(entry.name)
    if meant is None:
        kind = "not in one of the ten classes of VEGAS"
        reason = (
            f"{shown(entry.name)!a} isn't one of the ten classes of VEGAS; to take every folder "
            "as a class, open the root with kind 'folder'"
        )
    else:
        kind = "a class folder of another spelling"
        reason = f"{shown(entry.name)!a} isn't a class; if it is {meant!r}, rename it to that"
    leave_out_all(
        entry.path, leave_out, reason, kind=kind, class_name=entry.name, skipped=_NO_AUDIO
    )


def _audio_files(folder: Path, class_name: str, leave_out: PassedOver) -> Iterator[tuple[str, str]]:
    """Stem and path of the files in a class's `audios`; audio elsewhere in its folder is noted."""
    for entry in usable_entries(folder, leave_out, class_name, ("audios", *_NO_AUDIO)):
        _pass_over_beside(entry, class_name, leave_out)
    for entry in usable_entries(folder / "audios", leave_out, class_name):
        stem = leave_out.file_id(entry.name) if entry.is_file else None
        if stem is None:
            _pass_over_beside(entry, class_name, leave_out)
        else:
            yield stem, entry.path


def _pass_over_beside(entry: Entry, class_name: str, leave_out: PassedOver) -> None:
    reason = f"not in {class_name}/audios itself"
    kind = "not in the class's folder audios itself"
    if entry.is_folder:
        leave_out_all(entry.path, leave_out, reason, kind=kind, class_name=class_name)
    elif leave_out.file_id(entry.name):
        leave_out(entry.path, reason, kind=kind, class_name=class_name)
    elif entry.name == "audios":
        leave_out(entry.path, "a file in place of the folder audios", class_name=class_name)


def _files_by_stem(folder: Path, extensions: tuple[str, ...]) -> dict[str, str]:
    """NFC-normalized stem → path; the first of several."""
    found: dict[str, str] = {}
    for entry in visible_entries(folder):
        stem, extension = os.path.splitext(entry.name)  # noqa: PTH122 - a stem may end in a dot
        if entry.is_file and extension.lower() in extensions:
            found.setdefault(unicodedata.normalize("NFC", stem), entry.path)
    return found


def _read_video_info(path: Path) -> dict[str, dict[str, str]]:
    """`video_00000` → row 0 of the table, and so on."""
    if not path.is_file():
        return {}
    with opened_table(path) as file:
        return {f"video_{index:05d}": row for index, row in enumerate(csv.DictReader(file))}


def _place_of(row: Mapping[str, str]) -> dict[str, Any]:
    """`ytid`, `start_second` and `end_second`, as far as the table has them."""
    place: dict[str, Any] = {"ytid": row["YTID"]} if row.get("YTID") else {}
    for key in ("start_second", "end_second"):
        try:
            place.update({key: float(row[key])} if row.get(key) else {})
        except ValueError:
            _logger.warning("video_info.csv: %s %r isn't a number of seconds", key, row[key])
    return place
