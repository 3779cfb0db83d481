"""Processor time of `lmdbcache --help` and `ls`, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lmdbcache import CacheConfig, EmbeddingCache


def measure(*, quick: bool) -> dict[str, dict[str, float]]:
    """Seconds of user and system time by command, in turns; the least of the rounds."""
    with tempfile.TemporaryDirectory() as root:
        for namespace in ("vegas", "esc50"):
            with EmbeddingCache(root).writer(CacheConfig(namespace=namespace)) as writer:
                writer.put("a:dog", np.zeros(768, np.float32))
        command = str(Path(sys.executable).with_name("lmdbcache"))
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
            "lmdbcache --help": [command, "--help"],
            "lmdbcache ls": [command, "ls", "--root", root],
        }
        best = dict.fromkeys(commands, np.inf)
        for _ in range(1 if quick else 10):
            for name, words in commands.items():
                best[name] = min(best[name], _cpu_seconds(words))
    return {"the command, processor time of a fresh process, s": best}


def _cpu_seconds(words: list[str]) -> float:
    before = os.times()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def main() -> None:
    for title, ways in measure(quick="--quick" in sys.argv).items():
        print(title)
        for name, seconds in ways.items():
            print(f"{name:<26} {seconds:.3f}")


if __name__ == "__main__":
    main()
