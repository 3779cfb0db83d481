"""A small AST, a few clips, and a cache for the tests of the extraction."""

from __future__ import annotations

import pytest
from extraction.clips import NUM_CLIPS, write_bad, write_tones
from extraction.processes import Command
from small_ast import save_small_ast

from lmdbcache import CacheConfig, EmbeddingCache, model_identity
from lmdbcache.extraction import extract

DURATION = 0.5


@pytest.fixture(scope="session")
def ast_folder(tmp_path_factory):
    """A checkpoint of 128 frames; not to be changed."""
    return save_small_ast(tmp_path_factory.mktemp("ast") / "small-ast", max_length=128)


@pytest.fixture(scope="session")
def other_ast_folder(tmp_path_factory):
    """The same model with other weights."""
    return save_small_ast(tmp_path_factory.mktemp("ast") / "small-ast", seed=1, max_length=128)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Ten different clips: sample id → path; not to be changed."""
    return write_tones(tmp_path_factory.mktemp("clips"), 10)


@pytest.fixture
def bad_clips(tmp_path):
    """Clips that give no embedding: sample id → path."""
    (tmp_path / "bad").mkdir()
    return {sample_id: path for sample_id, (path, _) in write_bad(tmp_path / "bad").items()}


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory):
    """A dataset large enough to be interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("VEGAS")
    write_tones(folder, NUM_CLIPS)
    return folder


@pytest.fixture
def cache(tmp_path):
    return EmbeddingCache(tmp_path / "cache")


@pytest.fixture(scope="session")
def config(ast_folder):
    return CacheConfig(duration=DURATION, model_name=model_identity(ast_folder))


@pytest.fixture
def run(cache, config, ast_folder):
    """`extract` with this test's cache, decoding in this process."""

    def run(clips, config=config, **options):
        options = {"num_workers": 0, "model": ast_folder, "batch_size": 4, **options}
        return extract(cache, config, clips, **options)

    return run


@pytest.fixture
def stored(cache, config):
    """What is stored: sample id → array."""

    def stored(config=config):
        with cache.reader(config) as reader:
            return dict(reader)

    return stored


@pytest.fixture
def start(tmp_path):
    """Start the command line in a process of its own; what is left running is killed."""
    started = []

    def start(*arguments, prepare=None):
        command = Command(tmp_path / f"command-{len(started)}", arguments, prepare)
        started.append(command)
        return command

    yield start
    for command in started:
        command.end()
