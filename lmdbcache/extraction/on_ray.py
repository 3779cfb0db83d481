"""The extraction on a Ray cluster: a Ray task for each rank, which stages; this process merges."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Final

from lmdbcache.audio import AudioSource, Clips
from lmdbcache.cache import ClipFailure, EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.datasets import AudioDataset
from lmdbcache.embedders import AudioModel, PretrainedModel, identify, ready_model
from lmdbcache.errors import (
    CacheError,
    ConfigError,
    DatasetError,
    ExtractionError,
    MissingDependencyError,
    ModelLoadError,
    StorageError,
)
from lmdbcache.exchange import Refusal, merge_stores
from lmdbcache.extraction.pipeline import (
    ExtractionRun,
    check_duration,
    check_options,
    extract,
)
from lmdbcache.extraction.ranks import RankShare
from lmdbcache.extraction.staging import staging_folder
from lmdbcache.extraction.summary import ExtractionSummary
from lmdbcache.files import existing_parent
from lmdbcache.machine import install_line, needing
from lmdbcache.storage import OnDuplicate, Progress

_logger: Final = logging.getLogger(__name__)

_MOST_LEVEL: Final = logging.CRITICAL + 1
_REACH_SECONDS: Final = 10.0
# A rank whose process or node dies is started again so often. A clip that always kills its process
# is another matter.
_RETRIES: Final = 3
_MARK_NAME: Final = "ray-run"  # in the staging folder, for nodes to know it by
_NEWS_SECONDS: Final = 1.0
_COMMIT_SECONDS: Final = 20.0  # for ranks to commit what they have when the run is stopped


def extract_on_ray(  # noqa: PLR0913
    cache: EmbeddingCache,
    config: CacheConfig,
    clips: Clips | AudioDataset,
    *,
    model: str | os.PathLike[str] | AudioModel | None = None,
    batch_size: int = 8,
    device: str | None = None,
    progress: Progress | None = None,
    dataset_root: str | Path = "",
    commit_seconds: float = 10.0,
    recompute_changed: bool = False,
    address: str | None = None,
    num_actors: int | None = None,
    staging: str | os.PathLike[str] | None = None,
) -> ExtractionSummary:
    """Run `extract` on the nodes of a Ray cluster; the store lies on a disk of this machine.

    Each rank is a Ray task that decodes, embeds and stores its share in a staging folder; this
    process merges what they have staged into `cache`. A rank whose process or node dies is started
    again, on another node if necessary, and goes on where it was. This process may also be
    killed: the next run merges what is staged and computes the rest.

    Every node needs lmdbcache with its extra `ray`, and the audio files, a checkpoint folder and
    the staging folder at the same paths as here.

    Args:
        cache: Where to store.
        config: The identity of the embeddings.
        clips: A dataset; or sample id (`file_id:class`) → audio file or `AudioSource`.
        model: Hub name, checkpoint folder, or an `AudioModel`; None takes `config.model_name`.
        batch_size: Clips per forward pass.
        device: `"cpu"` or `"cuda"`; None takes the cluster's GPUs if it has any.
        progress: Called with (clips done, clips in all).
        dataset_root: Kept in the store's metadata.
        commit_seconds: Commit at least this often.
        recompute_changed: Also compute cached clips again whose file has changed since.
        address: Of the cluster; None takes `RAY_ADDRESS`, else a cluster that runs on this machine,
            else starts one here for the time of the run.
        num_actors: Ranks, each with a model; None: one for each GPU, else for each node.
        staging: A folder that all nodes share; None takes `<root>.staging`, which suits a cluster
            of one machine.

    Returns:
        What was done, failures included.

    Raises:
        MissingDependencyError: ray isn't installed.
        ConfigError: The config doesn't fit the model, or an option is invalid.
        DatasetError: Two files for one sample id, or the files aren't on a node.
        ExtractionError: No cluster, not enough memory on a device, or a rank whose processes die
            again and again.
        ModelLoadError: The model can't be loaded, here or on a node.
        ProvenanceMismatchError: The store was filled with other weights or features.
        StorageError: A node doesn't see the staging folder, or what is staged can't be merged.
        CacheFullError: A disk is full; what was committed is kept.
    """
    check_options(batch_size, None, commit_seconds)
    if not isinstance(config, CacheConfig):
        raise ConfigError(
            "config: on a Ray cluster one run fills one store: give one `output` and one `dtype`, "
            "and run again for the others"
        )
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(
            f'device: {device!r}; each rank has one GPU: `device="cuda"` or `device="cpu"`'
        )
    if num_actors is not None and num_actors < 1:
        raise ConfigError(f"num_actors: {num_actors}; it must be 1 or more")
    if recompute_changed and config.window is not None:
        raise ConfigError(
            "recompute_changed: with windows the merged store would keep those that a changed "
            "recording no longer has; use `extract`"
        )
    folder = staging_folder(staging or cache.root.with_name(f"{cache.root.name}.staging"))
    # What a run that was killed has left may be older than what is stored by now.
    _merge(cache, config, folder, on_duplicate="skip")
    run = ExtractionRun(cache, [config], clips, batch_size=batch_size, dataset_root=dataset_root)
    (store,) = run.stores
    missing = run.plan(recompute_changed=recompute_changed)
    run.close_readers()
    given = config.model_name if model is None else model
    run.compare_weights(given)
    if not missing:
        run.record_failures()
        return run.summaries()[0]
    run.check_writable()
    found = ready_model(given, config)  # its errors are for the user to read, before Ray starts
    check_duration(config, found.make_front_end(config))
    # Until they are merged, staged embeddings take the space of a second store.
    places = [existing_parent(place).stat().st_dev for place in (cache.root, folder)]
    shape = found.embedding_shape(config)
    run.check_space({config.output: shape}, num_stores=3 - len(set(places)))
    digest = found.checkpoint.weights_digest if isinstance(found, PretrainedModel) else None
    if digest and config in cache:
        with cache.reader(config, track_usage=False) as reader:
            reader.metadata.with_provenance({"weights_digest": digest}, reader.path)
    run.log_new_stores()
    ranks = _Ranks(
        config,
        _seen_from_nodes(given),
        digest,
        device,
        batch_size,
        commit_seconds,
        os.fspath(dataset_root),
        folder,
        {sample_id: _absolute(source) for sample_id, source in run.paths.items()},
        run.paths.keys() - missing,
    )
    with _connected(address) as ray:
        try:
            answers = ranks.run(ray, num_actors, progress)
        except BaseException:
            with contextlib.suppress(CacheError):  # the next run tries again
                _merge(cache, config, folder)
            raise
    refused = _merge(cache, config, folder)
    _add_up(run, answers)
    computed = missing.keys() - {failure.sample_id for failure in store.outcomes.failures}
    left = cache.coverage(config, computed).missing
    if left:
        reason = "; ".join(map(str, refused)) or "is another process removing stores there?"
        raise StorageError(f"{len(left)} clips were computed and can't be merged: {reason}")
    store.num_extracted = len(computed)
    run.record_failures()
    return run.summaries()[0]


@dataclass(frozen=True)
class _Answer:
    """What became of one rank's share.

    Args:
        summary: What it did.
        absent: Failed clips whose file isn't on the node.
        host: The node's name.
    """

    summary: ExtractionSummary
    absent: tuple[str, ...]
    host: str


@dataclass(frozen=True)
class _Ranks:
    """The ranks of one run, and what each of them has to know.

    Args:
        config: Identity of the embeddings.
        model: Hub name, absolute checkpoint folder, or an `AudioModel`.
        weights_digest: Of the checkpoint where the run was started; None if it isn't known.
        device: Where the model runs; None takes the GPU that Ray gives, if any.
        batch_size: Clips of a unit.
        commit_seconds: Commit at least this often.
        dataset_root: Kept in the store's metadata.
        folder: Where they stage.
        clips: All clips of the run, by absolute path.
        stored: Those that aren't to be computed.
    """

    config: CacheConfig
    model: str | AudioModel
    weights_digest: str | None
    device: str | None
    batch_size: int
    commit_seconds: float
    dataset_root: str
    folder: Path
    clips: Mapping[str, str | AudioSource]
    stored: Collection[str]

    def run(self, ray: Any, num_ranks: int | None, progress: Progress | None) -> list[_Answer]:
        """Have all shares computed and staged; an error of one rank ends the others.

        Raises:
            CacheError: A rank's, or Ray has given up.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = [node["CPU"] for node in nodes if node.get("CPU")]
        gpus = 0 if self.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        num_units = len(self.clips)
        if self.config.window is None:
            num_units = ceil(num_units / self.batch_size)
        size = min(num_ranks or gpus or len(cores) or 1, num_units)
        num_cores = max(1, int(min(cores, default=1)) // ceil(size / max(1, len(cores))))
        _logger.info("%d nodes, %d GPUs: %d ranks of %d cores", len(nodes), gpus, size, num_cores)
        task = ray.remote(_extract_share).options(
            num_cpus=num_cores,
            num_gpus=1 if gpus or self.device == "cuda" else 0,
            max_retries=_RETRIES,
        )
        counter = ray.remote(_Counter).options(num_cpus=0).remote() if progress else None
        mark = secrets.token_hex(8)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _MARK_NAME).write_text(mark, "ascii")
        everything = ray.put((self, mark))
        shares = [RankShare(rank, size, num_cores=num_cores) for rank in range(size)]
        pending = [task.remote(everything, share, counter) for share in shares]
        answers = []
        try:
            while pending:
                done, pending = ray.wait(pending, timeout=_NEWS_SECONDS)
                answers += [_answer_of(ray, reference) for reference in done]
                if progress is not None and counter is not None:
                    with contextlib.suppress(ray.exceptions.RayError):  # its node is gone
                        progress(ray.get(counter.total.remote()), len(self.clips))
        finally:
            for reference in pending:
                ray.cancel(reference)  # a KeyboardInterrupt there: it commits what it has
            if pending:
                ray.wait(pending, num_returns=len(pending), timeout=_COMMIT_SECONDS)
            (self.folder / _MARK_NAME).unlink(missing_ok=True)
        return answers


class _Counter:
    """An actor that adds up how far the ranks are."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def note(self, rank: int, done: int) -> None:
        self._done[rank] = done

    def total(self) -> int:
        return sum(self._done.values())


def _extract_share(everything: tuple[_Ranks, str], share: RankShare, counter: Any) -> _Answer:
    """One rank, in a process on a node."""
    import torch

    ranks, mark = everything
    host = socket.gethostname()
    torch.set_num_threads(max(1, (share.num_cores or 1) // 2))  # the others decode
    try:
        _check_folder(ranks.folder, mark)
        _check_weights(ranks)
        summary = extract(
            # The root is on the machine that has started the run, which knows what it holds.
            EmbeddingCache(ranks.folder),
            ranks.config,
            ranks.clips,
            model=ranks.model,
            batch_size=ranks.batch_size,
            device=ranks.device,
            progress=None if counter is None else _reported(counter, share.rank),
            dataset_root=ranks.dataset_root,
            commit_seconds=ranks.commit_seconds,
            share=share,
            staging=ranks.folder,
            stored=ranks.stored,
        )
    except CacheError as error:
        raise type(error)(f"on node {host}: {error}") from error
    absent = [one.sample_id for one in summary.failures if one.path and not Path(one.path).exists()]
    return _Answer(summary, tuple(absent), host)


def _reported(counter: Any, rank: int) -> Progress:
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > _NEWS_SECONDS:
            last = time.monotonic()
            counter.note.remote(rank, done)

    return report


def _check_folder(folder: Path, mark: str) -> None:
    """Refuse a staging folder of this node alone."""
    found = ""
    with contextlib.suppress(OSError):
        found = (folder / _MARK_NAME).read_text("ascii")
    if found != mark:
        raise StorageError(
            f"the staging folder {folder} isn't the one that the run was started with; `staging` "
            "has to be a folder that all nodes share"
        )


def _check_weights(ranks: _Ranks) -> None:
    """Refuse a checkpoint of this node that isn't the one of the run."""
    if ranks.weights_digest is None:
        return
    found = ready_model(ranks.model, ranks.config)
    digest = found.checkpoint.weights_digest if isinstance(found, PretrainedModel) else None
    if digest and digest != ranks.weights_digest:
        raise ModelLoadError(
            f"{ranks.model} has the weights {digest} here and {ranks.weights_digest} where the run "
            "was started: give every node the same files"
        )


def _answer_of(ray: Any, reference: Any) -> _Answer:
    try:
        answer: _Answer = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CacheError):
            raise error.cause from error
        raise _given_up(error.cause) from error
    except ray.exceptions.RayError as error:
        raise _given_up(error) from error
    return answer


def _given_up(error: BaseException) -> CacheError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:500]
    if isinstance(error, ModuleNotFoundError):
        return MissingDependencyError(
            f"on a node: {reason}. Every node needs the extra [ray], the same version everywhere; "
            f"on this machine {install_line('ray')}"
        )
    return ExtractionError(
        f"a rank can't go on ({type(error).__name__}: {reason}). What was computed is kept; run "
        f"again to go on. If its process was killed {_RETRIES + 1} times, memory is short on the "
        "nodes or a clip crashes the model: leave it out, or use a smaller `batch_size`"
    )


def _add_up(run: ExtractionRun, answers: list[_Answer]) -> None:
    """Take down what became of all clips.

    Raises:
        DatasetError: A file is here and not on a node: the clip didn't fail.
    """
    outcomes = run.stores[0].outcomes
    for answer in answers:
        here = [run.paths[sample_id] for sample_id in answer.absent]
        for path in here:
            if isinstance(path, str) and Path(path).exists():
                raise DatasetError(
                    f"{path} isn't on node {answer.host}, but it is here: the audio files have to "
                    "lie at the same paths on every node"
                )
        summary = answer.summary
        outcomes.failures += [
            ClipFailure(failure.sample_id, str(run.paths[failure.sample_id]), failure.reason)
            for failure in summary.failures
        ]
        outcomes.silent.extend(summary.silent)
        outcomes.cancelled.extend(summary.cancelled)
        run.compute_seconds += summary.compute_seconds
        run.built_model |= summary.built_model
    outcomes.settled = run.asked


# ---- the staging folder


def _merge(
    cache: EmbeddingCache,
    config: CacheConfig,
    folder: Path,
    on_duplicate: OnDuplicate = "overwrite",
) -> list[Refusal]:
    """Bring what is staged for this config into the cache, and remove it there.

    Returns:
        What couldn't be merged, and stays.
    """
    if not folder.is_dir():
        return []
    # What this run has staged was missing, or computed again since its file changed.
    found = merge_stores(cache, [folder], configs=[config], on_duplicate=on_duplicate)
    refused = [one for report in found.stores for one in report.refused]
    if refused or found.refused:
        return [*refused, *found.refused]
    for rank in sorted(folder.glob("world-*/rank-*")):
        EmbeddingCache(rank).clear(config)
        with contextlib.suppress(OSError):  # a store of another config is there
            if not EmbeddingCache(rank).folders():
                shutil.rmtree(rank)
            rank.parent.rmdir()
            folder.rmdir()
    return []


# ---- the cluster


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The package ray, connected to a cluster.

    A program that has called `ray.init` itself stays connected; otherwise a cluster on this machine
    that was started here ends with the block.
    """
    asked = address or os.environ.get("RAY_ADDRESS") or ""
    if asked.startswith("ray://"):
        raise ConfigError(
            f"address: {asked}; through Ray's client no folder is shared. Start the program on a "
            'node of the cluster, or by `ray job submit`, with `address="auto"`'
        )
    _check_reachable(asked)
    with needing("extraction on Ray, on every node,", "ray"):
        import ray
    if ray.is_initialized():
        yield ray
        return
    is_quiet = not _logger.isEnabledFor(logging.INFO)
    try:
        with _signals_kept():
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=not is_quiet,
                logging_level=_MOST_LEVEL if is_quiet else logging.INFO,
            )
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        raise _no_cluster(asked, error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return  # auto, local
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ExtractionError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ExtractionError(
        f"no Ray cluster at {address or 'this machine'} ({reason}). `ray status` shows what runs; "
        "without an `address` one is started here"
    )


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, which starting Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _seen_from_nodes(model: str | os.PathLike[str] | AudioModel) -> str | AudioModel:
    """The model as processes find it that have other working folders."""
    if not isinstance(model, (str, os.PathLike)):
        return model
    found = identify(model)
    return os.fspath(Path(found.location).absolute()) if found.is_local else os.fspath(model)


def _absolute(source: str | AudioSource) -> str | AudioSource:
    return os.path.abspath(source) if isinstance(source, str) else source  # noqa: PTH100
