"""Push: what the place lacks of a store, as shards and commits."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError
from lmdbcache.exchange.sharing.choosing import Choice, choose
from lmdbcache.exchange.sharing.commits import checked_writer
from lmdbcache.exchange.sharing.copies import CommitCopies
from lmdbcache.exchange.sharing.history import History, Offer, SharedChecksums, read_history
from lmdbcache.exchange.sharing.push_report import PushReport
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.exchange.sharing.shards import SHARD_BYTES, SHARDS_NAME
from lmdbcache.exchange.sharing.uploading import Upload
from lmdbcache.storage import EmbeddingReader, StoreMetadata

__all__ = ["PushReport", "default_writer", "push"]


def push(
    cache: EmbeddingCache,
    config: CacheConfig,
    url: str,
    *,
    writer: str | None = None,
    own: bool = False,
    classes: Iterable[str] | None = None,
    sample_ids: Iterable[str] | None = None,
    replace: bool = False,
    dry_run: bool = False,
    shard_bytes: int = SHARD_BYTES,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PushReport:
    """Share a store's embeddings through a folder or bucket: upload what it lacks.

    Nothing that is there is changed. A push that is interrupted goes on where it was when it is
    started again; several may run at once. Each value is compared with its checksum before it
    leaves this machine.

    Embeddings can tell much about the audio they were computed from: push what may be shared.

    Args:
        cache: The cache.
        config: Identity of the store.
        url: Such as `s3://bucket/folder`, `file:///mnt/shared`, `ssh://host/folder`.
        writer: Name that the commits carry; default: this host's.
        own: Only what was computed or imported in this store, not what was pulled or merged.
        classes: Only these classes.
        sample_ids: Only these samples.
        replace: Where a sample is there with another value, this one counts from now on. Otherwise
            both do, and who pulls is told of a conflict.
        dry_run: Only tell how much would be pushed.
        shard_bytes: Bytes of values in one shard.
        storage_options: For fsspec; default: its configuration and the environment.
        progress: Called with the number of samples looked at and of those to be pushed.

    Raises:
        CacheNotFoundError: Nothing is stored for this config.
        SampleNotFoundError: A sample isn't stored.
        ConfigError: Not a URL, no such class, no name for a writer, or the place holds embeddings
            of another shape.
        ProvenanceMismatchError: The place holds embeddings of other weights.
        IntegrityError: The store is damaged. A single damaged value is reported instead.
        RemoteError: The place can't be reached or refuses.
        MissingDependencyError: A package is needed for this kind of URL.
    """
    remote = Remote(url, storage_options)
    name = default_writer() if writer is None else checked_writer(writer)
    report = PushReport(remote.place, config.fingerprint, name)
    report.dry_run = dry_run
    with cache.reader(config, verify="always", track_usage=False) as reader:
        choice = choose(reader, own=own, classes=classes, sample_ids=sample_ids)
        copies = CommitCopies(cache.path(config), remote.url)
        history = read_history(remote, config.fingerprint, copies)
        _check_same_kind(reader, history, remote)
        report.heads, report.problems = history.heads, history.problems
        listed = remote.list_files(f"{config.fingerprint}/{SHARDS_NAME}")
        there = SharedChecksums(_whole(history, listed, report))
        missing = _compare(choice, there, report, replace=replace)
        if missing and not dry_run:
            upload = Upload(reader, remote, copies, history.heads, there, report, replace=replace)
            upload.run(missing, listed, shard_bytes, progress)
    return report


def default_writer() -> str:
    """This host's name."""
    name = platform.node()[:255].strip()
    return name if name.isprintable() and name else "writer"


def _check_same_kind(reader: EmbeddingReader, history: History, remote: Remote) -> None:
    """Refuse to mix embeddings of other weights, or of another shape, with what is there."""
    shape, provenance = reader.embedding_shape, reader.metadata.provenance
    for commit in history.commits.values():
        place = f"{remote.place}/{history.fingerprint}"
        StoreMetadata(commit.config, provenance=commit.provenance).with_provenance(
            provenance, place
        )
        if commit.shards and shape is not None and commit.embedding_shape != shape:
            raise ConfigError(
                f"{place} holds embeddings of shape {commit.embedding_shape} (commit {commit.id}), "
                f"the store of shape {shape}: another output or length needs a config of its own"
            )


def _whole(history: History, listed: Mapping[str, int], report: PushReport) -> Iterator[Offer]:
    """The shards that are there in their whole size; what others held is pushed again."""
    for offer in history.offers():
        size = listed.get(offer.entry.name)
        if size == offer.entry.num_bytes:
            yield offer
        else:
            found = "isn't there" if size is None else f"has {size} bytes"
            why = f"{found}, and commit {offer.commit.id} lists {offer.entry.num_bytes}"
            report.problems[offer.entry.path] = why


def _compare(
    choice: Choice, there: SharedChecksums, report: PushReport, *, replace: bool
) -> dict[str, bytes]:
    """What of the choice the place lacks, in order."""
    missing: dict[str, bytes] = {}
    num_different = 0
    for sample_id, expected in choice.checksums.items():
        found = there.of(sample_id)
        # With `replace`, a value of somebody else beside ours is to go, too.
        if expected not in found or (replace and len(found) > 1):
            missing[sample_id] = expected
            num_different += bool(found)
    report.damaged.update(choice.unusable)
    report.num_chosen = len(choice.checksums) + len(choice.unusable)
    report.num_there = len(choice.checksums) - len(missing)
    if report.dry_run:
        report.num_pushed, report.num_different = len(missing), num_different
    return missing
