"""The VEGAS folder on disk: its classes and its files. No torch here."""

from __future__ import annotations

import csv
import json
import logging
import os
import unicodedata
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.datasets.base import Sample, sample_id_of
from lmdbcache.datasets.classes import chosen_classes
from lmdbcache.embedders.audio_formats import is_readable
from lmdbcache.errors import DatasetError, InvalidSampleIdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

__all__ = [
    "CLASS_LABELS",
    "LABEL_TO_CLASS",
    "NAMESPACE",
    "list_samples",
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
_LAYOUT: Final = "<root_dir>/<class>/audios/video_00001.wav"

_logger = logging.getLogger(__name__)


def resolve_classes(classes: str | int | Iterable[str | int] | None) -> list[str] | None:
    """Class names of a selection of the ten, see `lmdbcache.datasets.classes`."""
    return chosen_classes(classes, CLASS_LABELS, "VEGAS")


def list_samples(
    root: Path, classes: Mapping[str, int], *, audio_duration: float, captions: Mapping[str, Any]
) -> list[Sample]:
    """Every clip of these classes, by class and then by file id.

    A file whose name can't be an id, such as one that isn't UTF-8, is left out with a warning.

    Args:
        root: Folder that holds one folder per class.
        classes: Class name → label.
        audio_duration: Default of `end_second`, in seconds.
        captions: As of `read_captions`.

    Raises:
        DatasetError: The root or all class folders are missing, or two files have one file id.
    """
    if not root.is_dir():
        raise DatasetError(f"root_dir: {str(root)!r} isn't a folder; expected is {_LAYOUT}")
    missing = [name for name in classes if not (root / name / "audios").is_dir()]
    if missing and len(missing) == len(classes):
        raise DatasetError(
            f"root_dir: {str(root)!r} has no folder <class>/audios for any of "
            f"{', '.join(missing)}; expected is {_LAYOUT}"
        )
    if missing:
        _logger.warning("%s has no folder <class>/audios for: %s", root, ", ".join(missing))
    samples: list[Sample] = []
    for name, label in classes.items():
        if name not in missing:
            samples += _class_samples(root / name, name, label, audio_duration, captions)
    for index, sample in enumerate(samples):
        sample["sample_idx"] = index
    return samples


def _class_samples(
    folder: Path, class_name: str, label: int, audio_duration: float, captions: Mapping[str, Any]
) -> list[Sample]:
    audios = _files_by_stem(folder / "audios", is_readable, unique=True)
    images = _files_by_stem(folder / "img", _IMAGE_EXTENSIONS.__contains__)
    videos = _files_by_stem(folder / "videos", _VIDEO_EXTENSIONS.__contains__)
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
            continue
        sample["caption"] = _caption(captions, sample_id, file_id)
        samples.append(sample)
    return samples


def _files_by_stem(
    folder: Path, is_wanted: Callable[[str], bool], *, unique: bool = False
) -> dict[str, Path]:
    """NFC-normalised stem → file, sorted; hidden files are left out."""
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file())
    for name in names:
        stem, extension = os.path.splitext(name)  # noqa: PTH122 - a stem may end in a dot
        if name.startswith(".") or not is_wanted(extension.lower()):
            continue
        file_id = unicodedata.normalize("NFC", stem)
        if unique and file_id in found:
            raise DatasetError(
                f"{found[file_id]} and {folder / name} have the same file id {file_id!r}; "
                "rename or remove one of them"
            )
        found.setdefault(file_id, folder / name)
    return dict(sorted(found.items()))


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
