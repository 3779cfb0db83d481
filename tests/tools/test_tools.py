"""The scripts in tools/, started as users start them."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdbcache import CacheConfig, EmbeddingCache

TOOLS = Path(__file__).parents[2] / "tools"


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, TOOLS / name, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def cache(tmp_path):
    """A store with pages that nobody uses."""
    cache = EmbeddingCache(tmp_path / "cache")
    with cache.writer(CacheConfig(), on_duplicate="overwrite", commit_records=20) as writer:
        for _ in range(5):
            for number in range(100):
                writer.put(f"{number}:dog", np.full(500, number, np.float32))
    return cache


def test_demo(tmp_path):
    """The demo extracts once, computes nothing again, and trains on what is stored."""
    result = script("demo.py", "--folder", tmp_path / "demo", "--clips-per-class", 3)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "30 samples: 0 were cached, 29 extracted, 1 failed" in result.stdout
    assert "30 samples: 29 were cached, 0 extracted, 1 failed" in result.stdout
    assert "second run" in result.stdout
    assert "0 embeddings computed" in result.stdout
    assert "Traceback" not in result.stderr


def test_cache_maintenance_reports(cache):
    """Without options: the sizes of all stores, and nothing changes."""
    before = cache.size()
    result = script("cache_maintenance.py", cache.root)
    assert result.returncode == 0, result.stderr
    assert CacheConfig().fingerprint in result.stdout
    assert cache.size() == before
    (entry,) = json.loads(script("cache_maintenance.py", cache.root, "--json").stdout)
    assert entry["size_bytes"] == before


def test_cache_maintenance_compacts(cache):
    """--compact gives space back and keeps every embedding."""
    (entry,) = json.loads(script("cache_maintenance.py", cache.root, "--compact", "--json").stdout)
    assert entry["bytes_after"] < entry["bytes_before"]
    with cache.reader(CacheConfig()) as reader:
        assert len(reader) == 100
        assert all((reader[f"{number}:dog"] == number).all() for number in range(100))


def test_cache_maintenance_of_nothing(tmp_path):
    """A root without stores is no error."""
    result = script("cache_maintenance.py", tmp_path)
    assert result.returncode == 0
    assert "nothing is stored" in result.stdout


def test_synthetic_vegas_script_is_deterministic(tmp_path):
    """The script makes the same bytes every time."""
    for name in ("a", "b"):
        result = script(
            "synthetic_vegas.py", tmp_path / name, "--clips-per-class", 2, "--duration", 0.3
        )
        assert result.returncode == 0, result.stderr
    files = [str(path.relative_to(tmp_path / "a")) for path in tmp_path.glob("a/*/audios/*.wav")]
    assert len(files) == 20
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files


def test_synthetic_layouts_script_is_deterministic(tmp_path):
    """The same bytes every time, in layouts that are recognized."""
    from lmdbcache.datasets import open_dataset

    for layout in ("esc50", "vggsound", "folder"):
        roots = [tmp_path / name / layout for name in "ab"]
        for root in roots:
            result = script("synthetic_layouts.py", layout, root, "--seconds", 0.1)
            assert result.returncode == 0, result.stderr
        assert open_dataset(roots[0]).kind == layout
        files = [str(path.relative_to(roots[0])) for path in roots[0].rglob("*") if path.is_file()]
        same = [name for name in files if not name.endswith(".ogg")]  # a stream's number is random
        assert filecmp.cmpfiles(*roots, same, shallow=False)[0] == same
        assert len(files) >= 13


def test_small_ast_script_is_deterministic(tmp_path):
    """The same seed gives the same weights, another seed others."""
    from small_ast import save_small_ast

    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = save_small_ast(tmp_path / name, seed=seed, max_length=128)
        digests.append((folder / "model.safetensors").read_bytes())
    assert digests[0] == digests[1] != digests[2]


def test_gpu_check_runs_every_part_on_the_cpu(tmp_path):
    """A quick run has a figure for each part, and none of them fails."""
    report = tmp_path / "figures.json"
    result = script("gpu_check.py", "--device", "cpu", "--quick", "--json", report)
    assert result.returncode == 0, result.stderr
    figures = json.loads(report.read_text("utf-8"))
    words = ("tests that", "log-mel, one", "features to", "extract,", "limit,", "log-mel on", "RAM")
    for word in words:
        assert any(word in name for name in figures), word
    parts = {"tests", "stages", "models", "extractions", "log_mel", "reads"}
    assert not parts & figures.keys(), figures


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_gpu_check_needs_a_gpu():
    """Without one it says so and fails."""
    result = script("gpu_check.py")
    assert (result.returncode, "no GPU" in result.stdout) == (2, True)
