"""Windows of recordings: their sample ids, and when a recording counts as stored.

The window of `file_id:class` that starts after 12.48 s is `file_id@00012.480000:class`, so that the
order of keys is that of time. A recording counts as stored once its first window is: whoever writes
windows writes that one last, and whoever takes a window away takes the first one with it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple

import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.errors import InvalidSampleIdError

_FIRST: Final = "@00000.000000"
_MAX_SECONDS: Final = 100_000
_WINDOW: Final = re.compile(r"(.+)@([0-9]{5})\.([0-9]{6}):([^:]+)", re.DOTALL)
_WINDOW_KEY: Final = re.compile(rb"(.+)@[0-9]{5}\.[0-9]{6}:([^:]+)", re.DOTALL)


class Windows(NamedTuple):
    """The windows of one recording, in order.

    Args:
        starts: float64 array (n,), where each begins, in seconds.
        embeddings: Array (n, *embedding_shape) in the stored dtype.
        sample_ids: Their sample ids.
    """

    starts: npt.NDArray[Any]
    embeddings: npt.NDArray[Any]
    sample_ids: list[str]


def window_id(recording_id: str, start: int, sample_rate: int) -> str:
    """Return the sample id of a window.

    Args:
        recording_id: `file_id:class`.
        start: Its first sample.
        sample_rate: Of the waveform that the windows are cut from, in Hz.

    Raises:
        InvalidSampleIdError: It starts behind the largest time that an id holds, 27 hours.
    """
    microseconds = (2_000_000 * start + sample_rate) // (2 * sample_rate)
    seconds, rest = divmod(microseconds, 1_000_000)
    if seconds >= _MAX_SECONDS:
        raise InvalidSampleIdError(
            f"sample id {recording_id!r}: a window at {seconds} s; the id of a window holds less "
            f"than {_MAX_SECONDS} s. Cut the recording"
        )
    return _with_time(recording_id, f"@{seconds:05}.{rest:06}")


def window_start(sample_id: str, sample_rate: int) -> int | None:
    """Return the first sample of a window, see `window_id`; None if this isn't a window's id."""
    found = _WINDOW.fullmatch(sample_id)
    if found is None:
        return None
    microseconds = 1_000_000 * int(found[2]) + int(found[3])
    return (2 * microseconds * sample_rate + 1_000_000) // 2_000_000


def recording_of(sample_id: str) -> str:
    """Return the recording's `file_id:class` of a window's id; any other id as it is."""
    found = _WINDOW.fullmatch(sample_id)
    return f"{found[1]}:{found[4]}" if found else sample_id


def first_window(sample_id: str) -> str:
    """Return the id of a recording's first window; a window's id as it is."""
    return sample_id if _WINDOW.fullmatch(sample_id) else _with_time(sample_id, _FIRST)


def is_first_window(sample_id: str) -> bool:
    """Return whether this is the id of a recording's first window."""
    return sample_id.rpartition(":")[0].endswith(_FIRST)


def check_recording_id(sample_id: str) -> None:
    """Refuse a recording whose windows could be taken for those of another.

    Raises:
        InvalidSampleIdError: It looks like the id of a window.
    """
    if _WINDOW.fullmatch(sample_id):
        raise InvalidSampleIdError(
            f"sample id {sample_id!r} is that of a window, file_id@start:class; rename the file"
        )


def check_window_key(key: bytes, config: CacheConfig) -> None:
    """Refuse what isn't a window in a store of windows.

    Raises:
        InvalidSampleIdError: The config has windows, and the key isn't one's.
    """
    if config.window is not None and not _WINDOW_KEY.fullmatch(key):
        raise InvalidSampleIdError(
            f"sample id {key.decode(errors='backslashreplace')!r} isn't that of a window, and the "
            "store holds windows: `window_id(recording, start, sample_rate)` makes one"
        )


def first_windows_of(keys: Iterable[bytes]) -> set[bytes]:
    """Return the keys of the first windows of the recordings that these windows are of."""
    found = (_WINDOW_KEY.fullmatch(key) for key in keys)
    return {b"%s%s:%s" % (each[1], _FIRST.encode(), each[2]) for each in found if each}


def window_range(recording_key: bytes) -> tuple[bytes, bytes]:
    """Return what all keys of a recording's windows lie between."""
    file_id = recording_key.rpartition(b":")[0]
    return file_id + b"@0", file_id + b"@:"


def keys_of_windows(recording_key: bytes, keys: Collection[bytes]) -> list[bytes]:
    """Return those of the keys that are windows of this recording."""
    file_id, _, class_name = recording_key.rpartition(b":")
    wanted = (file_id, class_name)
    found = ((key, _WINDOW_KEY.fullmatch(key)) for key in keys)
    return [key for key, each in found if each and each.groups() == wanted]


def _with_time(recording_id: str, time: str) -> str:
    file_id, colon, class_name = recording_id.rpartition(":")
    return f"{file_id}{time}{colon}{class_name}" if colon else recording_id
