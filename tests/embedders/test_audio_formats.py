"""Which suffixes are audio that can be decoded."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from lmdbcache.audio import decode, is_readable
from lmdbcache.audio.formats import readable_suffixes, unreadable_suffixes
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
    assert suffix in readable_suffixes()
    assert is_readable(suffix.upper())
    assert len(decode(path, 16000, 0.5)) == 8000


@pytest.mark.parametrize(
    "suffix", [".m4a", ".aac", ".mp4", ".webm", ".wma", ".amr", ".mka", ".mov"]
)
def test_audio_that_the_decoder_does_not_read_is_known_as_such(suffix: str) -> None:
    assert suffix in unreadable_suffixes()
    assert suffix not in readable_suffixes()


@pytest.mark.parametrize("suffix", ["", ".raw", ".txt", ".json", ".mat", ".jpg", ".xi"])
def test_what_has_no_header_or_is_no_audio_is_not_readable(suffix: str) -> None:
    assert suffix not in readable_suffixes()


def test_an_instrument_without_a_sample_rate_is_refused(tmp_path: Path) -> None:
    """libsndfile would play it at 44,100 Hz, whatever it was recorded at."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.zeros(16000), 16000, format="XI", subtype="DPCM_16")
    with pytest.raises(AudioDecodeError, match="XI"):
        decode(path, 16000, 1.0)


def test_without_soundfile_the_suffixes_are_the_same() -> None:
    script = (
        "import sys; sys.modules['soundfile'] = None\n"
        "from lmdbcache.audio.formats import readable_suffixes as found\n"
        "assert 'torch' not in sys.modules\n"
        "print(*sorted(found()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == sorted(readable_suffixes())


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(ConfigError):
        readable_suffixes("gramophone")
