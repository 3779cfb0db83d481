"""Shards: some samples of a store as safetensors bytes, the same bytes on every machine.

docs/sharing_format.md specifies them. The header is put together here and not by the safetensors
package, which promises no order and no padding: a shard's name is the digest of its bytes, and a
repair has to find the very same ones again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError, FormatVersionError, IntegrityError
from lmdbcache.storage import NUMPY_DTYPES, checksum, sample_key

__all__ = [
    "FORMAT",
    "MAX_SHARD_SAMPLES",
    "SHARD_BYTES",
    "SHARDS_NAME",
    "SHARD_NAME",
    "Shape",
    "ShardContent",
    "ShardEntry",
    "check_content",
    "checked_shape",
    "decode_shard",
    "encode_shard",
    "entry_of",
    "row_bounds",
    "row_bytes",
    "rows_by_header",
    "sound_rows",
]

FORMAT: Final = 1
SHARD_BYTES: Final = 64 << 20  # of values
# A safetensors header may have 100 MB; an id has up to 511 bytes, and escapes make more of them.
MAX_SHARD_SAMPLES: Final = 50_000
SHARDS_NAME: Final = "shards"
SHARD_NAME: Final = re.compile(r"([0-9a-f]{64})\.safetensors")

_MAX_HEADER_BYTES: Final = 100_000_000
_TENSOR: Final = "embeddings"
_METADATA: Final = "lmdbcache"
_DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Shape = tuple[int | None, ...]
Buffer = bytes | memoryview
Embeddings = npt.NDArray[Any] | Sequence[npt.NDArray[Any]]


@dataclass(frozen=True)
class ShardEntry:
    """One shard as a commit lists it.

    Args:
        sha256: Digest of the file's bytes, in hex; its name.
        num_bytes: Of the file.
        sample_ids: What it holds, in the order of the ids' UTF-8 bytes.
        checksums: 8 bytes for each sample: the checksum that a store keeps of the embedding.
        lengths: First dimension of each embedding where that differs; else None.
    """

    sha256: str
    num_bytes: int
    sample_ids: tuple[str, ...]
    checksums: tuple[bytes, ...]
    lengths: tuple[int, ...] | None = None

    @property
    def path(self) -> str:
        """The file, below the fingerprint's folder."""
        return f"{SHARDS_NAME}/{self.name}"

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.sha256}.safetensors"


@dataclass(frozen=True)
class ShardContent:
    """What a shard holds.

    Args:
        config: The store that it is of.
        embedding_shape: Shape of one embedding; None in front if the first dimension differs.
        sample_ids: In the order of the ids' UTF-8 bytes.
        embeddings: `(n, *embedding_shape)` in the stored dtype, or one array for each sample where
            the first dimension differs. They are read-only views of the bytes that were decoded.
    """

    config: CacheConfig
    embedding_shape: Shape
    sample_ids: tuple[str, ...]
    embeddings: Embeddings

    def checksums(self) -> tuple[bytes, ...]:
        """The checksum of each embedding, as a store keeps it."""
        pairs = zip(self.sample_ids, self.embeddings, strict=True)
        return tuple([checksum(sample_key(one), _raw(value)) for one, value in pairs])


class _Layout:
    """Where everything lies in the shard of these samples.

    Raises:
        ConfigError: The samples can't be a shard: none, too many, not canonical or not in order.
    """

    def __init__(
        self,
        config: CacheConfig,
        shape: Shape,
        sample_ids: Sequence[str],
        lengths: Sequence[int] | None,
    ) -> None:
        self.config, self.shape, self.lengths = config, shape, lengths
        self.keys = _keys(sample_ids)
        if (lengths is not None) != (None in shape):
            raise ConfigError(f"lengths {'given' if lengths else 'missing'} for shape {shape}")
        if lengths is not None and (
            len(lengths) != len(self.keys) or not all(type(n) is int and n > 0 for n in lengths)
        ):
            raise ConfigError(f"{len(lengths)} lengths for {len(self.keys)} samples")
        self.dtype = NUMPY_DTYPES[config.dtype]
        rest = [size for size in shape if size is not None]
        self.row_bytes = row_bytes(config, shape)
        num_rows = len(self.keys) if lengths is None else sum(lengths)
        self.num_value_bytes = num_rows * self.row_bytes
        self.header = self._header(sample_ids, [num_rows, *rest])
        self.num_bytes = len(self.header) + self.num_value_bytes

    def _header(self, sample_ids: Sequence[str], tensor_shape: list[int]) -> bytes:
        about: dict[str, Any] = {
            "config": self.config.to_dict(),
            "embedding_shape": list(self.shape),
            "fingerprint": self.config.fingerprint,
            "format": FORMAT,
            "sample_ids": list(sample_ids),
        }
        if self.lengths is not None:
            about["lengths"] = list(self.lengths)
        tensor = {
            "data_offsets": [0, self.num_value_bytes],
            "dtype": _DTYPES[self.config.dtype],
            "shape": tensor_shape,
        }
        text = _dumps({"__metadata__": {_METADATA: _dumps(about)}, _TENSOR: tensor}).encode("ascii")
        padded = text + b" " * (-len(text) % 8)
        if len(padded) > _MAX_HEADER_BYTES:
            raise ConfigError(f"a shard's header of {len(padded)} bytes; give it fewer samples")
        return len(padded).to_bytes(8, "little") + padded

    def bounds(self) -> list[tuple[int, int]]:
        """First and last byte of each embedding in the file."""
        at, found = len(self.header), []
        for length in self.lengths or [1] * len(self.keys):
            found.append((at, at + length * self.row_bytes))
            at = found[-1][1]
        return found

    def value(self, raw: Buffer) -> npt.NDArray[Any]:
        """One embedding of its bytes."""
        flat = np.frombuffer(raw, self.dtype)
        return flat.reshape([-1 if size is None else size for size in self.shape])

    def values(self, data: Buffer) -> Embeddings:
        """All embeddings of the file's bytes."""
        view = memoryview(data)
        if self.lengths is not None:
            return [self.value(view[first:last]) for first, last in self.bounds()]
        flat = np.frombuffer(view[len(self.header) :], self.dtype)
        return flat.reshape([len(self.keys), *self.shape])


def encode_shard(
    config: CacheConfig, embedding_shape: Shape, sample_ids: Sequence[str], embeddings: Embeddings
) -> tuple[ShardEntry, bytes]:
    """The one shard that these samples make.

    Args:
        config: The store that they are of.
        embedding_shape: Shape of one embedding; None in front if the first dimension differs.
        sample_ids: Canonical, each once, in any order; at most `MAX_SHARD_SAMPLES`.
        embeddings: `(n, *embedding_shape)`, or an array for each sample, in the stored dtype.

    Raises:
        ConfigError: They can't be a shard.
    """
    order = sorted(range(len(sample_ids)), key=lambda index: sample_ids[index].encode())
    ids = tuple(sample_ids[index] for index in order)
    is_ragged = None in embedding_shape
    lengths = tuple(len(embeddings[index]) for index in order) if is_ragged else None
    layout = _Layout(config, embedding_shape, ids, lengths)
    checksums, pieces = [], [memoryview(layout.header)]
    for index, key, (first, last) in zip(order, layout.keys, layout.bounds(), strict=True):
        value = np.asarray(embeddings[index])
        raw = _raw(value)
        if value.dtype != layout.dtype or len(raw) != last - first:
            raise ConfigError(
                f"{sample_ids[index]}: an embedding of shape {value.shape} and dtype "
                f"{value.dtype}, the shard's are {embedding_shape} in {layout.dtype}"
            )
        checksums.append(checksum(key, raw))
        pieces.append(raw)
    data = b"".join(pieces)
    digest = hashlib.sha256(data).hexdigest()
    return ShardEntry(digest, len(data), ids, tuple(checksums), lengths), data


def row_bytes(config: CacheConfig, embedding_shape: Shape) -> int:
    """Bytes of one embedding, or of one step of its first dimension where that differs."""
    rest = [size for size in embedding_shape if size is not None]
    return math.prod(rest) * NUMPY_DTYPES[config.dtype].itemsize


def decode_shard(data: Buffer, name: str) -> ShardContent:
    """Read a shard, which may be damaged or made by a stranger.

    Args:
        data: The whole file: bytes, or a memoryview of a mapped file.
        name: Of the file, for errors.

    Raises:
        FormatVersionError: Of a newer lmdbcache.
        IntegrityError: Not a shard, or not in its one form.
    """
    about = _about(data, name)
    if isinstance(about.get("format"), int) and about["format"] > FORMAT:
        raise FormatVersionError(
            f"{name} is in format {about['format']}; this lmdbcache reads up to {FORMAT}. Upgrade "
            "lmdbcache"
        )
    try:
        config = CacheConfig.from_dict(about["config"])
        shape = tuple(about["embedding_shape"])
        lengths = about.get("lengths")
        layout = _Layout(config, checked_shape(shape), about["sample_ids"], lengths)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{name} isn't a shard of embeddings ({error})") from None
    if len(data) != layout.num_bytes or bytes(data[: len(layout.header)]) != layout.header:
        raise IntegrityError(f"{name} isn't a whole shard of embeddings in its one form")
    return ShardContent(config, shape, tuple(about["sample_ids"]), layout.values(data))


def entry_of(content: ShardContent, sha256: str, num_bytes: int) -> ShardEntry:
    """How a commit lists a shard.

    Args:
        content: What it holds.
        sha256: Digest of its bytes, in hex.
        num_bytes: How many these are.
    """
    is_ragged = None in content.embedding_shape
    lengths = tuple(len(value) for value in content.embeddings) if is_ragged else None
    return ShardEntry(sha256, num_bytes, content.sample_ids, content.checksums(), lengths)


def check_content(content: ShardContent, entry: ShardEntry, config: CacheConfig) -> None:
    """Refuse a shard that doesn't hold what the commit says.

    Raises:
        IntegrityError: Other samples, another config or other values.
    """
    name = entry.path
    if content.config != config:
        raise IntegrityError(
            f"{name} holds embeddings of another config ({config.differences(content.config)}, "
            "asked and found)"
        )
    if content.sample_ids != entry.sample_ids:
        raise IntegrityError(f"{name} doesn't hold the samples that its commit lists")
    pairs = zip(content.checksums(), entry.checksums, entry.sample_ids, strict=True)
    wrong = [sample_id for found, expected, sample_id in pairs if found != expected]
    if wrong:
        raise IntegrityError(
            f"{name}: {len(wrong)} embeddings aren't those that its commit lists, {wrong[0]!r} "
            "for one"
        )


def row_bounds(
    entry: ShardEntry, config: CacheConfig, embedding_shape: Shape
) -> list[tuple[int, int]]:
    """First and last byte of each embedding in the file of a shard.

    Args:
        entry: The shard as a commit lists it.
        config: The store that it is of.
        embedding_shape: Shape of one embedding.

    Raises:
        ConfigError: The samples can't be a shard.
    """
    return _Layout(config, embedding_shape, entry.sample_ids, entry.lengths).bounds()


def sound_rows(
    data: Buffer, entry: ShardEntry, config: CacheConfig, embedding_shape: Shape
) -> dict[str, npt.NDArray[Any]]:
    """The embeddings of a damaged or cut shard that are still as its commit lists them.

    Args:
        data: What is left of the file.
        entry: The shard as the commit lists it.
        config: The store that it is of.
        embedding_shape: Shape of one embedding.
    """
    try:
        layout = _Layout(config, embedding_shape, entry.sample_ids, entry.lengths)
    except ConfigError:
        return {}
    view, found = memoryview(data), {}
    rows = zip(entry.sample_ids, layout.keys, entry.checksums, layout.bounds(), strict=True)
    for sample_id, key, expected, (first, last) in rows:
        if last <= len(view) and checksum(key, view[first:last]) == expected:
            found[sample_id] = layout.value(view[first:last])
    return found


def rows_by_header(
    data: Buffer, name: str, config: CacheConfig, embedding_shape: Shape
) -> dict[str, npt.NDArray[Any] | None]:
    """Sample id → embedding of a damaged shard by its own header, unchecked; None if it is cut off.

    For a shard that no commit lists; see `sound_rows`.

    Raises:
        IntegrityError: Its header can't be read.
    """
    about = _about(data, name)
    try:
        ids, lengths = about["sample_ids"], about.get("lengths")
        layout = _Layout(config, embedding_shape, ids, lengths)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{name}: its header is damaged ({error})") from None
    view = memoryview(data)
    return {
        one: layout.value(view[first:last]) if last <= len(view) else None
        for one, (first, last) in zip(ids, layout.bounds(), strict=True)
    }


def _raw(value: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _keys(sample_ids: Sequence[str]) -> list[bytes]:
    if not 0 < len(sample_ids) <= MAX_SHARD_SAMPLES:
        raise ConfigError(f"{len(sample_ids)} samples; a shard has 1 to {MAX_SHARD_SAMPLES}")
    keys = [sample_key(sample_id) for sample_id in sample_ids]
    for sample_id, key, following in zip(sample_ids, keys, [*keys[1:], None], strict=True):
        if key != sample_id.encode():
            raise ConfigError(f"sample id {sample_id!r} isn't in its canonical form")
        if following is not None and key >= following:
            raise ConfigError(f"sample id {sample_id!r} is out of order, or there twice")
    return keys


def checked_shape(shape: tuple[Any, ...]) -> Shape:
    """An embedding's shape as read from JSON.

    Raises:
        ConfigError: It is none.
    """
    sizes = shape[1:] if shape[:1] == (None,) else shape
    if len(shape) > 32 or not all(type(size) is int and 0 < size < 1 << 40 for size in sizes):
        raise ConfigError(f"embedding_shape: {shape!r}")
    return shape


def _about(data: Buffer, name: str) -> dict[str, Any]:
    length = int.from_bytes(bytes(data[:8]), "little")
    if not 2 <= length <= min(len(data) - 8, _MAX_HEADER_BYTES):
        raise IntegrityError(f"{name} isn't a safetensors file")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        about = json.loads(header["__metadata__"][_METADATA])
    except (ValueError, KeyError, TypeError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise IntegrityError(f"{name} isn't a shard of embeddings")
    return about
