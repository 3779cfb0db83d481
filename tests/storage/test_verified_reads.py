"""Readers that verify give no value that isn't as written, whichever way they are asked."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from storage.child_processes import in_fork, peer_process, rewrite
from storage.damage import data_file

from lmdbcache.errors import ConfigError, IntegrityError, SampleNotFoundError

MODES = ["first_read", "always"]


@pytest.fixture(params=["alike", "ragged"])
def damaged(request, cache, config):
    """A cache of ten embeddings of which number 7 has a flipped bit."""
    with cache.writer(config, ragged=request.param == "ragged") as writer:
        for n in range(10):
            rows = n % 3 + 2 if request.param == "ragged" else 3
            writer.put(f"{n}:dog", np.full((rows, 300), n + 1))
    data = data_file(cache, config)
    content = bytearray(data.read_bytes())
    content[content.rindex(np.full(300, 8, np.float32).tobytes()) + 5] ^= 1
    data.write_bytes(content)
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
                    with pytest.raises(IntegrityError, match=r"'7:dog'.*lmdbcache repair"):
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
        data = data_file(cache, config)
        at = data.read_bytes().rindex(np.arange(700, dtype=np.float32).tobytes())
        with data.open("r+b") as file:
            file.seek(at + 40)
            file.write(b"\x77")
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
