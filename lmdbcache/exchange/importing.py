"""`import_embeddings`: embeddings of other tools' files into a store."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import AudioModel
from lmdbcache.errors import (
    CacheError,
    ConfigError,
    InvalidEmbeddingError,
    ProvenanceMismatchError,
    TransferError,
)
from lmdbcache.exchange.config_inference import Shape, infer_config
from lmdbcache.exchange.formats import open_source
from lmdbcache.exchange.formats.base import Entry, Source
from lmdbcache.exchange.formats.keys import KeyChoice, KeyOrder
from lmdbcache.exchange.intake import Intake, IntakeReport, Refusal, Rows
from lmdbcache.files import existing_parent, few
from lmdbcache.storage import (
    RESERVE_BYTES,
    OnDuplicate,
    Progress,
    as_stored,
    check_room,
    check_shape,
    checksum,
    encoded,
    is_first_window,
    sample_key,
    split_sample_id,
    value_bytes,
)
from lmdbcache.training import HIDDEN, output_of_dimensions

# What one value may fail with; the import goes on with the others.
_UNUSABLE: Final = (CacheError, OSError, ValueError, IndexError, RuntimeError, TypeError)
_FROM, _AT, _DIGEST = "imported_from", "imported_at", "weights_digest"


@dataclass
class ImportReport(IntakeReport):
    """What an import did, or would do.

    Args:
        source: Where the embeddings come from.
        kind: What that is, in words.
        classes: Class → number of samples of the source.
        embedding_shape: Of the store; None in front if the first dimension may differ.
        dtypes: dtype → number of embeddings of the source.
        zeros: Samples of the source whose embedding is all zeros; they are imported.
    """

    source: Path = Path()
    kind: str = ""
    classes: Mapping[str, int] = field(default_factory=dict)
    embedding_shape: Shape | None = None
    dtypes: Mapping[str, int] = field(default_factory=dict)
    zeros: list[str] = field(default_factory=list)


def import_embeddings(  # noqa: PLR0913 - what a file may leave open
    cache: EmbeddingCache | str | Path,
    config: CacheConfig | Mapping[str, Any] | None,
    source: str | Path | Source,
    *,
    class_name: str | None = None,
    keys: KeyOrder = "auto",
    on_duplicate: OnDuplicate = "error",
    ragged: bool = False,
    squeeze: bool = False,
    ignore_metadata: bool = False,
    weights_digest: str | None = None,
    model: AudioModel | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Bring the embeddings of a file or folder into a store.

    Each batch is one transaction, and is then read back and compared with the source bit for bit.
    Stopped at any moment, the same call continues where it was.

    Args:
        cache: The cache, or its root.
        config: What the embeddings are: a whole config, or some fields. It must agree with what
            the file says; sample_rate, duration and model_name must come from one of the two.
        source: What `torch.save` has written, a folder of .npy files with or without manifests,
            safetensors, .npz or Parquet: see docs/migrating.md. Or what `open_source` returned.
        class_name: Class of names that have none.
        keys: Whether names such as `video_00001:dog` are `"file_id:class"` or `"class:file_id"`;
            `"auto"` infers it.
        on_duplicate: For a sample that is stored, or that the source has twice, with other bits:
            `"error"` keeps what is stored, takes neither of two, and reports a conflict;
            `"skip"` keeps the stored or first one, `"overwrite"` takes the last one.
        ragged: Let the first dimension differ between embeddings.
        squeeze: Take off a leading dimension of size 1, that of a batch of one.
        ignore_metadata: Where the file disagrees with `config`, take the latter.
        weights_digest: Digest of the weights that computed the embeddings, where known.
        model: What computed them, where that is known: its output and front end are the defaults,
            and it must be able to fill the store.
        dry_run: Read and check everything, store nothing.
        progress: Called with the number of embeddings done and in all.

    Returns:
        What was imported and what wasn't.

    Raises:
        TransferError: The source can't be read, holds nothing, or holds nothing usable and no
            config is stated.
        ConfigError: File and config disagree, or a field is missing.
        ProvenanceMismatchError: The store was filled with known weights, the source's are unknown.
        CacheFullError: The disk is full; what was committed stays.
        MissingDependencyError: A package is needed to read the source.
    """
    cache = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache)
    if not isinstance(source, Source):
        source = open_source(source, KeyChoice(keys, class_name))
    fields = _fields(config)
    output = fields.get("output") or source.description.facts.get("output")
    usual = _usual_shape(source, output, squeeze=squeeze, ragged=ragged)
    try:
        inferred, notes = infer_config(
            source, usual, fields, ignore_metadata=ignore_metadata, model=model
        )
    except ConfigError as error:
        if source.entries:
            raise
        # No config would help.
        raise TransferError(
            f"{source.path} ({source.kind}): nothing can be imported: {len(source.refused)} "
            f"refused, the first is {source.refused[0]}"
        ) from error
    provenance, more = _provenance(source, cache, inferred, weights_digest)
    shape = cache.info(inferred).embedding_shape if inferred in cache else None
    shape = usual if shape is None else shape
    intake = Intake(
        cache,
        inferred,
        tolerance=0.0,
        on_duplicate=on_duplicate,
        ragged=shape is not None and None in shape,
        dry_run=dry_run,
        without_provenance=True,  # `_provenance` has decided
        read_back=True,
    )
    classes = Counter(split_sample_id(sample_id)[1] for sample_id in source.entries)
    report = intake.report = ImportReport(
        **vars(intake.report),
        source=source.path,
        kind=source.kind,
        classes=dict(sorted(classes.items())),
        embedding_shape=shape,
        dtypes={str(name): number for name, number in source.dtypes.items()},
    )
    report.refused += source.refused
    report.notes += [*source.notes, *notes, *more, *_doubts(source, usual)]
    rows = _Entries(source, report, squeeze=squeeze)
    if not dry_run:
        _check_room(intake, rows.entries)
    rows.bring_into(intake, provenance, progress)
    if report.zeros:
        are, of = ("are", "clips") if len(report.zeros) > 1 else ("is", "a clip")
        report.notes.append(
            f"{len(report.zeros)} {are} all zeros, perhaps of {of} that failed: "
            f"{few(report.zeros, 3)}"
        )
    return report


def _fields(config: CacheConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    given = config.to_dict() if isinstance(config, CacheConfig) else dict(config or {})
    if "dataset" in given:  # the name of the namespace on disk
        given["namespace"] = given.pop("dataset")
    if unknown := sorted(set(given) - set(CacheConfig.__dataclass_fields__)):
        raise ConfigError(f"{', '.join(unknown)}: not a field of CacheConfig")
    return given


def _doubts(source: Source, shape: Shape | None) -> list[str]:
    """What in a source looks as if something were missing."""
    notes = []
    stated = source.description.num_embeddings
    held = len(source.entries) + len(source.refused) + len(source.repeated)
    if stated is not None and stated != held:
        notes.append(f"{source.path.name} says num_embeddings {stated}, and holds {held}")
    if shape is not None and len(shape) > 1 and shape[0] == 1:
        notes.append(
            f"the embeddings have shape {shape}; `squeeze=True` takes off the 1, which "
            "isn't part of an embedding if it was a batch of one"
        )
    return notes


def _usual_shape(source: Source, output: object, *, squeeze: bool, ragged: bool) -> Shape | None:
    """The shape that most of an output have, and a new store will; None if it isn't known yet."""
    entries = source.entries.values()
    if squeeze:
        for entry in (*entries, *source.repeated):
            entry.shape = None if entry.shape is None else _squeezed(entry.shape)
    if source.description.embedding_shape is not None:
        return source.description.embedding_shape
    shapes = Counter(entry.shape for entry in entries if entry.shape is not None)
    if not shapes:
        return _first_shape(entries, squeeze=squeeze, ragged=ragged)
    # A folder that holds two outputs of a model is imported into a store for each.
    fitting = {}
    if output is not None:  # hidden states have two dimensions, all others one
        is_hidden = output == HIDDEN
        fitting = {
            s: n for s, n in shapes.items() if (output_of_dimensions(len(s)) == HIDDEN) == is_hidden
        }
    shapes = Counter(fitting) or shapes
    if not ragged:
        return shapes.most_common(1)[0][0]
    rests: Counter[tuple[int, ...]] = Counter()
    for shape, number in shapes.items():
        rests[shape[1:]] += number
    return (None, *rests.most_common(1)[0][0])


def _first_shape(entries: Iterable[Entry], *, squeeze: bool, ragged: bool) -> Shape | None:
    """The shape of the first that can be read, where it isn't known before reading."""
    for entry in entries:
        # What is wrong with it is reported when it is imported.
        with contextlib.suppress(CacheError, OSError, ValueError, IndexError):
            value = entry.load()
            if value is not None:
                shape = _squeezed(value.shape) if squeeze else tuple(value.shape)
                return (None, *shape[1:]) if ragged else shape
    return None


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the leading dimension of a batch of one; one dimension stays."""
    return tuple(shape[1:] if len(shape) > 1 and shape[0] == 1 else shape)


def _misfit(entry: Entry, shape: Shape | None) -> Refusal | None:
    """Why an embedding doesn't go with the others, as far as its shape shows."""
    if entry.shape is None:
        return None
    try:
        check_shape(entry.sample_id, entry.shape, shape)
    except InvalidEmbeddingError:
        hint = ""
        if shape and len(shape) == len(entry.shape) > 1 and shape[1:] == entry.shape[1:]:
            hint = "; `ragged=True` lets the first dimension differ"
        elif shape and len(shape) != len(entry.shape):
            hint = "; give their `output` to import those into another store"
        expected = ", ".join("any" if size is None else str(size) for size in shape or ())
        reason = f"shape {entry.shape}, where ({expected}) is expected{hint}"
        return Refusal(entry.name, entry.sample_id, reason)
    return None


def _check_room(intake: Intake, entries: list[Entry]) -> None:
    """Refuse what the disk can't hold, as far as shapes are known."""
    report = intake.report
    new = {sample_key(entry.sample_id): entry.shape for entry in entries}
    if report.on_duplicate != "overwrite":
        for key in intake.stored(list(new)):
            del new[key]
    dtype = report.config.dtype
    needed = sum(value_bytes(shape, dtype) for shape in new.values() if shape is not None)
    if needed:
        check_room(existing_parent(report.path), needed + RESERVE_BYTES, "this import")


class _Entries:
    """The embeddings of a source, those of one sample together."""

    def __init__(self, source: Source, report: ImportReport, *, squeeze: bool) -> None:
        self._report = report
        self._squeeze = squeeze
        self._num_refused = 0
        groups = {sample_id: [entry] for sample_id, entry in source.entries.items()}
        for entry in source.repeated:
            groups[entry.sample_id].append(entry)
        self.entries: list[Entry] = []
        for entry in (entry for group in groups.values() for entry in group):
            if (refusal := _misfit(entry, report.embedding_shape)) is None:
                self.entries.append(entry)
            else:
                report.refused.append(refusal)
        if report.config.window is not None:  # see `Intake.add`
            self.entries.sort(key=lambda entry: is_first_window(entry.sample_id))

    def bring_into(
        self,
        intake: Intake,
        provenance: Mapping[str, str],
        progress: Progress | None,
    ) -> None:
        """Read and check them all, and store them."""
        done, total = 0, len(self.entries)

        def advance(number: int) -> None:
            nonlocal done
            done += number
            if progress is not None:
                progress(min(total, done + self._num_refused), total)

        intake.add(Rows.in_memory(self._checked(), None), provenance, advance=advance)
        advance(0)

    def _checked(self) -> Iterator[tuple[bytes, bytes, npt.NDArray[Any], str]]:
        report = self._report
        for entry in self.entries:
            try:
                value = self._read(entry)
                check_shape(entry.sample_id, value.shape, report.embedding_shape)
            except _UNUSABLE as error:
                reason = " ".join(str(error).removeprefix(f"{entry.sample_id}: ").split())
                report.refused.append(Refusal(entry.name, entry.sample_id, reason))
                self._num_refused += 1
                continue
            if report.embedding_shape is None:
                report.embedding_shape = value.shape
            if not value.any():
                report.zeros.append(entry.sample_id)
            key = sample_key(entry.sample_id)
            yield key, checksum(key, encoded(value, report.config.dtype)), value, entry.name

    def _read(self, entry: Entry) -> npt.NDArray[Any]:
        value = entry.load()
        if value is None:
            raise TransferError("the value is missing")
        if self._squeeze:
            value = value.reshape(_squeezed(value.shape))
        return as_stored(entry.sample_id, value, self._report.config.dtype, copy=False)


# ---- where they come from


def _provenance(
    source: Source, cache: EmbeddingCache, config: CacheConfig, weights_digest: str | None
) -> tuple[dict[str, str], list[str]]:
    """The provenance to store with a source's embeddings, and notes.

    Raises:
        ProvenanceMismatchError: The store was filled with known weights, and nothing states
            whether these embeddings were computed with them.
    """
    stated = dict(source.description.provenance)
    if weights_digest is not None:
        if stated.get(_DIGEST, weights_digest) != weights_digest:
            raise ProvenanceMismatchError(
                f"{source.path.name} says weights_digest {stated[_DIGEST]!r}, {weights_digest!r} "
                "is given. Leave `weights_digest` out"
            )
        stated[_DIGEST] = weights_digest
    stored = dict(cache.info(config).provenance) if config in cache else {}
    name = _name_size_and_time(source)
    # Behind the names of what is kept: nothing for the first source, then `_2`, `_3`.
    number, suffix = 1, ""
    while stored.get(f"{_FROM}{suffix}", name) != name:
        number += 1
        suffix = f"_{number}"
    is_known = stored.get(f"{_FROM}{suffix}") == name
    if _DIGEST in stored and _DIGEST not in stated and not is_known:
        raise ProvenanceMismatchError(
            f"{cache.path(config)} was filled with the weights {stored[_DIGEST]!r}, and "
            f"{source.path.name} doesn't say which weights computed its embeddings. If they are "
            f"the same, give `weights_digest={stored[_DIGEST]!r}`; else give `model_name` or "
            "`front_end` another name, which makes another store"
        )
    notes = []
    if _DIGEST not in stated and not is_known:
        notes.append(
            "the weights that computed these aren't stated: an extraction that adds to the store "
            "warns, and the store then counts as filled with its weights"
        )
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**stated, f"{_FROM}{suffix}": name, f"{_AT}{suffix}": now}, notes


def _name_size_and_time(source: Source) -> str:
    """What distinguishes a source from another one later."""
    found = [file.stat() for file in source.files]
    newest = max((one.st_mtime for one in found), default=0.0)
    when = datetime.fromtimestamp(newest, timezone.utc).isoformat(timespec="seconds")
    size = sum(one.st_size for one in found)
    files = f"{len(found)} files, " if len(found) != 1 else ""
    return f"{source.path.name} ({files}{size} bytes, modified {when})"
