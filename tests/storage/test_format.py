"""Format version 1, byte by byte, and through other programs' eyes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import lmdb
import msgpack
import numpy as np
import pytest
import xxhash

from lmdbcache import CacheConfig
from lmdbcache.errors import FormatVersionError, IntegrityError
from lmdbcache.storage import StoreMetadata, checksum
from lmdbcache.storage.layout import METADATA_KEY

EMBEDDING = np.array([1.0, -2.5, 3.25e-5], np.float32)
SAMPLE_ID = "vidéo:1:dog"
KEY = b"vid\xc3\xa9o:1:dog"
# Golden bytes of version 1: never change a line.
VALUE = {
    "float32": bytes.fromhex("0000803f000020c09c500838"),
    "float16": bytes.fromhex("003c00c12102"),
    "bfloat16": bytes.fromhex("803f20c00838"),
}
CHECKSUM = {
    "float32": bytes.fromhex("97a0bbec9b76ff09"),
    "float16": bytes.fromhex("2f330889d5c84db9"),
    "bfloat16": bytes.fromhex("6fe4b1b9cca9277f"),
}


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def store(request, cache):
    """A closed store of one known embedding; its config, generation folder and LMDB contents."""
    config = CacheConfig(dtype=request.param, namespace="golden", duration=2)
    provenance = {"weights_digest": "abc"}
    with cache.writer(config, provenance=provenance, dataset_root="/data") as writer:
        writer.put(SAMPLE_ID, EMBEDDING)
    folder = cache.path(config)
    generation = folder / (folder / "CURRENT").read_text().strip()
    with lmdb.open(str(generation), readonly=True, max_dbs=2) as environment:
        checksums = environment.open_db(b"checksums", create=False)
        with environment.begin() as transaction:
            main = dict(transaction.cursor())
            sums = dict(transaction.cursor(checksums))
    return config, generation, main, sums


def test_value_is_the_raw_buffer(store):
    """A value is the little-endian buffer and nothing else, under the UTF-8 key."""
    config, _, main, _ = store
    assert main[KEY] == VALUE[config.dtype]
    assert set(main) == {KEY, b"metadata", b"checksums"}


def test_checksum_is_seeded_by_the_key(store):
    """8 bytes xxh3-64, big-endian, of the value, with the key's own xxh3-64 as seed."""
    config, _, main, sums = store
    assert sums[KEY] == CHECKSUM[config.dtype]
    seed = xxhash.xxh3_64_intdigest(KEY)
    assert sums[KEY] == xxhash.xxh3_64_intdigest(main[KEY], seed=seed).to_bytes(8, "big")
    assert set(sums) == {KEY, b"metadata"}
    assert sums[b"metadata"] == checksum(METADATA_KEY, main[b"metadata"])


def test_metadata_record_has_exactly_these_fields(store):
    """The metadata is one msgpack map of plain values."""
    config, _, main, _ = store
    record = msgpack.unpackb(main[b"metadata"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record.pop("creation_time"))
    assert record == {
        "format_version": 1,
        "sample_rate": 16000,
        "duration": 2.0,
        "model_name": "MIT/ast-finetuned-audioset-10-10-0.4593",
        "output": "pooler_output",
        "dtype": config.dtype,
        "dataset": "golden",
        "front_end": "soundfile+soxr-hq+mono-mean+zero-pad+ast-fbank/1",
        "compute_dtype": "float32",
        "embedding_shape": [3],
        "dataset_root": "/data",
        "provenance": {"weights_digest": "abc"},
    }


def test_folder_holds_what_the_format_says(store):
    """CURRENT names the one generation; nothing else lies beside it but the writer's lock."""
    _, generation, _, _ = store
    folder = generation.parent
    assert sorted(child.name for child in folder.iterdir()) == [
        "CURRENT",
        "gen-000001",
        "writer.lock",
    ]
    assert (folder / "CURRENT").read_bytes() == b"gen-000001\n"
    assert sorted(child.name for child in generation.iterdir()) == [
        "checked",
        "committed",
        "data.mdb",
        "lock.mdb",
    ]


def test_a_plain_client_reads_a_value(filled, config, embeddings):
    """Open, get, frombuffer: no code of ours is needed."""
    folder = filled.path(config)
    generation = folder / (folder / "CURRENT").read_text().strip()
    with lmdb.open(str(generation), readonly=True) as environment, environment.begin() as txn:
        for sample_id, embedding in embeddings.items():
            np.testing.assert_array_equal(
                np.frombuffer(txn.get(sample_id.encode()), "<f4"), embedding
            )


def lmdb_tool(name, *arguments):
    tool = shutil.which(name)
    if tool is None:
        if os.environ.get("LMDBCACHE_NO_LMDB_UTILS") == "1":
            pytest.skip("LMDBCACHE_NO_LMDB_UTILS=1")
        pytest.fail(
            f"{name} isn't installed: `apt-get install lmdb-utils`, or set "
            "LMDBCACHE_NO_LMDB_UTILS=1 to leave this test out"
        )
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, check=True).stdout


def test_mdb_stat_reads_the_store(store):
    """LMDB's own mdb_stat sees one embedding, the metadata and the checksums."""
    _, generation, _, _ = store
    printed = lmdb_tool("mdb_stat", "-a", generation).decode()
    assert re.findall(r"Status of (.*)\n(?:.*\n){4}  Entries: (\d+)", printed) == [
        ("Main DB", "3"),
        ("checksums", "2"),
    ]


def test_mdb_dump_shows_the_golden_bytes(store):
    """LMDB's own mdb_dump prints key, value and checksum as specified."""
    config, generation, _, _ = store
    main = lmdb_tool("mdb_dump", generation).decode()
    assert f" {KEY.hex()}\n {VALUE[config.dtype].hex()}\n" in main
    sums = lmdb_tool("mdb_dump", "-s", "checksums", generation).decode()
    assert f" {KEY.hex()}\n {CHECKSUM[config.dtype].hex()}\n" in sums


@pytest.mark.parametrize(
    ("command", "expected"),
    [(["stat"], b"entries"), (["get", KEY.decode()], None), (["verify"], b"OK")],
)
def test_python_m_lmdb_reads_the_store(store, command, expected):
    """py-lmdb's own command line reads and verifies the store."""
    config, generation, _, _ = store
    line = [sys.executable, "-m", "lmdb", "-e", str(generation), *command]
    printed = subprocess.run(line, capture_output=True, check=True, env=os.environ).stdout
    value = repr(VALUE[config.dtype]).encode()
    assert (value if expected is None else expected) in printed


# ---- a record that isn't what we write


def record_with(**changes):
    values = msgpack.unpackb(StoreMetadata.new(CacheConfig()).pack())
    return msgpack.packb({**values, **changes})


def test_newer_format_version_asks_for_an_upgrade():
    """A store of a later release is refused as such, not as damaged."""
    with pytest.raises(FormatVersionError, match=r"version 2.*Upgrade"):
        StoreMetadata.unpack(record_with(format_version=2), "store")


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb({"format_version": 1}),
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x91" * 1000 + b"\xc0",
        bytes(70_000),
        record_with(format_version=0),
        record_with(format_version="1"),
        record_with(embedding_shape=3),
        record_with(embedding_shape=[0]),
        record_with(embedding_shape=[-1, 3]),
        record_with(embedding_shape=[3, None]),
        record_with(embedding_shape="abc"),
        record_with(provenance=[1]),
        record_with(sample_rate="fast"),
        record_with(dtype="float64"),
        record_with(creation_time=msgpack.Timestamp(1, 0)),
    ],
)
def test_foreign_record_is_an_integrity_error(record):
    """Whatever stands in the record, reading it ends in our error."""
    with pytest.raises(IntegrityError):
        StoreMetadata.unpack(record, "store")


def test_record_goes_to_json(filled, config):
    """`StoreInfo.to_dict` holds plain values only."""
    info = filled.info(config)
    assert json.loads(json.dumps(info.to_dict()))["num_embeddings"] == 20
    assert info.to_dict()["fingerprint"] == config.fingerprint


def test_mutated_records_end_in_our_error_or_in_metadata():
    """Whatever a few changed bytes make of a record, nothing else escapes."""
    record = StoreMetadata.new(CacheConfig(), "/data").pack()
    generator = np.random.default_rng(5)
    refused = 0
    for _ in range(3000):
        mutated = np.frombuffer(record, np.uint8).copy()
        places = generator.integers(0, len(record), int(generator.integers(1, 4)))
        mutated[places] = generator.integers(0, 256, len(places))
        try:
            assert isinstance(StoreMetadata.unpack(mutated.tobytes(), "store"), StoreMetadata)
        except IntegrityError:
            refused += 1
    assert 500 < refused < 3000
