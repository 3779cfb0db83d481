"""The upload of a push: shard after shard, and a commit now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Final

import numpy.typing as npt

from lmdbcache.errors import IntegrityError, RemoteError, SampleNotFoundError
from lmdbcache.exchange.sharing.commits import COMMITS_NAME, new_commit
from lmdbcache.exchange.sharing.copies import CommitCopies
from lmdbcache.exchange.sharing.history import SharedChecksums
from lmdbcache.exchange.sharing.push_report import PushReport
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.exchange.sharing.shards import (
    MAX_SHARD_SAMPLES,
    SHARDS_NAME,
    ShardEntry,
    encode_shard,
    row_bytes,
)
from lmdbcache.storage import EmbeddingReader, portable

__all__ = ["Upload"]

# A push that is killed has no more than this to do again.
_SHARDS_PER_COMMIT: Final = 8
_SAMPLES_PER_COMMIT: Final = 100_000
_SECONDS_PER_COMMIT: Final = 60.0
_UPLOADS: Final = 3  # of one shard, if it isn't listed afterwards

Values = Sequence[npt.NDArray[Any]] | npt.NDArray[Any]


class Upload:
    """One push that has something to do.

    Args:
        reader: Of the store; compares each value with its checksum.
        remote: The place.
        copies: Where the commits are kept that are made.
        heads: The commits to build on.
        there: What is shared already.
        report: What is done is noted here.
        replace: Whether what is there for the same samples counts no more.
    """

    def __init__(
        self,
        reader: EmbeddingReader,
        remote: Remote,
        copies: CommitCopies,
        heads: tuple[str, ...],
        there: SharedChecksums,
        report: PushReport,
        *,
        replace: bool,
    ) -> None:
        self._reader, self._remote, self._copies = reader, remote, copies
        self._parents, self._there, self._report = heads, there, report
        self._replace = replace
        self._folder = report.fingerprint
        self._pending: list[ShardEntry] = []
        self._sizes: dict[str, int] = {}  # of the commits that were made
        self._since = time.monotonic()

    def run(
        self,
        missing: Mapping[str, bytes],
        listed: Mapping[str, int],
        shard_bytes: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Upload these, but for shards that are listed already, and commit them."""
        done = 0
        for ids, values, num_looked_at in self._pieces(list(missing), shard_bytes):
            done += num_looked_at
            if ids:
                self._pending.append(self._shard(ids, values, listed))
            del values  # before the next ones are read
            if self._is_time():
                self._commit()
            if progress is not None:
                progress(done, len(missing))
        self._commit()
        self._check_commits()

    def _pieces(
        self, sample_ids: Sequence[str], shard_bytes: int
    ) -> Iterator[tuple[list[str], Values, int]]:
        """(ids, values, how many samples were looked at) of one shard after the other."""
        shape = self._reader.embedding_shape or ()
        if None not in shape:
            step = max(1, shard_bytes // row_bytes(self._reader.config, shape))
            step = min(step, MAX_SHARD_SAMPLES)
            for first in range(0, len(sample_ids), step):
                some = list(sample_ids[first : first + step])
                yield *self._values(some), len(some)
            return
        ids: list[str] = []
        values: list[npt.NDArray[Any]] = []
        held = looked_at = 0
        for sample_id in sample_ids:
            sound, found = self._values([sample_id])
            size = sum(value.nbytes for value in found)
            if ids and (held + size > shard_bytes or len(ids) == MAX_SHARD_SAMPLES):
                yield ids, values, looked_at
                ids, values, held, looked_at = [], [], 0, 0
            ids += sound
            values += list(found)
            held, looked_at = held + size, looked_at + 1
        yield ids, values, looked_at

    def _values(self, ids: list[str]) -> tuple[list[str], Values]:
        """Those of these samples whose value is sound, and the values."""
        try:
            if None not in (self._reader.embedding_shape or ()):
                return ids, self._reader.get_batch(ids)
        except (IntegrityError, SampleNotFoundError):
            pass  # one by one, to know which
        sound, values = [], []
        for sample_id in ids:
            try:
                values.append(self._reader[sample_id])
                sound.append(sample_id)
            except (IntegrityError, SampleNotFoundError) as error:
                self._report.damaged[sample_id] = str(error)
        return sound, values

    def _shard(self, ids: list[str], values: Values, listed: Collection[str] = ()) -> ShardEntry:
        """Upload the shard of these samples, unless it is listed; `_check_shards` sees its size."""
        reader = self._reader
        entry, data = encode_shard(reader.config, reader.embedding_shape or (), ids, values)
        if entry.name not in listed:
            self._remote.write(f"{self._folder}/{entry.path}", data)
            self._report.num_bytes += len(data)
            self._report.num_uploaded += 1
        return entry

    def _check_shards(self) -> None:
        """Before a commit names them: a LIST shows what a server has lost or kept in part."""
        for number in range(_UPLOADS):
            listed = self._remote.list_files(f"{self._folder}/{SHARDS_NAME}")
            absent = [one for one in self._pending if listed.get(one.name) != one.num_bytes]
            if not absent:
                return
            if number + 1 < _UPLOADS:
                for entry in absent:
                    self._pending.remove(entry)
                    ids, values = self._values(list(entry.sample_ids))
                    if ids:
                        self._pending.append(self._shard(ids, values))
        raise RemoteError(
            f"{self._remote.place}/{self._folder}/{absent[0].path} isn't there, or not whole, "
            f"though it was uploaded {_UPLOADS} times. Is somebody removing files there?"
        )

    def _is_time(self) -> bool:
        num_samples = sum(len(entry.sample_ids) for entry in self._pending)
        return (
            len(self._pending) >= _SHARDS_PER_COMMIT
            or num_samples >= _SAMPLES_PER_COMMIT
            or (bool(self._pending) and time.monotonic() - self._since > _SECONDS_PER_COMMIT)
        )

    def _commit(self) -> None:
        if not self._pending:
            return
        self._check_shards()
        samples = [sample_id for entry in self._pending for sample_id in entry.sample_ids]
        commit, data = new_commit(
            self._reader.config,
            self._reader.embedding_shape or (),
            self._report.writer,
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
            parents=self._parents,
            provenance=portable(self._reader.metadata.provenance),
            shards=self._pending,
            replaced=self._replaced() if self._replace else {},
        )
        self._remote.write(f"{self._folder}/{commit.path}", data)
        self._copies.keep(commit.id, data)
        report = self._report
        report.commits.append(commit.id)
        self._sizes[commit.id] = len(data)
        report.num_bytes += len(data)
        report.num_shards += len(self._pending)
        report.num_pushed += len(samples)
        report.num_different += sum(1 for one in samples if self._there.of(one))
        self._parents, self._pending, self._since = (commit.id,), [], time.monotonic()

    def _replaced(self) -> dict[str, set[bytes]]:
        """What else there is of the pending samples."""
        pairs = {
            sample_id: self._there.of(sample_id) - {expected}
            for entry in self._pending
            for sample_id, expected in zip(entry.sample_ids, entry.checksums, strict=True)
        }
        return {sample_id: others for sample_id, others in pairs.items() if others}

    def _check_commits(self) -> None:
        listed = self._remote.list_files(f"{self._folder}/{COMMITS_NAME}")
        for commit_id, num_bytes in self._sizes.items():
            found = listed.get(f"{commit_id}.json")
            if found != num_bytes:
                state = "isn't there" if found is None else f"has {found} of {num_bytes} bytes"
                raise RemoteError(
                    f"{self._remote.place}/{self._folder}: commit {commit_id} {state}, though it "
                    "was written. Is somebody changing files there? Push again, and "
                    f"`lmdbcache verify {self._remote.place} --repair` if it stays so"
                )
