"""Names on disk and the form of a key: what docs/format.md specifies, in code."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Sequence
from itertools import repeat
from typing import Final

from lmdbcache.errors import InvalidSampleIdError

FORMAT_VERSION: Final = 1

CURRENT_NAME: Final = "CURRENT"
WRITER_LOCK_NAME: Final = "writer.lock"
STATISTICS_NAME: Final = "statistics"
EXTRAS_NAME: Final = "extras"  # what other rooms keep of a store, a folder each; goes with it
GENERATION_NAME: Final = re.compile(r"gen-[0-9]{6,12}")

# Both live in the main database beside the embeddings. Neither holds a colon, every embedding's
# key does, so they can't collide.
METADATA_KEY: Final = b"metadata"
CHECKSUMS_NAME: Final = b"checksums"
NUM_RESERVED_KEYS: Final = 2

MAX_KEY_BYTES: Final = 511  # the limit of LMDB 0.9

_CAPITAL_IN_CLASS: Final = re.compile("[A-Z][^:\n]*\n")


def sample_key(sample_id: str) -> bytes:
    """The LMDB key of a sample id: UTF-8 of its canonical form.

    Raises:
        InvalidSampleIdError: Not text, no colon, an empty part, NUL, a lone surrogate, or over
            511 bytes.
    """
    # Most ids are ASCII and canonical already: one look is enough for those.
    if isinstance(sample_id, str) and sample_id.isascii():
        key = sample_id.encode()
        colon = key.rfind(b":")
        tail = key[colon + 1 :]
        usable = 0 < colon < len(key) - 1 and len(key) <= MAX_KEY_BYTES and b"\0" not in key
        if usable and tail == tail.lower():
            return key
    file_id, class_name = split_sample_id(sample_id)
    return _encode(file_id, class_name, sample_id)


def sample_keys(sample_ids: Sequence[str]) -> list[bytes]:
    """The LMDB keys of several sample ids, `(n,)`: `sample_key` of each.

    Raises:
        InvalidSampleIdError: See `sample_key`.
    """
    # One look at all of them, a line each: five times faster where all are ASCII and canonical.
    try:
        lines = "\n".join(["", *sample_ids, ""])
    except TypeError:  # not text
        lines = ""
    is_canonical = (
        lines.isascii()
        and lines.count("\n") == len(sample_ids) + 1
        and not ("\0" in lines or "\n:" in lines or ":\n" in lines)
        and all(map(operator.contains, sample_ids, repeat(":")))
        and not (lines != lines.lower() and _CAPITAL_IN_CLASS.search(lines))
    )
    keys = lines.encode().split(b"\n")[1:-1] if is_canonical else []
    if keys and max(map(len, keys)) <= MAX_KEY_BYTES:
        return keys
    return [sample_key(sample_id) for sample_id in sample_ids]


def split_sample_id(sample_id: str) -> tuple[str, str]:
    """(file_id, class_name) of `file_id:class`, split at the last colon, in canonical form.

    The file id is brought to NFC; the class to NFC and lower case.

    Raises:
        InvalidSampleIdError: Not text, no colon, or an empty part.
    """
    if not isinstance(sample_id, str):
        raise InvalidSampleIdError(
            f"sample id {sample_id!r} isn't text of the form 'file_id:class'"
        )
    file_id, colon, class_name = sample_id.rpartition(":")
    if not (colon and file_id and class_name):
        raise InvalidSampleIdError(
            f"sample id {sample_id!r} isn't of the form 'file_id:class', such as 'video_00001:dog'"
        )
    if not sample_id.isascii():
        file_id = unicodedata.normalize("NFC", file_id)
    return file_id, canonical_class(class_name)


def canonical_class(class_name: str) -> str:
    """A class as it stands in a sample id: NFC and lower case."""
    if class_name.isascii():
        return class_name.lower()
    # Lower case can leave NFC; its own NFC doesn't leave lower case.
    lower = unicodedata.normalize("NFC", class_name).lower()
    return unicodedata.normalize("NFC", lower).lower()


def join_sample_id(file_id: str, class_name: str) -> str:
    """The canonical sample id of a file and its class.

    Raises:
        InvalidSampleIdError: The class holds a colon, a part is empty, or see `sample_key`.
    """
    if ":" in class_name:
        raise InvalidSampleIdError(
            f"class {class_name!r} of file {file_id!r} holds a colon; only the file id may"
        )
    return canonical_sample_id(f"{file_id}:{class_name}")


def class_of(sample_id: str) -> str:
    """The class of a sample id, to count by; `(no class)` for one that can't be stored."""
    try:
        return split_sample_id(sample_id)[1]
    except InvalidSampleIdError:
        return "(no class)"


def canonical_sample_id(sample_id: str) -> str:
    """The one form of a sample id under which it is stored.

    Raises:
        InvalidSampleIdError: See `sample_key`.
    """
    return sample_key(sample_id).decode("utf-8")


def sample_id_of_key(key: bytes) -> str:
    """The sample id behind an LMDB key; bytes of a damaged one that aren't UTF-8 as escapes."""
    return key.decode("utf-8", errors="backslashreplace")


def _encode(file_id: str, class_name: str, sample_id: str) -> bytes:
    try:
        key = f"{file_id}:{class_name}".encode()
    except UnicodeEncodeError:
        raise InvalidSampleIdError(
            f"sample id {sample_id!a} holds bytes that aren't UTF-8; rename the file"
        ) from None
    if b"\0" in key:
        raise InvalidSampleIdError(f"sample id {sample_id!r} holds a NUL character")
    if len(key) > MAX_KEY_BYTES:
        raise InvalidSampleIdError(
            f"sample id {sample_id[:40]!r}… is {len(key)} bytes long; "
            f"{MAX_KEY_BYTES} are the limit. Use a shorter file id"
        )
    return key
