"""Clips in tar shards, as webdataset keeps them; the shards stay where they are. No torch here.

A shard is read once when the dataset is opened, for the places of its members; a decoding process
then reads the bytes of one clip. Shards lie in a folder or at a URL.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Final

from lmdbcache.audio import FilePart, is_audio, is_readable, opened_url, shown
from lmdbcache.datasets.base import ListedDataset, checked_folder, own_split_name
from lmdbcache.datasets.namespaces import namespace_of
from lmdbcache.datasets.scanning import PassedOver, entries_of, visible_entries
from lmdbcache.errors import DatasetError, RemoteError
from lmdbcache.files import expand_user, is_url, without_secrets

_SUFFIX: Final = ".tar"
_CLASS_NAMES: Final = ("class", "class_name", "label", "category")
_FILE_ID_NAMES: Final = ("file_id", "id")
_TEXTS: Final = ("json", "cls", "txt")
_CONNECTIONS: Final = 8
_MOST_TEXT_BYTES: Final = 1 << 20
_SPLITS: Final = ("train", "val", "test")


class TarShards(ListedDataset):
    """Tar files in the layout of webdataset: `KEY.wav` with `KEY.cls`, `KEY.json` or `KEY.txt`.

    Members that follow each other and have one key are one clip. Its class is a field of the JSON
    (`class`, `class_name`, `label` or `category`), else the text of `KEY.cls` or `KEY.txt`, else
    the key's first folder, as in `AudioFolder`: `dog/0001.wav` is `0001:dog`. Its file id is the
    JSON's `file_id` or `id`, else the key. Labels are the numbers of the classes if all of them are
    whole numbers, else positions in their sorted list. Shards in folders called train, val or test,
    or whose names begin so, are the clips' `split`. Shards are plain tar files: a compressed one
    can't be read in parts and is left out.

    Args:
        root: A folder or URL with shards, or one shard.
        with_shard: Put the shard's name in front of each file id, `shard-0001/KEY`, where keys are
            unique within a shard only.
        namespace: None makes one from the folder's name, see `lmdbcache.datasets.namespaces`.
        decoder: What decodes the clips: members that it doesn't read are left out.

    Raises:
        DatasetError: No shards or no clips, a shard that can't be read or is cut, or two clips with
            one sample id.
    """

    kind = "webdataset"
    layout = "*.tar with <key>.wav (or flac, …) and <key>.json, .cls or .txt"

    def __init__(
        self,
        root: str | Path,
        *,
        with_shard: bool = False,
        namespace: str | None = None,
        decoder: str = "soundfile",
    ) -> None:
        passed_over = PassedOver(decoder)
        place, shards = _shards_of(root, passed_over)
        with ThreadPoolExecutor(_CONNECTIONS if is_url(place) else 1) as threads:
            parts = list(threads.map(lambda path: _clips(path, decoder), shards))
        found = [clip for clips, _ in parts for clip in clips]
        passed_over.items += [item for _, left_out in parts for item in left_out.items]
        classes = sorted({class_name for _, _, class_name, _ in found})
        are_numbers = all(name.isdecimal() for name in classes)
        super().__init__(
            place,
            namespace_of(self.kind, namespace, _name_of(place)),
            {name: int(name) if are_numbers else i for i, name in enumerate(classes)},
            namespace_is_derived=namespace is None,
            passed_over=passed_over,
        )
        for shard, key, class_name, source in found:
            stem = _name_of(shard).removesuffix(_SUFFIX)
            file_id = f"{stem}/{key}" if with_shard else key
            split = _split_of(shard[len(place) :].strip("/") or stem, key)
            more: dict[str, Any] = {"split": split} if split else {}
            try:
                self.add(file_id, class_name, str(source), audio_source=source, **more)
            except DatasetError as error:
                raise DatasetError(
                    f"{error}. If keys repeat from one shard to the next, open the dataset with "
                    "`with_shard=True`"
                ) from None
        self.finish()

    @classmethod
    def recognizes(cls, root: str | Path, decoder: str) -> bool:
        """Return whether there are tar files in the folder, or in folders right below it."""
        del decoder
        entries = visible_entries(root)
        below = (each for one in entries if one.is_folder for each in visible_entries(one.path))
        files = itertools.chain(entries, below)
        return any(one.is_file and one.name.endswith(_SUFFIX) for one in files)


def _shards_of(root: str | Path, passed_over: PassedOver) -> tuple[str, list[str]]:
    """Return the folder and the paths of the shards in it and in its folders, sorted."""
    given = os.fspath(root)
    if given.endswith(_SUFFIX):
        path = given if is_url(given) else os.path.abspath(expand_user(given))  # noqa: PTH100
        return path, [path]
    folder = checked_folder(root, "<root>/*.tar")
    entries = entries_of(folder)
    below = [each for one in entries if one.is_folder for each in visible_entries(one.path)]
    files = [one for one in (*entries, *below) if one.is_file and not one.is_hidden]
    for one in files:
        if one.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
            passed_over(one.path, "a compressed tar; unpack it to a plain one")
    shards = [one.path for one in files if one.name.endswith(_SUFFIX)]
    if not shards:
        raise DatasetError(f"{shown(folder)}: no .tar files in it")
    return folder, sorted(shards)


_Clip = tuple[str, str, str, FilePart]  # shard, file id, class, source


def _clips(path: str, decoder: str) -> tuple[list[_Clip], PassedOver]:
    """Return the clips of a shard, and what in it isn't one.

    Raises:
        DatasetError: It can't be read, or is cut.
    """
    found, passed_over = [], PassedOver(decoder)
    try:
        with (
            opened_url(path) if is_url(path) else open(path, "rb") as file,  # noqa: PTH123
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            for key, group in groupby(_members(archive), lambda one: _parts(one[0].name)[0]):
                members = {_parts(member.name)[1]: (member, text) for member, text in group}
                clip = _clip(path, key, members, passed_over)
                found += [clip] if clip else []
            _check_end(file, archive.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError, RemoteError) as error:
        reason = str(error) if isinstance(error, RemoteError) else f"not a whole tar file ({error})"
        raise DatasetError(f"{shown(without_secrets(path))}: {reason}") from error
    return found, passed_over


def _clip(
    path: str,
    key: str,
    members: Mapping[str, tuple[tarfile.TarInfo, str]],
    passed_over: PassedOver,
) -> _Clip | None:
    audio = next((name for name in members if is_audio(_suffix(name))), None)
    if not key or audio is None:
        return None
    member, _ = members[audio]
    name, suffix, decoder = (
        f"{without_secrets(path)}/{member.name}",
        _suffix(audio),
        passed_over.decoder,
    )
    if not is_readable(suffix, decoder):
        kind = f"audio that {decoder} doesn't read"
        passed_over(name, f"{decoder} doesn't read {suffix}", kind=kind)
        return None
    try:
        file_id, class_name = _names(key, {one: text for one, (_, text) in members.items()})
    except ValueError as error:
        passed_over(name, f"its JSON can't be read ({error})", kind="damaged JSON")
        return None
    if not class_name:
        passed_over(name, "no class")
        return None
    return path, file_id, class_name, FilePart(path, member.offset_data, member.size, name)


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield each file with its text, empty for one that isn't a small text."""
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # they are kept otherwise
        if member.isreg() and not member.name.rpartition("/")[2].startswith("."):
            is_text = _parts(member.name)[1] in _TEXTS and member.size <= _MOST_TEXT_BYTES
            # Now: at a URL, going back later would fetch these bytes again.
            file = archive.extractfile(member) if is_text else None
            text = "" if file is None else file.read().decode("utf-8", "replace").strip()
            yield member, text


def _parts(name: str) -> tuple[str, str]:
    """(key, extension) as webdataset splits a name: at the first dot behind the last slash."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _suffix(extension: str) -> str:
    return f".{extension.rpartition('.')[2]}"


def _names(key: str, texts: Mapping[str, str]) -> tuple[str, str]:
    """(file id, class) of a clip; an empty class where none is stated."""
    facts = json.loads(texts["json"]) if texts.get("json") else {}
    facts = facts if isinstance(facts, dict) else {}
    stated = _first(facts, _CLASS_NAMES) or texts.get("cls") or texts.get("txt")
    file_id = _first(facts, _FILE_ID_NAMES)
    if stated:
        return file_id or key, stated
    # As in a plain folder: <class>/<file id>, or <split>/<class>/<file id>.
    first, _, rest = key.partition("/")
    if own_split_name(first) not in _SPLITS or "/" not in rest:
        return file_id or rest, first if rest else ""
    class_name, _, rest = rest.partition("/")
    return file_id or f"{first}/{rest}", class_name


def _first(facts: Mapping[str, Any], names: tuple[str, ...]) -> str:
    found = (facts[name] for name in names if name in facts)
    return next((str(one) for one in found if type(one) in (str, int)), "")


def _name_of(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _split_of(path: str, key: str) -> str:
    """Return the split that a shard's folder, the beginning of its name or a key's folder says."""
    folder, _, name = path.rpartition("/")
    beginning = name.split("-")[0].split("_")[0].split(".")[0]
    for part in (folder.rpartition("/")[2], beginning, key.partition("/")[0]):
        if own_split_name(part) in _SPLITS:
            return own_split_name(part)
    return ""


def _check_end(file: BinaryIO, offset: int) -> None:
    """Whether the archive's end is there: tarfile also takes a damaged header for the end."""
    file.seek(offset)
    if any(file.read(tarfile.BLOCKSIZE)) or file.seek(0, io.SEEK_END) < offset + tarfile.BLOCKSIZE:
        raise ValueError("damaged or cut")
