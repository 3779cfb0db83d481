"""One embedding for each recording of a store of windows: the mean or maximum of its windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from lmdbcache.cache.views import HiddenStateView, StoreView, ViewSelection
from lmdbcache.errors import ConfigError, SampleNotFoundError
from lmdbcache.files import few
from lmdbcache.storage import EmbeddingReader, Positions, Selection, canonical_sample_id

Pool = Literal["mean", "max"]


def pooled(windows: npt.NDArray[Any], pool: Pool) -> npt.NDArray[Any]:
    """Pool the windows of one recording.

    Args:
        windows: `(n, *embedding_shape)`.
        pool: `"mean"`, which is taken in float32, or `"max"`.

    Returns:
        `embedding_shape`, dtype of `windows`.
    """
    if pool == "max":
        found: npt.NDArray[Any] = windows.astype(np.float32, copy=False).max(0)
    else:
        found = windows.mean(0, dtype=np.float32)
    return found.astype(windows.dtype, copy=False)


class RecordingView(StoreView):
    """Recordings by the sample ids that their dataset has, each as one embedding.

    It has the recordings that are stored in full.

    Args:
        source: A reader of a store of windows, or a `HiddenStateView` of one.
        pool: `"mean"` or `"max"` over a recording's windows.

    Raises:
        ConfigError: The store has no windows, or `pool` is unknown.
    """

    def __init__(self, source: EmbeddingReader | HiddenStateView, pool: Pool = "mean") -> None:
        if pool not in get_args(Pool):
            raise ConfigError(f"pool: {pool!r}; known are {', '.join(get_args(Pool))}")
        super().__init__(source.reader if isinstance(source, HiddenStateView) else source)
        self.source: Final = source
        self.pool: Final = pool
        if self.reader.config.window is None:
            raise ConfigError(f"{self.path} holds one embedding a clip: its config has no window")

    @property
    def embedding_shape(self) -> tuple[int | None, ...] | None:
        """Shape of the embedding of one recording."""
        return self.source.embedding_shape

    def __contains__(self, recording_id: object) -> bool:
        return isinstance(recording_id, str) and not self.reader.missing([recording_id])

    def __iter__(self) -> Iterator[str]:
        return self.reader.recordings()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {self.pool!r})"

    def reopened(self) -> RecordingView:
        """Return the same view of another reader, see `EmbeddingReader.reopened`."""
        return RecordingView(self.source.reopened(), self.pool)

    def select(self, sample_ids: Iterable[str] | None = None) -> RecordingSelection:
        """Return these recordings by position, for a training loop; None takes all."""
        return RecordingSelection(self, sample_ids)


class RecordingSelection:
    """Some recordings of a view by position.

    Args:
        view: Which view.
        recording_ids: In the order of the positions; None takes all that are stored now, by key.
    """

    def __init__(self, view: RecordingView, recording_ids: Iterable[str] | None = None) -> None:
        self.view = view
        self.sample_ids: list[str] = list(view if recording_ids is None else recording_ids)
        self._windows: Selection | ViewSelection | None = None
        self._ends: npt.NDArray[np.int64] = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_windows": None}

    def get_batch(self, positions: Positions) -> npt.NDArray[Any]:
        """Return the embeddings at these positions, `(n, *embedding_shape)`, stored dtype.

        Raises:
            SampleNotFoundError: Names what the newest commit lacks.
        """
        selection = self._found()
        # One by one: a recording may have thousands of windows.
        rows = [pooled(selection.get_batch(self._span(n)), self.view.pool) for n in positions]
        shape = rows[0].shape if rows else tuple(n or 0 for n in self.view.embedding_shape or ())
        return np.array(rows, self.view.dtype).reshape(len(rows), *shape)

    def will_need(self, positions: Positions) -> None:
        """Ask the kernel to read what is needed for these from disk, in the background."""
        for number in positions:
            self._found().will_need(self._span(number))

    def _span(self, number: Any) -> npt.NDArray[np.int64]:
        return np.arange(self._ends[number], self._ends[number + 1])

    def _found(self) -> Selection | ViewSelection:
        """The windows of all recordings, one behind the other."""
        if self._windows is None:
            reader = self.view.reader
            if missing := reader.missing(self.sample_ids):
                raise SampleNotFoundError(
                    f"{few(list(map(repr, missing)), 3)}: not stored in full in {reader.path}. "
                    "Extract what is missing, or check the file id and class"
                )
            windows = [reader.window_ids(canonical_sample_id(one)) for one in self.sample_ids]
            self._ends = np.cumsum([0, *map(len, windows)])
            self._windows = self.view.source.select([one for each in windows for one in each])
        return self._windows
