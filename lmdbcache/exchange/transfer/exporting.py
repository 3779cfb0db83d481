"""A store, or some of its samples, as files that other tools read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import TransferError
from lmdbcache.exchange.sharing.remote import is_url, without_secrets
from lmdbcache.exchange.transfer.parts import Embeddings, Part
from lmdbcache.exchange.transfer.placing import SUFFIXES, appearing, check_target, shard_name
from lmdbcache.exchange.transfer.selection import Chosen, choose
from lmdbcache.files import expand_user
from lmdbcache.storage import RESERVE_BYTES, check_room

__all__ = ["FORMATS", "ExportFormat", "ExportReport", "export_embeddings"]

ExportFormat = Literal["pt", "safetensors", "npz", "parquet", "lance", "webdataset"]
FORMATS: Final = ("pt", "safetensors", "npz", "parquet", "lance", "webdataset")
_SHARD_BYTES: Final = 128 << 20
_STEP_BYTES: Final = 8 << 20
_MAX_SHARD_RECORDS: Final = 100_000  # a safetensors header holds the names, and has a limit
_IN_FLOAT32: Final = ("npz", "parquet", "lance", "webdataset")  # what they make of bfloat16
_TAR_BYTES: Final = 5 * 512  # beside each embedding: two headers, the JSON and its padding

Count = Callable[[int], None]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Args:
        path: The file, or the folder of shards; where that was a URL, the URL
            without its password.
        format: Its format.
        num_embeddings: Embeddings in it.
        num_files: Files in it.
        num_bytes: Of these files.
    """

    path: Path | str
    format: str
    num_embeddings: int
    num_files: int
    num_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "path": str(self.path)}


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
    progress: Callable[[int, int], None] | None = None,
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
        SampleNotFoundError: A sample isn't stored.
        IntegrityError: A stored value is damaged.
        CacheFullError: The disk is full; nothing is left there.
        RemoteError: The URL's place can't be reached or refuses; shards that were done stay there.
        MissingDependencyError: A package is needed for this format.
    """
    if format not in FORMATS:
        raise TransferError(f"format: {format!r}; known are {', '.join(FORMATS)}")
    if not isinstance(cache, EmbeddingCache):
        cache = EmbeddingCache(cache)
    plan = _Plan(format, num_shards, shard_bytes)
    if is_url(str(out)):
        out = str(out)
        plan.check_url(out)
    else:
        out = expand_user(out).absolute()
        check_target(out, overwrite=overwrite)
    with cache.reader(config, verify="always", track_usage=False) as reader:
        chosen = choose(reader, config, classes, sample_ids, shuffle)
        count = _counter(progress, len(chosen.sample_ids))
        if isinstance(out, Path):
            is_folder = format == "lance" or plan.is_sharded(out)
            plan.check_number(out, len(chosen.sample_ids), is_folder=is_folder)
            _check_space(out, chosen, format)
            with appearing(out, is_folder=is_folder) as target:
                num_files = _write(chosen, plan, target, count, is_folder=is_folder)
                found = target.rglob("*") if is_folder else [target]
                num_bytes = sum(file.stat().st_size for file in found if file.is_file())
        else:
            from lmdbcache.exchange.transfer.uploading import uploading

            plan.check_number(out, len(chosen.sample_ids), is_folder=True)
            with uploading(out, overwrite=overwrite) as upload:
                check_room(upload.folder, plan.room_for(chosen) + RESERVE_BYTES, "this export")
                num_files = _write(
                    chosen, plan, upload.folder, count, is_folder=True, finished=upload.put
                )
            num_bytes, out = upload.num_bytes, without_secrets(out)
    return ExportReport(out, format, len(chosen.sample_ids), num_files, num_bytes)


@dataclass(frozen=True)
class _Plan:
    """Which files an export writes."""

    format: str
    num_shards: int | None
    shard_bytes: int

    def is_sharded(self, out: Path) -> bool:
        """Whether a name stands for a folder of shards."""
        return self.format in SUFFIXES and out.suffix != SUFFIXES[self.format]

    def check_url(self, url: str) -> None:
        url = without_secrets(url)
        if self.format not in (*SUFFIXES, "lance"):
            raise TransferError(
                f"{url}: {self.format} is one file; export it to this machine and copy it"
            )
        if Path(url).suffix == SUFFIXES.get(self.format):
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

    def room_for(self, chosen: Chosen) -> int:
        """Bytes of what is on this machine at a time, of an upload."""
        num_bytes = _bytes_of(chosen, self.format)
        if self.format == "lance":
            return num_bytes
        if self.num_shards is not None:
            return num_bytes // self.num_shards
        return min(num_bytes, 2 * self.shard_bytes)


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Count:
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(done, total)

    return count


def _bytes_of(chosen: Chosen, kind: str) -> int:
    num_bytes = chosen.num_bytes
    if kind in _IN_FLOAT32 and chosen.reader.config.dtype == "bfloat16":
        num_bytes *= 2
    if kind == "webdataset":
        num_bytes += _TAR_BYTES * len(chosen.sample_ids)
    return num_bytes


def _check_space(out: Path, chosen: Chosen, kind: str) -> None:
    num_bytes = _bytes_of(chosen, kind)
    check_room(out.parent, num_bytes + RESERVE_BYTES, "this export")
    in_memory = kind == "pt" or (kind == "safetensors" and out.suffix == ".safetensors")
    available = available_memory()
    # Once as arrays and once as the file's content.
    if in_memory and available is not None and 2 * num_bytes > available:
        raise TransferError(
            f"{out}: {num_bytes >> 20} MiB of embeddings; a single {kind} file is put together in "
            f"memory, and {available >> 20} MiB are available. Export parquet, or safetensors "
            "to a folder, or fewer classes"
        )


def available_memory() -> int | None:
    """Bytes that a process may take without swapping; None where nobody tells."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _write(
    chosen: Chosen,
    plan: _Plan,
    target: Path,
    count: Count,
    *,
    is_folder: bool,
    finished: Callable[[Path], None] = lambda _: None,
) -> int:
    """Write all of it; `finished` is called with each shard.

    Returns:
        The number of files.
    """
    if plan.format == "lance":
        return _write_lance(chosen, plan, target, count)
    if not is_folder:
        return _write_parts(chosen, plan.format, target, None, count, finished)
    if plan.num_shards is None:
        first = target / shard_name(1, plan.format)
        return _write_parts(chosen, plan.format, first, plan.shard_bytes, count, finished)
    for number, piece in enumerate(chosen.cut(plan.num_shards), 1):
        shard = target / shard_name(number, plan.format)
        _write_parts(piece, plan.format, shard, None, count, finished)
    return plan.num_shards


def _write_lance(chosen: Chosen, plan: _Plan, target: Path, count: Count) -> int:
    from lmdbcache.exchange.transfer.lance_writer import write_lance

    def batches() -> Iterator[tuple[list[str], Embeddings]]:
        for ids, embeddings in chosen.batches(_STEP_BYTES):
            yield ids, embeddings
            count(len(ids))

    rows = len(chosen.sample_ids)
    limit = plan.shard_bytes * rows // chosen.num_bytes
    if plan.num_shards is not None:
        limit = -(-rows // plan.num_shards)
    return write_lance(target, chosen.description, batches(), max(1, limit))


def _write_parts(
    chosen: Chosen,
    kind: str,
    first: Path,
    limit: int | None,
    count: Count,
    finished: Callable[[Path], None],
) -> int:
    """Write one file, or numbered ones of about so many bytes.

    Returns:
        The number of files.
    """
    step = _STEP_BYTES if limit is None else min(_STEP_BYTES, limit)
    path, number, held, records = first, 1, 0, 0
    part = open_part(kind, path, chosen)
    try:
        for ids, embeddings in chosen.batches(step):
            size = sum(array.nbytes for array in embeddings)
            is_full = held + size > (limit or math.inf) or records + len(ids) > _MAX_SHARD_RECORDS
            if limit is not None and held and is_full:
                part.close()
                finished(path)
                number, held, records = number + 1, 0, 0
                path = first.with_name(shard_name(number, kind))
                part = open_part(kind, path, chosen)
            part.add(ids, embeddings)
            held, records = held + size, records + len(ids)
            count(len(ids))
        part.close()
        finished(path)
    except BaseException:
        part.abandon()
        raise
    return number


def open_part(kind: str, path: Path, chosen: Chosen) -> Part:
    """One file of a format; its packages are imported here."""
    if kind == "parquet":
        from lmdbcache.exchange.transfer.parquet_writer import ParquetPart

        return ParquetPart(path, chosen.description)
    if kind == "safetensors":
        from lmdbcache.exchange.transfer.safetensors_writer import SafetensorsPart

        return SafetensorsPart(path, chosen.description)
    if kind == "webdataset":
        from lmdbcache.exchange.transfer.webdataset_writer import WebDatasetPart

        return WebDatasetPart(path, chosen.description)
    if kind == "npz":
        from lmdbcache.exchange.transfer.npz_writer import NpzPart

        return NpzPart(path, chosen.description, chosen.sample_ids, chosen.lengths)
    from lmdbcache.exchange.transfer.torch_writer import TorchPart

    return TorchPart(path, chosen.description)
