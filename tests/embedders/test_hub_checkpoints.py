"""Models by Hub name: downloaded once, found again offline, and refused in seconds without either.

A small server on this machine stands in for the Hub; the real huggingface_hub talks to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from lmdbcache.embedders import model_identity, weights_digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAME = "owner/small-ast"
_COMMIT = "0123456789abcdef0123456789abcdef01234567"

_LOAD = """
import json, sys
import numpy
from lmdbcache.embedders import ASTEmbedder, ASTFrontEnd, find_checkpoint
from lmdbcache.errors import CacheError
for name in sys.argv[1:]:
    try:
        checkpoint = find_checkpoint(name)
        embedder = ASTEmbedder(checkpoint)
        ASTFrontEnd(checkpoint, 16000)(numpy.zeros(16000, numpy.float32))
        print(json.dumps({"before": checkpoint.is_local, **embedder.provenance()}))
    except CacheError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as a download of one repository takes."""

    folder: Path

    def do_GET(self) -> None:
        files = {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        if self.path.startswith(f"/{_NAME}/resolve/") and name in files:
            self.reply(files[name], "application/octet-stream")
        elif self.path.startswith(f"/api/models/{_NAME}/tree/"):
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": git_id(data)}
                for file, data in files.items()
            ]
            self.reply(json.dumps(entries).encode(), "application/json")
        elif self.path.startswith(f"/api/models/{_NAME}"):
            siblings = [{"rfilename": file} for file in files]
            info = {"id": _NAME, "sha": _COMMIT, "siblings": siblings}
            self.reply(json.dumps(info).encode(), "application/json")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def reply(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", _COMMIT)
        self.send_header("ETag", f'"{git_id(body)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub_url(ast_folder: Path) -> Iterator[str]:
    handler = type("OneModelHub", (Hub,), {"folder": ast_folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hangs_up() -> Iterator[tuple[str, list[int]]]:
    """The URL of a server that ends each connection, and how many there were."""
    connections: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()
                    connections.append(1)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def load(name: str, home: Path, **environment: str) -> dict[str, str]:
    """What a new process knows of a model that it loads, or why it can't."""
    (found,) = load_each([name], home, **environment)
    return found


def load_each(names: list[str], home: Path, **environment: str) -> list[dict[str, str]]:
    """One after the other in one process."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and not key.lower().endswith("_proxy")
    }
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, *names],
        env={**kept, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()[-len(names) :]]


def test_downloaded_once_and_found_again_offline(hub_url, ast_folder, tmp_path):
    """An unknown name gets the Hub's answer. Revision and digest are known from the first load."""
    unknown, first = load_each(["owner/no-such-model", _NAME], tmp_path, HF_ENDPOINT=hub_url)
    assert unknown["error"].startswith(
        "ModelLoadError: owner/no-such-model: the Hub has no such model"
    )
    assert first["before"] is False
    assert first["revision"] == _COMMIT
    assert first["weights_digest"] == weights_digest(ast_folder)
    second = load(_NAME, tmp_path, HF_HUB_OFFLINE="1")
    assert second == {**first, "before": True}
    # Half a snapshot is no model: the rest is asked for, here in vain.
    (weights,) = tmp_path.glob("hub/**/snapshots/*/model.safetensors")
    weights.unlink()
    assert "not on this machine" in load(_NAME, tmp_path, HF_HUB_OFFLINE="1")["error"]


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "when the network is back"),
        pytest.param(
            {"HF_ENDPOINT": "http://hub.invalid"},
            "when the network is back",
            marks=pytest.mark.stress,
        ),
        ({"HF_ENDPOINT": "hangs up"}, "when the network is back"),
    ],
)
def test_without_network_it_is_refused_without_retries(tmp_path, hangs_up, environment, remedy):
    """One try of each request, and a message that says what to do."""
    url, connections = hangs_up
    if environment.get("HF_ENDPOINT") == "hangs up":
        environment = {"HF_ENDPOINT": url}
    error = load("ast", tmp_path, **environment)["error"]
    assert len(connections) in ((1, 2) if url in environment.values() else (0,))
    assert error.startswith("ModelLoadError: MIT/ast-finetuned-audioset-10-10-0.4593: not on this")
    for advice in ("MIT/ast-finetuned", "HF_HOME", remedy):
        assert advice in error


def test_names_that_cannot_be_loaded(tmp_path, ast_folder):
    """Most likely a path that doesn't exist; and an identity of a folder, from a cache's config."""
    names = ["models/ast/v1", "two words", model_identity(ast_folder)]
    *paths, identity = [found["error"] for found in load_each(names, tmp_path)]
    assert all("no such folder here" in error for error in paths)
    assert "give the folder itself" in identity
