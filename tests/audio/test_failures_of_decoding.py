"""A file that gives no usable waveform raises AudioDecodeError, and nothing else."""

from __future__ import annotations

import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio.encoded_audio import InMemory, decoded

from lmdbcache.audio import load_clip
from lmdbcache.errors import AudioDecodeError, MissingDependencyError


def refusal(path: Path | str) -> str:
    with pytest.raises(AudioDecodeError) as caught:
        load_clip(path, 16000, 5.0)
    message = str(caught.value)
    message.encode("utf-8")  # printable: no lone surrogates
    assert Path(os.fsdecode(path)).name.split("\udce9")[0] in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
    return message


@pytest.fixture
def wav(tmp_path) -> Path:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 48000)
    soundfile.write(tmp_path / "clip.wav", samples, 16000)
    return tmp_path / "clip.wav"


def test_paths_that_are_no_readable_file(tmp_path, wav):
    """Each is refused by name; a pipe isn't waited for."""
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (
        tmp_path / "absent.wav",
        os.fsdecode(os.fsencode(tmp_path) + b"/latin\xe9.wav"),
        tmp_path,
        tmp_path / "pipe.wav",
        wav / "inside.wav",
        tmp_path / ("x" * 300),
        f"{tmp_path}/a\0b.wav",
    ):
        refusal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(wav):
    """A file that may not be read is refused."""
    wav.chmod(0)
    refusal(wav)


def test_empty_and_foreign_content(tmp_path):
    """An empty file, text and random bytes are not audio, from a path and from bytes."""
    path = tmp_path / "clip.wav"
    noise = random.Random(0).randbytes(5000)
    for content in (b"", b"<html>404 Not Found</html>", bytes(5000), noise):
        path.write_bytes(content)
        refusal(path)
        with pytest.raises(AudioDecodeError, match="row 3 of a table"):
            load_clip(InMemory(content), 16000, 1.0)


def test_a_source_that_cannot_be_opened():
    """Its error is the clip's error."""

    class Gone(InMemory):
        def open_binary(self):
            raise OSError("the table is gone")

    with pytest.raises(AudioDecodeError, match="row 3 of a table: .*the table is gone"):
        load_clip(Gone(b""), 16000, 1.0)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_no_samples(tmp_path, suffix):
    """A well-formed file of zero frames is refused, not padded to silence."""
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, np.zeros(0, dtype=np.float32), 16000)
    refusal(path)


def test_too_short_for_one_sample(tmp_path):
    """One frame at 96 kHz is nothing at 16 kHz."""
    soundfile.write(tmp_path / "clip.wav", np.ones(1), 96000)
    refusal(tmp_path / "clip.wav")


@pytest.mark.parametrize("file_rate", [16000, 44100])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, value, file_rate):
    """One NaN or Inf sample spoils a clip, resampled or not."""
    samples = np.zeros(file_rate, dtype=np.float32)
    samples[file_rate // 2] = value
    soundfile.write(tmp_path / "clip.wav", samples, file_rate, subtype="FLOAT")
    refusal(tmp_path / "clip.wav")


@pytest.mark.parametrize("rate", [0, 2**31 - 1, 2**32 - 1])
def test_absurd_rate_in_the_header(wav, rate):
    """A damaged sample rate ends in our error, fast and without gigabytes."""
    content = bytearray(wav.read_bytes())
    content[24:28] = struct.pack("<I", rate)
    wav.write_bytes(content)
    refusal(wav)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_damage_anywhere(tmp_path, suffix):
    """Whatever bytes are overwritten or lost: a finite waveform or AudioDecodeError."""
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.1, 0.1, (8000, 2)), 16000)
    sound, chance = path.read_bytes(), random.Random(suffix)
    refused = 0
    for _ in range(150):
        content = bytearray(sound)
        for _ in range(chance.randint(1, 8)):
            # Mostly in the header, where it does most harm.
            reach = 64 if chance.random() < 0.7 else len(content)
            content[chance.randrange(min(reach, len(content)))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice((len(content), chance.randrange(len(content))))])
        try:
            waveform = decoded(path, 16000, 5.0)
        except AudioDecodeError:
            refused += 1
        else:
            assert 1 <= len(waveform) <= 80000
            assert np.isfinite(waveform).all()
    assert refused


@pytest.mark.parametrize(
    ("package", "decoder", "other"),
    [("soundfile", "soundfile", "ffmpeg"), ("av", "ffmpeg", "soundfile")],
)
def test_missing_package_names_the_remedy(package, decoder, other):
    """Without its package a decoder says what to install, and the other one works."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from lmdbcache.audio import load_clip\n"
        "from lmdbcache.errors import AudioDecodeError, MissingDependencyError\n"
        f"try: load_clip('clip.wav', 16000, 5.0, {decoder!r})\n"
        "except MissingDependencyError as error: print(error)\n"
        f"try: load_clip('absent.wav', 16000, 5.0, {other!r})\n"
        "except AudioDecodeError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install" in result.stdout
    assert "absent.wav" in result.stdout
    assert issubclass(MissingDependencyError, ImportError)
