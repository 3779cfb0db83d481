"""Clips decoded and turned into features, in worker processes."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from lmdbcache.audio import (
    AudioSource,
    AudioWindow,
    DecodedClip,
    decoder_of,
    is_digital_silence,
    load_clip,
    shown,
)
from lmdbcache.cache import ClipFailure, Source, read_source
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import FrontEnd, clip_features
from lmdbcache.errors import AudioDecodeError, CacheError, ExtractionError, FrontEndError

_logger: Final = logging.getLogger(__name__)
_WAIT_SECONDS: Final = 600.0  # a worker that gives nothing for so long is stuck
_QUIET: Final = 1e-4  # of full scale; models may take quieter clips for silence
_NEWS_SECONDS: Final = 1.0
_CLOSE_SECONDS: Final = 5.0
_FOR_THE_MAIN_PROCESS: Final = {signal.SIGINT, signal.SIGTERM}


Clip = tuple[str, "str | AudioSource"]  # sample id, audio file or source


@dataclass
class FeatureBatch:
    """One unit of work for the model.

    Args:
        sample_ids: The clips that gave features.
        features: Their features: a tensor `(len(sample_ids), ...)`, or a list of one tensor for
            each where their shapes or dtypes differ; None if no clip gave any.
        failures: The clips that didn't.
        num_features: How many clips gave features.
        num_front_end_errors: How many of the failures are the front end's.
        audio: Sample id → checksum of the waveform, of the clips that aren't silent.
        silent: The sample ids of digital silence among `sample_ids`.
        cancelled: Those whose channels cancel when they are mixed to mono.
        sources: What their files were like right before they were decoded, with the number of
            samples that came of each.
        error: What ends the whole run, such as a front end that can't be loaded.
        recording: Of windows: the sample id of the recording that all of these are windows of.
        is_last: Whether nothing follows of the recording; of one that is whole, this batch has its
            first window, and `silent` and `cancelled` hold it if all of it is.
    """

    sample_ids: list[str] = field(default_factory=list)
    features: torch.Tensor | list[torch.Tensor] | None = None
    failures: list[ClipFailure] = field(default_factory=list)
    num_features: int = 0
    num_front_end_errors: int = 0
    audio: dict[str, int] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    error: CacheError | None = None
    recording: str = ""
    is_last: bool = True

    def __getstate__(self) -> dict[str, Any]:
        # Out of a worker as bytes in its pipe. As a tensor the features would go through /dev/shm,
        # which containers keep small; where it is full, torch loses the batch without a word.
        alike = [(positions, features.numpy()) for positions, features in self.groups()]
        return {**self.__dict__, "features": alike}

    def __setstate__(self, state: dict[str, Any]) -> None:
        alike = state.pop("features")
        self.__dict__.update(state, features=None)
        if len(alike) == 1:
            self.features = torch.from_numpy(alike[0][1])
        elif alike:
            pairs = [
                pair
                for places, rows in alike
                for pair in zip(places, torch.from_numpy(rows), strict=True)
            ]
            self.features = [features for _, features in sorted(pairs, key=lambda pair: pair[0])]

    @property
    def finished(self) -> list[str]:
        """The clips that are done with this unit and haven't failed; of windows: recordings."""
        if not self.recording:
            return self.sample_ids
        return [self.recording] if self.is_last and not self.failures else []

    @property
    def num_clips(self) -> int:
        """Number of clips that are done with this unit, failed ones included."""
        return len(self.finished) + len(self.failures)

    def num_valid(self, positions: Iterable[int]) -> list[int] | None:
        """Return how many samples of these clips came from their files; None if it isn't known."""
        sources = (self.sources.get(self.sample_ids[position]) for position in positions)
        counts = [None if source is None else source.num_valid for source in sources]
        known = [count for count in counts if count is not None]
        return known if len(known) == len(counts) else None

    def only(self, sample_ids: Sequence[str]) -> FeatureBatch:
        """Return the batch of some of `sample_ids`, in their order, with no failures."""
        features = self.features
        if len(sample_ids) < len(self.sample_ids) and features is not None:
            wanted = set(sample_ids)
            rows = [row for row, one in enumerate(self.sample_ids) if one in wanted]
            if isinstance(features, torch.Tensor):
                features = features[rows]
            else:
                features = stacked_if_alike([features[row] for row in rows])
        return replace(self, sample_ids=list(sample_ids), features=features, failures=[])

    def groups(self) -> list[tuple[list[int], torch.Tensor]]:
        """Return (positions in `sample_ids`, their features stacked), by shape and dtype."""
        if self.features is None or isinstance(self.features, torch.Tensor):
            stacked = self.features
            return [] if stacked is None else [(list(range(len(stacked))), stacked)]
        alike: dict[Any, list[int]] = {}
        for position, one in enumerate(self.features):
            alike.setdefault((one.dtype, one.shape), []).append(position)
        return [
            (positions, torch.stack([self.features[position] for position in positions]))
            for positions in alike.values()
        ]


def stacked_if_alike(features: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor] | None:
    """Return the features as one tensor; as they are if they differ; None for an empty list."""
    kinds = {(one.dtype, one.shape) for one in features}
    return torch.stack(features) if len(kinds) == 1 else (features or None)


class _Units(torch.utils.data.Dataset[FeatureBatch]):
    """Fixed units of clips, so that a batch doesn't depend on the number of workers."""

    def __init__(
        self, units: Sequence[Sequence[Clip]], config: CacheConfig, front_end: FrontEnd
    ) -> None:
        self.units, self.config, self.front_end = units, config, front_end

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> FeatureBatch:
        try:
            return _decode_unit(self.units[index], self.config, self.front_end)
        except CacheError as error:
            # As a value: raised here it would reach the user inside a worker's traceback.
            return FeatureBatch(error=picklable(error))


def picklable(error: CacheError) -> CacheError:
    """Return the error, or its text: torch loses what can't be pickled, and would wait for it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises
        return ExtractionError(f"{type(error).__name__}: {error}")
    return error


def _decode_unit(clips: Sequence[Clip], config: CacheConfig, front_end: FrontEnd) -> FeatureBatch:
    """Return the features of one unit's clips; those that give none are in its `failures`.

    Raises:
        CacheError: The front end can't be loaded.
    """
    decoder = decoder_of(config.front_end)
    batch = FeatureBatch()
    features = []
    for sample_id, given in clips:
        # Before decoding: a file that is replaced after that isn't the one remembered.
        source, content = read_source(given)
        try:
            decoded = load_clip(
                given, config.sample_rate, config.duration, decoder, content=content
            )
            features.append(features_in(decoded, front_end, config, given))
        except AudioDecodeError as error:
            batch.failures.append(ClipFailure(sample_id, str(given), str(error)))
            batch.num_front_end_errors += isinstance(error, FrontEndError)
            continue
        batch.sample_ids.append(sample_id)
        source = source or Source("", 0, None, None)
        batch.sources[sample_id] = source._replace(num_valid=decoded.num_valid)
        if is_digital_silence(decoded.waveform):
            batch.silent.append(sample_id)
        if decoded.is_cancelled:
            batch.cancelled.append(sample_id)
        note_audio(batch, sample_id, decoded.waveform)
    batch.num_features, batch.features = len(features), stacked_if_alike(features)
    return batch


def features_in(
    decoded: DecodedClip | AudioWindow,
    front_end: FrontEnd,
    config: CacheConfig,
    given: str | AudioSource,
) -> torch.Tensor:
    """Return the features of a clip or a window.

    Raises:
        FrontEndError: The front end fails on it.
    """
    found = clip_features(
        front_end,
        decoded.waveform,
        decoded.num_valid,
        sample_rate=config.sample_rate,
        name=shown(given),
    )
    return torch.from_numpy(found)


def note_audio(batch: FeatureBatch, sample_id: str, waveform: NDArray[np.float32]) -> None:
    """Keep the checksum of a waveform that isn't silent."""
    if np.abs(waveform).max() > _QUIET:
        batch.audio[sample_id] = xxhash.xxh3_64_intdigest(waveform.data)


class FeatureBatches(Iterator[FeatureBatch]):
    """The units' features in the order asked for. Close it to end the worker processes.

    An exception inside, Ctrl-C included, leaves the workers alone until then: what is computed
    can be committed first. See `lmdbcache.extraction.clips.features_of` for the arguments; a
    process that can't start workers decodes itself, with a warning.
    """

    def __init__(
        self,
        units: Sequence[Sequence[Clip]],
        config: CacheConfig,
        front_end: FrontEnd,
        *,
        num_workers: int,
        order: Callable[[int], Iterable[int]] = range,
        is_wanted: Callable[[list[str]], bool] = lambda _: True,
    ) -> None:
        self._units: torch.utils.data.Dataset[FeatureBatch] = _Units(units, config, front_end)
        self._wanted = _Wanted(units, order, is_wanted)
        num_workers = min(num_workers, len(units))
        if num_workers and (reason := _why_no_workers(num_workers)):
            _decodes_here(reason)
            num_workers = 0
        self._loader = self._make_loader(num_workers)
        self._batches: Any = None
        self._workers: list[Any] = []

    def _make_loader(self, num_workers: int) -> torch.utils.data.DataLoader[FeatureBatch]:
        return self._loader_of(self._units, num_workers, self._wanted)

    def _loader_of(
        self,
        dataset: torch.utils.data.Dataset[FeatureBatch],
        num_workers: int,
        sampler: torch.utils.data.Sampler[int] | None = None,
    ) -> torch.utils.data.DataLoader[FeatureBatch]:
        return torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            worker_init_fn=_begin_worker,
            multiprocessing_context=start_method() if num_workers else None,
            timeout=_WAIT_SECONDS if num_workers else 0,
        )

    def __next__(self) -> FeatureBatch:
        """The next unit.

        Raises:
            CacheError: The front end can't be loaded in a worker.
            ExtractionError: A worker ended while it handed over its features.
        """
        try:
            if self._batches is None:
                self._start_workers()
            # torch raises this news wherever the main process is, such as inside a model whose
            # errors are taken for its own.
            if any(map(self._is_lost, self._workers)):
                raise _worker_failure(EOFError("a process has ended"))
            batch: FeatureBatch = next(self._batches)
        except (EOFError, OSError) as error:
            if not self._loader.num_workers or isinstance(error, CacheError):
                raise
            # A dead worker's connection ends before torch's signal handler hears of it. Its
            # RuntimeError comes out of here, and not out of the cleaning up.
            time.sleep(_NEWS_SECONDS)
            raise _worker_failure(error) from error
        if batch.error is not None:
            raise batch.error
        return batch

    def _is_lost(self, worker: Any) -> bool:
        return not worker.is_alive()

    def _start_workers(self) -> None:  # the command line lets no signal interrupt it
        before = set(multiprocessing.active_children())
        try:
            with _no_signals():
                self._batches = iter(self._loader)
        except Exception as error:  # no more processes, or a front end that can't be pickled
            if not self._loader.num_workers:
                raise
            _kill([child for child in multiprocessing.active_children() if child not in before])
            _decodes_here(f"decoding processes can't be started ({error})")
            self._loader = self._make_loader(0)
            self._batches = iter(self._loader)
        self._workers = list(getattr(self._batches, "_workers", ()))

    def close(self) -> None:
        """End the worker processes now, even if an exception keeps torch's iterator alive."""
        batches, self._batches, workers = self._batches, None, self._workers
        # A worker that hangs in a file would let torch wait for each in turn.
        patience = threading.Timer(_CLOSE_SECONDS, _kill, [workers])
        patience.daemon = True
        patience.start()
        try:
            # Killed ones are news that torch raises as a RuntimeError.
            with contextlib.suppress(RuntimeError):
                getattr(batches, "_shutdown_workers", lambda: None)()
        finally:
            patience.cancel()
            _kill(workers)


def _decodes_here(reason: str) -> None:
    _logger.warning("%s; clips are decoded in this process, one after the other", reason)


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()  # SIGTERM they leave to the main process


def _why_no_workers(num_workers: int) -> str | None:
    if multiprocessing.current_process().daemon:
        return "this process is daemonic (of a Pool or a DataLoader) and can't start others"
    # Of a context: the default one's functions would fix the program's start method.
    method = start_method() or multiprocessing.get_start_method(allow_none=True)
    context = multiprocessing.get_context(method or "spawn")
    try:
        # What torch's iterator makes: where that fails, it prints its own errors.
        _ = [context.Event(), *(context.Queue() for _ in range(num_workers + 1))]
    except (ImportError, OSError) as error:  # /dev/shm is full, read-only or missing
        return f"decoding processes need semaphores in /dev/shm ({error})"
    return None


class _Wanted(torch.utils.data.Sampler[int]):
    """Numbers of the units that are still wanted when a worker has time for them."""

    def __init__(
        self,
        units: Sequence[Sequence[Clip]],
        order: Callable[[int], Iterable[int]],
        is_wanted: Callable[[list[str]], bool],
    ) -> None:
        self._units, self._order, self._is_wanted = units, order, is_wanted

    def __iter__(self) -> Iterator[int]:
        for number in self._order(len(self._units)):
            if self._is_wanted([sample_id for sample_id, _ in self._units[number]]):
                yield number

    def __len__(self) -> int:
        return len(self._units)


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Around everything that runs while there are worker processes.

    torch notices a dead one in a signal handler: its RuntimeError comes out of whatever the main
    process is doing at that moment.

    Raises:
        ExtractionError: A worker process was killed or is stuck.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker (", "DataLoader timed out")):
            raise
        raise _worker_failure(error) from error


def _worker_failure(error: BaseException) -> ExtractionError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ExtractionError(
        f"a decoding process ended or got stuck ({reason}). What was computed is kept; run again "
        "to go on, with `num_workers=0` if it happens again: memory or shared memory may be short, "
        "or a clip may crash its decoder"
    )


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    """A terminal and SLURM signal every process of a group; only the main process acts on it.

    Workers inherit the mask from their first moment.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_MAIN_PROCESS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_method() -> str | None:
    """Forked workers have everything imported already; a program's own choice is kept."""
    unset = multiprocessing.get_start_method(allow_none=True) is None
    return "fork" if unset and sys.platform == "linux" else None


def _begin_worker(_: int) -> None:
    # A forkserver's children have its mask and not ours.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_MAIN_PROCESS)
    # Features are fastest on one thread per clip.
    torch.set_num_threads(1)
    sys.excepthook = _show_unless_hung_up
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()


def _end_with(parent: int) -> None:
    # torch's loop ends by itself when the main process is killed, but then waits for features to be
    # read from a pipe that no process reads any more.
    while os.getppid() == parent:
        time.sleep(_NEWS_SECONDS)
    os._exit(1)


def _show_unless_hung_up(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # A thread that hands tensors over reports here that the main process was interrupted or is
    # gone, which isn't this process's news. A clip's errors never come this way.
    if not isinstance(error, (EOFError, OSError)):
        sys.__excepthook__(kind, error, trace)
