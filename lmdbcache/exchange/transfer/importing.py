"""Embeddings of other tools' files, brought into a store and compared with the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import AudioModel
from lmdbcache.errors import ConfigError, DuplicateSampleError, InvalidEmbeddingError, TransferError
from lmdbcache.exchange.transfer.agreement import agreed_config
from lmdbcache.exchange.transfer.entries import Entry, Refusal, Source
from lmdbcache.exchange.transfer.forms import KeyChoice
from lmdbcache.exchange.transfer.keys import KeyOrder
from lmdbcache.exchange.transfer.origins import origin_of
from lmdbcache.exchange.transfer.report import ImportReport
from lmdbcache.exchange.transfer.sources import open_source
from lmdbcache.exchange.transfer.survey import Survey, misfit, squeezed, survey
from lmdbcache.files import few
from lmdbcache.storage import (
    RESERVE_BYTES,
    EmbeddingReader,
    EmbeddingWriter,
    OnDuplicate,
    as_stored,
    check_room,
    check_shape,
)

__all__ = ["import_embeddings", "import_source"]

_BATCH_BYTES: Final = 64 << 20
_BATCH_RECORDS: Final = 2048
_STEP_IF_UNKNOWN: Final = 8 << 20


def import_embeddings(
    source: str | Path,
    cache: EmbeddingCache | str | Path,
    config: CacheConfig | Mapping[str, Any] | None = None,
    *,
    class_name: str | None = None,
    keys: KeyOrder = "auto",
    **options: Any,
) -> ImportReport:
    """Bring the embeddings of a file or folder into a store.

    Each batch is one transaction, and is then read back and compared with the source bit for bit.
    Stopped at any moment, the same call goes on where it was.

    Args:
        source: What `torch.save` has written, a folder of .npy files with or without manifests,
            safetensors, .npz or Parquet: see docs/migrating.md.
        cache: The cache, or its root.
        config: What the embeddings are: a whole config, or some fields. It must agree with what
            the file says; sample_rate, duration and model_name must come from one of the two.
        class_name: Class of names that have none.
        keys: In which order names such as `video_00001:dog` tell file and class.
        **options: See `import_source`.

    Returns:
        What was imported and what wasn't.

    Raises:
        TransferError: The source can't be read, or holds nothing.
        ConfigError: File and config disagree, or a field is missing.
        ProvenanceMismatchError: The store was filled with known weights, the source's are unknown.
        DuplicateSampleError: A sample is stored already, with `on_duplicate="error"`; nothing was
            stored.
        CacheFullError: The disk is full; what was committed stays.
        MissingDependencyError: A package is needed to read the source.
    """
    if not isinstance(cache, EmbeddingCache):
        cache = EmbeddingCache(cache)
    opened = open_source(source, KeyChoice(keys, class_name))
    given = config.to_dict() if isinstance(config, CacheConfig) else dict(config or {})
    if "namespace" in given:
        given["dataset"] = given.pop("namespace")
    if unknown := sorted(set(given) - set(CacheConfig().to_dict())):
        raise ConfigError(f"{', '.join(unknown)}: not a field of CacheConfig")
    return import_source(opened, cache, given, **options)


def import_source(
    source: Source,
    cache: EmbeddingCache,
    given: Mapping[str, Any],
    *,
    on_duplicate: OnDuplicate = "skip",
    ragged: bool = False,
    squeeze: bool = False,
    ignore_metadata: bool = False,
    weights_digest: str | None = None,
    model: AudioModel | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    batch_bytes: int = _BATCH_BYTES,
) -> ImportReport:
    """Bring an opened source into a store.

    Args:
        source: From `open_source`.
        cache: The cache.
        given: Fields of the config.
        on_duplicate: For a sample that is stored already: `"skip"`, `"overwrite"` or `"error"`.
        ragged: Let the first dimension differ between embeddings.
        squeeze: Take off a leading dimension of size 1, that of a batch of one.
        ignore_metadata: Where the file disagrees with `given`, take the latter.
        weights_digest: Digest of the weights that computed the embeddings, where known.
        model: What computed them, where that is known: its output and front end are the defaults,
            and it must be able to fill the store.
        dry_run: Read and check everything, store nothing.
        progress: Called with the number of embeddings done and in all.
        batch_bytes: Commit after so many bytes of embeddings.

    Returns:
        What was imported and what wasn't.

    Raises:
        CacheError: See `import_embeddings`.
    """
    found = survey(source, squeeze=squeeze, ragged=ragged)
    config, notes = agreed_config(found, given, ignore_metadata=ignore_metadata, model=model)
    origin, more = origin_of(source, cache, config, weights_digest)
    notes = [*source.notes, *notes, *more, *_doubts(found)]
    shape = cache.info(config).embedding_shape if config in cache else None
    shape = found.shape if shape is None else shape
    report = ImportReport(
        source.path,
        source.kind,
        cache.path(config),
        config,
        dry_run,
        dict(sorted(found.classes.items())),
        shape,
        {str(name): number for name, number in found.dtypes.items()},
        refused=list(source.listing.refused),
        notes=notes,
    )
    run = _Import(report, cache, shape, on_duplicate=on_duplicate, squeeze=squeeze)
    entries = run.without_contradictions(source)
    if on_duplicate == "error":
        run.refuse_stored(entries)
    if dry_run:
        run.go_through(entries, None, progress, batch_bytes)
        run.conclude()
        return report
    cache.check_writable(config)
    run.check_room(entries)
    writer = cache.writer(
        config,
        on_duplicate=on_duplicate,
        ragged=shape is not None and None in shape,
        provenance=origin,
        without_provenance=True,  # `origin_of` has decided
        dataset_root="",
    )
    with writer:
        run.go_through(entries, writer, progress, batch_bytes)
    run.conclude()
    return report


class _Import:
    """One import on its way."""

    def __init__(
        self,
        report: ImportReport,
        cache: EmbeddingCache,
        shape: tuple[int | None, ...] | None,
        *,
        on_duplicate: OnDuplicate,
        squeeze: bool,
    ) -> None:
        self.report = report
        self.cache = cache
        self.shape = shape
        self.on_duplicate = on_duplicate
        self.squeeze = squeeze

    def without_contradictions(self, source: Source) -> list[Entry]:
        """The entries, but for samples that the source holds twice with different values."""
        entries = dict(source.listing.entries)
        for again in source.listing.repeated:
            first = source.listing.entries[again.sample_id]
            try:
                same = _same_bits(self._read(first), self._read(again))
            except _UNUSABLE as error:
                self._refuse(again.name, error)
                continue
            if same:
                self.report.num_repeated += 1
                continue
            self._refuse(
                again.name,
                f"the same sample as {first.name} ({again.sample_id}), with another value: "
                "neither is imported",
            )
            entries.pop(again.sample_id, None)
        kept = []
        for entry in entries.values():
            refusal = misfit(entry, self.shape)
            if refusal is None:
                kept.append(entry)
            else:
                self.report.refused.append(refusal)
        return kept

    def refuse_stored(self, entries: list[Entry]) -> None:
        """Refuse the import as a whole if one of its samples is stored."""
        missing = set(self._reader_missing([entry.sample_id for entry in entries]))
        stored = [entry.sample_id for entry in entries if entry.sample_id not in missing]
        if stored:
            raise DuplicateSampleError(
                f"{len(stored)} samples ({few(stored, 3)}) are stored in "
                f"{self.cache.path(self.report.config)} already; nothing was imported. Leave them "
                "out, or import with --on-duplicate skip or overwrite"
            )

    def check_room(self, entries: list[Entry]) -> None:
        """Refuse what the disk can't hold, as far as shapes are known."""
        sizes = [math.prod(entry.shape) for entry in entries if entry.shape is not None]
        itemsize = 4 if self.report.config.dtype == "float32" else 2
        missing = 1.0
        if self.report.config in self.cache and self.on_duplicate != "overwrite":
            ids = [entry.sample_id for entry in entries]
            missing = len(self._reader_missing(ids)) / max(1, len(ids))
        needed = int(sum(sizes) * itemsize * missing)
        if needed:
            check_room(self.cache.path(self.report.config), needed + RESERVE_BYTES, "this import")

    def go_through(
        self,
        entries: list[Entry],
        writer: EmbeddingWriter | None,
        progress: Callable[[int, int], None] | None,
        batch_bytes: int,
    ) -> None:
        """Read, check, store and compare, batch by batch; without a writer nothing is stored."""
        done = 0
        for batch in self._batches(entries, batch_bytes):
            arrays = self._checked(batch)
            if arrays:
                self._keep(arrays, writer)
            done += len(batch)
            if progress is not None:
                progress(done, len(entries))

    def conclude(self) -> None:
        """Say what only showed when everything was read."""
        if self.report.num_imported == 0 and self.report.config not in self.cache:
            self.report.store = None
        if zeros := self.report.zeros:
            are, of = ("are", "clips") if len(zeros) > 1 else ("is", "a clip")
            self.report.notes.append(
                f"{len(zeros)} {are} all zeros, perhaps of {of} that failed: {few(zeros, 3)}"
            )

    def _batches(self, entries: list[Entry], batch_bytes: int) -> Iterator[list[Entry]]:
        batch: list[Entry] = []
        num_bytes = 0
        for entry in entries:
            batch.append(entry)
            size = _STEP_IF_UNKNOWN if entry.shape is None else 4 * math.prod(entry.shape)
            num_bytes += size
            if num_bytes >= batch_bytes or len(batch) >= _BATCH_RECORDS:
                yield batch
                batch, num_bytes = [], 0
        if batch:
            yield batch

    def _checked(self, batch: list[Entry]) -> dict[str, npt.NDArray[Any]]:
        """The values that may be stored, in their stored form."""
        arrays = {}
        for entry in batch:
            try:
                array = self._read(entry)
                check_shape(entry.sample_id, array.shape, self.shape)
            except _UNUSABLE as error:
                self._refuse(entry.name, str(error).removeprefix(f"{entry.sample_id}: "))
                continue
            if self.shape is None:
                self.shape = self.report.embedding_shape = array.shape
            if not array.any():
                self.report.zeros.append(entry.sample_id)
            arrays[entry.sample_id] = array
        return arrays

    def _read(self, entry: Entry) -> npt.NDArray[Any]:
        value = entry.load()
        if value is None:
            raise TransferError("there is no value")
        if self.squeeze:
            value = value.reshape(squeezed(value.shape))
        return as_stored(entry.sample_id, value, self.report.config.dtype, copy=False)

    def _keep(self, arrays: Mapping[str, npt.NDArray[Any]], writer: EmbeddingWriter | None) -> None:
        missing = set(self._reader_missing(arrays))
        new = {
            sample_id: array
            for sample_id, array in arrays.items()
            if sample_id in missing or self.on_duplicate == "overwrite"
        }
        if new and writer is not None:
            writer.put_batch(new, list(new.values()))
            writer.commit()
        self.report.num_imported += len(new)
        self.report.num_bytes += sum(array.nbytes for array in new.values())
        readable = arrays if writer is not None else arrays.keys() - new.keys()
        if readable:
            with self._reader() as reader:
                for sample_id in readable:
                    self._compare(reader, sample_id, arrays[sample_id], is_new=sample_id in new)

    def _compare(
        self, reader: EmbeddingReader, sample_id: str, array: npt.NDArray[Any], *, is_new: bool
    ) -> None:
        is_same = _same_bits(reader[sample_id], array)
        if is_same:
            self.report.num_verified += 1
            self.report.num_present += not is_new
        elif is_new:
            self._refuse(sample_id, "read back, it isn't what the source holds")
        else:
            self.report.differing.append(sample_id)

    def _reader(self) -> EmbeddingReader:
        # To look whether all is there is no use of the store.
        return self.cache.reader(self.report.config, track_usage=False)

    def _reader_missing(self, sample_ids: Any) -> list[str]:
        if self.report.config not in self.cache:
            return list(sample_ids)
        with self._reader() as reader:
            return reader.missing(sample_ids)

    def _refuse(self, name: str, reason: object) -> None:
        self.report.refused.append(Refusal(name, " ".join(str(reason).split())))


# What one value may fail with; the import goes on with the others.
_UNUSABLE: Final = (
    InvalidEmbeddingError,
    TransferError,
    OSError,
    ValueError,
    IndexError,
    RuntimeError,
    TypeError,
)


def _same_bits(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Whether two values in the store's dtype are the same, down to the sign of a zero."""
    if one.shape != other.shape:
        return False
    return np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))


def _doubts(found: Survey) -> list[str]:
    """What in a source looks as if something were missing."""
    notes = []
    told = found.source.description.num_embeddings
    listing = found.source.listing
    held = len(listing.entries) + len(listing.refused) + len(listing.repeated)
    if told is not None and told != held:
        notes.append(f"{found.source.path.name} says num_embeddings {told}, and holds {held}")
    shape = found.shape
    if shape is not None and len(shape) > 1 and shape[0] == 1:
        notes.append(
            f"the embeddings have shape {shape}; --squeeze takes off the 1, which is no part of "
            "an embedding if it was a batch of one"
        )
    return notes
