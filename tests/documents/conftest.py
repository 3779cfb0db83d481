"""A folder as the documents take it for granted: a dataset, a model, a cache to be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_tables as tables
import pytest
from sharing.places import s3_client, s3_environment
from sharing.server_fixtures import kept, moto  # noqa: F401 - fixtures
from small_ast import save_small_ast
from synthetic_layouts import make_esc50
from synthetic_vegas import make_synthetic_vegas

from lmdbcache.config import DEFAULT_MODEL_NAME

PACKAGE = Path(__file__).resolve().parents[2]
# Stands in for SLURM's: two tasks, the options left out.
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
export SLURM_NTASKS=2
for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Datasets of several layouts, and a model `my-ast/`, also as the Hub's AST."""
    folder = tmp_path_factory.mktemp("documents")
    make_synthetic_vegas(folder / "VEGAS", clips_per_class=4, duration=1.0, broken=False)
    make_esc50(folder / "ESC-50")
    rows = [(name, tables.encoded(name, 0), None) for name in tables.CLASSES]
    tables.table(rows, key=["a", "b", "c"]).save_to_disk(folder / "sounds")
    tags = [["dog"], ["car", "rain"], []]
    feature = tables.datasets.Sequence(tables.datasets.Value("string"))
    several = tables.table(rows).remove_columns("label").add_column("tags", tags, feature=feature)
    several.rename_column("tags", "labels").save_to_disk(folder / "tagged")
    save_small_ast(folder / "my-ast", max_length=512, hidden_size=96)  # takes 5 s
    repository = folder / "hub" / f"models--{DEFAULT_MODEL_NAME.replace('/', '--')}"
    shutil.copytree(folder / "my-ast", repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return folder


@pytest.fixture(scope="session")
def filled_cache(world) -> Path:
    """`VEGAS.cache` after `lmdbcache extract VEGAS --model ast`."""
    environment = {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "lmdbcache.cli.main", "extract", "VEGAS"]
        + ["--root", "VEGAS.cache", "--model", "ast", "--num-workers", "0"],
        cwd=world,
        env={**os.environ, **environment, **hub(world)},
        check=True,
        capture_output=True,
    )
    return world / "VEGAS.cache"


def hub(world: Path) -> dict[str, str]:
    return {"HF_HUB_CACHE": str(world / "hub"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def reader_at_home(world, tmp_path, monkeypatch) -> Path:
    """A copy of the world as the working folder, and the programs that the documents call."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("VEGAS", "my-ast", "ESC-50", "sounds", "tagged"):
        shutil.copytree(world / name, home / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    modules = {
        "lmdbcache": "-m lmdbcache.cli.main",
        "python": "",
        "torchrun": "-m torch.distributed.run",
        "accelerate": "-m accelerate.commands.accelerate_cli",
    }
    scripts = {
        name: f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n'
        for name, module in modules.items()
    }
    for name, script in {**scripts, "srun": SRUN}.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.chdir(home)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    for variable, value in hub(world).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("LMDBCACHE_ROOT", raising=False)
    return home


@pytest.fixture
def with_a_bucket(request, monkeypatch):
    """An S3 server with a bucket `bucket`, which the environment names."""
    endpoint = request.getfixturevalue("moto").endpoint
    s3_client(endpoint).create_bucket(Bucket="bucket")
    for variable, value in {**s3_environment(endpoint), "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(variable, value)
