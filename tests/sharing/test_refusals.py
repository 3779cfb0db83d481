"""What a user gets wrong, or a server refuses: one line that says what to do, and no password."""

from __future__ import annotations

import socket

import pytest
from sharing.nodes import embeddings
from sharing.servers import ACCESS_KEY, PASSWORD, SECRET_KEY

from lmdbcache.errors import RemoteError
from lmdbcache.exchange import Remote

MORE = [pytest.param(command, marks=pytest.mark.stress) for command in ("push", "verify")]
COMMANDS = ["pull", *MORE]


@pytest.fixture
def unused_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def refused(node, command, url=None):
    node.store(embeddings(0, 3))
    line = node.refused(command, url or node.place.url)
    assert len(line) < 600
    assert not any(secret in line for secret in (PASSWORD, SECRET_KEY, ACCESS_KEY))
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_credentials(on_moto, nodes_at, command):
    """A signature that the server refuses; it isn't tried again and again."""
    (node,) = nodes_at(on_moto, 1)
    on_moto.proxy.fault("answer", status=403, times=99)
    assert "credentials" in refused(node, command)
    assert len(on_moto.proxy.requests) <= 4


@pytest.mark.parametrize("command", ["push", "pull"])
def test_no_credentials(on_moto, nodes_at, command):
    (node,) = nodes_at(on_moto, 1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del on_moto.environment[name]
    assert "AWS_ACCESS_KEY_ID" in refused(node, command)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_such_bucket(on_moto, nodes_at, command):
    """It isn't made, and it isn't told to be empty without a word on the URL."""
    (node,) = nodes_at(on_moto, 1)
    url = "s3://no-such-bucket-here/place"
    assert url in refused(node, command, url)


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_password(on_sftp, nodes_at, command):
    (node,) = nodes_at(on_sftp, 1)
    url = on_sftp.url.replace(PASSWORD, "wrong-word")
    line = refused(node, command, url)
    assert "wrong-word" not in line
    assert "permission denied" in line


def test_an_unknown_host_key(on_sftp, tmp_path, monkeypatch):
    """Neither the URL nor the connection is wrong: the key and where it belongs are named."""
    monkeypatch.setenv("HOME", str(tmp_path))
    remote = Remote(on_sftp.url)
    with pytest.raises(RemoteError, match=r"~/\.ssh/known_hosts") as caught:
        remote.list_folders()
    assert "Check the URL" not in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_nobody_listens(on_moto, nodes_at, unused_port):
    """Another server than the one that is meant."""
    (node,) = nodes_at(on_moto, 1)
    on_moto.environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{unused_port}"
    assert on_moto.url in refused(node, "push")
    assert f"127.0.0.1:{unused_port}" in refused(
        node, "pull", f"ssh://a:b@127.0.0.1:{unused_port}/x"
    )


def test_an_empty_place(on_moto, nodes_at):
    """Nothing to pull or to verify is an error that names the place; nothing is left behind."""
    (node,) = nodes_at(on_moto, 1)
    for command in ("pull", "verify"):
        assert on_moto.url in node.refused(command, on_moto.url)
    assert not node.cache.root.exists() or not list(node.cache.root.iterdir())
