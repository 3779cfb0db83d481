"""A place to share through: whole files, fresh listings, second tries and errors of ours."""

from __future__ import annotations

import io
import os
import pickle

import pytest

from lmdbcache.errors import ConfigError, MissingDependencyError, RemoteError
from lmdbcache.exchange import Remote, is_url
from lmdbcache.exchange.sharing import remote as remote_module


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
    assert place.read("a/shards/one", 6) == b"123456"
    place.remove("a/shards/one")
    place.remove("a/shards/one")
    assert place.list_files("a/shards") == {}


def test_a_fetch_goes_on_where_it_was_cut(place, monkeypatch):
    """Piece by piece; what the file holds already isn't read again."""
    monkeypatch.setattr(remote_module, "_PIECE_BYTES", 10)
    data = os.urandom(35)
    place.write("x", data)
    target, pieces = io.BytesIO(), []
    target.write(data[:12])
    place.fetch("x", target, 35, pieces.append)
    assert target.getvalue() == data
    assert pieces == [10, 10, 3]
    with pytest.raises(RemoteError, match="isn't there"):
        place.fetch("y", io.BytesIO(), 35)
    with pytest.raises(RemoteError, match="35"):
        place.read("x", 34)
    with pytest.raises(RemoteError):
        place.fetch("x", io.BytesIO(), 36)


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
    with pytest.raises(RemoteError, match="tried 5 times"):
        place._try(failing(5, TimeoutError()), "x")
    with pytest.raises(RemoteError, match="credentials"):
        place._try(failing(1, PermissionError("no")), "x")
    assert len(calls) == 1


def test_files_being_uploaded_are_not_listed(remote, tmp_path):
    """A killed upload leaves a file that nobody takes for a shard."""
    folder = tmp_path / "shared" / "shards"
    folder.mkdir(parents=True)
    (folder / ".uploading-1234-abc").write_bytes(b"half")
    assert remote.list_files("shards") == {}
    ((name, age),) = remote.leftovers("shards").items()
    assert name == ".uploading-1234-abc"
    assert 0 <= age < 3600


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
    with pytest.raises(MissingDependencyError, match="pip install"):
        Remote("gs://bucket/x")


def test_a_place_pickles_and_works_in_a_forked_process(place):
    """Each process connects for itself."""
    place.write("x", b"12")
    again = pickle.loads(pickle.dumps(place))
    assert again.read("x", 2) == b"12"
    child = os.fork()
    if child == 0:
        os._exit(0 if place.list_files("") == {"x": 2} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_folders_on_a_server_that_lists_none(in_memory, monkeypatch):
    """s3rver lists nothing where there are only folders of folders: the files tell."""
    in_memory.write("a/commits/one", b"1")
    in_memory.write("b/shards/two", b"2")
    monkeypatch.setattr(Remote, "_list", lambda *_: {})
    monkeypatch.setattr(in_memory, "protocol", "s3")
    assert in_memory.list_folders() == ["a", "b"]
    assert in_memory.list_folders("a") == ["commits"]
    assert in_memory.list_folders("c") == []
