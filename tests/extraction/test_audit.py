"""Stored embeddings computed again: the same model agrees, another one is found out."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from extraction.clips import tone, write, write_tones

from lmdbcache.embedders import ASTEmbedder, find_checkpoint
from lmdbcache.errors import ConfigError
from lmdbcache.extraction import audit


@pytest.fixture
def check(cache, config):
    def check(config=config, **options):
        return audit(cache, config, **{"num_workers": 0, "batch_size": 3, **options})

    return check


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32"), ("int8", "float32")]
    + [("float32", "bfloat16")],
)
@pytest.mark.parametrize("output", ["pooler_output", "last_hidden_state"])
def test_the_same_model_agrees(run, check, clips, config, dtype, compute_dtype, output):
    """Other batches, and rounding to the stored dtype, stay within the tolerance."""
    config = config.replace(dtype=dtype, compute_dtype=compute_dtype, output=output)
    run(clips, config)
    report = check(config)
    assert report.is_sound
    assert len(report.samples) == len(clips)
    assert report.samples[0].relative_l2 < report.tolerance / (1.05 if dtype == "int8" else 1.5)
    assert dict(report.differences) == {}
    distances = [sample.relative_l2 for sample in report.samples]
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("output", ["layer:1/mean", "layers/mean", "layer:1", "valid_mean"])
def test_layers_and_means_of_own_frames(run, check, config, output, tmp_path):
    """Each is computed as the extraction does, for clips shorter than the duration as well."""
    clips = write_tones(tmp_path / "data", 4)
    write(Path(clips["video_00001:dog"]), tone(700.0, seconds=0.21))
    config = config.replace(output=output)
    run(clips, config)
    report = check(config, batch_size=4)
    assert report.is_sound
    assert [sample.max_abs for sample in report.samples] == [0.0] * 4


def test_perturbed_weights_are_found(run, check, clips, config, ast_folder):
    """A model whose weights moved by a ten-thousandth gives embeddings that are called drifted."""
    run(clips)

    class Perturbed(ASTEmbedder):
        def __init__(self):
            super().__init__(find_checkpoint(ast_folder))
            for parameter in self._model.parameters():
                parameter.mul_(1 + 1e-4)

    report = check(make_embedder=Perturbed)
    assert not report.is_sound
    assert len(report.drifted) == len(clips)
    assert 1e-5 < report.samples[-1].relative_l2 < 1e-2
    assert check(make_embedder=Perturbed, tolerance=0.1).is_sound


class Scaled(ASTEmbedder):
    """Embeddings that are longer than they should be by a small part, and else the same."""

    def __init__(self, folder, compute_dtype, part):
        super().__init__(find_checkpoint(folder), compute_dtype=compute_dtype)
        self._part = part

    def embed(self, features):
        return super().embed(features).float() * (1 + self._part)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "within", "beyond"),
    [
        # A relative step of the format is 2^-24, 2^-11 or 2^-8; a network amplifies it a few times.
        ("float32", "float32", 3e-6, 1e-4),
        ("float16", "float32", 2e-4, 4e-3),
        ("bfloat16", "float32", 4e-3, 3e-2),
        ("float32", "float16", 4e-3, 3e-2),
        ("float32", "bfloat16", 1e-2, 1e-1),
        ("bfloat16", "float16", 4e-3, 3e-2),
        ("float16", "bfloat16", 1e-2, 1e-1),
    ],
)
def test_tolerance_is_that_of_the_coarser_dtype(
    run, check, clips, config, ast_folder, dtype, compute_dtype, within, beyond
):
    """What rounding explains, of storing or of computing, isn't drift; ten times that is."""
    config = config.replace(dtype=dtype, compute_dtype=compute_dtype)
    some = dict(list(clips.items())[:3])
    run(some, config)
    for part, is_sound in ((within, True), (beyond, False)):
        report = check(config, make_embedder=partial(Scaled, ast_folder, compute_dtype, part))
        assert report.is_sound is is_sound, report.samples[0].relative_l2
        assert len(report.drifted) == (0 if is_sound else 3)


def test_other_weights_are_named(run, check, clips, config, other_ast_folder):
    """Another checkpoint is told by its digest and by what it computes."""
    run(clips, config.replace(model_name="mine"))
    report = check(config.replace(model_name="mine"), model=other_ast_folder)
    assert set(report.differences) == {"weights_digest"}
    assert len(report.drifted) == len(clips)


def test_one_embedding_that_somebody_changed(run, check, clips, cache, config):
    """A single wrong embedding is the farthest; its source is adopted, as it has no record."""
    run(clips)
    with cache.writer(config, on_duplicate="overwrite", without_provenance=True) as writer:
        writer.put("video_00004:dog", np.ones(64))
    assert "video_00004:dog" in check().skipped
    report = check(clips=clips)
    assert [sample.sample_id for sample in report.drifted] == ["video_00004:dog"]
    assert report.samples[0].sample_id == "video_00004:dog"


def test_picks_by_hash(run, check, clips):
    """The same samples each time, others for another seed, and no more than asked for."""
    run(clips)

    def picked(seed):
        return sorted(s.sample_id for s in check(num_samples=4, seed=seed).samples)

    first = picked(0)
    assert len(first) == 4
    assert picked(0) == first
    assert not picked(1) == picked(2) == first
    with pytest.raises(ConfigError, match="num_samples"):
        check(num_samples=0)


def test_changed_sources_are_passed_over(run, check, tmp_path):
    """A file that changed or vanished says nothing about drift; a file that only fails does."""
    clips = write_tones(tmp_path / "data", 5)
    run(clips)
    write(Path(clips["video_00000:dog"]), tone(900.0))
    Path(clips["video_00001:dog"]).unlink()
    report = check()
    assert report.is_sound
    assert {i: why.split(":")[0] for i, why in report.skipped.items()} == {
        "video_00000:dog": "changed",
        "video_00001:dog": "vanished",
    }
    for path in clips.values():
        Path(path).unlink(missing_ok=True)
    report = check()
    assert not report.is_sound
    assert len(report.skipped) == 5


def test_nothing_is_written(run, check, clips, cache, config):
    """No file of the store changes."""
    run(clips)

    def contents():
        return {
            path: (hashlib.sha256(path.read_bytes()).hexdigest(), os.stat(path).st_mtime_ns)
            for path in cache.root.rglob("*")
            if path.is_file() and path.name != "lock.mdb"
        }

    before = contents()
    assert check().is_sound
    assert contents() == before


def test_the_folder_is_remembered(run, check, clips, cache, config):
    """A store that was filled from a folder is audited without naming it."""
    run(clips)
    assert "@" in config.model_name
    assert check().is_sound
    assert cache.info(config).provenance["checkpoint"].endswith("small-ast")


def test_a_negative_tolerance_is_refused(cache, config):
    """It would call everything drift."""
    with pytest.raises(ConfigError, match="tolerance: -1"):
        audit(cache, config, tolerance=-1)
