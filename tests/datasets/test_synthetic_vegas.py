"""The synthetic VEGAS that demos and tests run on."""

from __future__ import annotations

import filecmp

import numpy as np
import pytest
import soundfile
from synthetic_vegas import SAMPLE_RATES, make_synthetic_vegas

from lmdbcache.datasets import CLASS_LABELS


def test_layout_and_variety(tmp_path):
    """Ten classes, mixed sample rates, one stereo clip, one file that isn't audio."""
    make_synthetic_vegas(tmp_path, clips_per_class=2, duration=0.5)
    clips = sorted(tmp_path.glob("*/audios/*.wav"))
    assert {clip.parts[-3] for clip in clips} == set(CLASS_LABELS)
    assert len(clips) == 20
    rates, channels, broken = set(), [], []
    for clip in clips:
        try:
            info = soundfile.info(clip)
        except soundfile.LibsndfileError:
            broken.append(clip)
            continue
        rates.add(info.samplerate)
        channels.append(info.channels)
        assert info.duration == pytest.approx(0.5, abs=1e-3)
    assert rates == set(SAMPLE_RATES)
    assert sorted(channels) == [1] * 18 + [2]
    assert [clip.parts[-3] for clip in broken] == ["water_flowing"]


def test_same_seed_same_bytes(tmp_path):
    """A folder can be made again bit by bit; another seed gives other clips."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_synthetic_vegas(tmp_path / name, clips_per_class=1, seed=seed, duration=0.2)
    files = [str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").glob("*/audios/*")]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files
    same = filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", files, shallow=False)[0]
    assert [name.split("/")[0] for name in same] == ["water_flowing"]  # the broken one


def test_clips_are_audible_and_differ(shared_root):
    """Every clip has sound in it, and no two of a class are alike."""
    for class_name in CLASS_LABELS:
        heard = []
        for clip in sorted((shared_root / class_name / "audios").iterdir()):
            waveform, _ = soundfile.read(clip)
            assert np.isfinite(waveform).all()
            assert 0.1 < np.abs(waveform).max() <= 1.0
            heard.append(waveform.tobytes())
        assert len(set(heard)) == 6
