"""Shards: the same bytes for the same samples, and nothing but whole shards is read."""

from __future__ import annotations

import contextlib
import hashlib
import json

import numpy as np
import pytest
from safetensors import safe_open
from sharing.shared_samples import ragged_embeddings, shard_of, some_embeddings

from lmdbcache import CacheConfig
from lmdbcache.errors import ConfigError, FormatVersionError, IntegrityError
from lmdbcache.exchange.sharing.shards import (
    decode_header,
    decode_lengths,
    encode_shard,
    lengths_file,
)
from lmdbcache.storage import checksum, sample_key


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_shard_comes_back_bit_for_bit(dtype):
    """What is decoded has the bytes, dtype and order of what was encoded."""
    config = CacheConfig(dtype=dtype)
    embeddings = some_embeddings(0, 9, dtype=dtype, shape=(3, 5))
    entry, data = shard_of(config, embeddings)
    header = decode_header(data[: entry.header_bytes], "shard")
    assert header.config == config
    assert header.sample_ids == tuple(sorted(embeddings))
    assert (entry.num_samples, entry.first, entry.num_bytes) == (9, min(embeddings), len(data))
    rows = zip(header.sample_ids, header.checksums, header.values(data), strict=True)
    for sample_id, found, value in rows:
        assert value.dtype == embeddings[sample_id].dtype
        assert value.tobytes() == embeddings[sample_id].tobytes()
        assert found == checksum(sample_key(sample_id), value.tobytes())


def test_a_ragged_shard_comes_back_bit_for_bit(config):
    """Embeddings of different lengths lie one after the other."""
    embeddings = ragged_embeddings(11)
    entry, data = shard_of(config, embeddings, (None, 4))
    header = decode_header(data[: entry.header_bytes], "shard")
    assert header.lengths == tuple(len(embeddings[one]) for one in header.sample_ids)
    for sample_id, value in zip(header.sample_ids, header.values(data), strict=True):
        np.testing.assert_array_equal(value, embeddings[sample_id])


def test_the_order_in_which_samples_are_given_does_not_matter(config):
    """The same samples have one shard, and one name."""
    embeddings = some_embeddings(0, 7)
    backwards = dict(reversed(embeddings.items()))
    assert shard_of(config, embeddings)[1] == shard_of(config, backwards)[1]


def test_the_bytes_never_change_between_releases():
    """A shard of format 2 has this digest for ever."""
    values = (np.arange(12, dtype=np.float32) / 4).reshape(3, 4)
    names = ["b:dog", "a:dog", "ü:hund"]
    entry, data = encode_shard(CacheConfig(), (4,), names, values)
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert entry.sha256 == "0ee8c536eed468cbf9afb82885b49e062dd0d4a94e0ba6b1e92eacbe73f93ea9"


def test_the_safetensors_package_reads_a_shard(config, tmp_path):
    """A shard is an ordinary safetensors file, with the ids in its metadata."""
    embeddings = some_embeddings(0, 5)
    _, data = shard_of(config, embeddings)
    path = tmp_path / "shard.safetensors"
    path.write_bytes(data)
    with safe_open(path, "np") as file:
        values = file.get_tensor("embeddings")
        about = json.loads(file.metadata()["lmdbcache"])
    assert about["sample_ids"] == sorted(embeddings)
    np.testing.assert_array_equal(values, [embeddings[one] for one in sorted(embeddings)])


def test_no_flipped_bit_and_no_cut_crashes_the_decoder(config):
    """A header that is damaged is an error of ours, or another header."""
    entry, data = shard_of(config, some_embeddings(0, 3, shape=(2,)))
    data = data[: entry.header_bytes]
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with contextlib.suppress(IntegrityError):
            assert decode_header(bytes(damaged), "shard").encoded != data
        with pytest.raises(IntegrityError):
            decode_header(data[:position], "shard")


def about_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lmdbcache"])


def with_about(data, about):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["lmdbcache"] = json.dumps(about, sort_keys=True, separators=(",", ":"))
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_ids": ["a:dog", "a:dog", "b:dog"]},
        {"sample_ids": ["b:dog", "a:dog", "c:dog"]},
        {"sample_ids": ["a:DOG", "b:dog", "c:dog"]},
        {"sample_ids": ["../../x", "b:dog", "c:dog"]},
        {"sample_ids": "abc"},
        {"sample_ids": [1, 2, 3]},
        {"sample_ids": None},
        {"sample_ids": []},
        {"embedding_shape": [3]},
        {"embedding_shape": [-2]},
        {"embedding_shape": [True, 2]},
        {"embedding_shape": [10**400]},
        {"embedding_shape": [None, 2]},
        {"lengths": [1, 1, 1]},
        {"embedding_shape": [None, 2], "lengths": [1.0, 1.0, 1.0]},
        {"embedding_shape": [None, 2], "lengths": [1, 1, -1]},
        {"fingerprint": "0" * 16},
        {"config": {"evil": 1}},
        {"config": 7},
        {"format": "2"},
        {"format": 1},
        {"checksums": ""},
        {"checksums": "zz" * 24},
        {"checksums": "00" * 24 + "0"},
    ],
)
def test_a_header_that_lies_is_refused(config, changes):
    """What isn't in the one form of a shard is no shard."""
    embeddings = dict(
        zip(["a:dog", "b:dog", "c:dog"], some_embeddings(0, 3, shape=(2,)).values(), strict=True)
    )
    _, data = shard_of(config, embeddings)
    with pytest.raises(IntegrityError):
        decode_header(with_about(data, {**about_of(data), **changes}), "shard")


def test_a_newer_format_is_named(config):
    """A shard of a later release asks for an upgrade."""
    _, data = shard_of(config, some_embeddings(0, 3))
    with pytest.raises(FormatVersionError):
        decode_header(with_about(data, {**about_of(data), "format": 3}), "shard")


def test_what_cannot_be_a_shard_is_refused(config):
    """No samples, two of a name, and values of another shape or dtype."""
    value = np.zeros((2, 4), np.float32)
    for names, values in [
        ([], value[:0]),
        (["a:dog", "a:dog"], value),
        (["a:dog", "b:dog"], np.zeros((2, 5), np.float32)),
        (["a:dog", "b:dog"], np.zeros((2, 4), np.float16)),
    ]:
        with pytest.raises(ConfigError):
            encode_shard(config, (4,), names, values)


@pytest.mark.parametrize(
    "content",
    ["[1,2]", "[1,2,3,4]", "[1,0,2]", "[80001,1,2]", "[true,1,2]", '["1",1,2]', "{}", "["],
)
def test_lengths_that_arent_the_clips_are_refused(config, content):
    """One for each sample, null or 1 to the config's duration."""
    entry, data = shard_of(config, some_embeddings(0, 3))
    header = decode_header(data[: entry.header_bytes], entry.path)
    name, good = lengths_file(entry, [1, None, 80000])
    assert list(decode_lengths(good, name, header).values()) == [1, 80000]
    bad = content.encode()
    with pytest.raises(IntegrityError):
        decode_lengths(bad, f"{entry.sha256}-{hashlib.sha256(bad).hexdigest()}.json", header)
