"""Windows that were computed elsewhere: a recording comes in full, or counts as missing."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from storage.damage import data_file, flip_value

from lmdbcache import CacheConfig, EmbeddingCache, export_embeddings, import_embeddings, window_id
from lmdbcache.exchange import intake as intake_module, merge_stores, pull, push
from lmdbcache.storage import first_window, recording_of

NUM_WINDOWS = 12
RECORDINGS = ("a:dog", "b:cat", "c:dog")


@pytest.fixture
def config():
    return CacheConfig(window=1.0, hop=0.5, model_name="m", front_end="f", namespace="w")


@pytest.fixture
def source(tmp_path, config):
    """Three recordings, and the beginning of a fourth."""
    source = EmbeddingCache(tmp_path / "source")
    with source.writer(config) as writer:
        for number, recording in enumerate((*RECORDINGS, "part:dog")):
            for k in range(recording == "part:dog", NUM_WINDOWS):
                value = np.full(600, 100 * number + k + 1, "f4")
                writer.put(window_id(recording, 8000 * k, 16000), value)
    return source


def contents(cache, config):
    with cache.reader(config) as reader:
        return {sample_id: embedding.tobytes() for sample_id, embedding in reader.items()}


def looks_whole(found):
    return {recording for recording in RECORDINGS if first_window(recording) in found}


def is_whole(found):
    counts = [recording_of(sample_id) for sample_id in found]
    return {recording for recording in RECORDINGS if counts.count(recording) == NUM_WINDOWS}


def brought(way, target, source, config, folder):
    """Bring the embeddings from one cache into another."""
    if way == "merge":
        merge_stores(target, [source.root])
        return
    if way == "pull":
        push(source, config, f"file://{folder / 'place'}", writer="w")
        pull(target, config, f"file://{folder / 'place'}")
        return
    path = folder / f"export.{way}"
    if not path.exists():
        export_embeddings(source, config, path, format=way)
    import_embeddings(target, None, path)


@pytest.mark.parametrize("way", ["merge", "pull", "npz", "safetensors"])
@pytest.mark.parametrize("num_commits", [0, 1, 2, 5, 8, None])
def test_a_killed_intake_leaves_no_recording_that_looks_whole(
    tmp_path, source, config, way, num_commits
):
    """Whatever was committed; the next one completes the store, with the bits of the source."""
    target = EmbeddingCache(tmp_path / "target")
    if way == "pull":  # what is shared is complete, only the way into the store is cut
        push(source, config, f"file://{tmp_path / 'place'}", writer="w")
    pid = os.fork()
    if pid == 0:
        signal.alarm(240)
        write, done = intake_module.Intake._write, []

        def write_and_die(self, *arguments):
            if len(done) == num_commits:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(write(self, *arguments))

        intake_module.Intake._write = write_and_die
        intake_module._BATCH_RECORDS = 4
        intake_module._BATCH_BYTES = 4 * 2400
        try:
            brought(way, target, source, config, tmp_path)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    if config in target:
        found = contents(target, config)
        assert looks_whole(found) <= is_whole(found)
    brought(way, target, source, config, tmp_path)
    expected = contents(source, config)
    if way not in ("merge", "pull"):  # an export leaves the unfinished recording out
        expected = {i: value for i, value in expected.items() if recording_of(i) != "part:dog"}
    assert contents(target, config) == expected
    with target.reader(config) as reader:
        assert reader.missing([*RECORDINGS, "part:dog"]) == ["part:dog"]


def test_a_recording_whose_window_is_refused_is_missing(tmp_path, source, config):
    """Its other windows come in; the first, which says that all are there, doesn't."""
    flip_value(data_file(source, config), np.full(600, 105, "f4"))
    target = EmbeddingCache(tmp_path / "target")
    report = merge_stores(target, [source.root])
    assert report.exit_code == 1
    with target.reader(config) as reader:
        assert reader.missing(RECORDINGS) == ["b:cat"]
        assert len(reader.window_ids("b:cat")) == NUM_WINDOWS - 2


def test_recordings_are_chosen_by_their_ids(tmp_path, source, config):
    """An export and a pull take the windows of a recording that is named."""
    export_embeddings(source, config, tmp_path / "one.npz", format="npz", sample_ids=["a:dog"])
    push(source, config, f"file://{tmp_path / 'place'}", writer="w")
    imported, pulled = EmbeddingCache(tmp_path / "imported"), EmbeddingCache(tmp_path / "pulled")
    import_embeddings(imported, None, tmp_path / "one.npz")
    report = pull(pulled, config, f"file://{tmp_path / 'place'}", sample_ids=["a:dog", "z:dog"])
    assert report.absent == ["z:dog"]
    for cache in (imported, pulled):
        with cache.reader(config) as reader:
            assert list(reader.recordings()) == ["a:dog"]
            assert len(reader) == NUM_WINDOWS


def test_what_isnt_a_window_is_refused(tmp_path, config):
    """Under a config with windows, an import of clips brings nothing in."""
    plain = config.replace(window=None)
    cache = EmbeddingCache(tmp_path / "cache")
    with cache.writer(plain) as writer:
        writer.put("clip:dog", np.ones(4))
    export_embeddings(cache, plain, tmp_path / "clips.npz", format="npz")
    report = import_embeddings(cache, config, tmp_path / "clips.npz", ignore_metadata=True)
    assert [refusal.sample_id for refusal in report.refused] == ["clip:dog"]
    assert config not in cache
