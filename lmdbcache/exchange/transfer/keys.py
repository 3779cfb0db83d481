"""The names that scripts give their embeddings, as sample ids."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final, Literal

from lmdbcache.datasets import CLASS_LABELS
from lmdbcache.errors import InvalidSampleIdError, TransferError
from lmdbcache.storage import join_sample_id

__all__ = [
    "KEY_ORDERS",
    "KeyOrder",
    "KeyReader",
    "file_id_in_class",
    "is_vegas_clip",
    "sample_id_in_class",
    "with_colon",
    "without_extension",
]

KeyOrder = Literal["auto", "file_id:class", "class:file_id"]
KEY_ORDERS: Final = ("auto", "file_id:class", "class:file_id")

# A dataset's file id is the name of the clip without this.
_EXTENSION: Final = re.compile(
    r"\.(wav|flac|mp3|ogg|opus|m4a|aac|aif|aiff|mp4|avi|mkv|webm|npy|pt)$", re.IGNORECASE
)
_DIGIT: Final = re.compile(r"\d")
_VEGAS_CLIP: Final = re.compile(r"video_\d+")


class KeyReader:
    """Reads keys such as `video_00001:dog`, `dog:video_00001.wav`, or without a class.

    `file_id:class` is the form; `class:file_id` is read where names tell it, never by counts alone.

    Args:
        keys: All of them: in which order they name file and class is told by all together.
        hints: Key → class, where the source says so beside the key.
        order: Which comes first; `"auto"`: look.
        class_name: Class of keys that have none.
        is_exact: The keys are sample ids; nothing is looked at or taken off.

    Raises:
        TransferError: An unknown order, or the keys may be in either.
    """

    def __init__(
        self,
        keys: Collection[Any],
        hints: Mapping[Any, str] | None = None,
        *,
        order: KeyOrder = "auto",
        class_name: str | None = None,
        is_exact: bool = False,
    ) -> None:
        if order not in KEY_ORDERS:
            raise TransferError(f"keys: {order!r}; known are {', '.join(KEY_ORDERS)}")
        self.notes: list[str] = []
        self._hints = hints or {}
        self._class_name = class_name
        self._is_exact = is_exact
        self._num_shortened = 0
        self._order = order if order != "auto" or is_exact else self._look(keys)

    def sample_id(self, key: Any) -> str:
        """The sample id of a key.

        Raises:
            InvalidSampleIdError: Not text, or no class can be told.
        """
        if not isinstance(key, str):
            raise InvalidSampleIdError(f"a key of type {type(key).__name__}, not text")
        if self._is_exact:
            return key
        file_id, class_name = self._parts(key)
        return join_sample_id(without_extension(file_id), class_name)

    def _colon_form(self, key: str) -> str:
        """`__` stands for the colon where nothing else tells the class."""
        return key if self._hints.get(key) or self._class_name else with_colon(key)

    def _parts(self, key: str) -> tuple[str, str]:
        hint = self._hints.get(key)
        shown, key = key, self._colon_form(key)
        if ":" not in key:
            class_name = hint or self._class_name
            if not class_name:
                raise InvalidSampleIdError(
                    f"{key!r} names no class: expected file_id:class or file_id__class; if all "
                    "are of one class, give it (--class)"
                )
            return file_id_in_class(key, class_name), class_name
        if self._order == "class:file_id":
            class_name, _, file_id = key.partition(":")
        else:
            file_id, _, class_name = key.rpartition(":")
        if hint and hint.lower() != class_name.lower():
            raise InvalidSampleIdError(
                f"the name {shown!r} says class {class_name!r}, its value has class_name {hint!r}: "
                "correct one of them, or if the name is turned round, give the order (--keys)"
            )
        return file_id, class_name

    def _look(self, keys: Collection[Any]) -> KeyOrder:
        hinted = [
            (key, self._hints[key].lower())
            for key in keys
            if isinstance(key, str) and ":" in key and key in self._hints
        ]
        named = [self._colon_form(key) for key in keys if isinstance(key, str)]
        named = [key for key in named if ":" in key]
        heads = {key.partition(":")[0] for key in named}
        tails = {key.rpartition(":")[2] for key in named}
        if hinted:
            is_tail = all(key.rpartition(":")[2].lower() == hint for key, hint in hinted)
            is_head = all(key.partition(":")[0].lower() == hint for key, hint in hinted)
            reversed_order = is_head and not is_tail
        else:
            told = _told_by_names(heads, tails)
            if told is None and _looks_reversed(heads, tails):
                raise TransferError(
                    f"names such as {named[0]!r} may be file_id:class ({len(tails)} classes) or "
                    f"class:file_id ({len(heads)} classes): give --keys file_id:class or "
                    "--keys class:file_id"
                )
            reversed_order = bool(told)
        if not reversed_order:
            return "file_id:class"
        self.notes.append(
            f"keys such as {named[0]!r} are read as class:file_id ({len(heads)} classes); if that "
            "is wrong, give the order (--keys file_id:class)"
        )
        return "class:file_id"


def file_id_in_class(name: str, class_name: str) -> str:
    """The file id of a name that is known to be of a class, and may repeat that."""
    name, known = without_extension(name), class_name.lower()
    if not known:
        return name
    for mark in (f":{known}", f"__{known}"):
        if name.lower().endswith(mark):
            return name[: -len(mark)]
    return name[len(known) + 1 :] if name.lower().startswith(f"{known}:") else name


def sample_id_in_class(name: str, class_name: str) -> str:
    """The sample id of a name that is known to be of a class.

    Raises:
        InvalidSampleIdError: They make none.
    """
    return join_sample_id(file_id_in_class(name, class_name), class_name)


def with_colon(name: str) -> str:
    """`video_00001__dog`, as files are named, as `video_00001:dog`."""
    if ":" in name:
        return name
    file_id, underscores, class_name = name.rpartition("__")
    return f"{file_id}:{class_name}" if underscores and file_id and class_name else name


def is_vegas_clip(name: str) -> bool:
    """Whether a name is one that VEGAS gives its clips, such as `video_00001`."""
    return _VEGAS_CLIP.fullmatch(without_extension(name)) is not None


def without_extension(name: str) -> str:
    """A file's name or path as a dataset's file id: `audios/video_00001.wav` → `video_00001`."""
    if not _EXTENSION.search(name):
        return name
    return _EXTENSION.sub("", name.replace("\\", "/").rpartition("/")[2]) or name


def _told_by_names(heads: set[str], tails: set[str]) -> bool | None:
    """Whether names tell that classes come first; None if they don't tell."""
    first = _are_vegas_classes(heads) or all(map(is_vegas_clip, tails))
    last = _are_vegas_classes(tails) or all(map(is_vegas_clip, heads))
    if first != last:
        return first
    files = [[bool(_EXTENSION.search(name)) for name in names] for names in (heads, tails)]
    if any(files[0]) != any(files[1]):
        return all(files[1]) or (None if any(files[1]) else False)
    return None


def _are_vegas_classes(names: set[str]) -> bool:
    return all(name.lower() in CLASS_LABELS for name in names)


def _looks_reversed(heads: set[str], tails: set[str]) -> bool:
    if len(heads) != len(tails):
        # Files are many, classes few.
        return len(heads) < len(tails)
    numbered = [sum(bool(_DIGIT.search(name)) for name in names) for names in (heads, tails)]
    return numbered[0] == 0 and numbered[1] > 0
