"""Clips that aren't files of their own."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import soundfile
from embedders.encoded_audio import InMemory
from synthetic_layouts import tone, write_audio

from lmdbcache.audio import AudioSource, as_source, decode, load_waveform, shown
from lmdbcache.errors import AudioDecodeError


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_bytes_give_what_the_file_gives(tmp_path, suffix):
    """The same bits from a file and from its bytes, in every format."""
    path = write_audio(tmp_path / f"clip.{suffix}", tone("bell"))
    source = InMemory(path.read_bytes())
    assert isinstance(source, AudioSource)
    for rate in (16000, 8000):
        assert decode(source, rate, 0.2).tobytes() == decode(path, rate, 0.2).tobytes()
    assert load_waveform(source, 16000, 1.0).shape == (16000,)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"<html>404</html>", "not readable as audio"),
    ],
)
def test_bytes_that_are_no_audio(content, reason):
    """The message has the source's name and the reason."""
    with pytest.raises(AudioDecodeError) as caught:
        decode(InMemory(content), 16000, 1.0)
    assert str(caught.value).startswith("row 3 of a table: ")
    assert reason in str(caught.value)


def test_bytes_cut_off():
    """A recording that ends early is refused like a file's."""
    buffer = io.BytesIO()
    soundfile.write(buffer, tone("bell", seconds=1.0), 16000, format="FLAC")
    with pytest.raises(AudioDecodeError, match="row 3 of a table"):
        decode(InMemory(buffer.getvalue()[:5000]), 16000, 1.0)


def test_a_source_that_cannot_be_opened():
    """Its error is the clip's error."""

    class Gone(InMemory):
        def open_binary(self):
            raise OSError("the table is gone")

    with pytest.raises(AudioDecodeError, match="row 3 of a table: .*the table is gone"):
        decode(Gone(b""), 16000, 1.0)


def test_paths_stay_paths():
    """Text and Path objects are no sources, though a Path can be opened, too."""
    assert as_source(Path("a.wav")) == "a.wav"
    assert as_source("a.wav") == "a.wav"
    source = InMemory(b"")
    assert as_source(source) is source
    with pytest.raises(TypeError, match="5 is neither a path nor an AudioSource"):
        as_source(5)
    assert shown(os.fsdecode(b"caf\xe9.wav")) == r"caf\xe9.wav"
    assert shown(source) == "row 3 of a table"
