"""How long push and pull take, beside a copy: `python tools/bench_push.py [URL]` (an empty place).

28,109 pooled embeddings (82 MiB, six shards); without a URL to an S3 server on this machine (moto,
where tools/install_test_programs.sh has put it), else to a folder. The copy of the same files is
`put` and `get` of fsspec's file system, a new one each time as for push and pull, several files at
once; `write` stores the same embeddings without a place. All in turns; the least of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.exchange import pull, push, verify_remote

_SERVER = Path(sys.prefix) / "servers" / "bin" / "moto_server"
_SETTINGS = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


def made(first: int, number: int) -> tuple[list[str], Any]:
    """Sample ids and embeddings."""
    names = [f"video_{index:05d}:dog" for index in range(first, first + number)]
    return names, np.random.default_rng(first).random((number, 768), dtype=np.float32)


def put(cache: EmbeddingCache, config: CacheConfig, names: list[str], values: Any) -> None:
    with cache.writer(config) as writer:
        writer.put_batch(names, values)


@contextlib.contextmanager
def place(folder: Path) -> Iterator[str]:
    """URL of an empty place on this machine."""
    if not _SERVER.exists():
        yield (folder / "place").as_uri()
        return
    log = folder / "server.log"
    with log.open("wb") as output:
        command = [str(_SERVER), "-H", "127.0.0.1", "-p", "0"]
        if setpriv := shutil.which("setpriv"):  # ends with this process, however that ends
            command = [setpriv, "--pdeathsig", "KILL", *command]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    before = dict(os.environ)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text("utf-8"))):
            assert process.poll() is None, log.read_text("utf-8")
            time.sleep(0.05)
        os.environ.update(_SETTINGS, AWS_ENDPOINT_URL=found[0])
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bench")
        yield "s3://bench"
    finally:
        process.kill()
        process.wait()
        os.environ.clear()
        os.environ.update(before)


def measure(*, quick: bool, url: str | None = None) -> dict[str, dict[str, float]]:
    """Seconds by what was done, for a table."""
    number, rounds = (200, 1) if quick else (28_109, 3)
    best: dict[str, float] = {}

    def timed(what: str, action: Any) -> Any:
        before = time.perf_counter()
        result = action()
        best[what] = min(best.get(what, np.inf), time.perf_counter() - before)
        return result

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, config = Path(name), CacheConfig()
        first, more = made(0, number), made(number, 100)
        base = url or stack.enter_context(place(folder))
        for count in range(rounds):
            there = f"{base}/{uuid.uuid4().hex}"
            cache = EmbeddingCache(folder / f"from-{count}")
            timed("write", lambda cache=cache: put(cache, config, *first))
            timed("push", lambda c=cache, t=there: push(c, config, t))
            timed("push again", lambda c=cache, t=there: push(c, config, t))
            other = EmbeddingCache(folder / f"to-{count}")
            timed("pull", lambda c=other, t=there: pull(c, config, t))
            timed("pull again", lambda c=other, t=there: pull(c, config, t))
            copies = folder / f"copies-{count}"
            copies.mkdir()
            timed("copy from there", lambda t=there, c=copies: _get(t, config, c))
            timed("copy to there", lambda t=there, c=copies: _put(t, c))
            put(cache, config, *more)
            timed("push of 100 more", lambda c=cache, t=there: push(c, config, t))
            timed("pull of 100 more", lambda c=other, t=there: pull(c, config, t))
            report = timed("verify", lambda t=there: verify_remote(t, config.fingerprint))
            assert report.is_sound
    protocol = base.partition("://")[0]
    return {f"push and pull, {number:,} pooled, {protocol}://, s": best}


def _get(there: str, config: CacheConfig, folder: Path) -> None:
    system, path = fsspec.core.url_to_fs(there, skip_instance_cache=True)
    files = system.ls(f"{path}/{config.fingerprint}/shards", detail=False)
    system.get(files, [str(folder / Path(one).name) for one in files])


def _put(there: str, folder: Path) -> None:
    system, path = fsspec.core.url_to_fs(there, skip_instance_cache=True)
    files = sorted(folder.iterdir())
    system.makedirs(f"{path}/copy", exist_ok=True)
    system.put([str(one) for one in files], [f"{path}/copy/{one.name}" for one in files])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--quick", action="store_true", help="Few: only tries the code.")
    arguments = parser.parse_args()
    for title, ways in measure(quick=arguments.quick, url=arguments.url).items():
        print(title)
        for what, seconds in ways.items():
            print(f"{what:<20} {seconds:6.2f}")


if __name__ == "__main__":
    main()
