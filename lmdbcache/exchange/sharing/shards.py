"""Shards: some samples of a store as safetensors bytes, the same bytes on every machine.

docs/sharing_format.md specifies them. The header is put together here and not by the safetensors
package, which promises no order and no padding: a shard's name is the digest of its bytes, and a
push that replaces a damaged one has to make the very same bytes again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError, FormatVersionError, IntegrityError
from lmdbcache.storage import NUMPY_DTYPES, checksum, sample_key

__all__ = [
    "FORMAT",
    "MAX_HEADER_BYTES",
    "MAX_SHARD_FILE_BYTES",
    "MAX_SHARD_SAMPLES",
    "SHARD_BYTES",
    "Shape",
    "ShardContent",
    "ShardEntry",
    "ShardHeader",
    "check_format",
    "checked_shape",
    "decode_header",
    "decode_shard",
    "encode_shard",
    "row_bytes",
]

FORMAT: Final = 2  # of shards and manifests
SHARD_BYTES: Final = 16 << 20  # of values
# The limits below bound what a reader spends on a file before it knows that it is sound.
MAX_SHARD_SAMPLES: Final = 10_000
MAX_SHARD_FILE_BYTES: Final = 1 << 30
MAX_HEADER_BYTES: Final = 16 << 20

_TENSOR: Final = "embeddings"
_METADATA: Final = "lmdbcache"
_DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CHECKSUM_BYTES: Final = 8

Shape = tuple[int | None, ...]
Buffer = bytes | memoryview
Embeddings = npt.NDArray[Any] | Sequence[npt.NDArray[Any]]


@dataclass(frozen=True)
class ShardEntry:
    """One shard as a manifest lists it.

    Args:
        sha256: Digest of the file's bytes, in hex; its name.
        num_bytes: Size of the file.
        header_bytes: Size of the file's beginning that says what is in it.
        header_sha256: Digest of that beginning.
        num_samples: How many embeddings it holds.
        first: The first sample id, in the order of the ids' UTF-8 bytes.
        last: The last sample id.
        without: Sample ids whose values here don't count any more.
    """

    sha256: str
    num_bytes: int
    header_bytes: int
    header_sha256: str
    num_samples: int
    first: str
    last: str
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.sha256}.safetensors"

    @property
    def path(self) -> str:
        """The file, below the fingerprint's folder."""
        return f"shards/{self.name}"


class ShardHeader:
    """The beginning of a shard's file: whose embeddings it holds, and where.

    Args:
        config: Identity of their store.
        embedding_shape: Shape of one embedding; None in front if the first dimension differs.
        sample_ids: In the order of the ids' UTF-8 bytes.
        checksums: The checksum of each embedding, as a store keeps it.
        lengths: First dimension of each embedding where that differs; else None.

    Raises:
        ConfigError: These can't be a shard: none, too many, not canonical or not in order.
    """

    def __init__(
        self,
        config: CacheConfig,
        embedding_shape: Shape,
        sample_ids: Sequence[str],
        checksums: Sequence[bytes],
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.config, self.embedding_shape = config, embedding_shape
        self.sample_ids, self.checksums = tuple(sample_ids), tuple(checksums)
        self.lengths = None if lengths is None else tuple(lengths)
        self.keys = _keys(self.sample_ids)
        if {len(one) for one in self.checksums} != {_CHECKSUM_BYTES} or len(self.checksums) != len(
            self.keys
        ):
            raise ConfigError(f"{len(self.checksums)} checksums for {len(self.keys)} samples")
        if (self.lengths is not None) != (None in embedding_shape):
            raise ConfigError(f"lengths {'given' if lengths else 'missing'}: {embedding_shape}")
        if self.lengths is not None and (
            len(self.lengths) != len(self.keys)
            or not all(type(n) is int and n > 0 for n in self.lengths)
        ):
            raise ConfigError(f"{len(self.lengths)} lengths for {len(self.keys)} samples")
        self.dtype = NUMPY_DTYPES[config.dtype]
        num_rows = len(self.keys) if self.lengths is None else sum(self.lengths)
        self.num_value_bytes = num_rows * row_bytes(config, embedding_shape)
        self.encoded: Final = self._encoded(num_rows)
        self.num_bytes: Final = len(self.encoded) + self.num_value_bytes

    def _encoded(self, num_rows: int) -> bytes:
        about: dict[str, Any] = {
            "checksums": b"".join(self.checksums).hex(),
            "config": self.config.to_dict(),
            "embedding_shape": list(self.embedding_shape),
            "fingerprint": self.config.fingerprint,
            "format": FORMAT,
            "sample_ids": list(self.sample_ids),
        }
        if self.lengths is not None:
            about["lengths"] = list(self.lengths)
        rest = [size for size in self.embedding_shape if size is not None]
        tensor = {
            "data_offsets": [0, self.num_value_bytes],
            "dtype": _DTYPES[self.config.dtype],
            "shape": [num_rows, *rest],
        }
        text = _dumps({"__metadata__": {_METADATA: _dumps(about)}, _TENSOR: tensor}).encode("ascii")
        padded = text + b" " * (-len(text) % 8)
        if len(padded) + 8 > MAX_HEADER_BYTES:
            raise ConfigError(f"a shard's header of {len(padded)} bytes; give it fewer samples")
        return len(padded).to_bytes(8, "little") + padded

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """First byte in the file of each embedding, and the one after its last."""
        at, found = len(self.encoded), []
        size = row_bytes(self.config, self.embedding_shape)
        for length in self.lengths or [1] * len(self.keys):
            found.append((at, at + length * size))
            at = found[-1][1]
        return found

    def value(self, raw: Buffer) -> npt.NDArray[Any]:
        """Return one embedding of its bytes."""
        flat = np.frombuffer(raw, self.dtype)
        return flat.reshape([-1 if size is None else size for size in self.embedding_shape])

    def values(self, data: Buffer) -> Embeddings:
        """Return all embeddings of the file's bytes."""
        view = memoryview(data)
        if self.lengths is not None:
            return [self.value(view[first:last]) for first, last in self.bounds]
        flat = np.frombuffer(view[len(self.encoded) :], self.dtype)
        return flat.reshape([len(self.keys), *self.embedding_shape])


@dataclass(frozen=True)
class ShardContent:
    """What a shard holds.

    Args:
        header: Whose embeddings.
        embeddings: `(n, *embedding_shape)` in the stored dtype, or one array for each sample where
            the first dimension differs. They are read-only views of the bytes that were decoded.
    """

    header: ShardHeader
    embeddings: Embeddings

    @property
    def config(self) -> CacheConfig:
        """Identity of their store."""
        return self.header.config

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """In the order of the ids' UTF-8 bytes."""
        return self.header.sample_ids


def encode_shard(
    config: CacheConfig, embedding_shape: Shape, sample_ids: Sequence[str], embeddings: Embeddings
) -> tuple[ShardEntry, bytes]:
    """Return the one shard that these samples make, as a manifest lists it and as bytes.

    Args:
        config: Identity of their store.
        embedding_shape: Shape of one embedding; None in front if the first dimension differs.
        sample_ids: Canonical, each once, in any order; at most `MAX_SHARD_SAMPLES`.
        embeddings: `(n, *embedding_shape)`, or an array for each sample, in the stored dtype.

    Raises:
        ConfigError: They can't be a shard.
    """
    order = sorted(range(len(sample_ids)), key=lambda index: sample_ids[index].encode())
    ids = [sample_ids[index] for index in order]
    values = [np.asarray(embeddings[index]) for index in order]
    raw = [np.ascontiguousarray(value).reshape(-1).view(np.uint8).data for value in values]
    checksums = [checksum(sample_key(one), bytes_) for one, bytes_ in zip(ids, raw, strict=True)]
    lengths = [len(value) for value in values] if None in embedding_shape else None
    header = ShardHeader(config, embedding_shape, ids, checksums, lengths)
    for sample_id, value, (first, last) in zip(ids, values, header.bounds, strict=True):
        if value.dtype != header.dtype or value.nbytes != last - first:
            raise ConfigError(
                f"{sample_id}: an embedding of shape {value.shape} and dtype {value.dtype}, the "
                f"shard's are {embedding_shape} in {header.dtype}"
            )
    data = b"".join([header.encoded, *raw])
    entry = ShardEntry(
        hashlib.sha256(data).hexdigest(),
        len(data),
        len(header.encoded),
        hashlib.sha256(header.encoded).hexdigest(),
        len(ids),
        ids[0],
        ids[-1],
    )
    return entry, data


def row_bytes(config: CacheConfig, embedding_shape: Shape) -> int:
    """Return the bytes of one embedding, or of one step of its first dimension if that differs."""
    rest = [size for size in embedding_shape if size is not None]
    return math.prod(rest) * NUMPY_DTYPES[config.dtype].itemsize


def decode_shard(data: Buffer, name: str) -> ShardContent:
    """Read a shard, which may be damaged or hostile. Its checksums aren't compared.

    Args:
        data: The whole file: bytes, or a memoryview of a mapped file.
        name: Name of the file, for errors.

    Raises:
        FormatVersionError: Of a newer lmdbcache.
        IntegrityError: Not a shard, or not in its one form.
    """
    length = int.from_bytes(bytes(data[:8]), "little")
    if length > min(len(data), MAX_HEADER_BYTES) - 8:
        raise IntegrityError(f"{name} isn't a safetensors file")
    header = decode_header(bytes(data[: 8 + length]), name)
    if len(data) != header.num_bytes:
        raise IntegrityError(f"{name} isn't a whole shard of embeddings")
    return ShardContent(header, header.values(data))


def decode_header(data: bytes, name: str) -> ShardHeader:
    """Read the beginning of a shard's file, which may be damaged or hostile.

    Raises:
        FormatVersionError: Of a newer lmdbcache.
        IntegrityError: Not a shard, or not in its one form.
    """
    try:
        about = json.loads(json.loads(data[8:])["__metadata__"][_METADATA])
        check_format(about["format"], name)
        digits = about["checksums"]
        checksums = [bytes.fromhex(digits[at : at + 16]) for at in range(0, len(digits), 16)]
        header = ShardHeader(
            CacheConfig.from_dict(about["config"]),
            checked_shape(tuple(about["embedding_shape"])),
            about["sample_ids"],
            checksums,
            about.get("lengths"),
        )
    except FormatVersionError:
        raise
    except (
        *(ConfigError, KeyError, TypeError, ValueError, AttributeError),
        *(RecursionError, OverflowError),
    ) as error:
        raise IntegrityError(f"{name} isn't a shard of embeddings ({error!r:.200})") from None
    if header.encoded != data:
        raise IntegrityError(f"{name} isn't a shard of embeddings in its one form")
    return header


def check_format(found: Any, name: str) -> None:
    """Refuse a file of another format.

    Raises:
        FormatVersionError: Of a newer lmdbcache.
        ConfigError: Of none.
    """
    if type(found) is int and found > FORMAT:
        raise FormatVersionError(
            f"{name} is in format {found}; this lmdbcache reads format {FORMAT}. Upgrade lmdbcache"
        )
    if type(found) is not int or found != FORMAT:
        raise ConfigError(f"format {found!r:.40} instead of {FORMAT}")


def checked_shape(shape: tuple[Any, ...]) -> Shape:
    """Return an embedding's shape as read from JSON.

    Raises:
        ConfigError: It isn't a shape.
    """
    sizes = shape[1:] if shape[:1] == (None,) else shape
    if len(shape) > 32 or not all(type(size) is int and 0 < size < 1 << 40 for size in sizes):
        raise ConfigError(f"embedding_shape: {shape!r:.200}")
    return shape


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _keys(sample_ids: tuple[str, ...]) -> list[bytes]:
    if not 0 < len(sample_ids) <= MAX_SHARD_SAMPLES:
        raise ConfigError(f"{len(sample_ids)} samples; a shard has 1 to {MAX_SHARD_SAMPLES}")
    keys = [sample_key(sample_id) for sample_id in sample_ids]
    for sample_id, key, following in zip(sample_ids, keys, [*keys[1:], None], strict=True):
        if key != sample_id.encode():
            raise ConfigError(f"sample id {sample_id!r} isn't in its canonical form")
        if following is not None and key >= following:
            raise ConfigError(f"sample id {sample_id!r} is out of order, or there twice")
    return keys
