"""Which suffixes are audio that can be decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
from audio.encoded_audio import decoded

from lmdbcache.audio import is_audio, is_readable, load_clip
from lmdbcache.errors import AudioDecodeError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = {
    "WAV": (".wav", ".wave"),
    "OGG": (".ogg", ".oga", ".opus"),
    "AIFF": (".aiff", ".aif"),
    "AU": (".au", ".snd"),
    "NIST": (".sph",),
    **{name: (f".{name.lower()}",) for name in ("FLAC", "MP3", "W64", "CAF", "RF64", "VOC")},
}
FORMAT_OF = {suffix: name for name, suffixes in FORMATS.items() for suffix in suffixes}


@pytest.mark.parametrize("suffix", FORMAT_OF)
def test_a_readable_suffix_is_one_that_decodes(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    tone = (0.3 * np.sin(np.arange(16000) / 5)).astype(np.float32)
    subtype = "OPUS" if suffix == ".opus" else None
    soundfile.write(path, tone, 16000, format=FORMAT_OF[suffix], subtype=subtype)
    assert is_readable(suffix.upper())
    assert len(decoded(path, 16000, 0.5)) == 8000


@pytest.mark.parametrize(
    "suffix", [".m4a", ".aac", ".mp4", ".webm", ".wma", ".amr", ".mka", ".mov"]
)
def test_audio_that_only_ffmpeg_reads_is_known_as_such(suffix: str) -> None:
    assert is_audio(suffix)
    assert not is_readable(suffix)
    assert is_readable(suffix, "ffmpeg")


@pytest.mark.parametrize("suffix", ["", ".raw", ".txt", ".json", ".mat", ".jpg", ".xi"])
def test_files_without_a_header_or_without_audio_are_not_readable(suffix: str) -> None:
    assert not is_readable(suffix)
    assert not is_readable(suffix, "ffmpeg")


def test_an_instrument_without_a_sample_rate_is_refused(tmp_path: Path) -> None:
    """libsndfile would play it at 44,100 Hz, whatever it was recorded at."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.zeros(16000), 16000, format="XI", subtype="DPCM_16")
    with pytest.raises(AudioDecodeError):
        load_clip(path, 16000, 1.0)


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(ConfigError):
        is_readable(".wav", "gramophone")
