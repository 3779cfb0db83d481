"""Encoded recordings as bytes, and surgery on their containers."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from lmdbcache.audio import load_clip, load_windows
from lmdbcache.errors import AudioDecodeError

RATE = 8000
SECONDS = 1.5


@dataclass(frozen=True)
class InMemory:
    """Bytes as an AudioSource."""

    content: bytes
    name: str = "row 3 of a table"

    def open_binary(self):
        return io.BytesIO(self.content)

    def __str__(self):
        return self.name


def tone(frequency: float = 440.0, seconds: float = SECONDS, rate: int = RATE) -> np.ndarray:
    """A tone with a little noise, so that no coding makes it tiny."""
    time = np.arange(round(rate * seconds)) / rate
    noise = np.random.default_rng(round(frequency)).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * frequency * time) + 0.02 * noise).astype(np.float32)


def encoded(form: str, subtype: str, samples: np.ndarray | None = None, **options) -> bytes:
    """What soundfile writes for these samples, or for a tone."""
    buffer = io.BytesIO()
    rate = options.pop("rate", RATE)
    samples = tone(rate=rate) if samples is None else samples
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype, **options)
    return buffer.getvalue()


def write_m4a(path: Path, samples: np.ndarray, rate: int) -> None:
    """AAC, which only FFmpeg reads."""
    import av

    with av.open(str(path), "w", format="ipod") as output:
        stream = output.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for part in av.AudioResampler("fltp", "mono", rate, 1024).resample(frame):
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))


def put(content: bytes, offset: int, layout: str, value: int) -> bytes:
    """The content with one number written over."""
    changed = bytearray(content)
    struct.pack_into(layout, changed, offset, value)
    return bytes(changed)


def chunk(name: bytes, body: bytes, order: str = "<") -> bytes:
    """A RIFF chunk with its padding."""
    return name + struct.pack(f"{order}I", len(body)) + body + b"\0" * (len(body) % 2)


def wave_file(
    samples: np.ndarray, order: str = "<", before: bytes = b"", after: bytes = b""
) -> bytes:
    """A 16-bit RIFF (or with order ">" RIFX) file with other chunks around the audio."""
    audio = (samples * 32767).astype(f"{order}i2").tobytes()
    form = chunk(b"fmt ", struct.pack(f"{order}HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16), order)
    body = b"WAVE" + form + before + chunk(b"data", audio, order) + after
    return chunk(b"RIFX" if order == ">" else b"RIFF", body, order)


def id3(num_bytes: int, *, footer: bool = False) -> bytes:
    """An ID3v2 tag, as one with a picture."""
    size = bytes((num_bytes >> shift) & 127 for shift in (21, 14, 7, 0))
    if footer:
        return b"ID3\x04\0\x10" + size + bytes(num_bytes) + b"3DI\x04\0\x10" + size
    return b"ID3\x03\0\0" + size + bytes(num_bytes)


def without_first_frame(mp3: bytes) -> bytes:
    """An mp3 without its Xing or Info header."""
    second = mp3.index(mp3[:2], 40)
    while mp3[second + 2] >> 2 & 3 != mp3[2] >> 2 & 3 or mp3[second + 2] >> 4 in (0, 15):
        second = mp3.index(mp3[:2], second + 1)
    return mp3[second:]


def decoded(source, rate: int = RATE, duration: float = 20.0, decoder: str = "soundfile"):
    """The samples that come from the file, without padding; streamed, they are the same."""
    try:
        clip = load_clip(source, rate, duration, decoder)
    except AudioDecodeError:
        with pytest.raises(AudioDecodeError):
            streamed(source, rate, decoder)
        raise
    assert clip.waveform.shape == (round(rate * duration),)
    assert not clip.waveform[clip.num_valid :].any()
    samples = clip.waveform[: clip.num_valid]
    if len(samples) < len(clip.waveform):
        assert streamed(source, rate, decoder).tobytes() == samples.tobytes()
    return samples


def streamed(source, rate: int, decoder: str = "soundfile") -> np.ndarray:
    """All samples of the file, put together from its windows."""
    found = load_windows(source, rate, rate // 3, rate // 3, "pad", decoder)
    return np.concatenate([window.waveform[: window.num_valid] for window in found])
