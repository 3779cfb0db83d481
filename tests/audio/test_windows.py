"""Windows are what a loop cuts from the whole waveform, sample by sample."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import soundfile
from audio.encoded_audio import InMemory, encoded, tone, write_m4a
from hypothesis import given, strategies as st

from lmdbcache.audio import AudioWindow, load_clip, load_windows, num_windows
from lmdbcache.audio.windows import WindowCutter
from lmdbcache.errors import AudioDecodeError

TAILS = ("pad", "drop", "align")


def cut_by_hand(whole: np.ndarray, size: int, hop: int, tail: str) -> list[tuple[int, np.ndarray]]:
    """Start and samples of each window, shorter where it is padded."""
    starts = [start for start in range(0, len(whole), hop) if start + size <= len(whole)]
    ends_at_the_end = bool(starts) and starts[-1] + size == len(whole)
    if tail == "align" and starts and not ends_at_the_end:
        starts.append(len(whole) - size)
    if tail == "pad" and starts and not ends_at_the_end and starts[-1] + hop < len(whole):
        starts.append(starts[-1] + hop)
    if not starts and tail != "drop":
        starts = [0]
    return [(start, whole[start : start + size]) for start in starts]


@given(
    st.lists(st.integers(0, 40), max_size=12),
    st.integers(1, 25),
    st.integers(1, 40),
    st.sampled_from(TAILS),
)
def test_pieces_of_any_length_give_the_windows_of_the_whole(lengths, size, hop, tail):
    """No window is lost, doubled, or starts behind the end; their number is known beforehand."""
    whole = np.arange(1, 1 + sum(lengths), dtype=np.float32)
    cutter, found, done = WindowCutter(size, hop, tail), [], 0
    for length in lengths:
        found += cutter.add(whole[done : done + length])
        done += length
    if len(whole):
        found += cutter.finish()
        expected = cut_by_hand(whole, size, hop, tail)
        assert [(start, part.tolist()) for start, part in found] == [
            (start, part.tolist()) for start, part in expected
        ]
    assert num_windows(len(whole), size, hop, tail) == cutter.num_windows == len(found)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 16000])
@pytest.mark.parametrize(
    ("form", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", ""), ("OGG", "VORBIS")]
)
def test_windows_of_a_file(form, subtype, rate, channels):
    """Of odd lengths, at any rate: those of the decoded and resampled whole, bit for bit."""
    if form == "MP3":
        subtype, channels = "MPEG_LAYER_III", min(2, channels)
    samples = np.stack([tone(440.0 + 100 * n, 7.1234, rate) for n in range(channels)], 1)
    source = InMemory(encoded(form, subtype, samples, rate=rate))
    clip = load_clip(source, 16000, 12.0)
    whole = clip.waveform[: clip.num_valid]
    for tail in TAILS:
        found = list(load_windows(source, 16000, 16001, 7777, tail))
        for window, (start, part) in zip(found, cut_by_hand(whole, 16001, 7777, tail), strict=True):
            padded = np.pad(part, (0, 16001 - len(part)))
            assert (window.start, window.num_valid) == (start, len(part))
            assert window.waveform.tobytes() == padded.tobytes()


def test_ffmpeg_gives_the_same_windows_as_its_whole(tmp_path):
    """Other decoders are streamed as well, bit for bit."""
    path = tmp_path / "clip.m4a"
    write_m4a(path, tone(440.0, 5.3, 44100), 44100)
    clip = load_clip(path, 16000, 9.0, "ffmpeg")
    found = list(load_windows(path, 16000, 8000, 8000, "pad", "ffmpeg"))
    joined = np.concatenate([window.waveform[: window.num_valid] for window in found])
    assert joined.tobytes() == clip.waveform[: clip.num_valid].tobytes()


def test_a_recording_shorter_than_a_window():
    """It is padded; where only whole windows count, it fails with its length."""
    source = InMemory(encoded("WAV", "PCM_16", tone(seconds=0.5)))
    for tail in ("pad", "align"):
        (window,) = load_windows(source, 8000, 8000, 4000, tail)
        assert (window.start, window.num_valid, len(window.waveform)) == (0, 4000, 8000)
    with pytest.raises(AudioDecodeError, match=r"0\.500 s long"):
        list(load_windows(source, 8000, 8000, 4000, "drop"))


def test_a_file_that_is_cut_or_not_finite_fails():
    """However many of its windows are sound, taking all of them is an error."""
    whole = encoded("WAV", "FLOAT", tone(seconds=6.0))
    spoilt = bytearray(whole)
    spoilt[-8:-4] = np.array([math.nan], "<f4").tobytes()
    for content in (
        whole[:-100],
        bytes(spoilt),
        encoded("FLAC", "PCM_16", tone(seconds=6.0))[:-99],
    ):
        with pytest.raises(AudioDecodeError):
            list(load_windows(InMemory(content), 8000, 8000, 8000))


def test_memory_doesnt_grow_with_the_recording(tmp_path):
    """Twenty minutes of stereo take less than a tenth of their samples."""
    path = tmp_path / "long.wav"
    noise = np.random.default_rng(0).integers(-9999, 9999, (22050 * 60, 2), np.int16)
    with soundfile.SoundFile(path, "w", 22050, 2, "PCM_16") as file:
        for _ in range(20):
            file.write(noise)
    tracemalloc.start()
    number = sum(isinstance(one, AudioWindow) for one in load_windows(path, 16000, 80000, 40000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 479
    assert peak < 16 << 20
