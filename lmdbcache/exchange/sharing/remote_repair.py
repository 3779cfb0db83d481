"""Repair of what is shared: the same bytes again if anybody here has them, else what is sound."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, Final, NamedTuple

import numpy.typing as npt

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    ConfigError,
    IntegrityError,
    RemoteError,
    SampleNotFoundError,
)
from lmdbcache.exchange.sharing.commits import Commit, commit_path, decode_commit, new_commit
from lmdbcache.exchange.sharing.history import Offer, SharedChecksums, read_history
from lmdbcache.exchange.sharing.inspecting import MOST_IN_MEMORY, Inspection, download_shard
from lmdbcache.exchange.sharing.shards import (
    SHARDS_NAME,
    Shape,
    ShardEntry,
    decode_shard,
    encode_shard,
    entry_of,
    rows_by_header,
    sound_rows,
)
from lmdbcache.storage import EmbeddingReader, checksum, sample_key

__all__ = ["Repair"]

_logger: Final = logging.getLogger(__name__)
_PUT_ASIDE: Final = "damaged"  # the folder of what can't be made again
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

    Nothing that is sound is changed, and nothing is thrown away: what can't be made again is put
    aside in a folder of its own, when a commit has taken it back.

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
        self._given_up: set[tuple[str, bytes]] = set()  # sample id and checksum
        self._unnamed: set[str] = set()  # samples of shards that no commit lists

    def run(self) -> None:
        """Do it.

        Raises:
            RemoteError: The place can't be reached or refuses.
            CacheError: The local store can't be read.
        """
        lost = self._restore_commits()
        with contextlib.ExitStack() as stack:
            is_asked = self._found.bad or self._found.bad_unlisted
            reader = self._reader(stack) if is_asked else None
            for digest in self._found.bad_unlisted:
                self._make_again_unlisted(digest, reader)
            if lost:
                self._take_up_unlisted(lost)
            for digest in self._found.bad:
                self._mend(digest, self._found.offers[digest], reader)
        self._commit()
        for commit_id in lost:  # after what it listed is listed anew
            self._put_aside(commit_path(commit_id))
        self._report.lost = self._lost()
        if self._report.repaired:
            self._count()
        self._remove_leftovers()

    # ---- commits

    def _restore_commits(self) -> list[str]:
        """Put copies in the place of bad commit files.

        Returns:
            Ids of those that there is no copy of.
        """
        lost: list[str] = []
        while ids := [one for one in self._found.lost_commits() if one not in lost]:
            restored = [one for one in ids if self._restore(one)]
            lost += [one for one in ids if one not in restored]
            if restored:  # they may name parents that aren't there either
                self._look_again()
        return lost

    def _restore(self, commit_id: str) -> bool:
        copy = self._found.copies.find(commit_id)
        try:
            if copy is None:
                return False
            decode_commit(commit_id, copy, self._folder)
        except IntegrityError:
            return False
        self._remote.write(f"{self._folder}/{commit_path(commit_id)}", copy)
        self._found.copies.keep(commit_id, copy)
        self._done(commit_path(commit_id), "restored from a copy")
        return True

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
        # One place holds embeddings of one model, so what is known of some holds for all.
        known = next(iter(self._found.history.commits.values()), None)
        provenance = () if known is None else _Author.of(known).provenance
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
                author = _Author(content.config, content.embedding_shape, self._writer, provenance)
                self._added.setdefault(author, []).append(entry)
                number += 1
        for commit_id in lost:
            self._withdrawn.append(commit_id[-64:])
            what = f"given up; shards that only it listed are listed anew, {number} of them"
            self._done(commit_path(commit_id), what, is_given_up=True)

    def _put_aside(self, path: str) -> str:
        """Move a damaged file to a folder of its own, and say so.

        A file that can't be read or written there stays where it is.
        """
        folder, _, name = path.rpartition("/")
        size = self._remote.list_files(f"{self._folder}/{folder}").get(name)
        if size is None:
            return "isn't there"
        if size > MOST_IN_MEMORY:
            return f"left there, {size} bytes are too many to put aside"
        received = io.BytesIO()
        try:
            self._remote.fetch(f"{self._folder}/{path}", received, size)
            aside = self._place_aside(name, received.getvalue())
        except RemoteError as error:
            return f"left there, it can't be put aside: {error}"
        self._remote.remove(f"{self._folder}/{path}")
        return f"put aside as {aside}"

    def _place_aside(self, name: str, data: bytes) -> str:
        """Write what is put aside; never over what another repair has."""
        if name in self._remote.list_files(f"{self._folder}/{_PUT_ASIDE}"):
            stem, dot, ending = name.rpartition(".")
            name = f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}{dot}{ending}"
        self._remote.write(f"{self._folder}/{_PUT_ASIDE}/{name}", data)
        return f"{_PUT_ASIDE}/{name}"

    # ---- shards

    def _reader(self, stack: contextlib.ExitStack) -> EmbeddingReader | None:
        try:
            config = self._found.history.config or self._config_here()
            if config is None or config not in self._cache:
                return None
            reader = self._cache.reader(config, verify="always", track_usage=False)
            stack.enter_context(reader)
            reader.pinned()
        except CacheError as error:
            _logger.warning("the store here is no help: %s", error)
            return None
        return reader

    def _config_here(self) -> CacheConfig | None:
        """Of the store here, where no commit is left that tells it."""
        return next((one for one in self._cache if one.fingerprint == self._folder), None)

    def _make_again_unlisted(self, digest: str, reader: EmbeddingReader | None) -> None:
        """A damaged shard that no commit lists: its header may tell what to make it of.

        Its name is the digest, so what comes out is either the very file or not taken.
        """
        path = _shard_path(digest)
        rows: dict[str, npt.NDArray[Any] | None] = {}
        local: dict[str, npt.NDArray[Any]] = {}
        shape = None if reader is None else reader.embedding_shape
        if reader is not None and shape is not None:
            with contextlib.suppress(IntegrityError):
                size = self._found.listed[f"{digest}.safetensors"]
                data = download_shard(self._remote, self._folder, digest, size)
                rows = rows_by_header(data, path, reader.config, shape)
                local = _local_values(reader, [(one, None) for one in rows])
                if self._is_made_again(digest, {**rows, **local}, reader.config, shape):
                    self._found.unlisted.append(digest)
                    self._done(path, f"made again, {len(rows)} embeddings")
                    return
        shared = self._found.history.checksums()
        self._unnamed |= {one for one in rows if one not in local and not shared.of(one)}
        holds = "no commit lists it, and its header can't be read here"
        if rows:
            holds = f"no commit lists it; of its {len(rows)} samples {len(local)} are stored here"
        self._done(path, f"given up, {self._put_aside(path)}; {holds}", is_given_up=True)

    def _is_made_again(
        self,
        digest: str,
        values: Mapping[str, npt.NDArray[Any] | None],
        config: CacheConfig,
        shape: Shape,
    ) -> bool:
        found = {one: value for one, value in values.items() if value is not None}
        if len(found) < len(values):
            return False
        try:
            entry, data = encode_shard(config, shape, list(found), list(found.values()))
        except ConfigError:  # lengths or shapes that were damaged
            return False
        if entry.sha256 != digest:
            return False
        self._remote.write(f"{self._folder}/{entry.path}", data)
        self._found.listed[entry.name] = entry.num_bytes
        return True

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
        pairs = [(entry.sample_ids[row], entry.checksums[row]) for row in rows]
        self._given_up |= {pair for pair in pairs if pair[0] not in values}
        self._withdrawn.append(digest)
        self._done(entry.path, f"taken back; {len(ids)} of {len(entry.sample_ids)} embeddings kept")

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
                self._report.repaired[_shard_path(digest)] += (
                    f", the file {self._put_aside(_shard_path(digest))}"
                )

    def _lost(self) -> list[str]:
        """What is given up and isn't shared, with this value, by another shard."""
        bad = set(self._found.bad) & set(self._withdrawn)
        offers = [one for digest, one in self._found.offers.items() if digest not in bad]
        entries = [(one.entry, one.rows) for one in offers]
        for added in self._added.values():
            entries += [(entry, range(len(entry.sample_ids))) for entry in added]
        kept = {(one.sample_ids[row], one.checksums[row]) for one, rows in entries for row in rows}
        named = {sample_id for sample_id, _ in self._given_up - kept}
        return sorted(named | (self._unnamed - {sample_id for sample_id, _ in kept}))

    def _count(self) -> None:
        """How much is shared now; what is there was looked at, or written by this repair."""
        history = read_history(self._remote, self._folder)
        sizes = self._remote.list_files(f"{self._folder}/{SHARDS_NAME}")
        whole = [
            one for one in history.offers() if sizes.get(one.entry.name) == one.entry.num_bytes
        ]
        self._report.num_commits = len(history.commits)
        self._report.num_samples = len(SharedChecksums(whole))
        self._report.num_shards = len(whole)
        listed = {one.entry.sha256 for one in whole}
        self._report.num_unlisted = len(set(self._found.unlisted) - listed)
        self._report.num_bytes = sum(one.entry.num_bytes for one in whole)

    # ---- the rest

    def _remove_leftovers(self) -> None:
        folders = {path.rpartition("/")[0] for path in self._report.leftovers}
        for folder in sorted(folders):
            for name, age in self._remote.leftovers(f"{self._folder}/{folder}").items():
                if age is not None and age > _OLD_SECONDS:
                    self._remote.remove(f"{self._folder}/{folder}/{name}")
                    self._report.leftovers.remove(f"{folder}/{name}")

    def _done(self, path: str, what: str, *, is_given_up: bool = False) -> None:
        self._report.repaired[path] = what
        if is_given_up:
            self._report.given_up.append(path)


def _local_values(
    reader: EmbeddingReader | None, wanted: Iterable[tuple[str, bytes | None]]
) -> dict[str, npt.NDArray[Any]]:
    """Those of these samples that the local store has with this checksum; None takes any."""
    found: dict[str, npt.NDArray[Any]] = {}
    if reader is None:
        return found
    for sample_id, expected in wanted:
        with contextlib.suppress(SampleNotFoundError, CacheError):
            value = reader[sample_id]
            if expected in (None, checksum(sample_key(sample_id), value.tobytes())):
                found[sample_id] = value
    return found


def _shard_path(digest: str) -> str:
    return f"{SHARDS_NAME}/{digest}.safetensors"
