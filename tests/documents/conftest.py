"""The folder that the documents take for granted."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents.program_server import ProgramServer
from playground import make_playground
from sharing.places import s3_client, s3_environment
from sharing.server_fixtures import kept, moto  # noqa: F401 - fixtures

PACKAGE = Path(__file__).resolve().parents[2]
# Stands in for SLURM's: two tasks, the options left out.
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
export SLURM_NTASKS=2
for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""
# Stands in for `sbatch --wait --wrap`: an array of two tasks, whatever it says.
SBATCH = """#!/bin/bash
while [[ $1 != --wrap ]]; do [[ $1 == --array=* ]] && array=yes; shift; done
[[ $array ]] || exit 64
export SLURM_ARRAY_TASK_COUNT=2 SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_MAX=1
export SLURM_ARRAY_TASK_STEP=1 SLURM_ARRAY_TASK_ID
for SLURM_ARRAY_TASK_ID in 0 1; do sh -c "$2" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """What `make playground` makes."""
    folder = tmp_path_factory.mktemp("documents")
    make_playground(folder)  # takes 5 s
    return folder


@pytest.fixture(scope="session")
def program_server(world, tmp_path_factory):
    """Where the programs of the pages are forked from: started with what libraries read early."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment_of(world).items():
            patch.setenv(variable, value)
        folder = tmp_path_factory.mktemp("server")
        patch.setenv("XDG_CACHE_HOME", str(folder / "user-cache"))
        server = ProgramServer(folder / "programs")
    yield server
    server.close()


@pytest.fixture(scope="session")
def filled_cache(world, program_server) -> Path:
    """`VEGAS.cache` after `lmdbcache extract VEGAS --model ast`."""
    subprocess.run(
        program_server.command("lmdbcache.cli.main", "extract", "VEGAS")
        + ["--root", "VEGAS.cache", "--model", "ast", "--num-workers", "0"],
        cwd=world,
        env={**os.environ, **environment_of(world)},
        check=True,
        capture_output=True,
    )
    return world / "VEGAS.cache"


def environment_of(world: Path) -> dict[str, str]:
    return {
        "HF_HUB_CACHE": str(world / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(PACKAGE),
    }


@pytest.fixture
def reader_at_home(world, program_server, tmp_path, monkeypatch) -> Path:
    """A copy of the world as the working folder, and the programs that the documents call."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("VEGAS", "my-ast", "ESC-50"):
        shutil.copytree(world / name, home / name)
    programs = tmp_path / "programs"
    programs.mkdir()
    modules = {
        "lmdbcache": "lmdbcache.cli.main",
        "torchrun": "torch.distributed.run",
        "accelerate": "accelerate.commands.accelerate_cli",
    }
    commands = {name: program_server.command(module) for name, module in modules.items()}
    commands["python"] = [sys.executable]
    scripts = {
        name: f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n' for name, command in commands.items()
    }
    for name, script in {**scripts, "srun": SRUN, "sbatch": SBATCH}.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.chdir(home)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    for variable, value in environment_of(world).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("LMDBCACHE_ROOT", raising=False)
    return home


@pytest.fixture
def with_a_bucket(request, monkeypatch):
    """An S3 server with a bucket `bucket`, which the environment names."""
    endpoint = request.getfixturevalue("moto").endpoint
    s3_client(endpoint).create_bucket(Bucket="bucket")
    for variable, value in {**s3_environment(endpoint), "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(variable, value)
