"""int8 goes through merges, shards and files of other formats without being rounded again."""

from __future__ import annotations

import os

import numpy as np
import pytest
from exchange.conftest import contents, numbered

from lmdbcache import CacheConfig, export_embeddings, import_embeddings
from lmdbcache.exchange import merge_stores, pull, push


@pytest.fixture(params=[False, True], ids=["pooled", "ragged"])
def filled(request, store, config):
    """A store of int8, its config, and whether lengths differ."""
    config = config.replace(dtype="int8", output="last_hidden_state")
    embeddings = {
        name: np.outer(1 + np.arange(2 + n % 3 if request.param else 3), embedding) + n
        for n, (name, embedding) in enumerate(numbered(0, 30).items())
    }
    return store("here", embeddings, config=config, ragged=request.param), config, request.param


def sums_of(cache, config):
    """Key → checksum of the stored bytes, all of them checked."""
    assert contents(cache, config)
    with cache.reader(config) as reader:
        return dict(reader.checksums()), reader.metadata.quantization_error


def test_merged(filled, target):
    """The bytes and the error arrive."""
    cache, config, _ = filled
    (report,) = merge_stores(target, [cache.root]).stores
    assert report.exit_code == 0
    assert sums_of(target, config) == sums_of(cache, config)


def test_pushed_and_pulled(filled, target, tmp_path):
    """Shards hold the stored bytes, of a quarter of the size."""
    cache, config, _ = filled
    assert push(cache, config, f"file://{tmp_path}/hub").exit_code == 0
    assert pull(target, config, f"file://{tmp_path}/hub").exit_code == 0
    assert sums_of(target, config) == sums_of(cache, config)
    (shard,) = (tmp_path / "hub").rglob("*.safetensors")
    with cache.reader(config) as reader:
        num_rows = sum(len(embedding) for embedding in reader.values())
    assert num_rows * 12 < os.path.getsize(shard) < num_rows * 12 + 6000
    assert push(target, config, f"file://{tmp_path}/other").exit_code == 0
    (same,) = (tmp_path / "other").rglob("*.safetensors")
    assert same.read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "x.parquet", "x.pt"])
def test_exported_and_imported(filled, target, tmp_path, name):
    """Files have float32; a store of int8 that is made of them is the one they came from."""
    cache, config, ragged = filled
    export_embeddings(cache, config, tmp_path / name, format=name.split(".")[1])
    report = import_embeddings(target, None, tmp_path / name, ragged=ragged)
    assert report.exit_code == 0
    assert report.config == config
    assert sums_of(target, config) == sums_of(cache, config)


def test_a_value_in_another_form_is_refused(filled, target, tmp_path):
    """A foreign writer's scale of 24 bits would have other bytes elsewhere: it is named."""
    import lmdb
    import xxhash

    cache, config, _ = filled
    (generation,) = cache.path(config).glob("gen-*")
    with lmdb.open(str(generation), max_dbs=1) as env:
        sums = env.open_db(b"checksums")
        with env.begin(write=True) as txn:
            key = b"clip_00003:dog"
            value = bytearray(txn.get(key))
            value[-4] ^= 1  # the lowest bit of a scale
            txn.put(key, bytes(value))
            seed = xxhash.xxh3_64_intdigest(key)
            txn.put(key, xxhash.xxh3_64_digest(bytes(value), seed=seed), db=sums)
    (report,) = merge_stores(target, [cache.root]).stores
    assert [refusal.sample_id for refusal in report.refused] == [key.decode()]
    assert len(contents(target, config)) == 29
    pushed = push(cache, config, f"file://{tmp_path}/hub")
    assert (pushed.num_pushed, list(pushed.damaged)) == (29, [key.decode()])


@pytest.mark.parametrize("dry_run", [True, False])
def test_imported_vectors_of_several_lengths_are_refused(target, tmp_path, dry_run):
    """They have no rows of one length; a dry run says so, too."""
    np.savez(tmp_path / "x.npz", **{f"{n}:x": np.ones(n, np.float32) for n in (3, 4)})
    config = CacheConfig(dtype="int8")
    path = tmp_path / "x.npz"
    report = import_embeddings(target, config, path, ragged=True, dry_run=dry_run)
    assert (report.num_new, len(report.refused)) == (0, 2)
