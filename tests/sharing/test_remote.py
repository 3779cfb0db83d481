"""A place to share through: whole files, fresh listings, second tries and errors of ours."""

from __future__ import annotations

import hashlib
import os
import time
from functools import partial

import pytest

from lmdbcache.errors import ConfigError, IntegrityError, MissingDependencyError, RemoteError
from lmdbcache.exchange import Remote, is_url
from lmdbcache.exchange.sharing import remote as remote_module
from lmdbcache.exchange.sharing.remote import in_parallel, without_secrets
from lmdbcache.exchange.sharing.shards import check_digest


@pytest.fixture(params=["remote", "in_memory"])
def place(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(remote_module, "_FIRST_WAIT", 0.001)


def test_what_is_written_is_listed_and_read(place):
    """Names with their sizes; an empty or missing folder lists as nothing."""
    assert place.list_files("a/shards") == {}
    assert place.list_folders() == []
    place.write("a/shards/one", b"12345")
    place.write("a/shards/one", b"123456")
    place.write("b/commits/two", b"")
    assert place.list_files("a/shards") == {"one": 6}
    assert place.list_files("a") == {}
    assert place.list_folders() == ["a", "b"]
    assert place.read("a/shards/one", 0, 6) == b"123456"
    assert place.read("a/shards/one", 2, 4) == b"34"
    place.remove("a/shards/one")
    place.remove("a/shards/one")
    assert place.list_files("a/shards") == {}


def test_a_large_file_comes_in_pieces(place, monkeypatch):
    """From any byte on; a missing file, a shorter one and another digest are errors."""
    monkeypatch.setattr(remote_module, "_PIECE_BYTES", 10)
    data = os.urandom(35)
    place.write("x", data)
    pieces = list(place.pieces("x", 12, 35))
    assert b"".join(pieces) == data[12:]
    assert [len(piece) for piece in pieces] == [10, 10, 3]
    for path, num_bytes in (("y", 35), ("x", 36)):
        with pytest.raises(RemoteError):
            list(place.pieces(path, 0, num_bytes))
    check = partial(check_digest, sha256=hashlib.sha256(data).hexdigest(), name="x")
    assert place.read("x", 0, 35, check) == data
    with pytest.raises(IntegrityError):
        place.read("x", 0, 34, check)


def test_what_breaks_on_the_way_is_tried_again(place):
    """Cut connections are no error as long as one try works; a refusal is one at once."""
    place.write("x", b"1")
    calls = []

    def failing(times, error):
        def action(_):
            calls.append(1)
            if len(calls) <= times:
                raise error
            return "done"

        calls.clear()
        return action

    assert place._try(failing(4, ConnectionResetError("cut")), "x") == "done"
    with pytest.raises(RemoteError):
        place._try(failing(5, TimeoutError()), "x")
    assert len(calls) == 5
    with pytest.raises(RemoteError):
        place._try(failing(1, PermissionError("no")), "x")
    assert len(calls) == 1


def test_files_being_uploaded_are_not_listed(remote, tmp_path):
    """A killed upload leaves a file that nobody takes for a shard."""
    folder = tmp_path / "shared" / "shards"
    folder.mkdir(parents=True)
    (folder / ".uploading-1234-abc").write_bytes(b"half")
    assert remote.list_files("shards") == {}


def test_a_failed_write_leaves_nothing(remote, tmp_path):
    """A file where a folder is needed; the error is ours."""
    (tmp_path / "shared").write_bytes(b"")
    with pytest.raises(RemoteError):
        remote.write("shards/x", b"1")


@pytest.mark.parametrize(
    "url", ["", "s3:", "s3://", "/tmp/x", "nonsense://a/b", "simplecache::s3://a", "://a"]
)
def test_what_is_no_place_is_refused(url):
    """One line that says what a URL looks like."""
    with pytest.raises(ConfigError):
        Remote(url)
    assert is_url("s3://x")
    assert not is_url("d9ec284310aafd0a")


def test_a_missing_package_is_named():
    """The error says what to install."""
    with pytest.raises(MissingDependencyError, match="gcsfs"):
        Remote("gs://bucket/x")


def test_several_at_once_and_in_order(monkeypatch):
    """Results come in the order of the items, exceptions where they are asked for."""
    monkeypatch.setattr(remote_module, "CONNECTIONS", 4)
    running, most = [], []

    def action(number):
        running.append(number)
        most.append(len(running))
        time.sleep(0.02 if number % 3 else 0.05)
        running.remove(number)
        if number == 7:
            raise ValueError(number)
        return -number

    found = []
    for number, result in in_parallel(action, range(20)):
        found.append(number)
        if number == 7:
            assert isinstance(result.exception(), ValueError)
        else:
            assert result.result() == -number
    assert found == list(range(20))
    assert 1 < max(most) <= 4


def test_secrets_of_a_url_are_not_kept():
    """A password or access key in a URL isn't shown, nor written to the store."""
    assert without_secrets("ssh://me:pass@host/folder") == "ssh://me@host/folder"
    for url in ("s3://bucket/folder", "ssh://me@host/a", "file:///a:b@c", "memory://x"):
        assert without_secrets(url) == url
