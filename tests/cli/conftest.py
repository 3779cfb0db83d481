"""The command line as users start it, and a root with a few stores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli.command_server import CommandServer
from extraction.clips import write_tones
from small_ast import save_small_ast

from lmdbcache import EmbeddingCache, config_for


@pytest.fixture(scope="session")
def command_server():
    """Where commands are forked from."""
    server = CommandServer()
    yield server
    server.close()


@pytest.fixture
def cli(tmp_path, tmp_path_factory, command_server):
    """Run `lmdbcache …` in a process of its own; the root is this test's, if none is given."""

    def cli(*arguments, root=tmp_path / "cache", stdin="", prepare="", **environment):
        output = tmp_path_factory.mktemp("output") / "of"
        clean = {name: value for name, value in os.environ.items() if name != "LMDBCACHE_ROOT"}
        if root is not None:
            clean["LMDBCACHE_ROOT"] = str(root)
        Path(f"{output}.0").write_bytes(stdin.encode())
        code = command_server.run(
            list(map(str, arguments)),
            {**clean, "HF_HUB_OFFLINE": "1", **environment},
            tmp_path,
            output,
            prepare,
        )
        printed = (Path(f"{output}.{number}").read_bytes().decode("utf-8") for number in (1, 2))
        return subprocess.CompletedProcess(arguments, code, *printed)

    return cli


@pytest.fixture
def refused(cli):
    """Run a command that must fail with one line on standard error; gives that line."""

    def refused(*arguments, code=1, **options):
        result = cli(*arguments, **options)
        assert result.returncode == code, result.stdout + result.stderr
        (line,) = result.stderr.splitlines()
        assert line.startswith("lmdbcache: ")
        assert result.stdout == ""
        return line

    return refused


@pytest.fixture
def imported(tmp_path):
    """Run a command in a new process; gives its exit code and which of some modules it imports."""

    def imported(modules, *arguments):
        code = (
            "import sys\nfrom lmdbcache.cli import main\n"
            f"sys.argv = ['lmdbcache', *{list(map(str, arguments))!r}]\n"
            "try: main()\nexcept SystemExit as stop: code = stop.code\n"
            f"print(code, *({set(modules)!r} & sys.modules.keys()), file=sys.stderr)"
        )
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
        code, *found = result.stderr.splitlines()[-1].split()
        return int(code), set(found)

    return imported


@pytest.fixture
def configs():
    """Three configs of the dataset `vegas`: AST's, as `--model` is by default."""
    one = config_for("ast", duration=1.0, model_name="mine", namespace="vegas")
    return [one, one.replace(output="last_hidden_state"), one.replace(dtype="float16")]


@pytest.fixture
def cache(tmp_path, configs):
    """Three stores of six embeddings each."""
    cache = EmbeddingCache(tmp_path / "cache")
    generator = np.random.default_rng(0)
    for config in configs:
        shape = (3, 8) if config.output == "last_hidden_state" else (8,)
        with cache.writer(
            config, provenance={"weights_digest": "abc"}, dataset_root="/data/Gerätusche"
        ) as writer:
            for number in range(6):
                name = "dog" if number % 2 else "drum"
                writer.put(f"video_{number:05d}:{name}", generator.normal(size=shape))
    return cache


@pytest.fixture(scope="session")
def ast_folder(tmp_path_factory):
    """A checkpoint of 128 frames; not to be changed."""
    return save_small_ast(tmp_path_factory.mktemp("ast") / "small-ast", max_length=128)


@pytest.fixture
def data(tmp_path):
    """A dataset of three dogs and three drums."""
    write_tones(tmp_path / "VEGAS", 3, "dog")
    write_tones(tmp_path / "VEGAS", 3, "drum")
    return tmp_path / "VEGAS"
