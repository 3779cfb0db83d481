"""The VEGAS folder on disk: its classes and its files. No torch here."""

from __future__ import annotations

import csv
import difflib
import json
import logging
import os
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.audio import shown
from lmdbcache.datasets.base import Sample, sample_id_of
from lmdbcache.datasets.classes import chosen_classes
from lmdbcache.datasets.listed import summary_of
from lmdbcache.datasets.scanning import (
    Entry,
    PassedOver,
    leave_out_all,
    usable_entries,
    visible_entries,
)
from lmdbcache.errors import DatasetError, InvalidSampleIdError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "CLASS_LABELS",
    "LABEL_TO_CLASS",
    "NAMESPACE",
    "NO_SAMPLE_ID",
    "has_class",
    "list_samples",
    "meant_class",
    "read_captions",
    "resolve_classes",
]

NAMESPACE: Final = "vegas"

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

_IMAGE_EXTENSIONS: Final = (".jpg", ".jpeg", ".png")
_VIDEO_EXTENSIONS: Final = (".mp4",)
_NO_AUDIO: Final = ("img", "videos")
NO_SAMPLE_ID: Final = "no sample id"
_LAYOUT: Final = "<root_dir>/<class>/audios/video_00001.wav"

_logger = logging.getLogger(__name__)


def resolve_classes(classes: str | int | Iterable[str | int] | None) -> list[str] | None:
    """Class names of a selection of the ten, see `lmdbcache.datasets.classes`."""
    return chosen_classes(classes, CLASS_LABELS, "VEGAS")


def list_samples(
    root: Path,
    classes: Mapping[str, int],
    *,
    audio_duration: float,
    captions: Mapping[str, Any],
    leave_out: PassedOver,
) -> list[Sample]:
    """Return every clip of these classes, by class and then by file id.

    A file whose name can't be an id, such as one that isn't UTF-8, is left out with a warning.

    Args:
        root: Folder that holds one folder per class.
        classes: Class name → label.
        audio_duration: Default of `end_second`, in seconds.
        captions: As of `read_captions`.
        leave_out: Takes the audio that is passed over.

    Raises:
        DatasetError: The root or all class folders are missing, or two files have one file id.
    """
    if not root.is_dir():
        raise DatasetError(f"root_dir: {str(root)!r} isn't a folder; expected is {_LAYOUT}")
    _pass_over_others(root, leave_out)
    missing = [name for name in classes if not has_class(root, name)]
    if missing and len(missing) == len(classes):
        raise DatasetError(
            f"root_dir: {str(root)!r} has no folder <class>/audios for any of "
            f"{', '.join(missing)}; expected is {_LAYOUT}"
            + (f"; {summary_of(leave_out.items)}" if leave_out.items else "")
        )
    if missing:
        _logger.warning("%s has no folder <class>/audios for: %s", root, ", ".join(missing))
    samples: list[Sample] = []
    for name, label in classes.items():
        if name not in missing:
            samples += _class_samples(root / name, name, label, audio_duration, captions, leave_out)
    for index, sample in enumerate(samples):
        sample["sample_idx"] = index
    return samples


def has_class(root: Path, name: str) -> bool:
    """Return whether there is a folder `<name>/audios`."""
    return os.path.isdir(root / name / "audios")  # noqa: PTH112 - False for a link in a circle


def meant_class(name: str) -> str | None:
    """Return the class that a folder of another spelling seems to be: `Baby-cry ` is baby_cry."""
    plain = re.sub(r"[\W_]+", "_", unicodedata.normalize("NFKC", name).lower()).strip("_")
    squeezed = {known.replace("_", ""): known for known in CLASS_LABELS}
    found = difflib.get_close_matches(plain.replace("_", ""), squeezed, n=1, cutoff=0.85)
    return squeezed[found[0]] if found else None


def _pass_over_others(root: Path, leave_out: PassedOver) -> None:
    """Note the audio that lies in no folder of a class."""
    for entry in usable_entries(root, leave_out):
        if entry.is_file and entry.name in CLASS_LABELS:
            leave_out(entry.path, "a file in place of a class folder", class_name=entry.name)
        elif entry.is_file and leave_out.file_id(entry.name):
            leave_out(entry.path, "not in a class folder")
        elif entry.is_folder and entry.name not in CLASS_LABELS:
            _pass_over_folder(entry, leave_out)
        elif entry.is_folder and not has_class(root, entry.name):
            for inside in usable_entries(entry.path, leave_out, entry.name, _NO_AUDIO):
                _pass_over_beside(inside, entry.name, leave_out)


def _pass_over_folder(entry: Entry, leave_out: PassedOver) -> None:
    meant = meant_class(entry.name)
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


def _class_samples(
    folder: Path,
    class_name: str,
    label: int,
    audio_duration: float,
    captions: Mapping[str, Any],
    leave_out: PassedOver,
) -> list[Sample]:
    audios = _audio_files(folder, class_name, leave_out)
    images = _files_by_stem(folder / "img", _IMAGE_EXTENSIONS)
    videos = _files_by_stem(folder / "videos", _VIDEO_EXTENSIONS)
    clips = _read_video_info(folder / "video_info.csv")
    samples = []
    for file_id, path in audios.items():
        image, video, clip = images.get(file_id), videos.get(file_id), clips.get(file_id, {})
        sample: Sample = {
            "file_id": file_id,
            "class_name": class_name,
            "class_label": label,
            "video_id": file_id,
            "audio_path": str(path),
            "audio_filename": path.name,
            "image_path": None if image is None else str(image),
            "image_filename": "" if image is None else image.name,
            "video_path": None if video is None else str(video),
            "video_filename": "" if video is None else video.name,
            "ytid": clip.get("YTID") or "",
            "start_second": _seconds(clip.get("start_second"), default=0.0),
            "end_second": _seconds(clip.get("end_second"), default=audio_duration),
            "audio_emb": None,
        }
        try:
            sample_id = sample_id_of(sample)
        except InvalidSampleIdError as error:
            _logger.warning("%a is left out; its name can't be a file id: %s", str(path), error)
            leave_out(str(path), str(error), kind=NO_SAMPLE_ID, class_name=class_name)
            continue
        sample["caption"] = _caption(captions, sample_id, file_id)
        samples.append(sample)
    return samples


def _audio_files(folder: Path, class_name: str, leave_out: PassedOver) -> dict[str, Path]:
    """File id → file, of a class's `audios`; audio elsewhere in its folder is noted."""
    found: dict[str, Path] = {}
    for entry in usable_entries(folder, leave_out, class_name, ("audios", *_NO_AUDIO)):
        _pass_over_beside(entry, class_name, leave_out)
    for entry in usable_entries(folder / "audios", leave_out, class_name):
        stem = leave_out.file_id(entry.name) if entry.is_file else None
        if stem is None:
            _pass_over_beside(entry, class_name, leave_out)
            continue
        file_id = unicodedata.normalize("NFC", stem)
        if file_id in found:
            raise DatasetError(
                f"{found[file_id]} and {entry.path} have the same file id {file_id!r}; "
                "rename or remove one of them"
            )
        found[file_id] = Path(entry.path)
    return dict(sorted(found.items()))


def _pass_over_beside(entry: Entry, class_name: str, leave_out: PassedOver) -> None:
    reason = f"not in {class_name}/audios itself"
    kind = "not in the class's folder audios itself"
    if entry.is_folder:
        leave_out_all(entry.path, leave_out, reason, kind=kind, class_name=class_name)
    elif leave_out.file_id(entry.name):
        leave_out(entry.path, reason, kind=kind, class_name=class_name)
    elif entry.name == "audios":
        leave_out(entry.path, "a file in place of the folder audios", class_name=class_name)


def _files_by_stem(folder: Path, extensions: tuple[str, ...]) -> dict[str, Path]:
    """NFC-normalised stem → file; the first of several."""
    found: dict[str, Path] = {}
    for entry in visible_entries(folder):
        stem, extension = os.path.splitext(entry.name)  # noqa: PTH122 - a stem may end in a dot
        if entry.is_file and extension.lower() in extensions:
            found.setdefault(unicodedata.normalize("NFC", stem), Path(entry.path))
    return found


def _read_video_info(path: Path) -> dict[str, dict[str, str]]:
    """`video_00000` → row 0 of the table, and so on."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return {f"video_{index:05d}": row for index, row in enumerate(csv.DictReader(file))}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: can't be read as CSV: {error}") from error


def _seconds(text: str | None, *, default: float) -> float:
    try:
        return float(text) if text else default
    except ValueError:
        _logger.warning("video_info.csv: %r isn't a number of seconds; %g is used", text, default)
        return default


def read_captions(root: Path) -> dict[str, Any]:
    """`captions.json` of the root, or nothing where there is none.

    Keys are `file_id` or `file_id:class`; the second wins, as file ids repeat between classes.

    Raises:
        DatasetError: The file isn't a JSON object.
    """
    path = root / "captions.json"
    if not path.is_file():
        return {}
    try:
        captions = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(captions, dict):
        raise DatasetError(f"{path}: expected an object of file_id → caption")
    return captions


def _caption(captions: Mapping[str, Any], sample_id: str, file_id: str) -> str:
    caption = captions.get(sample_id, captions.get(file_id, ""))
    return caption if isinstance(caption, str) else str(caption)
