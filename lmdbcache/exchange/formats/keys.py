"""The names that scripts give their embeddings, as sample ids."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from lmdbcache.errors import InvalidSampleIdError, TransferError
from lmdbcache.storage import join_sample_id

KeyOrder = Literal["auto", "file_id:class", "class:file_id"]
_FILE_FIRST: Final = "file_id:class"
_KEY_ORDERS: Final = ("auto", _FILE_FIRST, "class:file_id")

# A dataset's file id is the name of the clip without this.
_EXTENSION: Final = re.compile(
    r"\.(wav|flac|mp3|ogg|opus|m4a|aac|aif|aiff|mp4|avi|mkv|webm|npy|pt)$", re.IGNORECASE
)
_DIGIT: Final = re.compile(r"\d")
_NUMBERED: Final = re.compile(r"\D+\d{3,}")


@dataclass(frozen=True)
class KeyChoice:
    """What a caller says about a source's names: see `KeyReader`.

    Args:
        order: Which comes first, file or class; `"auto"`: infer it.
        class_name: Class of names that have none.
    """

    order: KeyOrder = "auto"
    class_name: str | None = None


class KeyReader:
    """Reads keys such as `video_00001:dog`, `dog:video_00001.wav`, or without a class.

    `file_id:class` is the form; `class:file_id` is read where the names show it, never by counts
    alone.

    Args:
        keys: All of them: which of the two comes first is inferred from all keys.
        choice: What the caller says.
        hints: Key → class, where the source states it next to the key.
        is_exact: The keys are sample ids; nothing is inferred or taken off.

    Raises:
        TransferError: An unknown order, or the keys may be in either.
    """

    def __init__(
        self,
        keys: Collection[Any],
        choice: KeyChoice,
        hints: Mapping[Any, str] | None = None,
        *,
        is_exact: bool,
    ) -> None:
        if choice.order not in _KEY_ORDERS:
            raise TransferError(f"keys: {choice.order!r}; known are {', '.join(_KEY_ORDERS)}")
        self.notes: list[str] = []
        self._hints = hints or {}
        self._class_name = choice.class_name
        self._is_exact = is_exact
        self._is_inferred = choice.order == "auto"
        self._order: KeyOrder = choice.order
        if self._is_inferred and not is_exact:
            self._order = self._infer_order(keys)

    def sample_id(self, key: Any) -> str:
        """Return the sample id of a key.

        Raises:
            InvalidSampleIdError: The key isn't text, or its class isn't known.
        """
        if not isinstance(key, str):
            raise InvalidSampleIdError(f"a key of type {type(key).__name__}, not text")
        if self._is_exact:
            return key
        file_id, class_name = self._parts(key)
        return join_sample_id(without_extension(file_id), class_name)

    def _parts(self, key: str) -> tuple[str, str]:
        hint = self._hints.get(key)
        shown, key = key, self._colon_form(key)
        if ":" not in key:
            class_name = hint or self._class_name
            if not class_name:
                raise InvalidSampleIdError(
                    f"{key!r} names no class: expected file_id:class or file_id__class; if all "
                    "are of one class, give it (`class_name`)"
                )
            return file_id_in_class(key, class_name), class_name
        # A stated class says the order of its own key: one dict may hold keys of both.
        if _is_reversed(key, hint) if hint and self._is_inferred else self._order != _FILE_FIRST:
            class_name, _, file_id = key.partition(":")
        else:
            file_id, _, class_name = key.rpartition(":")
        if hint and hint.lower() != class_name.lower():
            raise InvalidSampleIdError(
                f"the name {shown!r} says class {class_name!r}, its value has class_name {hint!r}: "
                "correct one of them, or if the name is the other way round, give the order "
                "(`keys`)"
            )
        return file_id, class_name

    def _colon_form(self, key: str) -> str:
        """Read `__` as the colon where nothing else states the class."""
        return key if self._hints.get(key) or self._class_name else with_colon(key)

    def _infer_order(self, keys: Collection[Any]) -> KeyOrder:
        """The order of the keys without a stated class."""
        named = [key for key in keys if isinstance(key, str) and ":" in self._colon_form(key)]
        hinted = {key: hint for key in named if (hint := self._hints.get(key))}
        others = [self._colon_form(key) for key in named if key not in hinted]
        turned = [key for key, hint in hinted.items() if _is_reversed(key, hint)]
        is_reversed = False
        if others:
            heads = {key.partition(":")[0] for key in others}
            tails = {key.rpartition(":")[2] for key in others}
            first = _are_classes(heads, tails, {hint.lower() for hint in hinted.values()})
            if first is None:
                first = _classes_are_first(heads, tails)
            if first is None and hinted and len(turned) in (0, len(hinted)):
                first = bool(turned)
            if first is None:
                raise TransferError(
                    f"names such as {others[0]!r} may be file_id:class ({len(tails)} classes) or "
                    f"class:file_id ({len(heads)} classes): give the order, "
                    "`keys='file_id:class'` or `keys='class:file_id'`"
                )
            is_reversed = first
            turned += others if is_reversed else []
        if turned:
            classes = {key.partition(":")[0].lower() for key in turned}
            self.notes.append(
                f"keys such as {turned[0]!r} are read as class:file_id ({len(classes)} classes); "
                "if that is wrong, give the order (`keys='file_id:class'`)"
            )
        return "class:file_id" if is_reversed else _FILE_FIRST


def file_id_in_class(name: str, class_name: str) -> str:
    """Return the file id of a name that is known to be of a class, and may repeat that."""
    name, known = without_extension(name), class_name.lower()
    if not known:
        return name
    for mark in (f":{known}", f"__{known}"):
        if name.lower().endswith(mark):
            return name[: -len(mark)]
    return name[len(known) + 1 :] if name.lower().startswith(f"{known}:") else name


def sample_id_in_class(name: str, class_name: str) -> str:
    """Return the sample id of a name that is known to be of a class.

    Raises:
        InvalidSampleIdError: They make none.
    """
    return join_sample_id(file_id_in_class(name, class_name), class_name)


def with_colon(name: str) -> str:
    """Return `video_00001__dog`, as files are named, as `video_00001:dog`."""
    if ":" in name:
        return name
    file_id, underscores, class_name = name.rpartition("__")
    return f"{file_id}:{class_name}" if underscores and file_id and class_name else name


def is_numbered_clip(name: str) -> bool:
    """Return whether a name is that of one of many clips, such as `video_00001`."""
    return _NUMBERED.fullmatch(without_extension(name)) is not None


def without_extension(name: str) -> str:
    """Return a file's name or path as a file id: `audios/video_00001.wav` → `video_00001`."""
    if not _EXTENSION.search(name):
        return name
    return _EXTENSION.sub("", name.replace("\\", "/").rpartition("/")[2]) or name


def _is_reversed(key: str, class_name: str) -> bool:
    """Whether a key of this class has the class first, and not last."""
    known = class_name.lower()
    head, tail = key.partition(":")[0].lower(), key.rpartition(":")[2].lower()
    return head == known != tail


def _are_classes(heads: set[str], tails: set[str], known: set[str]) -> bool | None:
    """Whether the heads, and not the tails, are known classes; None if both are or neither is."""
    first, last = ({name.lower() for name in names} <= known for names in (heads, tails))
    return None if first == last else first


def _classes_are_first(heads: set[str], tails: set[str]) -> bool | None:
    """Whether the names show that classes come first; None if it could be either."""
    clip_heads, clip_tails = (all(map(is_numbered_clip, names)) for names in (heads, tails))
    if clip_heads != clip_tails:
        return clip_tails
    file_heads, file_tails = (
        [bool(_EXTENSION.search(n)) for n in names] for names in (heads, tails)
    )
    if any(file_heads) != any(file_tails):
        return True if all(file_tails) else None if any(file_tails) else False
    if len(heads) == len(tails):
        numbered = [sum(bool(_DIGIT.search(name)) for name in names) for names in (heads, tails)]
        return None if numbered[0] == 0 < numbered[1] else False
    return None if len(heads) < len(tails) else False  # files are many, classes few
