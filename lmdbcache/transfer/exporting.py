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
from lmdbcache.storage.files.generations import RESERVE_BYTES, check_room
from lmdbcache.transfer.parts import Embeddings, Part
from lmdbcache.transfer.placing import SUFFIXES, appearing, check_target, shard_name
from lmdbcache.transfer.selection import Chosen, choose

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
        path: The file, or the folder of shards.
        format: Its format.
        num_embeddings: Embeddings in it.
        num_files: Files in it.
        num_bytes: Of these files.
    """

    path: Path
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
        MissingDependencyError: A package is needed for this format.
    """
    if format not in FORMATS:
        raise TransferError(f"format: {format!r}; known are {', '.join(FORMATS)}")
    if not isinstance(cache, EmbeddingCache):
        cache = EmbeddingCache(cache)
    out = Path(out).expanduser().absolute()
    check_target(out, overwrite=overwrite)
    with cache.reader(config, verify="always", counts_as_use=False) as reader:
        chosen = choose(reader, config, classes, sample_ids, shuffle)
        is_sharded = format in SUFFIXES and out.suffix != SUFFIXES[format]
        is_folder = is_sharded or format == "lance"
        _check_shards(out, chosen, num_shards, is_folder=is_folder)
        _check_space(out, chosen, format)
        count = _counter(progress, len(chosen.sample_ids))
        with appearing(out, is_folder=is_folder) as target:
            if format == "lance":
                num_files = _write_lance(chosen, target, shard_bytes, num_shards, count)
            elif num_shards is not None:
                pieces = chosen.cut(num_shards)
                for number, piece in enumerate(pieces, 1):
                    _write(piece, format, target / shard_name(number, format), None, count)
                num_files = num_shards
            else:
                first = target / shard_name(1, format) if is_sharded else target
                limit = shard_bytes if is_sharded else None
                num_files = _write(chosen, format, first, limit, count)
            found = target.rglob("*") if is_folder else [target]
            num_bytes = sum(file.stat().st_size for file in found if file.is_file())
    return ExportReport(out, format, len(chosen.sample_ids), num_files, num_bytes)


def _check_shards(out: Path, chosen: Chosen, num_shards: int | None, *, is_folder: bool) -> None:
    if num_shards is None:
        return
    if not is_folder:
        raise TransferError(
            f"{out} is to be one file; shards need a folder: a name without an ending"
        )
    if not 1 <= num_shards <= len(chosen.sample_ids):
        raise TransferError(
            f"num_shards {num_shards}: must be 1 to {len(chosen.sample_ids)}, the number of samples"
        )


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Count:
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(done, total)

    return count


def _check_space(out: Path, chosen: Chosen, kind: str) -> None:
    num_bytes = chosen.num_bytes
    if kind in _IN_FLOAT32 and chosen.reader.config.dtype == "bfloat16":
        num_bytes *= 2
    if kind == "webdataset":
        num_bytes += _TAR_BYTES * len(chosen.sample_ids)
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


def _write_lance(
    chosen: Chosen, target: Path, shard_bytes: int, num_shards: int | None, count: Count
) -> int:
    from lmdbcache.transfer.lance_writer import write_lance

    def batches() -> Iterator[tuple[list[str], Embeddings]]:
        for ids, embeddings in chosen.batches(_STEP_BYTES):
            yield ids, embeddings
            count(len(ids))

    rows = len(chosen.sample_ids)
    limit = shard_bytes * rows // chosen.num_bytes if num_shards is None else -(-rows // num_shards)
    return write_lance(target, chosen.description, batches(), max(1, limit))


def _write(chosen: Chosen, kind: str, first: Path, limit: int | None, count: Count) -> int:
    """Write all of it, to one file or to numbered ones of about so many bytes.

    Returns:
        The number of files.
    """
    step = _STEP_BYTES if limit is None else min(_STEP_BYTES, limit)
    part, number, held, records = open_part(kind, first, chosen), 1, 0, 0
    try:
        for ids, embeddings in chosen.batches(step):
            size = sum(array.nbytes for array in embeddings)
            is_full = held + size > (limit or math.inf) or records + len(ids) > _MAX_SHARD_RECORDS
            if limit is not None and held and is_full:
                part.close()
                number, held, records = number + 1, 0, 0
                part = open_part(kind, first.with_name(shard_name(number, kind)), chosen)
            part.add(ids, embeddings)
            held, records = held + size, records + len(ids)
            count(len(ids))
        part.close()
    except BaseException:
        part.abandon()
        raise
    return number


def open_part(kind: str, path: Path, chosen: Chosen) -> Part:
    """One file of a format; its packages are imported here."""
    if kind == "parquet":
        from lmdbcache.transfer.parquet_writer import ParquetPart

        return ParquetPart(path, chosen.description)
    if kind == "safetensors":
        from lmdbcache.transfer.safetensors_writer import SafetensorsPart

        return SafetensorsPart(path, chosen.description)
    if kind == "webdataset":
        from lmdbcache.transfer.webdataset_writer import WebDatasetPart

        return WebDatasetPart(path, chosen.description)
    if kind == "npz":
        from lmdbcache.transfer.npz_writer import NpzPart

        return NpzPart(path, chosen.description, chosen.sample_ids, chosen.lengths)
    from lmdbcache.transfer.torch_writer import TorchPart

    return TorchPart(path, chosen.description)
