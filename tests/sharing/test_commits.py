"""Commit files: what is written is read, and what a stranger wrote is looked at closely."""

from __future__ import annotations

import hashlib
import json

import pytest
from sharing.shared_samples import ragged_embeddings, shard_of, some_embeddings

from lmdbcache.errors import ConfigError, FormatVersionError, IntegrityError
from lmdbcache.exchange.sharing.commits import (
    COMMIT_NAME,
    commit_bytes,
    decode_commit,
    new_commit,
    writer_slug,
)

NOW = "2026-01-01T00:00:00+00:00"


def test_a_commit_comes_back_as_it_was(config):
    """All of its fields, ragged lengths included, survive the file."""
    entry, _ = shard_of(config, ragged_embeddings(4), (None, 4))
    commit, data = new_commit(
        config,
        (None, 4),
        "Jürgen's büro",
        NOW,
        parents=["node-b-" + "0" * 64],
        provenance={"weights_digest": "abc"},
        shards=[entry],
        withdrawn=["1" * 64],
        replaced={"a:dog": [b"12345678"]},
    )
    assert decode_commit(commit.id, data, config.fingerprint) == commit
    assert commit_bytes(commit) == data
    assert commit.writer == "Jürgen's büro"
    assert commit.shards == (entry,)
    assert COMMIT_NAME.fullmatch(f"{commit.id}.json")


@pytest.mark.parametrize(
    "writer",
    ["../../etc/passwd", ".hidden", "a/b\\c", "-", "節点", "x" * 255, "a b", "%2e%2e", "CON"],
)
def test_any_name_of_a_writer_makes_a_plain_file_name(config, writer):
    """A writer's name never leads out of the folder."""
    commit, _ = new_commit(config, (8,), writer, NOW)
    assert COMMIT_NAME.fullmatch(f"{commit.id}.json")
    assert commit.writer == writer
    assert "/" not in writer_slug(writer)
    assert not writer_slug(writer).startswith((".", "-"))


@pytest.mark.parametrize("writer", ["", "  ", "a\nb", "x" * 256, "\x00", "\ud800"])
def test_a_name_that_is_none_is_refused(config, writer):
    """A writer needs a printable name."""
    with pytest.raises(ConfigError, match="writer"):
        new_commit(config, (8,), writer, NOW)


def record_of(config, changes):
    entry, _ = shard_of(config, some_embeddings(0, 3))
    _, data = new_commit(config, (8,), "node", NOW, shards=[entry])
    return {**json.loads(data), **changes}


def decoded(config, record):
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    return decode_commit(f"node-{hashlib.sha256(data).hexdigest()}", data, config.fingerprint)


SHARD = {
    "sha256": "0" * 64,
    "num_bytes": 100,
    "samples": [["a:dog", "0" * 16], ["b:dog", "0" * 16]],
}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": True},
        {"format": "1"},
        {"format": 0},
        {"fingerprint": "0" * 16},
        {"config": {"sample_rate": 8000}},
        {"config": []},
        {"config": {"evil": 1}},
        {"embedding_shape": [10**400]},
        {"embedding_shape": ["8"]},
        {"embedding_shape": 8},
        {"writer": 7},
        {"writer": "x" * 5000},
        {"created": None},
        {"parents": ["../../commits/x"]},
        {"parents": "abc"},
        {"parents": [7]},
        {"provenance": []},
        {"provenance": {"a": 1}},
        {"shards": {}},
        {"shards": [7]},
        {"shards": [{**SHARD, "sha256": "../../../etc/passwd"}]},
        {"shards": [{**SHARD, "sha256": "A" * 64}]},
        {"shards": [{**SHARD, "num_bytes": -1}]},
        {"shards": [{**SHARD, "num_bytes": 10**30}]},
        {"shards": [{**SHARD, "num_bytes": True}]},
        {"shards": [{**SHARD, "num_bytes": 1.5}]},
        {"shards": [{**SHARD, "samples": []}]},
        {"shards": [{**SHARD, "samples": SHARD["samples"][::-1]}]},
        {"shards": [{**SHARD, "samples": SHARD["samples"][:1] * 2}]},
        {"shards": [{**SHARD, "samples": [["no colon", "0" * 16]]}]},
        {"shards": [{**SHARD, "samples": [["a:Dog", "0" * 16]]}]},
        {"shards": [{**SHARD, "samples": [["a:dog", "0" * 15]]}]},
        {"shards": [{**SHARD, "samples": [["a:dog"]]}]},
        {"shards": [{**SHARD, "samples": [["x" * 600 + ":dog", "0" * 16]]}]},
        {"shards": [{**SHARD, "lengths": [1, 1]}]},
        {"embedding_shape": [None, 4], "shards": [SHARD]},
        {"embedding_shape": [None, 4], "shards": [{**SHARD, "lengths": [1, 1, 1]}]},
        {"embedding_shape": [None, 4], "shards": [{**SHARD, "lengths": [1, 0]}]},
        {"withdrawn": ["x"]},
        {"replaced": [["a:dog", ["zz"]]]},
        {"replaced": {"a": 1}},
    ],
)
def test_a_commit_that_lies_is_refused(config, changes):
    """Whatever a stranger wrote, under its right digest, is an error of ours."""
    record = record_of(config, changes)
    if changes.get("config") == {"sample_rate": 8000}:
        record["fingerprint"] = config.replace(sample_rate=8000).fingerprint
    with pytest.raises(IntegrityError):
        decoded(config, record)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"7",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format":' + b"9" * 5000 + b"}",
        b'{"format":NaN}',
    ],
)
def test_what_is_no_json_of_a_commit_is_refused(config, data):
    """Broken JSON, too deep, too large numbers: one error of ours."""
    with pytest.raises(IntegrityError):
        decoded(config, data)


def test_a_changed_byte_shows(config):
    """The digest in the name is that of the bytes."""
    commit, data = new_commit(config, (8,), "node", NOW)
    with pytest.raises(IntegrityError, match="digest"):
        decode_commit(commit.id, data.replace(b"2026", b"2027"), config.fingerprint)


def test_a_newer_format_is_named(config):
    """A commit of a later release asks for an upgrade."""
    with pytest.raises(FormatVersionError, match="Upgrade"):
        decoded(config, record_of(config, {"format": 2}))


def test_unknown_fields_are_left_alone(config):
    """A later release may add some."""
    assert decoded(config, record_of(config, {"comment": "hello"})).writer == "node"
