"""Recordings decoded window by window, each in one pass by one worker."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lmdbcache.audio import AudioSource, AudioWindow, decoder_of, load_windows
from lmdbcache.cache import ClipFailure, Source, read_source
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import FrontEnd
from lmdbcache.errors import AudioDecodeError, CacheError, FrontEndError, InvalidSampleIdError
from lmdbcache.extraction.decoding import (
    Clip,
    FeatureBatch,
    FeatureBatches,
    features_in,
    note_audio,
    picklable,
    stacked_if_alike,
    start_method,
)
from lmdbcache.storage import window_id


class AllBut:
    """Windows that needn't be computed: all but some.

    Args:
        sample_ids: These.
    """

    def __init__(self, sample_ids: Iterable[str]) -> None:
        self._sample_ids = frozenset(sample_ids)

    def issuperset(self, sample_ids: Iterable[str]) -> bool:
        """Return whether none of these has to be computed."""
        return self._sample_ids.isdisjoint(sample_ids)


class RecordingBatches(FeatureBatches):
    """The windows of recordings, in batches that never hold those of two.

    Batch j of a recording is its windows j * batch_size and following: a run that goes on where
    another was killed computes the same batches, and leaves out those that are stored. The first
    one comes behind all others: whoever finds the recording's first window finds all of it.

    Args:
        units: One recording each.
        config: With windows.
        front_end: Waveform → features.
        batch_size: Windows of a batch.
        stored: Recording → the sample ids of those of its windows that needn't be computed.
        num_workers: See `FeatureBatches`, as for the others.
        order: See `FeatureBatches`.
        is_wanted: See `FeatureBatches`.
    """

    def __init__(
        self,
        units: Sequence[Sequence[Clip]],
        config: CacheConfig,
        front_end: FrontEnd,
        *,
        batch_size: int,
        stored: Mapping[str, frozenset[str] | AllBut],
        num_workers: int,
        order: Callable[[int], Iterable[int]] = range,
        is_wanted: Callable[[list[str]], bool] = lambda _: True,
    ) -> None:
        self._streams = _Recordings(units, config, front_end, batch_size, stored)
        super().__init__(
            units, config, front_end, num_workers=num_workers, order=order, is_wanted=is_wanted
        )
        self._numbers = iter(self._wanted)

    def __next__(self) -> FeatureBatch:
        """The next batch; see `FeatureBatches`."""
        batch = super().__next__()
        if batch.is_last:
            self._hand_out()
        return batch

    def _make_loader(self, num_workers: int) -> torch.utils.data.DataLoader[FeatureBatch]:
        context = multiprocessing.get_context(start_method()) if num_workers else None
        self._streams.numbers = queue.SimpleQueue() if context is None else context.SimpleQueue()
        return self._loader_of(self._streams, num_workers)

    def _is_lost(self, worker: Any) -> bool:
        return worker.exitcode not in (None, 0)  # it ends where no recording is left for it

    def _start_workers(self) -> None:
        super()._start_workers()
        # Each worker has one to go on with while the news of its last one is under way.
        for _ in range(2 * max(1, self._loader.num_workers)):
            self._hand_out()

    def _hand_out(self) -> None:
        """Give the next recording to whichever worker asks first; behind the last, none to each."""
        number = next(self._numbers, None)
        self._streams.numbers.put(number)


class _Recordings(torch.utils.data.IterableDataset[FeatureBatch]):
    """What a worker does: takes the number of a recording, gives its batches, takes another."""

    numbers: Any  # a queue of numbers that all workers share; None is the end

    def __init__(
        self,
        units: Sequence[Sequence[Clip]],
        config: CacheConfig,
        front_end: FrontEnd,
        batch_size: int,
        stored: Mapping[str, frozenset[str] | AllBut],
    ) -> None:
        self._units, self._config, self._front_end = units, config, front_end
        self._batch_size, self._stored = batch_size, stored

    def __iter__(self) -> Iterator[FeatureBatch]:
        while (number := self.numbers.get()) is not None:
            ((recording, given),) = self._units[number]
            try:
                yield from self._decoded(recording, given)
            except CacheError as error:
                # As a value: raised here it would reach the user inside a worker's traceback.
                yield FeatureBatch(error=picklable(error))

    def _decoded(self, recording: str, given: str | AudioSource) -> Iterator[FeatureBatch]:
        """Yield the batches to compute; the first one comes last, computed or not.

        Raises:
            CacheError: The front end can't be loaded.
        """
        # Before decoding: a file that is replaced after that isn't the one remembered.
        source = read_source(given)[0] or Source("", 0, None, None)
        config, stored = self._config, self._stored.get(recording, frozenset())
        windows = load_windows(
            given,
            config.sample_rate,
            config.num_samples,
            config.hop_samples,
            config.last_window,
            decoder_of(config.front_end),
        )
        first = None
        is_silent, is_cancelled = True, False
        try:
            for group in self._groups(recording, windows):
                is_silent &= not any(window.waveform.any() for _, window in group)
                is_cancelled = group[-1][1].is_cancelled
                batch = FeatureBatch(recording=recording, is_last=first is None)
                if not stored.issuperset(sample_id for sample_id, _ in group):
                    self._add_features(batch, group, given, source)
                if first is None:
                    first = batch
                elif batch.sample_ids:
                    yield batch
        except (AudioDecodeError, InvalidSampleIdError) as error:
            failure = ClipFailure(recording, str(given), str(error))
            first = FeatureBatch(recording=recording, failures=[failure])
            first.num_front_end_errors = isinstance(error, FrontEndError)
        else:
            assert first is not None  # there is at least one window
            first.silent = [recording] if is_silent else []
            first.cancelled = [recording] if is_cancelled else []
        yield first

    def _add_features(
        self,
        batch: FeatureBatch,
        group: Sequence[tuple[str, AudioWindow]],
        given: str | AudioSource,
        source: Source,
    ) -> None:
        features = []
        for sample_id, window in group:
            features.append(features_in(window, self._front_end, self._config, given))
            batch.sample_ids.append(sample_id)
            batch.sources[sample_id] = source._replace(num_valid=window.num_valid)
            note_audio(batch, sample_id, window.waveform)
        batch.num_features, batch.features = len(features), stacked_if_alike(features)

    def _groups(
        self, recording: str, windows: Iterator[AudioWindow]
    ) -> Iterator[list[tuple[str, AudioWindow]]]:
        group: list[tuple[str, AudioWindow]] = []
        for window in windows:
            name = window_id(recording, window.start, self._config.sample_rate)
            group.append((name, window))
            if len(group) == self._batch_size:
                yield group
                group = []
        if group:
            yield group
