"""verify finds what LMDB hands out without a word."""

from __future__ import annotations

import random

import lmdb
import numpy as np
import pytest
from storage.child_processes import in_fork, numbered, peer_process, write_in_turns
from storage.damage import flip_value

from lmdbcache.errors import CacheError


@pytest.fixture
def store(cache, config):
    """A closed store of embeddings on pages of their own; its data.mdb."""
    generator = np.random.default_rng(3)
    with cache.writer(config) as writer:
        for n in range(10):
            writer.put(f"{n}:dog", generator.normal(size=900))
    return cache.path(config) / "gen-000001" / "data.mdb"


def change(path, at, value=None):
    """Flip bits of one byte, or put another in its place."""
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 0x10 if value is None else value]))


@pytest.fixture
def change_main(store):
    """Change the main database behind our back, through plain LMDB."""

    def change_with(function):
        with lmdb.open(str(store.parent), max_dbs=2, map_size=1 << 30) as env:
            checksums = env.open_db(b"checksums")
            with env.begin(write=True) as transaction:
                function(transaction, checksums)

    return change_with


def test_clean_store_is_sound(cache, config, store):
    """Nothing is found where nothing is wrong."""
    report = cache.verify(config)
    assert report.is_sound
    assert (report.num_embeddings, report.structure, report.damaged, report.missing) == (
        10,
        (),
        (),
        (),
    )


@pytest.mark.parametrize("offset", [0, 1, 1799, 3599])
def test_flipped_byte_in_a_value_is_found(cache, config, store, offset):
    """One bit of one value, and the sample is named; LMDB itself sees nothing."""
    flip_value(store, cache.reader(config)["7:dog"], offset)
    report = cache.verify(config)
    assert not report.is_sound
    assert report.structure == ()
    assert report.damaged == ("7:dog",)
    assert report.num_embeddings == 10


def test_swapped_values_are_found(cache, config, change_main):
    """Two sound values under each other's keys are both named."""

    def swap(transaction, _):
        first, second = transaction.get(b"1:dog"), transaction.get(b"2:dog")
        transaction.put(b"1:dog", second)
        transaction.put(b"2:dog", first)

    change_main(swap)
    assert cache.verify(config).damaged == ("1:dog", "2:dog")


def test_swapped_values_with_their_checksums_are_found(cache, config, change_main):
    """The checksum is seeded by the key: carrying it along doesn't help."""

    def swap(transaction, checksums):
        for db in (None, checksums):
            first, second = transaction.get(b"1:dog", db=db), transaction.get(b"2:dog", db=db)
            transaction.put(b"1:dog", second, db=db)
            transaction.put(b"2:dog", first, db=db)

    change_main(swap)
    assert cache.verify(config).damaged == ("1:dog", "2:dog")


@pytest.mark.parametrize("key", [b"3;dog", b"3\xffdog", b"3:dof"])
def test_damaged_key_is_found(cache, config, change_main, key):
    """A value under a key that nobody wrote is damage, and a checksum without value is a loss."""

    def rename(transaction, _):
        transaction.put(key, transaction.pop(b"3:dog"))

    change_main(rename)
    report = cache.verify(config)
    assert report.damaged == (key.decode(errors="backslashreplace"),)
    assert report.missing == ("3:dog",)
    list(cache.reader(config))


def test_lost_value_is_found(cache, config, change_main):
    """A checksum whose value is gone counts as lost."""
    change_main(lambda transaction, _: transaction.delete(b"3:dog"))
    report = cache.verify(config)
    assert (report.is_sound, report.missing, report.damaged) == (False, ("3:dog",), ())


def test_missing_checksum_is_found(cache, config, change_main):
    """A value that can't be checked isn't sound."""
    change_main(lambda transaction, checksums: transaction.delete(b"3:dog", db=checksums))
    report = cache.verify(config)
    assert (report.damaged, report.missing) == (("3:dog",), ())


def test_wrong_structure_is_reported_without_reading_values(cache, config, store):
    """Leaf pages whose bounds are off are found by the structural check."""
    content = store.read_bytes()
    for page in range(8192, len(content), 4096):
        if content[page + 10 : page + 12] == b"\x02\x00":
            change(store, page + 13, 0xFF)
    report = cache.verify(config)
    assert report.structure
    assert not report.is_sound


def test_random_damage_never_ends_the_process(cache, config, store):
    """Sixty files with flipped bytes: a report or our error, never a signal, never "sound" while
    a value differs.
    """
    intact = store.read_bytes()
    expected = cache.reader(config).get_batch([f"{n}:dog" for n in range(10)])
    dice = random.Random(4)

    def verify_all():
        outcomes = []
        for _ in range(60):
            content = bytearray(intact)
            for _ in range(dice.randint(1, 8)):
                content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            store.write_bytes(content)
            try:
                sound = cache.verify(config).is_sound
                if sound:
                    batch = cache.reader(config).get_batch([f"{n}:dog" for n in range(10)])
                    np.testing.assert_array_equal(batch, expected)
                outcomes.append("sound" if sound else "damaged")
            except CacheError:
                outcomes.append("error")
        return outcomes

    outcomes = in_fork(verify_all)
    assert outcomes.count("damaged") > 20
    store.write_bytes(intact)


def test_verify_beside_writers_and_compactions_finds_nothing(cache, config):
    """What others do meanwhile never looks like damage."""
    with peer_process() as peer:
        with cache.writer(config) as writer:
            writer.put_batch(numbered(0, 50), numbered(0, 50).values())
        peer.start(write_in_turns, cache.root, config, 50, 500, 2)
        checks = 0
        while not peer._connection.poll(0):
            assert cache.verify(config).is_sound
            if checks % 3 == 0:
                cache.compact(config)
            checks += 1
        peer.answer()
    assert checks > 2
    assert len(cache.reader(config)) == 500
