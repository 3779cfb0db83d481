"""Errors that a DataLoader's worker raises."""

from __future__ import annotations

import contextlib
import traceback
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def raises_in_worker(kind: type[Exception], match: str | None = None) -> Iterator[Any]:
    """`pytest.raises` that lets go of the loader at once.

    torch's error and its traceback hold each other and the loader's iterator. Ended by the garbage
    collector, that can't tell its workers to end, and waits for five seconds.
    """
    with pytest.raises(kind, match=match) as raised:
        yield raised
    traceback.clear_frames(raised.tb)
