"""Readers that verify give no value that isn't as written, whichever way they are asked."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from storage.child_processes import in_fork, peer_process, rewrite
from storage.damage import data_file, flip_value

from lmdbcache.errors import ConfigError, IntegrityError, SampleNotFoundError

MODES = ["first_read", "always"]


@pytest.fixture(params=["alike", "ragged"])
def damaged(request, cache, config):
    """A cache of ten embeddings of which number 7 has a flipped bit."""
    with cache.writer(config, ragged=request.param == "ragged") as writer:
        for n in range(10):
            rows = n % 3 + 2 if request.param == "ragged" else 3
            writer.put(f"{n}:dog", np.full((rows, 300), n + 1))
    flip_value(data_file(cache, config), np.full(300, 8, np.float32), 5)
    return cache


@pytest.mark.parametrize("mode", MODES)
def test_damaged_value_is_never_given_out(damaged, config, mode):
    """One by one, in batches, by position, before and after a pickle and a fork."""
    with damaged.reader(config, verify=mode) as reader:

        def read_all(reader):
            for _ in range(2):
                for ask in (
                    lambda: reader["7:dog"],
                    lambda: reader.get_batch(["7:dog"]),
                    lambda: reader.select().get_batch([7]),
                    lambda: dict(reader.items()),
                ):
                    with pytest.raises(IntegrityError, match="'7:dog'"):
                        ask()
            for n in (0, 9):
                assert (reader[f"{n}:dog"] == n + 1).all()
            assert (reader.get_batch(["3:dog", "0:dog", "3:dog"])[1] == 1).all()
            with pytest.raises(SampleNotFoundError):
                reader["no:dog"]
            with pytest.raises(SampleNotFoundError):
                reader.get_batch(["1:dog", "no:dog"])
            return reader.verify

        assert read_all(reader) == mode
        with pickle.loads(pickle.dumps(reader)) as other:
            assert read_all(other) == mode
        assert in_fork(lambda: read_all(reader)) == mode
        selection = pickle.loads(pickle.dumps(reader.select()))
        assert selection.copy_with([0, 1], lambda *_: "unverified") is None
        selection.reader.close()


def test_without_verification_it_is_read_as_it_is(damaged, config):
    """The default costs nothing and sees nothing."""
    with damaged.reader(config) as reader:
        assert reader.verify == "never"
        assert not (reader["7:dog"] == 8).all()


def test_unknown_mode_is_refused(damaged, config):
    """By name."""
    with pytest.raises(ConfigError, match="first_read"):
        damaged.reader(config, verify="sometimes")


def test_first_read_looks_once_and_always_always(cache, config):
    """What is damaged after the first look is only seen by `always`."""
    with cache.writer(config) as writer:
        writer.put("a:x", np.arange(700))
    with cache.reader(config, verify="first_read") as once:
        always = cache.reader(config, verify="always")
        assert once["a:x"].tolist() == always["a:x"].tolist()
        flip_value(data_file(cache, config), np.arange(700, dtype=np.float32), 40)
        once["a:x"]
        with pytest.raises(IntegrityError):
            always["a:x"]
        always.close()


def test_verified_reads_beside_a_writer(cache, config):
    """Commits in between never look like damage."""
    names = [f"{n:02d}:x" for n in range(40)]
    with cache.writer(config) as writer:
        writer.put_batch(names, np.zeros((40, 768), np.float32))
    with peer_process() as peer, cache.reader(config, verify="always") as reader:
        peer.start(rewrite, cache.root, config, names, 60)
        rounds = 0
        while not peer._connection.poll(0):
            assert len(np.unique(reader.get_batch(names))) == 1
            assert reader[names[3]].shape == (768,)
            reader.refresh()
            rounds += 1
        peer.answer()
        reader.refresh()
        assert (reader.get_batch(names) == 60).all()
    assert rounds > 2


@pytest.fixture(scope="module")
def many():
    """Two hundred embeddings: several leaf pages under a branch page, in both databases."""
    return {f"{n:03d}:dog": np.full(100, n + 1, np.float32) for n in range(200)}


def damaged_files(content):
    """Files of which a damaged page hides keys: name → content."""
    pages = [content[at : at + 4096] for at in range(0, len(content), 4096)]
    kinds = {number: pages[number][10] for number in range(2, len(pages))}
    for number, kind in kinds.items():
        at, lower = number * 4096, int.from_bytes(pages[number][12:14], "little")
        if kind == 2 and lower > 18:  # a leaf that says it has one entry less
            yield f"leaf {number}", _changed(content, at + 12, lower - 2)
        if kind == 1:  # separators that send those who look for a key past its leaf
            for pointer in range(18, lower, 2):
                node = at + int.from_bytes(pages[number][pointer : pointer + 2], "little")
                flipped = int.from_bytes(content[node + 8 : node + 10], "little") ^ 0x100
                yield f"branch {number}, {pointer}", _changed(content, node + 8, flipped)
    for sample_id in (b"000:dog", b"007:dog", b"150:dog"):
        start = 0
        while (start := content.find(sample_id, start + 1)) > 0:
            yield f"key at {start}", _changed(content, start + 1, 0x3A30 ^ start & 1)


def _changed(content, at, number):
    return content[:at] + number.to_bytes(2, "little") + content[at + 2 :]


@pytest.mark.parametrize("mode", MODES)
def test_pages_that_hide_keys_are_no_miss(cache, config, many, mode):
    """Whatever was stored is read right, or is an error: it is never said to be absent."""
    with cache.writer(config) as writer:
        writer.put_batch(many, many.values())
    data, names = data_file(cache, config), list(many)
    content = data.read_bytes()
    tried = {name: damaged for name, damaged in damaged_files(content) if damaged != content}
    assert len([name for name in tried if name.startswith("leaf")]) > 6
    assert len([name for name in tried if name.startswith("branch")]) > 6
    assert len([name for name in tried if name.startswith("key")]) >= 6

    def absent(reader):
        return {
            "one": any(_is_absent(lambda name=name: reader[name]) for name in names[::25]),
            "batch": _is_absent(lambda: reader.get_batch(names)),
            "in": _is_absent(lambda: _check(all(name in reader for name in names))),
            "missing": _is_absent(lambda: _check(not reader.missing(names))),
            "all": _is_absent(lambda: _check(set(names) <= set(reader))),
            "number": _is_absent(lambda: _check(len(reader) == len(names))),
        }

    def examine():
        found = {}
        for name, damaged in tried.items():
            data.write_bytes(damaged)
            with cache.reader(config, verify=mode) as reader:
                found[name] = [way for way, is_absent in absent(reader).items() if is_absent]
        return {name: ways for name, ways in found.items() if ways}

    assert in_fork(examine) == {}
    data.write_bytes(content)
    with cache.reader(config, verify=mode) as reader:
        assert list(reader) == names
        assert len(reader) == 200
        assert reader.missing([*names, "200:dog"]) == ["200:dog"]
        assert "200:dog" not in reader


def _check(is_as_written):
    if not is_as_written:
        raise SampleNotFoundError


def _is_absent(ask):
    try:
        ask()
    except SampleNotFoundError:
        return True
    except IntegrityError:
        pass
    return False
