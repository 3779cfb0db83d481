"""docs/migrating.md, tried."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from lmdbcache import CacheConfig

ROOT = Path(__file__).resolve().parents[2]


def blocks(language):
    text = (ROOT / "docs" / "migrating.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_document_runs(tmp_path):
    """It makes old caches, imports and exports them as it says."""
    environment = {
        **os.environ, "LMDBCACHE_ROOT": str(tmp_path / "VEGAS.cache"), "PYTHONPATH": str(ROOT)
    }  # fmt: skip

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = blocks("python")
    run("-c", code[0])
    store = CacheConfig(dataset="vegas").fingerprint
    outputs = [
        run("-m", "lmdbcache.cli.main", *line.replace("STORE", store).split()[1:])
        for block in blocks("sh")
        for line in block.splitlines()
    ]
    assert "16 imported" in outputs[1]
    assert "0 imported (0 B), 16 stored already" in outputs[2]
    assert outputs[4].startswith("16 embeddings in 1 file")
    run("-c", "\n".join(code[1:]))
    assert (tmp_path / "VEGAS-npz.npz").is_file()
