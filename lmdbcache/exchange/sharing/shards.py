"""Shards: some samples of a store as safetensors bytes, the same bytes on every machine.

docs/sharing_format.md specifies them. The header is put together here and not by the safetensors
package, which promises no order and no padding: a shard's name is the digest of its bytes, and a
push that replaces a damaged one has to make the very same bytes again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError, FormatVersionError, IntegrityError
from lmdbcache.storage import (
    NUMPY_DTYPES,
    checksums,
    decoded,
    encoded,
    sample_keys,
    stored_form,
    value_bytes,
)

FORMAT: Final = 2  # of shards and manifests
# These bound what a reader spends on a file before it knows that it is sound.
MAX_SHARD_SAMPLES: Final = 10_000
MAX_SHARD_FILE_BYTES: Final = 1 << 30
MAX_HEADER_BYTES: Final = 16 << 20
MAX_LENGTHS_BYTES: Final = 1 << 20

_TENSOR: Final = "embeddings"
_METADATA: Final = "lmdbcache"
_DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}

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

    def check_listed(self, listed: Mapping[str, int]) -> None:
        """Compare the file with a listing of its folder.

        Raises:
            IntegrityError: It is missing, or has another size.
        """
        size = listed.get(self.name)
        if size != self.num_bytes:
            found = "isn't there (any more)" if size is None else f"has {size} bytes"
            raise IntegrityError(f"{self.path} {found}; it should have {self.num_bytes}")


@dataclass(frozen=True)
class ShardHeader:
    """The beginning of a shard's file: whose embeddings it holds, and where.

    Args:
        config: Identity of their store.
        embedding_shape: Shape of one embedding; None in front if the first dimension differs.
        sample_ids: In the order of the ids' UTF-8 bytes.
        checksums: The checksum of each embedding, as a store keeps it.
        lengths: First dimension of each embedding where that differs; else None.

    Raises:
        ConfigError: These can't be a shard: too few or many, not canonical, or not in order.
    """

    config: CacheConfig
    embedding_shape: Shape
    sample_ids: tuple[str, ...]
    checksums: tuple[bytes, ...]
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        number, lengths = len(self.sample_ids), self.lengths
        if not 0 < number <= MAX_SHARD_SAMPLES:
            raise ConfigError(f"{number} samples; a shard has 1 to {MAX_SHARD_SAMPLES}")
        if [key.decode() for key in self.keys] != [*self.sample_ids]:
            raise ConfigError("a sample id isn't in its canonical form")
        if not all(one < two for one, two in pairwise(self.keys)):
            raise ConfigError("the sample ids are out of order, or one is there twice")
        if {len(one) for one in self.checksums} != {8} or len(self.checksums) != number:
            raise ConfigError(f"{len(self.checksums)} checksums for {number} samples")
        if (lengths is not None) != (None in self.embedding_shape) or (
            lengths is not None
            and (len(lengths) != number or not all(type(n) is int and n > 0 for n in lengths))
        ):
            raise ConfigError(f"lengths for {number} samples of shape {self.embedding_shape}")
        if len(self.encoded) > MAX_HEADER_BYTES:
            raise ConfigError(f"a header of {len(self.encoded)} bytes; give it fewer samples")

    @cached_property
    def keys(self) -> list[bytes]:
        """The sample ids as a store has them."""
        return sample_keys(self.sample_ids)

    @cached_property
    def encoded(self) -> bytes:
        """The file's beginning."""
        about: dict[str, Any] = {
            "checksums": b"".join(self.checksums).hex(),
            "config": self.config.to_dict(),
            "embedding_shape": self.embedding_shape,
            "fingerprint": self.config.fingerprint,
            "format": FORMAT,
            "sample_ids": self.sample_ids,
        }
        if self.lengths is not None:
            about["lengths"] = self.lengths
        num_rows = len(self.keys) if self.lengths is None else sum(self.lengths)
        tensor = {
            "data_offsets": [0, self._row_bytes * num_rows],
            "dtype": _DTYPES[self.config.dtype],
            "shape": [num_rows, *self._stored_row[1]],
        }
        metadata = {_METADATA: encode_json(about).decode()}
        text = encode_json({"__metadata__": metadata, _TENSOR: tensor})
        padded = text + b" " * (-len(text) % 8)
        return len(padded).to_bytes(8, "little") + padded

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """First byte in the file of each embedding, and the one after its last."""
        lengths, row_bytes = self.lengths or [1] * len(self.keys), self._row_bytes
        ends = accumulate((row_bytes * length for length in lengths), initial=len(self.encoded))
        return [*pairwise(ends)]

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.bounds[-1][1]

    @property
    def _row_shape(self) -> list[int]:
        return [size for size in self.embedding_shape if size is not None]

    @property
    def _row_bytes(self) -> int:
        """Bytes of one embedding, or of one step of its first dimension if that differs."""
        return value_bytes(self._row_shape, self.config.dtype)

    @property
    def _stored_row(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Dtype and shape of what is stored of one embedding, or of one step of it."""
        dtype, shape = stored_form(self._row_shape, self.config.dtype)
        return dtype, tuple(size or 0 for size in shape)

    def value(self, raw: Buffer) -> npt.NDArray[Any]:
        """Return one embedding of its bytes."""
        rows = self._rows(raw)
        return rows if self.lengths is not None else rows[0]

    def _rows(self, raw: Buffer) -> npt.NDArray[Any]:
        dtype, shape = self._stored_row
        return decoded(np.frombuffer(raw, dtype).reshape(-1, *shape), self.config.dtype)

    def values(self, data: Buffer) -> Embeddings:
        """Return all embeddings of the file's bytes, as views of these but for int8."""
        view = memoryview(data)
        if self.lengths is None:
            return self._rows(view[len(self.encoded) :])
        return [self.value(view[first:last]) for first, last in self.bounds]


def encode_shard(
    config: CacheConfig, embedding_shape: Shape, sample_ids: Sequence[str], embeddings: Embeddings
) -> tuple[ShardEntry, bytes]:
    """Return the one shard that these samples make, as a manifest lists it and as bytes.

    Args:
        config: Identity of their store.
        embedding_shape: Shape of one embedding; None in front if the first dimension differs.
        sample_ids: Canonical, each once, in any order; at most `MAX_SHARD_SAMPLES`.
        embeddings: `(n, *embedding_shape)`, or an array for each sample, as a store gives them.

    Raises:
        ConfigError: They can't be a shard.
    """
    order = sorted(range(len(sample_ids)), key=lambda index: sample_ids[index].encode())
    ids = tuple(sample_ids[index] for index in order)
    given = [np.asarray(embeddings[index], order="C") for index in order]
    values = [encoded(value, config.dtype) for value in given]
    found = tuple(checksums(sample_keys(ids), values))
    lengths = tuple(len(value) for value in values) if None in embedding_shape else None
    header = ShardHeader(config, embedding_shape, ids, found, lengths)
    for sample_id, value, stored, (first, last) in zip(
        ids, given, values, header.bounds, strict=True
    ):
        if value.dtype != NUMPY_DTYPES[config.dtype] or stored.nbytes != last - first:
            raise ConfigError(
                f"{sample_id}: an embedding of shape {value.shape} and dtype {value.dtype}, the "
                f"shard's are {embedding_shape} in {config.dtype}"
            )
    parts: list[Any] = [header.encoded, *values]
    data = b"".join(parts)
    digests = [hashlib.sha256(one).hexdigest() for one in (data, header.encoded)]
    numbers = (len(data), len(header.encoded))
    return ShardEntry(digests[0], *numbers, digests[1], len(ids), ids[0], ids[-1]), data


def decode_header(data: bytes, name: str) -> ShardHeader:
    """Read the beginning of a shard's file, which may be damaged or hostile.

    Raises:
        FormatVersionError: Of a newer lmdbcache.
        IntegrityError: Not a shard, or not in its one form.
    """
    try:
        about = json.loads(json.loads(data[8:])["__metadata__"][_METADATA])
        check_format(about["format"], name)
        digits = bytes.fromhex(about["checksums"])
        header = ShardHeader(
            CacheConfig.from_dict(about["config"]),
            checked_shape(tuple(about["embedding_shape"])),
            tuple(about["sample_ids"]),
            tuple(digits[at : at + 8] for at in range(0, len(digits), 8)),
            tuple(about["lengths"]) if "lengths" in about else None,
        )
        if header.encoded != data:
            raise ConfigError("not in its one form")
    except FormatVersionError:
        raise
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{name} isn't a shard of embeddings ({error!r:.200})") from None
    return header


def lengths_file(entry: ShardEntry, lengths: Sequence[int | None]) -> tuple[str, bytes]:
    """Return the name and the bytes of the file with the clips' lengths of a shard.

    Args:
        entry: The shard.
        lengths: How many samples of its clip each embedding was computed from, where known; in the
            order of its sample ids.
    """
    data = encode_json(lengths)
    return f"{entry.sha256}-{hashlib.sha256(data).hexdigest()}.json", data


def decode_lengths(data: bytes, name: str, header: ShardHeader) -> dict[str, int]:
    """Read a file of `lengths_file`: return sample id → length.

    Raises:
        IntegrityError: It isn't one of this shard.
    """
    check_digest(data, name[-69:-5], name)
    try:
        found = dict(zip(header.sample_ids, json.loads(data), strict=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{name} has no lengths of a shard ({error!r:.200})") from None
    known = {sample_id: length for sample_id, length in found.items() if length is not None}
    longest = header.config.num_samples
    if not all(type(length) is int and 0 < length <= longest for length in known.values()):
        raise IntegrityError(f"{name} has lengths that aren't 1 to {longest}")
    return known


def check_digest(data: Buffer, sha256: str, name: str) -> None:
    """Compare bytes with their digest.

    Raises:
        IntegrityError: They don't have it.
    """
    if hashlib.sha256(data).hexdigest() != sha256:
        raise IntegrityError(f"{name} is damaged: its bytes don't have their digest")


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


def encode_json(value: Any) -> bytes:
    """Return JSON in the one form that shards and manifests have it in."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
