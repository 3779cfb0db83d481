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

from lmdbcache.audio import decode
from lmdbcache.errors import AudioDecodeError, MissingDependencyError


def refusal(path: Path | str) -> str:
    with pytest.raises(AudioDecodeError) as caught:
        decode(path, 16000, 5.0)
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


def test_missing_file(tmp_path):
    """The reason is that there is no such file."""
    assert "no such file" in refusal(tmp_path / "absent.wav")
    assert "no such file" in refusal(os.fsdecode(os.fsencode(tmp_path) + b"/latin\xe9.wav"))


def test_folder_and_special_files(tmp_path):
    """Folders are named as such, and a pipe isn't waited for."""
    assert "folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")
    assert "not a regular file" in refusal(tmp_path / "pipe.wav")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(wav):
    """The reason is the permission."""
    wav.chmod(0)
    assert "permission" in refusal(wav)


def test_path_component_is_a_file_or_too_long(wav, tmp_path):
    """Errors of the file system keep their reason."""
    assert "Not a directory" in refusal(wav / "inside.wav")
    assert "too long" in refusal(tmp_path / ("x" * 300))
    assert "null" in refusal(f"{tmp_path}/a\0b.wav")


def test_empty_and_foreign_content(tmp_path):
    """An empty file, text and random bytes are not audio."""
    path = tmp_path / "clip.wav"
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    for content in (b"<html>404 Not Found</html>", bytes(5000), random.Random(0).randbytes(5000)):
        path.write_bytes(content)
        assert "not readable as audio" in refusal(path)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_no_samples(tmp_path, suffix):
    """A well-formed file of zero frames is refused, not padded to silence."""
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, np.zeros(0, dtype=np.float32), 16000)
    message = refusal(path)
    # libsndfile writes no header either for a flac without samples.
    assert ("0 bytes" if suffix == "flac" else "0 frames") in message


def test_too_short_for_one_sample(tmp_path):
    """One frame at 96 kHz is nothing at 16 kHz."""
    soundfile.write(tmp_path / "clip.wav", np.ones(1), 96000)
    assert "shorter than one sample" in refusal(tmp_path / "clip.wav")


@pytest.mark.parametrize("file_rate", [16000, 44100])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, value, file_rate):
    """One NaN or Inf sample spoils a clip, resampled or not."""
    samples = np.zeros(file_rate, dtype=np.float32)
    samples[file_rate // 2] = value
    soundfile.write(tmp_path / "clip.wav", samples, file_rate, subtype="FLOAT")
    assert "NaN or Inf" in refusal(tmp_path / "clip.wav")


@pytest.mark.parametrize("rate", [0, 2**31 - 1, 2**32 - 1])
def test_absurd_rate_in_the_header(wav, rate):
    """A damaged sample rate ends in our error, fast and without gigabytes."""
    content = bytearray(wav.read_bytes())
    content[24:28] = struct.pack("<I", rate)
    wav.write_bytes(content)
    message = refusal(wav)
    if rate == 2**31 - 1:  # the others are refused by libsndfile
        assert "damaged header" in message


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_cut_off_in_the_middle(tmp_path, suffix):
    """Half a file whose header announces the whole isn't taken for a short clip."""
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.1, 0.1, 48000), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refusal(path)


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
            waveform = decode(path, 16000, 5.0)
        except AudioDecodeError:
            refused += 1
        else:
            assert 1 <= len(waveform) <= 80000
            assert np.isfinite(waveform).all()
    assert refused


def test_missing_package_names_the_remedy():
    """Without soundfile the module imports, and decoding says what to install."""
    code = (
        "import sys; sys.modules['soundfile'] = None\n"
        "from lmdbcache.embedders import audio\n"
        "from lmdbcache.errors import MissingDependencyError\n"
        "try: audio.decode('clip.wav', 16000, 5.0)\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert 'pip install "lmdbcache[audio]"' in result.stdout
    assert issubclass(MissingDependencyError, ImportError)
