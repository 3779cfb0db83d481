"""The files in a dataset's folders, and which of them are left out. No torch here.

A link that leads nowhere or in a circle, a pipe, a hidden copy or a folder without permission is
recorded and left out: none of them keeps the rest from being listed.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

import xxhash

from lmdbcache.audio import AudioSource, is_audio, is_readable, list_url, open_source, shown
from lmdbcache.errors import DatasetError, RemoteError
from lmdbcache.files import is_url

_PIECE_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class LeftOut:
    """A file or row of the dataset that isn't a sample, with the reason."""

    name: str
    reason: str
    kind: str  # the reason without names, to count by
    class_name: str = ""  # the class folder that it lies in, or the class that a table gives it

    @property
    def suffix(self) -> str:
        """The file's suffix in lower case, with the dot; empty where it has none."""
        return suffix_of(self.name)

    def to_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "reason": self.reason,
            "kind": self.kind,
            "class": self.class_name,
            "suffix": self.suffix,
        }


class PassedOver:
    """The files and folders that a listing leaves out.

    Args:
        decoder: What decodes the clips, see `lmdbcache.audio`.

    Attributes:
        items: The recorded ones, in order.
    """

    def __init__(self, decoder: str = "soundfile") -> None:
        self.decoder = decoder
        self.items: list[LeftOut] = []

    def __call__(self, name: str, reason: str, *, kind: str = "", class_name: str = "") -> None:
        """Record something that isn't a sample.

        Args:
            name: Its name.
            reason: Why.
            kind: The reason without names, to count by; defaults to the reason.
            class_name: Its class, if it has one.
        """
        self.items.append(LeftOut(shown(name), reason, kind or reason, shown(class_name)))

    def file_id(self, name: str) -> str | None:
        """See `audio_file_id`."""
        return audio_file_id(name, self.decoder)


def summary_of(left_out: list[LeftOut]) -> str:
    """Return `3 left out: no label, such as …; 1 left out: …`, most frequent first."""
    first = {item.kind: item for item in reversed(left_out)}
    kinds = Counter(item.kind for item in left_out).most_common()
    counted = [f"{count} left out: {kind}{_example(first[kind])}" for kind, count in kinds[:3]]
    rest = sum(count for _, count in kinds[3:])
    return "; ".join([*counted, *([f"{rest} more left out"] if rest else [])])


def _example(item: LeftOut) -> str:
    return f", such as {item.name}" + (f" ({item.reason})" if item.reason != item.kind else "")


@dataclass(frozen=True)
class Entry:
    """An entry of a folder.

    Args:
        name: Its name.
        path: Its path.
        is_file: Whether it is a regular file, or a link to one.
        is_folder: Whether it is a folder, or a link to one.
        is_link: Whether it is a symbolic link.
        oddity: Its kind if it is neither, such as a link that leads nowhere.
    """

    name: str
    path: str
    is_file: bool
    is_folder: bool
    is_link: bool
    oddity: str = ""

    @property
    def is_hidden(self) -> bool:
        """Whether it is a dot file or a folder of macOS's resource forks."""
        return self.name.startswith(".") or self.name == "__MACOSX"


def entries_of(folder: str | Path) -> list[Entry]:
    """Return the entries of a folder, sorted by name, including hidden ones.

    Raises:
        DatasetError: It can't be listed.
    """
    if is_url(os.fspath(folder)):
        return _remote_entries(os.fspath(folder))
    try:
        with os.scandir(folder) as entries:
            return sorted(map(_entry, entries), key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(
            f"{shown(folder)} can't be listed ({error.strerror}); check its permissions"
        ) from None


def _remote_entries(url: str) -> list[Entry]:
    try:
        found = list_url(url)
    except RemoteError as error:
        raise DatasetError(f"can't be listed: {error}") from error
    return [
        Entry(one.name, one.url, is_file=not one.is_folder, is_folder=one.is_folder, is_link=False)
        for one in found
    ]


def _entry(entry: os.DirEntry[str]) -> Entry:
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
        oddity = "" if is_folder or is_file else "neither a file nor a folder"
        if oddity and entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
            oddity = "a link to something that isn't there"
    except OSError as error:
        is_folder, is_file, oddity = False, False, f"it can't be followed ({error.strerror})"
    return Entry(entry.name, entry.path, is_file, is_folder, entry.is_symlink(), oddity)


def visible_entries(folder: str | Path) -> list[Entry]:
    """Return a folder's entries without hidden ones; an empty list if it can't be listed."""
    try:
        return [entry for entry in entries_of(folder) if not entry.is_hidden]
    except DatasetError:
        return []


def is_link_upward(entry: Entry) -> bool:
    """Return whether it is a link to a folder that it lies in, below which there is no end."""
    if not (entry.is_link and entry.is_folder):
        return False
    inside = os.path.join(os.path.realpath(entry.path), "")  # noqa: PTH118
    here = os.path.realpath(os.path.dirname(entry.path))  # noqa: PTH120
    return os.path.join(here, "").startswith(inside)  # noqa: PTH118


def suffix_of(name: str) -> str:
    """Return a file's suffix in lower case, with the dot."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a stem may end in a dot


def audio_file_id(name: str, decoder: str = "soundfile") -> str | None:
    """Return the name without its suffix if that is one that can be decoded, else None."""
    stem, suffix = os.path.splitext(name)  # noqa: PTH122 - a stem may end in a dot
    return stem if stem and is_readable(suffix, decoder) else None


def holds_audio(folder: str) -> bool:
    """Return whether there is audio at any depth, of any suffix; links aren't followed."""
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not os.path.islink(f"{path}/{name}")]  # noqa: PTH114
        if any(is_audio(suffix_of(name)) for name in names):
            return True
    return False


def pass_over(entry: Entry, leave_out: PassedOver, class_name: str = "") -> bool:
    """Record an entry that isn't a clip although it looks like one or hides some.

    Returns:
        Whether it isn't a usable file or folder.
    """
    suffix = suffix_of(entry.name)
    looks_like_audio = is_audio(suffix)
    kind = ""
    if entry.is_hidden:
        if entry.is_folder and holds_audio(entry.path):
            kind = "a hidden folder with audio"
        elif not entry.is_folder and looks_like_audio:
            kind = "a hidden file"
    elif is_link_upward(entry):
        leave_out(entry.path, "a link to a folder that it lies in", class_name=class_name)
        return True
    elif entry.oddity:
        kind = entry.oddity if looks_like_audio or not suffix else ""
    elif entry.is_file and looks_like_audio and not is_readable(suffix, leave_out.decoder):
        leave_out(
            entry.path,
            f"{leave_out.decoder} doesn't read {suffix}",
            kind=f"audio that {leave_out.decoder} doesn't read",
            class_name=class_name,
        )
        return True
    if kind:
        leave_out(entry.path, kind, class_name=class_name)
    return entry.is_hidden or bool(entry.oddity)


def usable_entries(
    folder: str | Path, leave_out: PassedOver, class_name: str = "", skipped: Collection[str] = ()
) -> Iterator[Entry]:
    """Yield the usable files and folders in a folder; the others are recorded.

    A folder that can't be listed is left out as a whole.
    """
    try:
        entries = entries_of(folder)
    except DatasetError as error:
        kind = "a folder that can't be listed"
        leave_out(os.fspath(folder), str(error), kind=kind, class_name=class_name)
        return
    for entry in entries:
        if entry.name not in skipped and not pass_over(entry, leave_out, class_name):
            yield entry


def audio_below(
    folder: str,
    leave_out: PassedOver,
    class_name: str,
    *,
    skipped: Collection[str] = (),
) -> Iterator[tuple[str, str]]:
    """Yield (path below the folder without suffix, path) of each audio file at any depth.

    Others are recorded. Links to folders inside aren't followed.

    Args:
        folder: Where to look.
        leave_out: Records the entries that are left out.
        class_name: The class of all of them.
        skipped: Names right below the folder that aren't looked at.
    """
    waiting = [(folder, "")]  # a list, as folders may be deeper than Python's stack
    while waiting:
        folder, below = waiting.pop()
        deeper = []
        for entry in usable_entries(folder, leave_out, class_name, skipped):
            if entry.is_folder and entry.is_link:
                if holds_audio(entry.path):
                    reason = "a link to a folder; links inside a class folder aren't followed"
                    leave_out(entry.path, reason, class_name=class_name)
            elif entry.is_folder:
                deeper.append((entry.path, f"{below}{entry.name}/"))
            elif stem := leave_out.file_id(entry.name):
                yield below + stem, entry.path
        waiting += reversed(deeper)
        skipped = ()


def leave_out_all(
    folder: str,
    leave_out: PassedOver,
    reason: str,
    *,
    kind: str = "",
    class_name: str = "",
    skipped: Collection[str] = (),
) -> None:
    """Leave out each audio file at any depth for one reason."""
    for _, path in audio_below(folder, leave_out, class_name, skipped=skipped):
        leave_out(path, reason, kind=kind, class_name=class_name)


@contextlib.contextmanager
def opened_table(path: Path) -> Iterator[TextIO]:
    """Open a dataset's CSV table; what goes wrong inside is an error that names it.

    Raises:
        DatasetError: It can't be read as CSV, or isn't a file but a pipe, whose reader would wait.
    """
    if path.exists() and not path.is_file():
        raise DatasetError(f"{shown(path)} isn't a file; the dataset's table is expected there")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{shown(path)}: can't be read as CSV: {error}") from error


def content_digest(source: str | AudioSource) -> str | None:
    """Return a digest of a clip's bytes, 32 hexadecimal digits; None if they can't be read."""
    digest = xxhash.xxh3_128()
    try:
        with open_source(source) as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    except (OSError, RemoteError, ValueError):  # ValueError: NUL in the path
        return None
    return str(digest.hexdigest())
