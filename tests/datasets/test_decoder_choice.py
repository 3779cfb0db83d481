"""A dataset opened for FFmpeg lists what that reads, and is extracted and found with it."""

from __future__ import annotations

import pytest
import soundfile
from audio.encoded_audio import tone, write_m4a
from embedders.small_folders import folder_of

from lmdbcache import EmbeddingCache, config_for, to_clips
from lmdbcache.datasets import open_dataset
from lmdbcache.errors import ConfigError
from lmdbcache.extraction import extract

pytest.importorskip("av")


@pytest.fixture
def media(tmp_path):
    """One m4a and one wav per class, as a folder of classes and as VEGAS."""
    for place in ("folder/bell", "folder/dog", "vegas/dog/audios", "vegas/drum/audios"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        samples = tone(seconds=1.0, rate=16000)
        soundfile.write(folder / "one.wav", samples, 16000)
        write_m4a(folder / "other.m4a", samples, 16000)
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "vegas"])
def test_listing(media, kind):
    """The decoder decides which files are listed and which are left out."""
    plain, other = open_dataset(media / kind), open_dataset(media / kind, decoder="ffmpeg")
    assert plain.kind == other.kind == kind
    assert (len(plain.samples), len(plain.left_out)) == (2, 2)
    assert (len(other.samples), len(other.left_out)) == (4, 0)
    assert len(open_dataset(media / kind).samples) == 2  # nothing of it stays behind
    with pytest.raises(ConfigError):
        open_dataset(media / kind, decoder="sox")


def test_extraction(media):
    """What soundfile can't decode fails by name; FFmpeg's store has all, apart from the other."""
    dataset = open_dataset(media / "folder", decoder="ffmpeg")
    cache, clips, model = (
        EmbeddingCache(media / "cache"),
        to_clips(dataset.samples),
        folder_of("ast"),
    )
    options = {"duration": 1.0, "dataset": dataset.namespace}
    summary = extract(cache, config_for(model, **options), clips, model=model, num_workers=0)
    assert sorted(each.sample_id for each in summary.failures) == ["other:bell", "other:dog"]
    assert all('decoder="ffmpeg"' in each.reason for each in summary.failures)
    for num_workers in (0, 2):
        config = config_for(model, decoder="ffmpeg", **options)
        summary = extract(cache, config, clips, model=model, num_workers=num_workers)
        assert (summary.num_samples, len(summary.failures)) == (4, 0)
    assert len(cache.stores()) == 2
