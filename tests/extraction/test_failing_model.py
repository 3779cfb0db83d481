"""Models and front ends that fail: what was computed is kept, and the error says what to do."""

from __future__ import annotations

import shutil

import pytest
import torch

from lmdbcache.cache import FAILURES_NAME
from lmdbcache.embedders import ASTEmbedder, find_checkpoint
from lmdbcache.errors import ExtractionError, ModelLoadError


class Failing(ASTEmbedder):
    """A real model whose third batch meets `accident`."""

    accident: object = None
    num_batches = 0

    def embed(self, features):
        self.num_batches += not torch.equal(features[0], features[1])  # copies of one clip
        embeddings = super().embed(features)
        if self.num_batches == 3:
            if isinstance(self.accident, BaseException):
                raise self.accident
            embeddings[0] = float(self.accident)
        return embeddings


@pytest.fixture
def failing(ast_folder):
    def failing(accident):
        embedder = Failing(find_checkpoint(ast_folder))
        embedder.accident = accident
        return lambda: embedder

    return failing


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_model_that_gives_nan(run, stored, clips, failing, value):
    """The clip whose embedding isn't finite fails by name and path; the others are stored."""
    summary = run(clips, batch_size=2, make_embedder=failing(value))
    (failure,) = summary.failures
    assert failure.sample_id == "video_00004:dog"
    assert failure.path == clips["video_00004:dog"]
    assert failure.reason
    assert stored().keys() == clips.keys() - {"video_00004:dog"}
    assert run(clips).num_extracted == 1


def test_out_of_memory(run, stored, clips, failing):
    """Too little memory is our error with a remedy; what was computed before is stored."""
    accident = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")
    with pytest.raises(ExtractionError, match="batch_size") as caught:
        run(clips, batch_size=2, make_embedder=failing(accident))
    assert "\n" not in str(caught.value)
    assert len(stored()) == 4


def test_any_other_error_keeps_what_was_computed(run, stored, clips, failing):
    """A bug in a model of one's own comes out as it is, after a commit."""
    with pytest.raises(ZeroDivisionError):
        run(clips, batch_size=2, make_embedder=failing(ZeroDivisionError("mine")))
    assert len(stored()) == 4


def test_interrupt_keeps_what_was_computed(run, stored, clips, failing):
    """So does Ctrl-C."""
    with pytest.raises(KeyboardInterrupt):
        run(clips, batch_size=2, make_embedder=failing(KeyboardInterrupt()))
    assert len(stored()) == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_front_end_that_cannot_be_loaded(run, clips, ast_folder, tmp_path, num_workers):
    """A broken preprocessor is one line of ours, in a worker process, too."""
    folder = shutil.copytree(ast_folder, tmp_path / "small-ast")
    (folder / "preprocessor_config.json").write_text('{"max_length": 128,')
    with pytest.raises(ModelLoadError, match="preprocessor_config") as caught:
        run(clips, model=folder, num_workers=num_workers)
    assert "\n" not in str(caught.value)


class FailsInWorkers:
    """A front end that finds out only where it runs that its files are damaged."""

    min_samples = 400

    def __call__(self, _):
        raise ModelLoadError("front end: its files are damaged; download it again")

    def provenance(self):
        return {}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_error_in_a_worker_has_no_traceback_in_it(run, cache, clips, num_workers):
    """An error of ours that ends the run crosses the process border as the line that it is."""
    with pytest.raises(ModelLoadError) as caught:
        run(clips, front_end=FailsInWorkers(), num_workers=num_workers)
    assert str(caught.value) == "front end: its files are damaged; download it again"
    assert cache.stores() == []


def test_unwritable_list_of_failures(run, stored, cache, config, clips, tmp_path, caplog):
    """A list of failures that can't be written is reported and ends nothing."""
    run(dict(list(clips.items())[:1]))
    (cache.path(config) / FAILURES_NAME).mkdir()
    (cache.path(config) / FAILURES_NAME / "something").touch()
    summary = run({**clips, "vanished:dog": str(tmp_path / "vanished.wav")})
    assert len(summary.failures) == 1
    assert stored().keys() == clips.keys()
    assert "failures.json can't be written" in caplog.text
    assert not list(cache.path(config).glob(".*.tmp"))
