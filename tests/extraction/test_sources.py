"""The extraction and the files it read: recorded before decoding, computed again when changed."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from extraction.clips import NUM_CLIPS, Steps, tone, write, write_tones
from extraction.processes import hold_after

from lmdbcache import CacheConfig, model_identity
from lmdbcache.cache import SOURCES_NAME, check_sources, recorded_sources
from lmdbcache.extraction import decoding


@pytest.fixture
def own_clips(tmp_path):
    """Five clips that a test may change."""
    return write_tones(tmp_path / "data", 5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_stored_clip_has_its_record(
    run, cache, config, tmp_path, own_clips, bad_clips, num_workers
):
    """What is stored is recorded with size, time and digest; what fails isn't."""
    run({**own_clips, **bad_clips}, num_workers=num_workers, dataset_root=tmp_path / "data")
    found = {i: source for i, _, source in recorded_sources(cache.path(config))}
    assert found.keys() == own_clips.keys()
    for sample_id, source in found.items():
        stat = os.stat(own_clips[sample_id])
        assert (source.size, source.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        assert len(source.digest) == 16
        assert source.root == str(tmp_path / "data")
        assert not Path(source.path).is_absolute()
    assert check_sources(cache.path(config)).found == ()


def test_a_file_replaced_while_it_is_decoded_is_called_changed(
    run, cache, config, own_clips, monkeypatch
):
    """The record is of the file before decoding, so a later one can't pass for it."""
    victim = own_clips["video_00002:dog"]
    load_clip = decoding.load_clip

    def replacing(path, *rest, content):
        if path == victim:
            write(Path(victim), tone(900.0))
        return load_clip(path, *rest, content=content)

    monkeypatch.setattr(decoding, "load_clip", replacing)
    run(own_clips)
    assert check_sources(cache.path(config)).ids("changed") == ["video_00002:dog"]


def test_changed_clips_are_counted_and_computed_again_on_request(
    run, cache, config, own_clips, stored
):
    """A cached run says how many files differ; `recompute_changed` replaces what really changed."""
    run(own_clips)
    before = stored()
    write(Path(own_clips["video_00001:dog"]), tone(800.0))
    os.utime(own_clips["video_00003:dog"])
    summary = run(own_clips)
    assert (summary.num_cached, summary.num_suspects) == (5, 2)
    assert "2 cached clips" in str(summary)
    np.testing.assert_equal(stored(), before)
    summary = run(own_clips, recompute_changed=True)
    assert (summary.num_samples, summary.num_cached, summary.num_extracted) == (5, 4, 1)
    after = stored()
    assert not np.allclose(after["video_00001:dog"], before["video_00001:dog"])
    del after["video_00001:dog"], before["video_00001:dog"]
    np.testing.assert_equal(after, before)
    assert check_sources(cache.path(config)).ids("changed") == []
    assert run(own_clips, recompute_changed=True).num_extracted == 0


def test_changed_and_missing_in_one_run(run, own_clips, cache, config):
    """What is missing is computed, too; a file that became rubbish fails and stays changed."""
    some = dict(list(own_clips.items())[:3])
    run(some)
    write(Path(some["video_00000:dog"]), tone(800.0))
    Path(some["video_00001:dog"]).write_bytes(b"rubbish")
    summary = run(own_clips, recompute_changed=True)
    assert (summary.num_extracted, summary.num_cached, len(summary.failures)) == (3, 1, 1)
    assert check_sources(cache.path(config)).ids("changed") == ["video_00001:dog"]


def test_moved_dataset_is_no_change(run, own_clips, tmp_path):
    """A dataset found elsewhere with the same sizes and times is the same."""
    run(own_clips)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    moved = {i: path.replace("/data/", "/moved/") for i, path in own_clips.items()}
    assert run(moved).num_suspects == 0
    assert run(moved, recompute_changed=True).num_extracted == 0


def test_damaged_records_stop_no_extraction(run, cache, config, own_clips, stored, caplog):
    """The embeddings are stored; `verify --sources` will say what is wrong."""
    run(dict(list(own_clips.items())[:2]))
    (cache.path(config) / SOURCES_NAME).write_bytes(b"rubbish" * 1000)
    assert run(own_clips).num_extracted == 3
    assert stored().keys() == own_clips.keys()
    assert caplog.text.count("isn't recorded") == 1
    assert run(own_clips).num_suspects == 0


def test_killed_runs_leave_no_embedding_without_a_record(
    start, dataset_folder, ast_folder, cache, tmp_path
):
    """kill -9 at any moment: each embedding of a new run has the record of its file."""
    config = CacheConfig(duration=0.5, model_name=model_identity(ast_folder), namespace="vegas")
    fixed = ("--root", cache.root, "--model", ast_folder, "--duration", 0.5, "--class", "dog")
    often = ("--batch-size", 1, "--commit-seconds", 0, "--num-workers", 1)
    hold = partial(hold_after, NUM_CLIPS // 4)
    seen = 0
    for _ in range(3):
        command = start("extract", dataset_folder, *fixed, *often, prepare=hold)

        def has_more(before=seen):
            return config in cache and len(list(recorded_sources(cache.path(config)))) > before

        command.wait_until(has_more)
        command.signal(signal.SIGKILL)
        command.wait()
        report = check_sources(cache.path(config))
        assert report.found == ()
        seen = report.num("unchanged")
        assert seen


class Rival:
    """Stores other bits of a clip, as another run would, before it computes any."""

    outputs = ("pooler_output",)
    embedding_shape = (4,)

    def __init__(self, cache, config, sample_id):
        self.store = lambda: self._store(cache, config, sample_id)

    def _store(self, cache, config, sample_id):
        self.store = lambda: None
        with cache.writer(config, without_provenance=True) as writer:
            assert writer.put(sample_id, np.full(4, 7.0))

    def embed(self, features):
        self.store()
        return features.flatten(1)[:, :4].clone()

    def provenance(self):
        return {}


def test_only_changed_clips_are_written_over(run, cache, config, own_clips, stored):
    """What another run has stored meanwhile stays, though changed clips are replaced."""
    *first, missing = own_clips
    rest = {sample_id: own_clips[sample_id] for sample_id in first}
    run(rest, front_end=Steps(), make_embedder=lambda: Rival(cache, config, missing[:-3] + "cat"))
    before = stored()
    write(Path(own_clips[first[0]]), tone(900.0))
    run(
        own_clips,
        front_end=Steps(),
        make_embedder=lambda: Rival(cache, config, missing),
        recompute_changed=True,
    )
    after = stored()
    assert not np.array_equal(after[first[0]], before[first[0]])
    np.testing.assert_array_equal(after[missing], np.full(4, 7.0))
    assert cache.verify(config).is_sound
