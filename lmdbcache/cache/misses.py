"""Why something isn't found: the reasons, the sentences, the list of failed clips, the log.

Everything about a miss is here. A reader only says what it doesn't have; why is worked out from
what is stored instead and from the clips that gave no embedding when last tried.
"""

from __future__ import annotations

import atexit
import bisect
import contextlib
import difflib
import json
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Final

from lmdbcache.cache.records import Origin, SourceRecords
from lmdbcache.cache.store_info import StoreInfo
from lmdbcache.config import DEFAULT_MODEL_NAME, CacheConfig
from lmdbcache.errors import CacheError, InvalidSampleIdError
from lmdbcache.files import few, read_file, replace_file
from lmdbcache.storage import (
    EmbeddingReader,
    Report,
    canonical_sample_id,
    class_of,
    current_generation,
    first_window,
    sample_id_of_key,
    sample_key,
    split_sample_id,
    write_lock,
)

_logger: Final = logging.getLogger("lmdbcache")


class MissReason(str, Enum):
    """The reasons why a config or a sample isn't found, or that it is."""

    STORED = "stored"
    # Of a config:
    NOTHING_STORED = "nothing_stored"
    CONFIG_ABSENT = "config_absent"
    DAMAGED = "damaged"
    # Of a sample:
    INVALID_SAMPLE_ID = "invalid_sample_id"
    FAILED = "failed"
    OTHER_CLASS = "other_class"
    CLASS_ABSENT = "class_absent"
    FILE_ABSENT = "file_absent"


# By reason, one sentence each; the words in braces are facts of the `Explanation`.
_SENTENCES: Final = {
    MissReason.STORED: "{store} holds {what}",
    MissReason.NOTHING_STORED: "nothing is stored under {root} yet (asked for {what})",
    MissReason.CONFIG_ABSENT: "nothing is stored under {root} for this config, {what}",
    MissReason.DAMAGED: "the store of this config is damaged: {damage}",
    MissReason.INVALID_SAMPLE_ID: "{error}",
    MissReason.FAILED: "{what} gave no embedding when it was last tried: {failure}",
    MissReason.OTHER_CLASS: (
        "{what} isn't stored; file id {file_id!r} is, under another class: {near}"
    ),
    MissReason.CLASS_ABSENT: (
        "{what} isn't stored, nor is any sample of class {class_name!r}; nearest class: {near}"
    ),
    MissReason.FILE_ABSENT: (
        "{what} isn't stored; {count:,} others of class {class_name!r} are, nearest: {near}"
    ),
}


def _sentence(reason: MissReason, **facts: Any) -> str:
    return _SENTENCES[reason].format(**facts)


@dataclass(frozen=True)
class Explanation(Report):
    """The reason why a config, or a sample of it, isn't found, or that it is, in a sentence.

    Args:
        reason: Which of the reasons; equals its text, such as `"config_absent"`.
        text: The sentence.
        config: What was asked for.
        sample_id: What was asked for, or None.
        nearest: The stored config with the fewest differing fields, if this one isn't stored.
        differences: Field → (asked, stored), against `nearest`.
        nearest_names: Sample ids, or for `"class_absent"` classes, that are stored instead.
        stored_elsewhere: Other configs that have the sample.
        failure: Why the clip gave no embedding.
        damaged: Stores under the root that can't be read.
        origin: Who computed the sample, if it came from another store.
    """

    derived: ClassVar = ("is_stored",)

    reason: MissReason
    text: str
    config: CacheConfig
    sample_id: str | None = None
    nearest: StoreInfo | None = None
    differences: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    nearest_names: tuple[str, ...] = ()
    stored_elsewhere: tuple[CacheConfig, ...] = ()
    failure: str | None = None
    damaged: tuple[Path, ...] = ()
    origin: Origin | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def is_stored(self) -> bool:
        """Whether what was asked for is there."""
        return self.reason == MissReason.STORED

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a config is given by its fingerprint."""
        values = super().to_dict()
        del values["config"]
        elsewhere = [config.fingerprint for config in self.stored_elsewhere]
        return {
            **values,
            "fingerprint": self.config.fingerprint,
            "stored_elsewhere": elsewhere,
        }

    def log(self) -> None:
        """Log one line: a warning if something else is stored."""
        level = logging.INFO if self.reason == MissReason.NOTHING_STORED else logging.WARNING
        _logger.log(level, "miss: %s", self.text)

    def log_new_store(self) -> None:
        """Log a hint, before this store is made, if one that differs little is there."""
        if self.is_stored or self.reason == MissReason.NOTHING_STORED:
            return
        if self.damaged:
            self.log()  # perhaps it is the one that is asked for
        # Another model, another dataset, or more than two fields: that is no slip.
        elif self.nearest is not None and _is_slip(self.differences):
            named = _listed(self.differences, "`{name}={asked!r}` here, {stored!r} there")
            where = _named(self.nearest.config or self.config)
            _logger.warning("new store; the nearest stored is %s (%s)", where, named)


def _is_slip(differences: Mapping[str, Any]) -> bool:
    return len(differences) <= 2 and not {"model_name", "namespace"} & differences.keys()


# ---- why


def nearest_store(config: CacheConfig, stores: Iterable[StoreInfo]) -> StoreInfo | None:
    """Return the stored config with the fewest differing fields; the fullest of several."""
    return min(
        [store for store in stores if store.config and store.num_embeddings],
        key=lambda store: (
            len(config.differences(store.config)) if store.config else 0,
            -store.num_embeddings,
        ),
        default=None,
    )


def explain_config(config: CacheConfig, path: Path, stores: Sequence[StoreInfo]) -> Explanation:
    """Return why nothing is found for this config, or that something is.

    Args:
        config: What is asked for.
        path: Its store's folder.
        stores: All that are under the root.
    """
    own = next((store for store in stores if store.path == path), None)
    if own is not None and own.damage:
        text = _sentence(MissReason.DAMAGED, damage=own.damage)
        return Explanation(MissReason.DAMAGED, text, config, damaged=(path,))
    if own is not None:
        what = f"{own.num_embeddings:,} embeddings"
        text = _sentence(MissReason.STORED, what=what, store=_named(config))
        return Explanation(MissReason.STORED, text, config)
    nearest = nearest_store(config, stores)
    damaged = tuple(store.path for store in stores if store.damage)
    differences = config.differences(nearest.config) if nearest and nearest.config else {}
    reason = MissReason.CONFIG_ABSENT if nearest or damaged else MissReason.NOTHING_STORED
    text = _sentence(reason, root=path.parent, what=_described(config))
    if nearest is not None and nearest.config is not None:
        named = _listed(differences, "`{name}={asked!r}` asked, {stored!r} stored")
        text += f". Nearest is {_named(nearest.config)}; {named}; "
        text += f"{nearest.num_embeddings:,} embeddings there"
    if damaged:
        text += f". Damaged, it may be one of these: {few([folder.name for folder in damaged], 3)}"
    return Explanation(
        reason, text, config, nearest=nearest, differences=differences, damaged=damaged
    )


def explain_sample(
    found: Explanation, path: Path, stores: Sequence[StoreInfo], sample_id: str
) -> Explanation:
    """Return why this sample isn't found, or that it is.

    Args:
        found: What `explain_config` says of the config.
        path: The config's store.
        stores: All that are under the root.
        sample_id: `file_id:class`.
    """
    facts: dict[str, Any] = {"sample_id": sample_id}
    if found.is_stored:
        with EmbeddingReader(path, found.config, track_usage=False) as reader:
            facts |= _facts_of(reader, sample_id)
    text = facts.pop("text", found.text)
    if facts.get("reason") != MissReason.STORED:
        elsewhere = [
            store.config
            for store in stores
            if store.config and store.path != path and _has(store, sample_id)
        ]
        elsewhere.sort(key=lambda config: len(found.config.differences(config)))
        facts["stored_elsewhere"] = tuple(elsewhere)
        if elsewhere:
            named = _listed(found.config.differences(elsewhere[0]), "`{name}={stored!r}`")
            more = f" and {len(elsewhere) - 1} more" if len(elsewhere) > 1 else ""
            text += f". It is stored for another config ({named}){more}"
    return replace(found, **facts, text=text)


def _facts_of(reader: EmbeddingReader, sample_id: str) -> dict[str, Any]:
    """Return what changes in an `Explanation` of the config for this sample."""
    what = repr(sample_id)
    has_windows = reader.config.window is not None
    # Anything may be asked for, and the store may have been cleared: neither is an error here.
    is_recording = has_windows and isinstance(sample_id, str)
    if (first_window(sample_id) if is_recording else sample_id) in reader:
        origin = _origin_of(reader, sample_id)
        text = _sentence(MissReason.STORED, what=what, store=_named(reader.metadata.config))
        text += f". It came from {origin}" if origin else ""
        return {"reason": MissReason.STORED, "text": text, "origin": origin}
    if failure := _failure_of(reader.path, sample_id):
        text = _sentence(MissReason.FAILED, what=what, failure=failure)
        return {"reason": MissReason.FAILED, "text": text, "failure": failure}
    stored = reader.recordings() if has_windows else iter(reader)
    reason, text, nearest = _absence(sample_id, stored)
    if has_windows and (number := len(reader.window_ids(sample_id))):
        text += f". {number} windows of it are stored, of a run that was stopped"
    return {"reason": reason, "text": text, "nearest_names": nearest}


def _absence(sample_id: str, stored: Iterable[str]) -> tuple[MissReason, str, tuple[str, ...]]:
    """Return why a sample isn't among the stored ones, in a sentence, and what is there instead."""
    try:
        what = canonical_sample_id(sample_id)
    except InvalidSampleIdError as error:
        reason = MissReason.INVALID_SAMPLE_ID
        return reason, _sentence(reason, error=error), ()
    file_id, class_name = split_sample_id(what)
    by_class: dict[str, list[str]] = {}
    for name in stored:
        their_file, _, their_class = name.rpartition(":")
        by_class.setdefault(their_class, []).append(their_file)
    reason, count = MissReason.FILE_ABSENT, len(by_class.get(class_name, ()))
    if near := [f"{file_id}:{name}" for name, files in by_class.items() if file_id in files]:
        reason = MissReason.OTHER_CLASS
    elif class_name not in by_class:
        reason = MissReason.CLASS_ABSENT
        near = difflib.get_close_matches(class_name, by_class, n=1) or sorted(by_class)[:3]
    else:
        near = [f"{name}:{class_name}" for name in _nearest(file_id, by_class[class_name])]
    text = _sentence(
        reason,
        what=repr(what),
        file_id=file_id,
        class_name=class_name,
        count=count,
        near=few([repr(name) for name in near], 3) or "none, the store is empty",
    )
    return reason, text, tuple(near[:3])


def _nearest(file_id: str, names: list[str]) -> list[str]:
    names = sorted(names)
    place = bisect.bisect(names, file_id)
    # All of a large store would be slow.
    near = names[max(0, place - 500) : place + 500]
    return difflib.get_close_matches(file_id, near, n=3) or near[:1]


def _described(config: CacheConfig) -> str:
    length = config.windows or f"{config.duration:g} s"
    plain = " ".join(filter(None, (config.namespace, config.model_alias, config.output)))
    return f"{plain} ({config.sample_rate} Hz, {length}, {config.dtype})"


def _named(config: CacheConfig) -> str:
    return f"{config.fingerprint} {config.title}"


def _listed(differences: Mapping[str, tuple[Any, Any]], form: str) -> str:
    aliases = {DEFAULT_MODEL_NAME: "ast"}
    return ", ".join(
        form.format(name=name, asked=aliases.get(asked, asked), stored=aliases.get(stored, stored))
        for name, (asked, stored) in differences.items()
    )


def _origin_of(reader: EmbeddingReader, sample_id: str) -> Origin | None:
    with contextlib.suppress(CacheError):  # damaged records affect nothing else
        has_windows = reader.config.window is not None
        key = sample_key(first_window(sample_id) if has_windows else sample_id)
        found = {sample_id_of_key(key): value for value in reader.checksums_of([key]).values()}
        with SourceRecords(reader.path) as records:
            return next(iter(records.origins(found).values()), None)
    return None


def _has(store: StoreInfo, sample_id: str) -> bool:
    try:
        with EmbeddingReader(store.path, track_usage=False) as reader:
            return not reader.missing([sample_id])
    except (CacheError, OSError):
        return False


# ---- clips that failed


FAILURES_NAME: Final = "failures.json"


@dataclass(frozen=True)
class ClipFailure:
    """A clip that gave no embedding; it is never cached and tried again by the next run."""

    sample_id: str
    path: str
    reason: str


def read_failures(store: Path) -> list[ClipFailure]:
    """Return the clips of this store that failed when last tried; empty without a list."""
    try:
        entries = json.loads(read_file(store / FAILURES_NAME))["failures"]
        return [ClipFailure(**{k: str(v) for k, v in entry.items()}) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []  # derived: the next run makes it anew


def update_failures(store: Path, tried: Iterable[str], failures: Sequence[ClipFailure]) -> None:
    """Replace what the list says of the tried samples; written at once or not at all.

    Several runs may do so at once: each waits for the store's writer lock. No list is
    written where nothing is stored: a folder with nothing else in it would look like a store. The
    run's summary has the failures.

    Raises:
        OSError, ReadOnlyCacheError: It can't be written.
    """
    tried = set(tried)
    if not _is_stored(store) or _updated(read_failures(store), tried, failures) is None:
        return
    with write_lock(store):
        # Again: another process may have changed the list, or removed the store.
        entries = _updated(read_failures(store), tried, failures)
        path = store / FAILURES_NAME
        if not _is_stored(store) or entries is None:
            return
        if not entries:
            path.unlink(missing_ok=True)
            return
        # ASCII: a file name that isn't UTF-8 holds lone surrogates.
        text = json.dumps({"failures": [asdict(entry) for entry in entries]}, indent=1)
        replace_file(path, text.encode("ascii"))


def _is_stored(store: Path) -> bool:
    try:
        return current_generation(store) is not None
    except CacheError:
        return True


def _updated(
    before: list[ClipFailure], tried: set[str], failures: Sequence[ClipFailure]
) -> list[ClipFailure] | None:
    """Return the new list; None if it is the one before."""
    kept = [failure for failure in before if failure.sample_id not in tried]
    entries = sorted([*kept, *failures], key=lambda failure: failure.sample_id)
    return None if entries == before else entries


def _failure_of(store: Path, sample_id: object) -> str | None:
    failures = {failure.sample_id: failure.reason for failure in read_failures(store)}
    if not isinstance(sample_id, str):  # any object may be asked for
        return None
    with contextlib.suppress(InvalidSampleIdError):
        return failures.get(sample_id) or failures.get(canonical_sample_id(sample_id))
    return failures.get(sample_id)


# ---- the log

_EXPLAINED_PER_CLASS: Final = 3
_EXPLAINED: Final = 30
_EXPLAINED_BY_WORKER: Final = 6
_NAMED_CLASSES: Final = 10
_EXPLAINED_UP_TO: Final = 100_000  # samples; looking at all ids takes long in a large store


class _MissLog:
    """The misses of this process in one store, and how many of them were logged."""

    def __init__(self, store: Path) -> None:
        self.process = os.getpid()
        self.name = store.name.rpartition("-")[2]  # the fingerprint: the folder's name is long
        self.by_class: Counter[str] = Counter()
        self.total = self.num_explained = self.num_when_logged = 0

    def note(self, reader: EmbeddingReader, sample_id: str) -> None:
        is_worker = multiprocessing.parent_process() is not None
        most = _EXPLAINED_BY_WORKER if is_worker else _EXPLAINED
        before = self.by_class[class_of(sample_id)]
        self.by_class[class_of(sample_id)] += 1
        self.total += 1
        if before < _EXPLAINED_PER_CLASS and self.num_explained < most:
            self.num_explained += 1
            _logger.warning("%s: miss: %s", self.name, _reason_of(reader, sample_id))
        elif self.total == self.num_explained + 1:
            atexit.register(self.log_sum_at_end)
            _logger.warning("%s: more misses; they are only counted from now on", self.name)
        if self.total >= 10 * max(10, self.num_when_logged):
            self.log_sum()

    def log_sum(self) -> None:
        self.num_when_logged = self.total
        most = self.by_class.most_common(_NAMED_CLASSES)
        named = ", ".join(f"{name}: {number:,}" for name, number in most)
        _logger.warning("%s: %s misses (%s)", self.name, f"{self.total:,}", named)

    def log_sum_at_end(self) -> None:
        if self.process == os.getpid() and self.total > self.num_when_logged:
            self.log_sum()


_logs: Final[dict[Path, _MissLog]] = {}


def log_misses(reader: EmbeddingReader, sample_ids: Sequence[str]) -> None:
    """Log the first misses of each class, and later the sum each time it is ten times more.

    Args:
        reader: What was read from.
        sample_ids: What was asked for and isn't there.
    """
    log = _logs.get(reader.path)
    if log is None or log.process != os.getpid():
        log = _logs[reader.path] = _MissLog(reader.path)
    for sample_id in sample_ids:
        log.note(reader, sample_id)


def _reason_of(reader: EmbeddingReader, sample_id: str) -> str:
    if len(reader) > _EXPLAINED_UP_TO:
        return f"{sample_id!r} isn't stored"
    return str(_facts_of(reader, sample_id)["text"])
