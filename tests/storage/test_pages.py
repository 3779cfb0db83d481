"""The table of values read from LMDB's pages: what LMDB says, or a clean refusal."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import pytest

from lmdbcache.storage.layout import METADATA_KEY, sample_key
from lmdbcache.storage.pages.pages import UnreadablePagesError, read_table
from lmdbcache.storage.value_table import find_rows, key_or_empty


def built(folder, items, **options):
    """A plain LMDB environment with our two kinds of reserved entries; returns (data, txn id)."""
    with lmdb.open(str(folder), map_size=1 << 30, max_dbs=2, **options) as environment:
        checksums = environment.open_db(b"checksums")
        with environment.begin(write=True) as transaction:
            transaction.put(METADATA_KEY, b"m" * 200)
            for key, value in items:
                transaction.put(key, value)
                transaction.put(key, b"checksum", db=checksums)
        transaction_id = environment.info()["last_txnid"]
    return np.fromfile(Path(folder) / "data.mdb", np.uint8), transaction_id


def shuffled_items(count, size, seed=0):
    """Keys of many lengths, in random order, values of about this size."""
    generator = np.random.default_rng(seed)
    for n in generator.permutation(count):
        key = f"{'k' * (n % 7)}ü{n}:x".encode()
        yield key, generator.bytes(int(generator.integers(1, 2 * size)))


@pytest.mark.parametrize(
    ("count", "size", "depth"),
    [(1, 8, 1), (40, 8, 1), (900, 40, 2), (30_000, 8, 3), (300, 9000, 2)],
)
def test_table_agrees_with_a_walk_by_cursor(tmp_path, count, size, depth):
    """Every key, in order, with a place that holds the value; at every depth of the tree."""
    data, transaction_id = built(tmp_path / "db", shuffled_items(count, size))
    table = read_table(data, transaction_id)
    with lmdb.open(str(tmp_path / "db"), max_dbs=2) as environment:
        with environment.begin() as transaction:
            assert transaction.stat()["depth"] == depth
            expected = [(k, v) for k, v in transaction.cursor() if b":" in k]
    assert [bytes(key) for key in table.keys] == [key for key, _ in expected]
    for offset, length, (_, value) in zip(table.offsets, table.lengths, expected, strict=True):
        assert data[offset : offset + length].tobytes() == value
    asked = [expected[-1][0], b"no:x", b"", expected[0][0], b"z" * 600]
    assert table.find(asked).tolist() == [count - 1, -1, -1, 0, -1]
    assert table.find([]).tolist() == []


def test_short_keys_at_the_end_of_a_page_that_has_a_long_one(tmp_path):
    """LMDB fills a page from its end: the first keys have fewer bytes behind them than the last."""
    keys = [f"{n}:x".encode() for n in range(1, 12)] + [b"k" * 500 + b":x"]
    data, transaction_id = built(tmp_path / "db", [(key, key[:1]) for key in keys])
    table = read_table(data, transaction_id)
    assert table.keys.tolist() == sorted(keys)
    found = zip(table.offsets.tolist(), table.lengths.tolist(), strict=True)
    assert [data[at : at + n].tobytes() for at, n in found] == [key[:1] for key in sorted(keys)]


def test_rows_by_id_are_those_of_the_canonical_keys(tmp_path):
    """Whether or not an id can be looked up as it stands."""
    ids = ["größe1:tür", "clip:dog", "音:犬"]
    data, transaction_id = built(tmp_path / "db", [(sample_key(i), b"v") for i in ids])
    table = read_table(data, transaction_id)
    asked = [*ids, "clip:DOG", "gro\u0308ße1:tür", "clip:dog\0", "clip", "a:\ud800", 3, "x:dog"]
    expected = [table.find([key_or_empty(sample_id)])[0] for sample_id in asked]
    assert expected[:5] == [*expected[:3], *expected[1::-1]]
    assert expected[5:] == [-1] * 5
    assert find_rows(table, asked).tolist() == expected
    for sample_id, row in zip(asked, expected, strict=True):
        assert find_rows(table, [sample_id]).tolist() == [row]
    assert find_rows(table, []).tolist() == []


def test_table_of_an_empty_store(tmp_path):
    """No values, with the reserved entries and without any entry at all."""
    data, transaction_id = built(tmp_path / "a", [])
    assert len(read_table(data, transaction_id).keys) == 0
    with lmdb.open(str(tmp_path / "b")) as environment, environment.begin(write=True):
        pass
    table = read_table(np.fromfile(tmp_path / "b" / "data.mdb", np.uint8), 0)
    assert len(table.keys) == 0
    assert table.find([b"a:x"]).tolist() == [-1]


def test_only_the_asked_transaction_is_read(tmp_path):
    """Another id than those of the two meta pages has no known root."""
    data, transaction_id = built(tmp_path / "db", shuffled_items(50, 8))
    for other in (transaction_id - 2, transaction_id + 1, transaction_id + 2, 10**9):
        with pytest.raises(UnreadablePagesError, match="meta page"):
            read_table(data, other)


def test_the_last_two_commits_are_both_known(tmp_path):
    """Each in its own meta page, whichever of the two it is."""
    for n in range(1, 4):
        data, transaction_id = built(tmp_path / "db", [(b"a%d:x" % n, b"value %d" % n)])
        keys = [b"a%d:x" % each for each in range(1, n + 1)]
        assert read_table(data, transaction_id).keys.tolist() == keys
        if n > 1:
            before = read_table(data, transaction_id - 1)
            assert before.keys.tolist() == keys[:-1]


@pytest.mark.parametrize("root", [2**64 - 2, 2**63, 10**6])
def test_a_root_beyond_the_file_is_refused(tmp_path, root):
    """Even one that no signed number can hold."""
    data, transaction_id = built(tmp_path / "db", shuffled_items(50, 8))
    at = (transaction_id & 1) * 4096 + 16 + 24 + 48 + 40
    data[at : at + 8] = np.array([root], "<u8").view(np.uint8)
    with pytest.raises(UnreadablePagesError):
        read_table(data, transaction_id)


def test_truncated_and_foreign_files_are_refused(tmp_path):
    """Any length short of the last page, zeros and noise are errors, not crashes."""
    data, transaction_id = built(tmp_path / "db", shuffled_items(900, 40))
    noise = np.random.default_rng(0).integers(0, 256, len(data), np.uint8)
    short = [data[:length] for length in (0, 1, 100, 151, 152, 4096, 8191, 8192, 20_000, -4096)]
    headed = noise.copy()
    headed[:8192] = data[:8192]
    for damaged in (*short, noise, np.zeros_like(data), headed):
        with pytest.raises(UnreadablePagesError):
            read_table(damaged, transaction_id)


def test_a_loop_of_branch_pages_is_refused(tmp_path):
    """A root that names itself, in a tree said to be deep, doesn't multiply without end."""
    data, transaction_id = built(tmp_path / "db", shuffled_items(30_000, 8))
    meta = (transaction_id & 1) * 4096 + 16
    depth = meta + 24 + 48 + 6
    root = int(data[meta + 24 + 48 + 40 :][:8].view("<u8")[0])
    assert data[depth] == 3
    page = data[root * 4096 :][:4096]
    for at in page[16 : int(page[12:14].view("<u2")[0])].view("<u2"):
        page[at : at + 6] = np.array([root], "<u8").view(np.uint8)[:6]
    data[depth] = 32
    with pytest.raises(UnreadablePagesError):
        read_table(data, transaction_id)


@pytest.mark.parametrize("size", [8, 3000])
def test_flipped_bytes_give_an_error_or_places_within_the_file(tmp_path, size):
    """Damage in meta, branch and leaf pages never leads out of the file or to another exception."""
    data, transaction_id = built(tmp_path / "db", shuffled_items(1500, size))
    kinds = data.reshape(-1, 4096)[:, 10:12].copy().view("<u2")[:, 0]
    trees = np.flatnonzero((kinds & 3) != 0)
    generator = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        damaged = data.copy()
        page = int(generator.choice([0, 1, *trees]))
        # The header and the pointers are hit as often as the rest.
        reach = int(generator.choice([40, 200, 4096]))
        places = page * 4096 + generator.integers(0, reach, int(generator.integers(1, 5)))
        damaged[places] = generator.integers(0, 256, len(places))
        try:
            table = read_table(damaged, transaction_id)
        except UnreadablePagesError:
            refused += 1
            continue
        assert (table.offsets >= 0).all()
        assert (table.offsets <= len(data) - table.lengths).all()
        assert (table.keys[1:] > table.keys[:-1]).all()
    assert 30 < refused < 300
