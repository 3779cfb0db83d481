"""The `metadata` record of a store: what was stored, from what, by what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Final

import msgpack
import xxhash

from lmdbcache.config import WINDOW_FIELDS, CacheConfig
from lmdbcache.errors import (
    ConfigError,
    FormatVersionError,
    IntegrityError,
    ProvenanceMismatchError,
)
from lmdbcache.storage.layout import FORMAT_VERSION

_MAX_RECORD_BYTES: Final = 64 * 1024
_LIMITS: Final[dict[str, Any]] = {
    "raw": False,
    "strict_map_key": True,
    "use_list": False,
    "max_str_len": _MAX_RECORD_BYTES,
    "max_bin_len": _MAX_RECORD_BYTES,
    "max_array_len": 4096,
    "max_map_len": 256,
    "max_ext_len": 0,
}
_CONFIG_FIELDS: Final = tuple(CacheConfig().to_dict())

# Two values of one of these under one config mean different embeddings for the same clip.
_NOT_TO_BE_MIXED: Final = ("weights_digest", "feature_extractor")
# The largest relative L2 distance of an embedding from what int8 keeps of it.
_QUANTIZATION_ERROR: Final = "quantization_error"
# Folders of one machine: they mean nothing on another, and tell of its users.
_OF_THIS_MACHINE: Final = ("checkpoint",)


def checksum(key: bytes, value: Any) -> bytes:
    """8 bytes: xxh3-64 of the value, seeded by the key's own xxh3-64, big-endian.

    The seed makes a sound value under the wrong key fail too. The value is a C-contiguous buffer.
    """
    return xxhash.xxh3_64_digest(value, seed=xxhash.xxh3_64_intdigest(key))


def checksums(keys: Iterable[bytes], values: Iterable[Any]) -> list[bytes]:
    """`checksum` of each key and its value, a C-contiguous buffer."""
    return list(map(xxhash.xxh3_64_digest, values, map(xxhash.xxh3_64_intdigest, keys)))


def new_checksum(key: bytes) -> Any:
    """An empty digest that gives `checksum` once the value has been fed to it in pieces."""
    return xxhash.xxh3_64(seed=xxhash.xxh3_64_intdigest(key))


def portable(provenance: Mapping[str, str]) -> dict[str, str]:
    """What of a provenance goes to others: all but where something lies on this machine."""
    return {name: value for name, value in provenance.items() if name not in _OF_THIS_MACHINE}


@dataclass(frozen=True)
class StoreMetadata:
    """One store's metadata.

    Args:
        config: The identity of the store.
        embedding_shape: Shape of every embedding; the first dimension is None if it may differ;
            None as a whole until the first embedding is stored.
        creation_time: ISO 8601, UTC.
        dataset_root: Folder that the first writer read its clips from, for people.
        provenance: Weights digest, model revision, library versions and the like.
        format_version: Version of the layout on disk.
    """

    config: CacheConfig
    embedding_shape: tuple[int | None, ...] | None = None
    creation_time: str = ""
    dataset_root: str = ""
    provenance: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def new(cls, config: CacheConfig, dataset_root: str = "") -> StoreMetadata:
        """Metadata of a store that is created now."""
        now = datetime.now(timezone.utc)
        return cls(config, None, now.isoformat(timespec="seconds"), dataset_root)

    @property
    def states_weights(self) -> bool:
        """Whether it is known which weights computed the embeddings."""
        return bool(self.provenance.get("weights_digest"))

    def check_config(self, config: CacheConfig | None, store: object) -> None:
        """Refuse a store that was written for another config; None takes any.

        Raises:
            IntegrityError: The two configs differ.
        """
        if config is not None and self.config != config:
            raise IntegrityError(
                f"{store} holds embeddings of another config "
                f"({config.differences(self.config)}, asked and stored): was the folder renamed "
                "by hand? Give it back its name"
            )

    def with_provenance(self, provenance: Mapping[str, str], store: object) -> StoreMetadata:
        """A copy that holds both provenances.

        Raises:
            ProvenanceMismatchError: The two name different weights or different features.
        """
        for name in _NOT_TO_BE_MIXED:
            here, there = self.provenance.get(name), provenance.get(name)
            if here and there and here != there:
                raise ProvenanceMismatchError(
                    f"{store} was filled with {name} {here!r}, this run has {there!r}: their "
                    "embeddings must not be mixed. Clear the store, or give the other model a "
                    "distinct `model_name`"
                )
        # What is known of the store's first embeddings stays.
        both = replace(self, provenance={**provenance, **self.provenance})
        theirs = StoreMetadata(self.config, provenance=provenance).quantization_error
        return both.with_quantization_error(theirs)

    @property
    def quantization_error(self) -> float | None:
        """Largest relative L2 distance of an embedding from what int8 keeps of it, if known."""
        try:
            error = float(self.provenance[_QUANTIZATION_ERROR])
        except (KeyError, ValueError):
            return None
        return error if 0 <= error < math.inf else None  # it may be foreign

    def with_quantization_error(self, error: float | None) -> StoreMetadata:
        """A copy that states this error, if it is larger than what is stated."""
        if error is None or error <= (self.quantization_error or 0.0):
            return self
        return replace(self, provenance={**self.provenance, _QUANTIZATION_ERROR: f"{error:.4g}"})

    def check_stated(self, provenance: Mapping[str, str], store: object) -> None:
        """Refuse embeddings of unstated weights where the store's own are known.

        Raises:
            ProvenanceMismatchError: The store has a weights digest, the provenance has none.
        """
        digest = self.provenance.get("weights_digest")
        if digest and not provenance.get("weights_digest"):
            raise ProvenanceMismatchError(
                f"{store} was filled with weights_digest {digest!r}, and these embeddings don't "
                "state which weights computed them. If they are the same, write with "
                f"provenance={{'weights_digest': {digest!r}}}; if they are others, give them a "
                "distinct `model_name`; to mix them knowingly, write with "
                "without_provenance=True"
            )

    def mixing(self, provenance: Mapping[str, str]) -> str | None:
        """Return a warning when embeddings of known weights join those of unknown ones.

        The rule of `with_provenance` can't distinguish them: one of the two digests is missing.
        """
        digest, origin = provenance.get("weights_digest"), self.provenance.get("imported_from")
        if digest is None or self.embedding_shape is None or self.states_weights:
            return None
        return (
            f"holds embeddings{f' imported from {origin}' if origin else ''} whose weights aren't "
            f"stated; from now on it counts as filled with {digest}. If other weights computed "
            "them, clear it, and write them under another model_name or front_end"
        )

    def pack(self) -> bytes:
        """The msgpack record.

        Raises:
            ConfigError: Too large to be read back.
        """
        record = {
            "format_version": self.format_version,
            **self.config.to_dict(),
            "embedding_shape": self.embedding_shape,
            "creation_time": self.creation_time,
            "dataset_root": self.dataset_root,
            "provenance": dict(self.provenance),
        }
        # Folder names and versions may hold bytes that aren't UTF-8: readable, not exact.
        packed: bytes = msgpack.packb(
            record, use_bin_type=True, unicode_errors="backslashreplace", default=str
        )
        if len(packed) > _MAX_RECORD_BYTES or len(self.provenance) > _LIMITS["max_map_len"]:
            raise ConfigError(
                f"provenance: {len(self.provenance)} entries, {len(packed)} bytes of metadata; "
                f"{_LIMITS['max_map_len']} entries and {_MAX_RECORD_BYTES} bytes are the limit"
            )
        return packed

    @classmethod
    def unpack(
        cls, record: bytes, store: object, expected_config: CacheConfig | None = None
    ) -> StoreMetadata:
        """Read a record that may be damaged or foreign.

        Args:
            record: What `pack` returned.
            store: For messages.
            expected_config: Taken as it is if the record holds its fields, instead of one that is
                made of these.

        Raises:
            FormatVersionError: Written in a version that this release doesn't know.
            IntegrityError: Not a metadata record.
        """
        values = _unpack_map(record, store)
        version = values.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{store} is in format version {version}; this lmdbcache reads up to "
                f"{FORMAT_VERSION}. Upgrade lmdbcache"
            )
        try:
            if version != FORMAT_VERSION:
                raise ConfigError(f"format_version: {version!r}")
            fields = {name: values[name] for name in _CONFIG_FIELDS}
            fields |= {name: values[name] for name in WINDOW_FIELDS if name in values}
            config = expected_config
            if config is None or config.to_dict() != fields:
                config = CacheConfig.from_dict(fields)
            return cls(
                config=config,
                embedding_shape=_shape(values["embedding_shape"], config.dtype),
                creation_time=str(values["creation_time"]),
                dataset_root=str(values["dataset_root"]),
                provenance={str(k): str(v) for k, v in values["provenance"].items()},
            )
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise IntegrityError(
                f"{store}: the metadata record lacks or garbles {error}. {_REMEDY}"
            ) from None


_REMEDY: Final = "Restore the store from a copy, or clear it and extract again"


def _unpack_map(record: bytes, store: object) -> dict[str, Any]:
    if len(record) > _MAX_RECORD_BYTES:
        raise IntegrityError(f"{store}: a metadata record of {len(record)} bytes. {_REMEDY}")
    try:
        values = msgpack.unpackb(record, **_LIMITS)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise IntegrityError(
            f"{store}: the metadata record can't be read ({error}). {_REMEDY}"
        ) from None
    if not isinstance(values, dict):
        raise IntegrityError(f"{store}: the metadata record isn't a map. {_REMEDY}")
    return values


def _shape(value: Any, dtype: str) -> tuple[int | None, ...] | None:
    if value is None:
        return None
    free_first = value[:1] == (None,)
    sizes = value[1:] if free_first else value
    has_rows = bool(sizes) or dtype != "int8"
    if not has_rows or not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(f"embedding_shape: {value!r}")
    return tuple(value)
