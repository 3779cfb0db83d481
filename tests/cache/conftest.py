"""A folder of files, and a store that was filled from them."""

from __future__ import annotations

import numpy as np
import pytest

from lmdbcache.cache import SourceRecorder, source_of


@pytest.fixture
def clips(tmp_path):
    """Twelve files in two classes: sample id → path."""
    clips = {}
    for number in range(12):
        name = "dog" if number % 2 else "drum"
        path = tmp_path / "data" / name / f"video_{number:05d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content %d" % number)
        clips[f"video_{number:05d}:{name}"] = str(path)
    return clips


@pytest.fixture
def fill(cache, config, tmp_path):
    """Store an embedding for each clip, with its source; other values at each call."""
    calls = []

    def fill(clips, root=tmp_path / "data", **options):
        calls.append(None)
        recorder = SourceRecorder(cache.path(config), root)
        with cache.writer(config, before_commit=recorder, **options) as writer:
            for number, (sample_id, path) in enumerate(clips.items()):
                recorder.note(sample_id, source_of(path))
                writer.put(sample_id, np.full(8, 100 * len(calls) + number, np.float32))

    return fill


@pytest.fixture
def store(fill, clips, cache, config):
    """The folder of a store with all clips in it."""
    fill(clips)
    return cache.path(config)
