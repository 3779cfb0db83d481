"""A store, or some of its samples, as files that other tools read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import TransferError
from lmdbcache.storage.files.generations import RESERVE_BYTES, check_room
from lmdbcache.transfer.parts import Part
from lmdbcache.transfer.placing import SHARD_FORMATS, appearing, check_target, shard_name
from lmdbcache.transfer.selection import Chosen, choose

__all__ = ["FORMATS", "ExportFormat", "ExportReport", "export_embeddings"]

ExportFormat = Literal["pt", "safetensors", "npz", "parquet"]
FORMATS: Final = ("pt", "safetensors", "npz", "parquet")
_SHARD_BYTES: Final = 128 << 20
_STEP_BYTES: Final = 8 << 20
_MAX_SHARD_RECORDS: Final = 100_000  # a safetensors header holds the names, and has a limit


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
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write a store's embeddings to a file or a folder of shards; `import_embeddings` reads them.

    Each value is compared with its checksum. The files appear under their name when they are
    whole. bfloat16 is written as such to .pt and safetensors, and as float32, exactly, to .npz
    and Parquet, which don't know it.

    Args:
        cache: The cache, or its root.
        config: Which store.
        out: A file; for `"safetensors"` and `"parquet"` also a folder of shards, which is what a
            name without that ending means.
        format: `"pt"` (a dict for `torch.load`), `"safetensors"`, `"npz"` or `"parquet"`.
            `"pt"`, and `"safetensors"` as a single file, need memory for all embeddings.
        classes: Only these classes.
        sample_ids: Only these samples.
        overwrite: Replace what an earlier export has left there.
        shard_bytes: Bytes of embeddings in one shard.
        progress: Called with the number of embeddings done and in all.

    Raises:
        TransferError: `out` exists, nothing is chosen, or the embeddings don't fit into memory.
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
        chosen = choose(reader, config, classes, sample_ids)
        is_sharded = format in SHARD_FORMATS and out.suffix != f".{format}"
        _check_space(out, chosen, format)
        with appearing(out, is_folder=is_sharded) as target:
            first = target / shard_name(1, format) if is_sharded else target
            limit = shard_bytes if is_sharded else None
            num_files = _write(chosen, format, first, limit, progress)
            found = sorted(target.iterdir()) if is_sharded else [target]
            num_bytes = sum(file.stat().st_size for file in found)
    return ExportReport(out, format, len(chosen.sample_ids), num_files, num_bytes)


def _check_space(out: Path, chosen: Chosen, kind: str) -> None:
    num_bytes = chosen.num_bytes
    if kind in ("npz", "parquet") and chosen.reader.config.dtype == "bfloat16":
        num_bytes *= 2
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
    kind: str,
    first: Path,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Write all of it, to one file or to numbered ones of about so many bytes.

    Returns:
        The number of files.
    """
    step = _STEP_BYTES if limit is None else min(_STEP_BYTES, limit)
    part, number, held, records, done = open_part(kind, first, chosen), 1, 0, 0, 0
    try:
        for ids, embeddings in chosen.batches(step):
            size = sum(array.nbytes for array in embeddings)
            is_full = held + size > (limit or math.inf) or records + len(ids) > _MAX_SHARD_RECORDS
            if limit is not None and held and is_full:
                part.close()
                number, held, records = number + 1, 0, 0
                part = open_part(kind, first.with_name(shard_name(number, kind)), chosen)
            part.add(ids, embeddings)
            held, records, done = held + size, records + len(ids), done + len(ids)
            if progress is not None:
                progress(done, len(chosen.sample_ids))
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
    if kind == "npz":
        from lmdbcache.transfer.npz_writer import NpzPart

        return NpzPart(path, chosen.description, chosen.sample_ids, chosen.lengths)
    from lmdbcache.transfer.torch_writer import TorchPart

    return TorchPart(path, chosen.description)
