"""Decoding: every format, rate, name and source gives the waveform that was written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from audio.encoded_audio import InMemory, decoded
from synthetic_layouts import tone, write_audio

from lmdbcache.audio import (
    AudioSource,
    as_source,
    fit,
    is_digital_silence,
    load_clip,
    load_waveform,
    shown,
)
from lmdbcache.errors import AudioDecodeError


def sine(rate: int, seconds: float, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)).astype(
        np.float32
    )


def noise(num_samples: int, channels: int = 1) -> np.ndarray:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (num_samples, channels))
    return samples.astype(np.float32)


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 1e-2),
        ("wav", "PCM_16", 4e-5),
        ("wav", "PCM_24", 2e-7),
        ("wav", "PCM_32", 1e-7),
        ("wav", "FLOAT", 0),
        ("wav", "DOUBLE", 0),
        ("flac", "PCM_16", 4e-5),
        ("flac", "PCM_24", 2e-7),
        ("ogg", "VORBIS", 5e-2),
        ("mp3", "MPEG_LAYER_III", 5e-2),
    ],
)
def test_formats(tmp_path, suffix, subtype, tolerance):
    """A clip at the wanted rate comes back within the error of its coding."""
    path, written = tmp_path / f"clip.{suffix}", sine(16000, 2)
    soundfile.write(path, written, 16000, subtype=subtype)
    waveform = decoded(path, 16000, 5.0)
    assert waveform.dtype == np.float32
    assert waveform.shape == written.shape
    assert np.abs(waveform - written)[200:-200].max() <= tolerance


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_16_bit_samples_are_scaled_as_libsndfile_does(tmp_path, suffix, channels):
    """Reading integers gives the same bits, also at both ends of the range."""
    integers = np.random.default_rng(0).integers(-(2**15), 2**15, (8000, channels), np.int16)
    integers[0], integers[1] = -(2**15), 2**15 - 1
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, integers, 16000, subtype="PCM_16")
    scaled, _ = soundfile.read(path, dtype="float32", always_2d=True)
    expected = scaled.mean(axis=1) if channels != 2 else (scaled[:, 0] + scaled[:, 1]) / 2
    assert np.array_equal(decoded(path, 16000, 5.0), expected)


@pytest.mark.parametrize("file_rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_resampling_keeps_frequency_and_level(tmp_path, file_rate):
    """A sine keeps its frequency within one bin and its RMS within 0.1 %."""
    soundfile.write(tmp_path / "clip.wav", sine(file_rate, 4, 1000.0), file_rate, subtype="FLOAT")
    waveform = decoded(tmp_path / "clip.wav", 16000, 3.0)
    assert waveform.shape == (48000,)
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    assert abs(np.argmax(spectrum) / 3.0 - 1000.0) < 0.34
    middle = waveform[4000:-4000]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=1e-3)


def test_resampling_removes_what_the_target_rate_cannot_hold(tmp_path):
    """A tone above half the target rate doesn't fold back."""
    soundfile.write(tmp_path / "clip.wav", sine(48000, 2, 11000.0), 48000, subtype="FLOAT")
    assert np.abs(decoded(tmp_path / "clip.wav", 16000, 1.5)[500:-500]).max() < 1e-3


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(
    ("file_rate", "rate"),
    [(16000, 16000), (44100, 16000), (8000, 16000), (11025, 16000), (96000, 16000), (44100, 1000)],
)
def test_reading_the_head_equals_cropping_a_full_decode(tmp_path, file_rate, rate, channels):
    """The mono mean of the head; the rest of the file changes nothing."""
    frames = noise(file_rate * 6, channels)
    soundfile.write(tmp_path / "clip.wav", frames, file_rate, subtype="FLOAT")
    whole = frames.mean(axis=1)
    if file_rate != rate:
        whole = soxr.resample(whole, file_rate, rate, quality="HQ")
    head = decoded(tmp_path / "clip.wav", rate, 2.5)
    assert head.shape == (round(rate * 2.5),)
    np.testing.assert_allclose(head, whole[: len(head)], atol=1e-6)


@pytest.mark.parametrize("file_rate", [16000, 44100])
def test_only_the_head_is_read(tmp_path, file_rate):
    """Damage behind duration and margin is never reached."""
    path = tmp_path / "clip.flac"
    soundfile.write(path, noise(file_rate * 10), file_rate)
    whole = decoded(path, 16000, 2.0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    np.testing.assert_array_equal(decoded(path, 16000, 2.0), whole)
    with pytest.raises(AudioDecodeError):
        decoded(path, 16000, 8.0)


@pytest.mark.parametrize(
    "name",
    [
        b"a clip with spaces.wav",
        b"12:34:56.wav",
        "voilà Ünï 音.wav".encode(),
        b"latin\xe9.wav",
        b"upper.WAV",
        b"no_suffix",
        b"wrong.mp3",
        b"-dash%s.wav",
    ],
)
def test_file_names(tmp_path, name):
    """Any name that the file system takes is read, non-UTF-8 bytes included."""
    soundfile.write(tmp_path / "plain.wav", sine(16000, 0.5), 16000)
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    try:
        path.write_bytes((tmp_path / "plain.wav").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    expected = decoded(tmp_path / "plain.wav", 16000, 5.0)
    np.testing.assert_array_equal(decoded(path, 16000, 5.0), expected)
    np.testing.assert_array_equal(decoded(str(path), 16000, 5.0), expected)


@pytest.mark.parametrize("duration", [0.5, 1.0, 1.23457, 3.0])
def test_load_waveform_has_exactly_the_duration(tmp_path, duration):
    """Long clips are cut, short ones zero-padded at the end."""
    clip = noise(16000)
    soundfile.write(tmp_path / "clip.wav", clip, 16000, subtype="FLOAT")
    waveform = load_waveform(tmp_path / "clip.wav", 16000, duration)
    assert waveform.shape == (round(16000 * duration),)
    kept = min(16000, len(waveform))
    np.testing.assert_array_equal(waveform[:kept], clip[:kept, 0])
    assert is_digital_silence(waveform[kept:])


def test_fit_never_aliases_its_input():
    """The result is a new float32 array also where nothing has to change."""
    waveform = np.ones(10, dtype=np.float32)
    fitted = fit(waveform, 10)
    fitted[0] = 5
    assert waveform[0] == 1
    np.testing.assert_array_equal(fit(waveform, 4), np.ones(4))
    np.testing.assert_array_equal(fit(waveform, 12), [1] * 10 + [0, 0])


def test_digital_silence_means_every_sample_is_zero(tmp_path):
    """One sample of the lowest level is not silence; zeros of either sign are."""
    quiet = np.zeros(16000, dtype=np.int16)
    soundfile.write(tmp_path / "zeros.wav", quiet, 16000)
    assert is_digital_silence(decoded(tmp_path / "zeros.wav", 16000, 1.0))
    quiet[-1] = 1
    soundfile.write(tmp_path / "one.wav", quiet, 16000)
    assert not is_digital_silence(decoded(tmp_path / "one.wav", 16000, 1.0))
    assert is_digital_silence(np.array([0.0, -0.0], dtype=np.float32))


@pytest.mark.parametrize("form", [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_channels_that_cancel_are_reported(tmp_path, form):
    """Opposite channels are noticed from files of any coding, and below 30 dB only."""
    path, left = tmp_path / "clip", sine(16000, 1)
    for factor, cancels in ((-1.0, True), (-0.96, True), (-0.9, False), (0.5, False)):
        samples = np.stack([left, np.float32(factor) * left], axis=1)
        soundfile.write(path, samples, 16000, format=form[0], subtype=form[1])
        assert load_clip(path, 16000, 1.0).is_cancelled == cancels, factor


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_bytes_give_what_the_file_gives(tmp_path, suffix):
    """The same bits from a file and from its bytes, in every format."""
    path = write_audio(tmp_path / f"clip.{suffix}", tone("bell"))
    source = InMemory(path.read_bytes())
    assert isinstance(source, AudioSource)
    for rate in (16000, 8000):
        assert decoded(source, rate, 0.2).tobytes() == decoded(path, rate, 0.2).tobytes()


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "caf", "au"])
def test_content_read_before_gives_what_the_file_gives(tmp_path, suffix):
    """Sound or damaged, named well or badly: the same bits or the same error; one read if sound."""
    random = np.random.default_rng(0)
    sound = write_audio(tmp_path / f"sound.{suffix}", tone("bell")).read_bytes()
    for number in range(60):
        content = bytearray(sound[: len(sound) // 2] if number % 5 == 3 else sound)
        for place in random.integers(0, min(len(content), 400), size=number % 4):
            content[place] = random.integers(256)
        name = "vox" if number % 12 == 8 else suffix  # to libsndfile an encoding without a header
        content[:2] = bytes(2) if name == "vox" else content[:2]
        path = tmp_path / f"clip{number}.{name}"
        path.write_bytes(content)
        expected = outcome(path)
        assert outcome(path, content=bytes(content)) == expected, number
        if not number:
            path.unlink()
            assert outcome(path, content=sound) == expected


def outcome(path, **given):
    try:
        clip = load_clip(path, 8000, 0.2, **given)
    except AudioDecodeError as error:
        return str(error)
    return clip.waveform.tobytes(), clip.num_valid, clip.is_cancelled


def test_paths_stay_paths():
    """Text and Path objects are paths, although a Path can be opened."""
    assert as_source(Path("a.wav")) == "a.wav"
    assert as_source("a.wav") == "a.wav"
    source = InMemory(b"")
    assert as_source(source) is source
    with pytest.raises(TypeError):
        as_source(5)
    assert shown(os.fsdecode(b"caf\xe9.wav")) == r"caf\xe9.wav"
    assert shown(source) == "row 3 of a table"
