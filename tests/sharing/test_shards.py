"""Shards: the same bytes for the same samples, and nothing but whole shards is read."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from safetensors import safe_open
from sharing.shared_samples import ragged_embeddings, shard_of, some_embeddings

from lmdbcache import CacheConfig
from lmdbcache.errors import ConfigError, FormatVersionError, IntegrityError
from lmdbcache.exchange import decode_shard, encode_shard
from lmdbcache.exchange.sharing.shards import check_content, sound_rows
from lmdbcache.storage import checksum, sample_key


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_shard_comes_back_bit_for_bit(dtype):
    """What is decoded has the bytes, dtype and order of what was encoded."""
    config = CacheConfig(dtype=dtype)
    embeddings = some_embeddings(0, 9, dtype=dtype, shape=(3, 5))
    entry, data = shard_of(config, embeddings)
    content = decode_shard(data, "shard")
    assert content.sample_ids == entry.sample_ids == tuple(sorted(embeddings))
    assert content.config == config
    assert content.embeddings.shape == (9, 3, 5)
    for sample_id, value in zip(content.sample_ids, content.embeddings, strict=True):
        assert value.dtype == embeddings[sample_id].dtype
        assert value.tobytes() == embeddings[sample_id].tobytes()
    check_content(content, entry, config)
    key = sample_key(entry.sample_ids[0])
    assert entry.checksums[0] == checksum(key, embeddings[entry.sample_ids[0]].tobytes())


def test_a_ragged_shard_comes_back_bit_for_bit(config):
    """Embeddings of different lengths lie one after the other."""
    embeddings = ragged_embeddings(11)
    entry, data = shard_of(config, embeddings, (None, 4))
    content = decode_shard(data, "shard")
    check_content(content, entry, config)
    assert entry.lengths == tuple(len(embeddings[one]) for one in entry.sample_ids)
    for sample_id, value in zip(content.sample_ids, content.embeddings, strict=True):
        np.testing.assert_array_equal(value, embeddings[sample_id])


def test_the_order_in_which_samples_are_given_does_not_matter(config):
    """The same samples have one shard, and one name."""
    embeddings = some_embeddings(0, 7)
    backwards = dict(reversed(embeddings.items()))
    assert shard_of(config, embeddings)[1] == shard_of(config, backwards)[1]


def test_the_bytes_never_change_between_releases():
    """A shard of format 1 has this digest for ever."""
    values = (np.arange(12, dtype=np.float32) / 4).reshape(3, 4)
    names = ["b:dog", "a:dog", "ü:hund"]
    entry, data = encode_shard(CacheConfig(), (4,), names, values)
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert entry.sha256 == "bde434bbc6c6625ea77dd9d72d3ddbdb3c19d682649f3e201a7a79b8c8ac6948"


def test_the_safetensors_package_reads_a_shard(config, tmp_path):
    """A shard is an ordinary safetensors file, with the ids in its metadata."""
    embeddings = some_embeddings(0, 5)
    entry, data = shard_of(config, embeddings)
    path = tmp_path / "shard.safetensors"
    path.write_bytes(data)
    with safe_open(path, "np") as file:
        values = file.get_tensor("embeddings")
        about = json.loads(file.metadata()["lmdbcache"])
    assert about["sample_ids"] == list(entry.sample_ids)
    np.testing.assert_array_equal(values, [embeddings[one] for one in entry.sample_ids])


def test_every_flipped_bit_and_every_cut_is_an_error_of_ours(config):
    """No damage crashes the decoder or passes both of its checks."""
    entry, data = shard_of(config, some_embeddings(0, 3, shape=(2,)))
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(IntegrityError):
            check_content(decode_shard(bytes(damaged), "shard"), entry, config)
        with pytest.raises(IntegrityError):
            decode_shard(data[:position], "shard")
    with pytest.raises(IntegrityError):
        decode_shard(data + b"\0", "shard")


def about_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lmdbcache"])


def with_about(data, about):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["lmdbcache"] = json.dumps(about, sort_keys=True, separators=(",", ":"))
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


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
        {"format": "1"},
    ],
)
def test_a_header_that_lies_is_refused(config, changes):
    """What isn't in the one form of a shard is no shard."""
    embeddings = dict(
        zip(["a:dog", "b:dog", "c:dog"], some_embeddings(0, 3, shape=(2,)).values(), strict=True)
    )
    _, data = shard_of(config, embeddings)
    with pytest.raises(IntegrityError):
        decode_shard(with_about(data, {**about_of(data), **changes}), "shard")


def test_a_newer_format_is_named(config):
    """A shard of a later release asks for an upgrade."""
    _, data = shard_of(config, some_embeddings(0, 3))
    with pytest.raises(FormatVersionError, match="Upgrade"):
        decode_shard(with_about(data, {**about_of(data), "format": 2}), "shard")


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


def test_sound_rows_of_a_damaged_shard_are_found(config):
    """Each embedding that still has its checksum is found, in a cut or flipped file alike."""
    embeddings = some_embeddings(0, 6)
    entry, data = shard_of(config, embeddings)
    damaged = bytearray(data)
    damaged[-1] ^= 1
    damaged[3] ^= 255  # the header is of no importance
    found = sound_rows(bytes(damaged), entry, config, (8,))
    assert list(found) == list(entry.sample_ids[:5])
    for sample_id, value in found.items():
        np.testing.assert_array_equal(value, embeddings[sample_id])
    assert list(sound_rows(data[:-33], entry, config, (8,))) == list(entry.sample_ids[:4])
    assert sound_rows(b"", entry, config, (8,)) == {}


def test_another_shard_than_the_commit_says_is_refused(config):
    """Samples, config and values are compared with the commit's."""
    embeddings = some_embeddings(0, 4)
    entry, data = shard_of(config, embeddings)
    other_values, _ = shard_of(config, some_embeddings(0, 4, seed=1))
    other_samples, _ = shard_of(config, some_embeddings(1, 4))
    content = decode_shard(data, "shard")
    for wrong in (other_values, other_samples):
        with pytest.raises(IntegrityError):
            check_content(content, wrong, config)
    with pytest.raises(IntegrityError, match="another config"):
        check_content(content, entry, config.replace(duration=1.0))
