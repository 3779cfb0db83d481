"""A plain folder of audio files, one folder per class. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from lmdbcache.audio import shown
from lmdbcache.datasets.base import ListedDataset, checked_folder, own_split_name
from lmdbcache.datasets.namespaces import namespace_of
from lmdbcache.datasets.scanning import (
    Entry,
    PassedOver,
    audio_below,
    audio_file_id,
    entries_of,
    usable_entries,
    visible_entries,
)
from lmdbcache.errors import DatasetError
from lmdbcache.files import is_url

_LAYOUT: Final = "<root>/<class>/clip.wav"
_SPLITS: Final = ("train", "val", "test")
_VEGAS_AUDIO: Final = "audios"
_VEGAS_VISUAL: Final = ("img", "videos")
_NOT_A_CLASS: Final = frozenset({"audio", "audios", "clip", "clips", "wav", "wavs", "data"})


class AudioFolder(ListedDataset):
    """`<root>/<class>/*.wav`, or any suffix that libsndfile reads; deeper folders belong to it.

    A file id is the path below the class folder without the suffix, so that `dog/a/1.wav` is
    `a/1:dog` and doesn't meet `dog/b/1.wav`. Where the folders right below the root are called
    train, val or test (or one of their usual variants) and hold class folders, they are the
    clips' `split`, and part of the file id: `train/1:dog`. Labels are positions in the sorted list
    of the class folders that hold audio. Audio that is passed over is in `left_out`: other
    suffixes, hidden names, files outside a class folder.

    In a folder laid out like VEGAS, `<class>/audios/1.wav` is `audios/1:<class>`, and the class's
    folders `img` and `videos` are ignored.

    Args:
        root: Folder that holds one folder per class; a path or a URL such as `s3://bucket/sounds`.
        namespace: None makes one from the folder's name, see `lmdbcache.datasets.namespaces`.
        decoder: What decodes the clips: files that it doesn't read are left out.

    Raises:
        DatasetError: Not a folder, no clips in it, or two clips with one sample id.
    """

    kind = "folder"
    layout = "<class>/*.wav (or flac, ogg, opus, mp3, aiff, …)"

    def __init__(
        self, root: str | Path, *, namespace: str | None = None, decoder: str = "soundfile"
    ) -> None:
        folder = checked_folder(root, _LAYOUT)
        passed_over = PassedOver(decoder)
        entries_of(folder)  # raises where it can't be listed
        groups = _class_folders(folder, passed_over)
        place = folder if is_url(folder) else os.path.realpath(folder)
        name = os.path.basename(place)  # noqa: PTH119
        super().__init__(
            folder,
            namespace_of(self.kind, namespace, name),
            {class_name: number for number, class_name in enumerate(sorted(groups))},
            namespace_is_derived=namespace is None,
            passed_over=passed_over,
        )
        for class_name, clips in groups.items():
            for split, file_id, path in clips:
                more: dict[str, Any] = {"split": split} if split else {}
                self.add(file_id, class_name, path, **more)
        self.finish()

    @classmethod
    def recognizes(cls, root: Path, decoder: str) -> bool:
        """Return whether folders right below the root, or below its splits, hold audio files.

        Folders that seem to hold all clips of a dataset whose table is missing don't count. Files
        in a folder `audios` of a class, as in VEGAS, do. Audio files next to the folders are strays
        as long as they are fewer than the folders; else the root is a folder of clips.
        """
        num_stray = cls.num_stray(root, decoder)
        return next(islice(_class_like(root, decoder), num_stray, None), None) is not None

    @staticmethod
    def num_stray(root: Path, decoder: str) -> int:
        """Return how many audio files lie in the root itself."""
        return sum(
            bool(audio_file_id(entry.name, decoder))
            for entry in visible_entries(root)
            if entry.is_file
        )


def _class_like(root: str | Path, decoder: str) -> Iterator[Entry]:
    for entry in _folders(root):
        below = _folders(entry.path) if own_split_name(entry.name) in _SPLITS else []
        for each in (entry, *below):
            places = (each.path, f"{each.path}/{_VEGAS_AUDIO}")
            if each.name.lower() not in _NOT_A_CLASS and any(
                _holds_clips(place, decoder) for place in places
            ):
                yield each


def _folders(folder: str | Path) -> list[Entry]:
    return [entry for entry in visible_entries(folder) if entry.is_folder]


def _holds_clips(folder: str, decoder: str) -> bool:
    return any(
        audio_file_id(entry.name, decoder) for entry in visible_entries(folder) if entry.is_file
    )


def _class_folders(folder: str, leave_out: PassedOver) -> dict[str, list[tuple[str, str, str]]]:
    """Class → (split, file id, path) of each clip, of the folders that hold some."""
    parts = list(_usable_folders(folder, leave_out))
    splits = [part for part in parts if _has_clips_below(part.path, leave_out.decoder)]
    groups: dict[str, list[tuple[str, str, str]]] = {}
    if _are_splits(splits, leave_out.decoder):
        for part in splits:
            for entry in _usable_folders(part.path, leave_out):
                for file_id, path in _clips(entry, leave_out):
                    clip = (own_split_name(part.name), f"{part.name}/{file_id}", path)
                    groups.setdefault(entry.name, []).append(clip)
        parts = [part for part in parts if part not in splits]
    for entry in parts:
        for file_id, path in _clips(entry, leave_out):
            groups.setdefault(entry.name, []).append(("", file_id, path))
    return groups


def _usable_folders(folder: str, leave_out: PassedOver) -> Iterator[Entry]:
    """The folders in a folder; what else looks like audio is left out."""
    for entry in usable_entries(folder, leave_out):
        if entry.is_folder:
            yield entry
        elif leave_out.file_id(entry.name):
            leave_out(entry.path, "not in a class folder")


def _clips(entry: Entry, leave_out: PassedOver) -> Iterator[tuple[str, str]]:
    """(file id, path) of a class folder's clips."""
    is_like_vegas = _holds_clips(f"{entry.path}/{_VEGAS_AUDIO}", leave_out.decoder)
    return audio_below(
        entry.path, leave_out, entry.name, skipped=_VEGAS_VISUAL if is_like_vegas else ()
    )


def _has_clips_below(folder: str, decoder: str) -> bool:
    return next(audio_below(folder, PassedOver(decoder), ""), None) is not None


def _are_splits(folders: list[Entry], decoder: str) -> bool:
    if not folders or any(own_split_name(entry.name) not in _SPLITS for entry in folders):
        return False
    flat = [entry for entry in folders if _holds_clips(entry.path, decoder)]
    if len(folders) > 1:  # stray clips beside a split's class folders are left out
        flat = [
            one
            for one in flat
            if not any(_has_clips_below(each.path, decoder) for each in _folders(one.path))
        ]
    if flat and len(folders) > 1:
        raise DatasetError(
            f"{shown(flat[0].path)} holds audio files without a class folder; expected is "
            f"<root>/{shown(flat[0].name)}/<class>/clip.wav or {_LAYOUT}"
        )
    return not flat
