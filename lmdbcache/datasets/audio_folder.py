"""A plain folder of audio files, one folder per class. No torch here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.datasets.listed import (
    ListedDataset,
    audio_file_id,
    checked_folder,
    own_split_name,
    visible_entries,
)
from lmdbcache.datasets.namespaces import chosen_namespace, derived_namespace
from lmdbcache.embedders.audio_source import shown
from lmdbcache.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["AudioFolderDataset", "looks_like_classes"]

_LAYOUT: Final = "<root>/<class>/clip.wav"
_SPLITS: Final = ("train", "val", "test")
_NOT_A_CLASS: Final = frozenset({"audio", "audios", "clip", "clips", "wav", "wavs", "data"})


class AudioFolderDataset(ListedDataset):
    """`<root>/<class>/*.wav`, or any suffix that libsndfile reads; deeper folders belong to it.

    A file id is the path below the class folder without the suffix, so that `dog/a/1.wav` is
    `a/1:dog` and doesn't meet `dog/b/1.wav`. Where the folders right below the root are called
    train, val or test (or one of their usual variants) and hold class folders, they are the
    clips' `split`, and part of the file id: `train/1:dog`. Hidden names and other suffixes are
    ignored. Labels are positions in the sorted list of the class folders that hold audio.

    Args:
        root: Folder that holds one folder per class.
        namespace: None makes one from the folder's name, see `lmdbcache.datasets.namespaces`.

    Raises:
        DatasetError: Not a folder, no clips in it, or two clips with one sample id.
    """

    kind = "folder"

    def __init__(self, root: str | Path, *, namespace: str | None = None) -> None:
        folder = checked_folder(root, _LAYOUT)
        groups = _class_folders(folder)
        name = os.path.basename(os.path.realpath(folder))  # noqa: PTH119
        super().__init__(
            folder,
            chosen_namespace(namespace, self.kind)
            if namespace
            else derived_namespace(self.kind, name),
            {class_name: number for number, class_name in enumerate(sorted(groups))},
            namespace_is_derived=namespace is None,
        )
        self.can_be_opened_with()
        for class_name, parts in groups.items():
            for split, prefix, class_folder in parts:
                more: dict[str, Any] = {"split": split} if split else {}
                for file_id, path in _files_below(class_folder):
                    self.add(prefix + file_id, class_name, path, **more)
        for entry in visible_entries(folder):
            if entry.is_file() and audio_file_id(entry.name):
                self.leave_out(entry.path, "not in a class folder")
        self.finish()


def looks_like_classes(root: str | Path) -> bool:
    """Whether folders right below the root, or below its splits, hold audio files themselves.

    Folders that seem to hold all clips of a dataset whose table is missing don't count.
    """
    for entry in _folders(root):
        below = _folders(entry.path) if own_split_name(entry.name) in _SPLITS else []
        if any(
            each.name.lower() not in _NOT_A_CLASS and _holds_audio(each.path)
            for each in (entry, *below)
        ):
            return True
    return False


def _folders(folder: str | Path) -> list[os.DirEntry[str]]:
    return [entry for entry in visible_entries(folder) if entry.is_dir()]


def _holds_audio(folder: str) -> bool:
    return any(audio_file_id(entry.name) for entry in visible_entries(folder) if entry.is_file())


def _has_audio_below(folder: str) -> bool:
    return next(_files_below(folder), None) is not None


def _class_folders(folder: str) -> dict[str, list[tuple[str, str, str]]]:
    """Class → (split, beginning of the file ids, folder), of the folders that hold audio."""
    below = [entry for entry in _folders(folder) if _has_audio_below(entry.path)]
    groups: dict[str, list[tuple[str, str, str]]] = {}
    if not _are_splits(below):
        return {entry.name: [("", "", entry.path)] for entry in below}
    for part in below:
        for entry in _folders(part.path):
            if _has_audio_below(entry.path):
                place = (own_split_name(part.name), f"{part.name}/", entry.path)
                groups.setdefault(entry.name, []).append(place)
    return groups


def _are_splits(folders: list[os.DirEntry[str]]) -> bool:
    if not folders or any(own_split_name(entry.name) not in _SPLITS for entry in folders):
        return False
    flat = [entry for entry in folders if _holds_audio(entry.path)]
    if flat and len(folders) > 1:
        raise DatasetError(
            f"{shown(flat[0].path)} holds audio files without a class folder; expected is "
            f"<root>/{shown(flat[0].name)}/<class>/clip.wav or {_LAYOUT}"
        )
    return not flat


def _files_below(folder: str) -> Iterator[tuple[str, str]]:
    """(path below the folder without suffix, path) of each audio file; links aren't followed."""
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(path, folder)
        for name in sorted(names):
            stem = None if name.startswith(".") else audio_file_id(name)
            if stem:
                file_id = stem if below == "." else f"{below}/{stem}".replace(os.sep, "/")
                yield file_id, os.path.join(path, name)  # noqa: PTH118
