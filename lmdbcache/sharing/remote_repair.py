"""Repair of what is shared: the same bytes again if anybody here has them, else what is sound."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any, Final, NamedTuple

import numpy.typing as npt

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, IntegrityError, RemoteError, SampleNotFoundError
from lmdbcache.sharing.commits import Commit, commit_path, decode_commit, new_commit
from lmdbcache.sharing.history import Offer
from lmdbcache.sharing.inspecting import Inspection, download_shard
from lmdbcache.sharing.shards import (
    SHARDS_NAME,
    Shape,
    ShardEntry,
    decode_shard,
    encode_shard,
    entry_of,
    sound_rows,
)
from lmdbcache.storage.format.layout import sample_key
from lmdbcache.storage.format.metadata import checksum
from lmdbcache.storage.reader import EmbeddingReader

__all__ = ["Repair"]

_logger: Final = logging.getLogger(__name__)
_PUT_ASIDE: Final = "damaged"  # the folder of what was a commit file
_OLD_SECONDS: Final = 24 * 3600.0


class _Author(NamedTuple):
    """Whose embeddings a commit lists."""

    config: CacheConfig
    shape: Shape
    writer: str
    provenance: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, commit: Commit) -> _Author:
        provenance = tuple(sorted(commit.provenance.items()))
        return cls(commit.config, commit.embedding_shape, commit.writer, provenance)


class Repair:
    """The repair of what an inspection has found.

    Nothing that is sound is changed, and nothing is removed whose samples aren't somewhere else
    or lost: a damaged shard goes when a commit has taken it back.

    Args:
        inspection: After its `run`.
        cache: Where sound embeddings and copies of commits are looked for.
        writer: Name for the commits that have to be made.
    """

    def __init__(self, inspection: Inspection, cache: EmbeddingCache, writer: str) -> None:
        self._found, self._cache, self._writer = inspection, cache, writer
        self._remote, self._folder = inspection.remote, inspection.fingerprint
        self._report = inspection.report
        self._added: dict[_Author, list[ShardEntry]] = {}
        self._withdrawn: list[str] = []
        self._given_up: set[str] = set()

    def run(self) -> None:
        """Do it.

        Raises:
            RemoteError: The place can't be reached or refuses.
            CacheError: The local store can't be read.
        """
        lost = self._restore_commits()
        if lost:
            self._take_up_unlisted(lost)
        with contextlib.ExitStack() as stack:
            reader = self._reader(stack) if self._found.bad else None
            for digest in self._found.bad:
                self._mend(digest, self._found.offers[digest], reader)
        self._commit()
        for commit_id in lost:  # after what it listed is listed anew
            self._put_aside(commit_path(commit_id))
        self._report.lost = self._lost()
        for digest in self._found.bad_unlisted:
            self._remote.remove(f"{self._folder}/{SHARDS_NAME}/{digest}.safetensors")
            self._done(_shard_path(digest), "removed; no commit lists it")
        self._remove_leftovers()

    # ---- commits

    def _restore_commits(self) -> list[str]:
        """Put copies in the place of bad commit files.

        Returns:
            Ids of those that there is no copy of.
        """
        lost = []
        restored = False
        for commit_id in self._found.lost_commits():
            copy = self._found.copies.get(commit_id)
            if copy is None:
                lost.append(commit_id)
                continue
            with contextlib.suppress(IntegrityError):
                decode_commit(commit_id, copy, self._folder)
                self._remote.write(f"{self._folder}/{commit_path(commit_id)}", copy)
                self._done(commit_path(commit_id), "restored from a copy")
                restored = True
        if restored:
            self._look_again()
        return lost

    def _look_again(self) -> None:
        """After commits are back: what they list may be bad, too."""
        again = Inspection(self._remote, self._folder, self._found.copies)
        again.run()
        known = {found.path for found in self._report.findings}
        self._report.findings += [one for one in again.report.findings if one.path not in known]
        for name in ("num_commits", "num_shards", "num_samples", "num_unlisted"):
            setattr(self._report, name, getattr(again.report, name))
        self._found = again

    def _take_up_unlisted(self, lost: list[str]) -> None:
        """List anew the shards that only lost commits listed."""
        there = self._found.history.checksums()
        gone = {
            digest for commit in self._found.history.commits.values() for digest in commit.withdrawn
        }
        number = 0
        for digest in self._found.unlisted:
            size = self._found.listed[f"{digest}.safetensors"]
            data = download_shard(self._remote, self._folder, digest, size)
            try:
                content = decode_shard(data, _shard_path(digest))
            except IntegrityError:
                continue  # somebody else's
            entry = entry_of(content, digest, size)
            pairs = zip(entry.sample_ids, entry.checksums, strict=True)
            is_new = not all(one in there.of(name) for name, one in pairs)
            if content.config.fingerprint == self._folder and digest not in gone and is_new:
                author = _Author(content.config, content.embedding_shape, self._writer)
                self._added.setdefault(author, []).append(entry)
                number += 1
        for commit_id in lost:
            self._withdrawn.append(commit_id[-64:])
            if number:
                what = f"given up; what only it listed is listed anew, {number} of the shards"
                self._done(commit_path(commit_id), what)

    def _put_aside(self, path: str) -> None:
        name = path.rpartition("/")[2]
        size = self._remote.list_files(f"{self._folder}/{path.rpartition('/')[0]}").get(name)
        if size is None:
            return
        with contextlib.suppress(RemoteError):
            data = self._remote.read(f"{self._folder}/{path}", size)
            self._remote.write(f"{self._folder}/{_PUT_ASIDE}/{name}", data)
        self._remote.remove(f"{self._folder}/{path}")

    # ---- shards

    def _reader(self, stack: contextlib.ExitStack) -> EmbeddingReader | None:
        config = self._found.history.config
        try:
            if config is None or config not in self._cache:
                return None
            reader = self._cache.reader(config, verify="always", counts_as_use=False)
            stack.enter_context(reader)
            reader.pinned()
        except CacheError as error:
            _logger.warning("the store here is no help: %s", error)
            return None
        return reader

    def _mend(self, digest: str, offer: Offer, reader: EmbeddingReader | None) -> None:
        commit, entry, rows = offer
        values = self._values_left(digest, offer)
        wanted = [
            (one, expected)
            for one, expected in zip(entry.sample_ids, entry.checksums, strict=True)
            if one not in values
        ]
        values.update(_local_values(reader, wanted))
        ids = [one for one in entry.sample_ids if one in values]
        if ids:
            arrays = [values[one] for one in ids]
            again, data = encode_shard(commit.config, commit.embedding_shape, ids, arrays)
            self._remote.write(f"{self._folder}/{again.path}", data)
            if again.sha256 == digest:
                self._done(entry.path, f"made again, {len(ids)} embeddings")
                return
            self._added.setdefault(_Author.of(commit), []).append(again)
        self._given_up |= {entry.sample_ids[row] for row in rows} - values.keys()
        self._withdrawn.append(digest)
        self._done(entry.path, f"given up; {len(ids)} of {len(entry.sample_ids)} embeddings kept")

    def _values_left(self, digest: str, offer: Offer) -> dict[str, npt.NDArray[Any]]:
        """What is sound of a damaged file."""
        size = self._found.listed.get(offer.entry.name)
        if size is None:
            return {}
        try:
            data = download_shard(self._remote, self._folder, digest, size)
        except IntegrityError:  # too large; what can't be read is no reason to give it up
            return {}
        return sound_rows(data, offer.entry, offer.commit.config, offer.commit.embedding_shape)

    def _commit(self) -> None:
        """A commit for each writer whose embeddings are listed anew; the last one takes back."""
        history = self._found.history
        known = next(iter(history.commits.values()), None)
        if self._withdrawn and not self._added and known is not None:
            self._added[_Author.of(known)._replace(writer=self._writer)] = []
        parents = history.heads
        for number, (author, entries) in enumerate(self._added.items(), 1):
            commit, data = new_commit(
                author.config,
                author.shape,
                author.writer,
                datetime.now(timezone.utc).isoformat(timespec="seconds"),
                parents=parents,
                provenance=dict(author.provenance),
                shards=entries,
                withdrawn=self._withdrawn if number == len(self._added) else (),
            )
            self._remote.write(f"{self._folder}/{commit.path}", data)
            self._found.copies.keep(commit.id, data)
            self._report.commits.append(commit.id)
            parents = (commit.id,)
        for digest in self._withdrawn:
            if digest in self._found.offers:
                self._remote.remove(f"{self._folder}/{_shard_path(digest)}")

    def _lost(self) -> list[str]:
        """What is given up and isn't shared by another shard."""
        bad = set(self._found.bad)
        entries = [entry for entries in self._added.values() for entry in entries]
        kept = {sample_id for entry in entries for sample_id in entry.sample_ids}
        for digest, offer in self._found.offers.items():
            if digest not in bad:
                kept |= {offer.entry.sample_ids[row] for row in offer.rows}
        return sorted(self._given_up - kept)

    # ---- the rest

    def _remove_leftovers(self) -> None:
        folders = {path.rpartition("/")[0] for path in self._report.leftovers}
        for folder in sorted(folders):
            for name, age in self._remote.leftovers(f"{self._folder}/{folder}").items():
                if age is not None and age > _OLD_SECONDS:
                    self._remote.remove(f"{self._folder}/{folder}/{name}")
                    self._report.leftovers.remove(f"{folder}/{name}")

    def _done(self, path: str, what: str) -> None:
        self._report.repaired[path] = what


def _local_values(
    reader: EmbeddingReader | None, wanted: Iterable[tuple[str, bytes]]
) -> dict[str, npt.NDArray[Any]]:
    """Those of these samples that the local store has with this checksum."""
    found: dict[str, npt.NDArray[Any]] = {}
    if reader is None:
        return found
    for sample_id, expected in wanted:
        with contextlib.suppress(SampleNotFoundError, CacheError):
            value = reader[sample_id]
            if checksum(sample_key(sample_id), value.tobytes()) == expected:
                found[sample_id] = value
    return found


def _shard_path(digest: str) -> str:
    return f"{SHARDS_NAME}/{digest}.safetensors"
