"""`export_embeddings`: a store, or some of its samples, as files that other tools read."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import SampleNotFoundError, TransferError
from lmdbcache.exchange.formats import FORMATS
from lmdbcache.exchange.formats.base import Description, Embeddings, Part, Samples
from lmdbcache.exchange.output import Output, local_output, shard_name, url_output
from lmdbcache.exchange.selection import Selection
from lmdbcache.files import expand_user, few, is_url, without_secrets
from lmdbcache.machine import memory_limit
from lmdbcache.storage import (
    RESERVE_BYTES,
    EmbeddingReader,
    Progress,
    Report,
    canonical_sample_id,
    check_room,
    portable,
    recording_of,
)

ExportFormat = Literal["pt", "safetensors", "npz", "parquet", "lance", "webdataset"]
_SHARD_BYTES: Final = 128 << 20
_STEP_BYTES: Final = 8 << 20
_MAX_SHARD_RECORDS: Final = 100_000  # a safetensors header holds the names, and has a limit


@dataclass(frozen=True)
class ExportReport(Report):
    """What an export wrote.

    Args:
        path: The file, or the folder of shards; where that was a URL, the URL
            without its password.
        format: Its format.
        num_embeddings: Embeddings in it.
        num_files: Files in it.
        num_bytes: Bytes of these files.
    """

    path: Path | str
    format: str
    num_embeddings: int
    num_files: int
    num_bytes: int


def export_embeddings(
    cache: EmbeddingCache | str | Path,
    config: CacheConfig,
    out: str | Path,
    *,
    format: ExportFormat,  # noqa: A002 - what it is called on the command line
    classes: Iterable[str] | None = None,
    sample_ids: Iterable[str] | None = None,
    overwrite: bool = False,
    shard_bytes: int = _SHARD_BYTES,
    num_shards: int | None = None,
    shuffle: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a store's embeddings to a file or a folder of shards; `import_embeddings` reads them.

    Each value is compared with its checksum. The files appear under their name when they are
    whole. bfloat16 is written as such to .pt and safetensors, and as float32, exactly, to the
    others, which don't know it.

    Args:
        cache: The cache, or its root.
        config: Which store.
        out: A file; for `"safetensors"`, `"parquet"` and `"webdataset"` (.tar) also a folder of
            shards, which is what a name without that ending means. `"lance"` is always a folder.
            A URL that fsspec knows (`"s3://bucket/folder"`) is a folder of these four; shards are
            made in the temporary folder of this machine and uploaded one by one.
        format: `"pt"` (a dict for `torch.load`), `"safetensors"`, `"npz"`, `"parquet"`, `"lance"`
            or `"webdataset"`. `"pt"`, and `"safetensors"` as a single file, need memory for all
            embeddings.
        classes: Only these classes.
        sample_ids: Only these samples.
        overwrite: Replace what an earlier export has left there.
        shard_bytes: Bytes of embeddings in one shard.
        num_shards: So many shards instead, which differ by one embedding at most.
        shuffle: Seed of a random order; the samples are in the order of their ids without it.
            Readers that stream mix what they have in a buffer, and no more.
        progress: Called with the number of embeddings done and in all.

    Raises:
        TransferError: `out` exists, nothing is chosen, the embeddings don't fit into memory, or
            `num_shards` for what is one file or has fewer samples.
        CacheNotFoundError: Nothing is stored for this config.
        ConfigError: A class has no sample.
        SampleNotFoundError: A sample isn't stored.
        IntegrityError: A stored value is damaged.
        CacheFullError: The disk is full; nothing is left there.
        RemoteError: The URL's place can't be reached or refuses; shards that were done stay there.
        MissingDependencyError: A package is needed for this format.
    """
    if format not in FORMATS:
        raise TransferError(f"format: {format!r}; known are {', '.join(FORMATS)}")
    cache = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache)
    plan = _Plan(format, num_shards, shard_bytes)
    opened: AbstractContextManager[Output]
    if is_url(str(out)):
        plan.check_url(without_secrets(str(out)))
        place: Path | str = without_secrets(str(out))
        is_folder = True
        opened = url_output(str(out), overwrite=overwrite)
    else:
        place = expand_user(out).absolute()
        is_folder = plan.is_folder(place)
        opened = local_output(place, is_folder=is_folder, overwrite=overwrite)
    with cache.reader(config, verify="always", track_usage=False) as reader:
        chosen = _choose(reader, config, classes, sample_ids, shuffle)
        plan.check_number(place, len(chosen.sample_ids), is_folder=is_folder)
        run = _Export(chosen, plan, progress)
        if isinstance(place, Path):
            plan.check_memory(place, chosen, is_folder=is_folder)
        with opened as output:
            needed = plan.num_bytes(chosen, is_local=isinstance(place, Path))
            folder = place.parent if isinstance(place, Path) else output.path
            check_room(folder, needed + RESERVE_BYTES, "this export")
            num_files = run.write(output, is_folder=is_folder)
            output.finish()
    return ExportReport(place, format, len(chosen.sample_ids), num_files, output.num_bytes)


# ---- which samples


@dataclass(frozen=True)
class _Chosen(Samples):
    """What is exported, and where it is read.

    Args:
        reader: Where the embeddings are.
    """

    reader: EmbeddingReader

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        rows = len(self.sample_ids) if self.lengths is None else sum(self.lengths)
        return rows * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        shape = self.description["embedding_shape"]
        return math.prod(int(n) for n in shape if n is not None) * self.reader.dtype.itemsize

    def cut(self, number: int) -> Iterator[_Chosen]:
        """Yield so many pieces, one behind the other, whose lengths differ by one at most."""
        for piece in range(number):
            first, last = (len(self.sample_ids) * n // number for n in (piece, piece + 1))
            lengths = None if self.lengths is None else self.lengths[first:last]
            yield replace(self, sample_ids=self.sample_ids[first:last], lengths=lengths)

    def batches(self, most_bytes: int) -> Iterator[tuple[list[str], Embeddings]]:
        """Yield sample ids and embeddings in steps of about so many bytes."""
        if self.lengths is None:
            step = max(1, most_bytes // self._row_bytes)
            for first in range(0, len(self.sample_ids), step):
                ids = self.sample_ids[first : first + step]
                yield ids, self.reader.get_batch(ids)
            return
        ids, arrays, held = [], [], 0
        for sample_id in self.sample_ids:
            ids.append(sample_id)
            arrays.append(self.reader[sample_id])
            held += arrays[-1].nbytes
            if held >= most_bytes:
                yield ids, arrays
                ids, arrays, held = [], [], 0
        if ids:
            yield ids, arrays


def _choose(
    reader: EmbeddingReader,
    config: CacheConfig,
    classes: Iterable[str] | None,
    sample_ids: Iterable[str] | None,
    shuffle: int | None,
) -> _Chosen:
    """Some samples of a store, or all; with a seed to shuffle by, in random order.

    Raises:
        SampleNotFoundError: One isn't stored.
        ConfigError: A class has no sample.
        TransferError: Nothing is left.
    """
    has_windows = reader.config.window is not None
    if sample_ids is None and has_windows:
        whole = set(reader.recordings())
        ids = [one for one in reader if recording_of(one) in whole]
    elif sample_ids is None:
        ids = list(reader)
    else:
        ids = list(dict.fromkeys(canonical_sample_id(one) for one in sample_ids))
        if missing := reader.missing(ids):
            raise SampleNotFoundError(
                f"{len(missing)} of {len(ids)} samples aren't stored in {reader.path}: "
                f"{few(missing, 3)}"
            )
        if has_windows:
            ids = list(dict.fromkeys(i for one in ids for i in reader.window_ids(one) or [one]))
    selection = Selection(classes)
    ids = [one for one in ids if one in selection]
    selection.check_classes(str(reader.path))
    shape = reader.embedding_shape
    if not ids or shape is None:
        raise TransferError(f"{reader.path}: no samples to export")
    if shuffle is not None:
        random.Random(shuffle).shuffle(ids)
    lengths = [len(reader[one]) for one in ids] if None in shape else None
    provenance = portable(reader.metadata.provenance)
    description = Description.of_export(config, shape, len(ids), provenance)
    return _Chosen(ids, lengths, description, reader)


# ---- into which files


@dataclass(frozen=True)
class _Plan:
    """Which files an export writes, and whether they fit."""

    name: str
    num_shards: int | None
    shard_bytes: int

    def is_folder(self, out: Path) -> bool:
        """Whether a name is that of a folder."""
        format_ = FORMATS[self.name]
        is_shards = format_.is_sharded and out.suffix != format_.suffixes[0]
        return is_shards or format_.write_dataset is not None

    def check_url(self, url: str) -> None:
        format_ = FORMATS[self.name]
        if not self.is_folder(Path()):
            raise TransferError(
                f"{url}: {self.name} is one file; export it to this machine and copy it"
            )
        if format_.suffixes and Path(url).suffix == format_.suffixes[0]:
            raise TransferError(f"{url}: a URL is that of a folder of shards; leave the ending out")

    def check_number(self, out: Path | str, num_samples: int, *, is_folder: bool) -> None:
        if self.num_shards is None:
            return
        if not is_folder:
            raise TransferError(
                f"{out} is to be one file; shards need a folder: a name without an ending"
            )
        if not 1 <= self.num_shards <= num_samples:
            raise TransferError(
                f"num_shards {self.num_shards}: must be 1 to {num_samples}, the number of samples"
            )

    def check_memory(self, out: Path, chosen: _Chosen, *, is_folder: bool) -> None:
        needed, available = self.num_bytes(chosen), _available_memory()
        if is_folder or not FORMATS[self.name].is_in_memory:
            return
        if 2 * needed > available:  # once as arrays and once as the file's content
            raise TransferError(
                f"{out}: {needed >> 20} MiB of embeddings; a single {self.name} file is put "
                f"together in memory, of which {available >> 20} MiB are available. Export "
                "parquet, or safetensors to a folder, or fewer classes"
            )

    def num_bytes(self, chosen: _Chosen, *, is_local: bool = True) -> int:
        """Bytes of all files; of an upload, of what is on this machine at a time."""
        format_ = FORMATS[self.name]
        num_bytes = chosen.num_bytes + format_.bytes_beside * len(chosen.sample_ids)
        if chosen.reader.config.dtype == "bfloat16" and not format_.has_bfloat16:
            num_bytes += chosen.num_bytes
        if is_local or format_.write_dataset is not None:
            return num_bytes
        if self.num_shards is not None:
            return num_bytes // self.num_shards
        return min(num_bytes, 2 * self.shard_bytes)


def _available_memory() -> int:
    """The bytes that this process may take without swapping, as far as that is known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text("ascii")
        return min(memory_limit(), int(text.partition("MemAvailable:")[2].split()[0]) << 10)
    return memory_limit()


# ---- writing them


class _Export:
    """One export on its way."""

    def __init__(self, chosen: _Chosen, plan: _Plan, progress: Progress | None) -> None:
        self._chosen = chosen
        self._plan = plan
        self._progress = progress
        self._done = 0

    def write(self, output: Output, *, is_folder: bool) -> int:
        """Write all of it.

        Returns:
            The number of files.
        """
        plan, chosen = self._plan, self._chosen
        if (write_dataset := FORMATS[plan.name].write_dataset) is not None:
            rows = len(chosen.sample_ids)
            limit = plan.shard_bytes * rows // chosen.num_bytes
            if plan.num_shards is not None:
                limit = -(-rows // plan.num_shards)
            return write_dataset(output.path, chosen.description, self._counted(), max(1, limit))
        if not is_folder:
            return self._write_parts(chosen, output, None, None)
        if plan.num_shards is None:
            return self._write_parts(chosen, output, 1, plan.shard_bytes)
        for number, piece in enumerate(chosen.cut(plan.num_shards), 1):
            self._write_parts(piece, output, number, None)
        return plan.num_shards

    def _write_parts(
        self, chosen: _Chosen, output: Output, first: int | None, limit: int | None
    ) -> int:
        """Write one file, or shards from this number on of about so many bytes.

        Returns:
            The number of files.
        """
        held = records = number = 0
        part: Part | None = None
        path = output.path
        try:
            for ids, embeddings in chosen.batches(min(_STEP_BYTES, limit or _STEP_BYTES)):
                size = sum(array.nbytes for array in embeddings)
                is_full = limit is not None and (
                    held + size > limit or records + len(ids) > _MAX_SHARD_RECORDS
                )
                if part is not None and is_full:
                    part.close()
                    output.finished(path)
                    part, held, records = None, 0, 0
                if part is None:
                    if first is not None:
                        path = output.path / shard_name(first + number, self._plan.name)
                    part, number = self._open(path, chosen), number + 1
                part.add(ids, embeddings)
                held, records = held + size, records + len(ids)
                self._count(len(ids))
            if part is not None:
                part.close()
                output.finished(path)
        except BaseException:
            if part is not None:
                part.abandon()
            raise
        return number

    def _open(self, path: Path, chosen: _Chosen) -> Part:
        open_part = FORMATS[self._plan.name].part
        if open_part is None:  # pragma: no cover - a dataset is written as a whole
            raise TransferError(f"{self._plan.name} isn't written file by file")
        return open_part(path, chosen)

    def _counted(self) -> Iterator[tuple[list[str], Embeddings]]:
        for ids, embeddings in self._chosen.batches(_STEP_BYTES):
            yield ids, embeddings
            self._count(len(ids))

    def _count(self, number: int) -> None:
        self._done += number
        if self._progress is not None:
            self._progress(self._done, len(self._chosen.sample_ids))
