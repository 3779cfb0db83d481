"""Units that a node has embedded and that wait for the one process that stores them.

They lie as files at a place that every node reaches. A file is a line of JSON and then the
embeddings as a shard of `lmdbcache.exchange.sharing`; it appears whole or not at all, and its
name is the
digest of its bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy.typing as npt

from lmdbcache.cache import Source
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, IntegrityError
from lmdbcache.exchange import Remote, decode_shard, encode_shard, is_url
from lmdbcache.files import expand_user
from lmdbcache.machine import is_alive

__all__ = ["StagedUnit", "StagingPlace"]

_FORMAT: Final = 1
_NAME: Final = re.compile(r"[0-9a-f]{64}\.unit")
_MARK: Final = re.compile(r"run-(\d+)-([0-9a-f]+)-(.+)")  # process id, run, host


@dataclass(frozen=True)
class StagedUnit:
    """One unit's embeddings and what is known of them.

    Args:
        sample_ids: What was embedded.
        embeddings: `(len(sample_ids), *embedding_shape)` in the stored dtype.
        sources: What the files were like right before they were decoded.
        silent: The sample ids of digital silence.
        provenance: Of the model and its features.
        cancelled: The sample ids of clips whose channels cancel when they are mixed.
    """

    sample_ids: tuple[str, ...]
    embeddings: npt.NDArray[Any]
    sources: dict[str, Source | None] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)
    cancelled: tuple[str, ...] = ()


class StagingPlace:
    """Where units of one store wait. Picklable.

    Args:
        place: A folder that every node has at this path, or a URL.
        config: Identity of the store.

    Raises:
        ConfigError: Not a URL that fsspec knows.
        MissingDependencyError: A package is needed for it.
    """

    def __init__(self, place: str | os.PathLike[str], config: CacheConfig) -> None:
        text = os.fspath(place)
        if not is_url(text):
            text = f"file://{expand_user(text).absolute()}"
        self._remote = Remote(text)
        self._config = config
        self._folder = f"{config.fingerprint}/units"

    def __str__(self) -> str:
        return self._remote.url

    @contextlib.contextmanager
    def marked(self, run: str) -> Iterator[None]:
        """Leave a mark by which nodes tell that this is their place, too.

        Raises:
            RemoteError: The place can't be written.
        """
        self._remove_stale_marks()
        mark = f"{self._folder}/run-{os.getpid()}-{run}-{socket.gethostname()}"
        self._remote.write(mark, run.encode())
        try:
            yield
        finally:
            with contextlib.suppress(CacheError):
                self._remote.remove(mark)

    def _remove_stale_marks(self) -> None:
        """Those of runs on this machine that were killed."""
        for name in self._remote.list_files(self._folder):
            found = _MARK.fullmatch(name)
            if found and found[3] == socket.gethostname() and not is_alive(int(found[1])):
                self._remote.remove(f"{self._folder}/{name}")

    def has_mark(self, run: str) -> bool:
        """Whether the process that stores has left its mark here.

        Raises:
            RemoteError: The place can't be reached.
        """
        marks = map(_MARK.fullmatch, self._remote.list_files(self._folder))
        return any(mark is not None and mark[2] == run for mark in marks)

    def names(self) -> dict[str, int]:
        """Name → bytes of the units that wait.

        Raises:
            RemoteError: The place can't be reached.
        """
        listed = self._remote.list_files(self._folder)
        return {name: size for name, size in sorted(listed.items()) if _NAME.fullmatch(name)}

    def put(self, unit: StagedUnit) -> tuple[str, int]:
        """Put a unit there.

        Returns:
            Its name and bytes.

        Raises:
            RemoteError, CacheFullError: It can't be written.
        """
        _, shard = encode_shard(
            self._config, unit.embeddings.shape[1:], unit.sample_ids, unit.embeddings
        )
        record = {
            "format": _FORMAT,
            "provenance": unit.provenance,
            "silent": list(unit.silent),
            "cancelled": list(unit.cancelled),
            "sources": {name: _record(source) for name, source in unit.sources.items()},
        }
        data = json.dumps(record).encode("ascii") + b"\n" + shard
        name = f"{hashlib.sha256(data).hexdigest()}.unit"
        self._remote.write(f"{self._folder}/{name}", data)
        return name, len(data)

    def get(self, name: str, num_bytes: int) -> StagedUnit:
        """Read a unit.

        Raises:
            RemoteError: It isn't there, or can't be read.
            IntegrityError: It is damaged, or of another store.
        """
        data = self._remote.read(f"{self._folder}/{name}", num_bytes)
        if hashlib.sha256(data).hexdigest() != name.partition(".")[0]:
            raise IntegrityError(f"{self}/{self._folder}/{name} is damaged")
        line, _, shard = data.partition(b"\n")
        try:
            record = json.loads(line)
            if record["format"] != _FORMAT:
                raise ValueError(f"format {record['format']}")
            sources = {name: _source(one) for name, one in record["sources"].items()}
            provenance = {str(key): str(value) for key, value in record["provenance"].items()}
            silent = tuple(map(str, record["silent"]))
            cancelled = tuple(map(str, record.get("cancelled", ())))  # absent in older units
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{self}/{self._folder}/{name} isn't a unit ({error})") from None
        content = decode_shard(shard, name)
        if content.config != self._config:
            raise IntegrityError(f"{self}/{self._folder}/{name} is of another store")
        embeddings: Any = content.embeddings
        return StagedUnit(content.sample_ids, embeddings, sources, silent, provenance, cancelled)

    def remove(self, name: str) -> None:
        """Remove a unit; none there is fine.

        Raises:
            RemoteError: It can't be removed.
        """
        self._remote.remove(f"{self._folder}/{name}")


def _record(source: Source | None) -> list[Any] | None:
    if source is None:
        return None
    digest = None if source.digest is None else source.digest.hex()
    return [source.path, source.size, source.mtime_ns, digest, source.root]


def _source(record: list[Any] | None) -> Source | None:
    if record is None:
        return None
    path, size, mtime_ns, digest, root = record
    known = None if digest is None else bytes.fromhex(digest)
    return Source(str(path), int(size), mtime_ns, known, str(root))
