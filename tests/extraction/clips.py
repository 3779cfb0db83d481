"""Audio files for the tests of the extraction: good ones, and those that people really have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import soundfile

if TYPE_CHECKING:
    from pathlib import Path

RATE = 16000
NUM_CLIPS = 120  # of a dataset that takes a while


def tone(frequency: float = 440.0, rate: int = RATE, seconds: float = 0.5) -> np.ndarray:
    """A sine with a little noise of its own."""
    time = np.arange(round(rate * seconds)) / rate
    noise = np.random.default_rng(round(frequency)).standard_normal(len(time))
    return (0.4 * np.sin(2 * np.pi * frequency * time) + 0.01 * noise).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE, **form: str) -> Path:
    """Write under any name: a file object, as not every name survives the path of a C library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form.setdefault("format", "WAV")
    with path.open("wb") as file:
        soundfile.write(file, samples, rate, **form)
    return path


def write_tones(folder: Path, count: int, class_name: str = "dog") -> dict[str, str]:
    """`count` different clips: sample id → path."""
    clips = {}
    for number in range(count):
        path = folder / class_name / "audios" / f"video_{number:05d}.wav"
        write(path, tone(200.0 + 37 * number))
        clips[f"video_{number:05d}:{class_name}"] = str(path)
    return clips


def write_good(folder: Path) -> dict[str, str]:
    """Unusual clips that give an embedding: sample id → path."""
    stereo = np.stack([tone(300), tone(500)], axis=1)
    written = {
        "stereo": write(folder / "stereo.wav", stereo),
        "8 kHz": write(folder / "8 kHz.wav", tone(rate=8000), 8000),
        "96 kHz": write(folder / "96kHz.wav", tone(rate=96000), 96000),
        "24 bit": write(folder / "24bit.wav", tone(), subtype="PCM_24"),
        "float": write(folder / "float.wav", tone(), subtype="FLOAT"),
        "flac": write(folder / "clip.flac", tone(), format="FLAC"),
        "ogg": write(folder / "clip.ogg", tone(), format="OGG"),
        "silence": write(folder / "silence.wav", np.zeros(8000, np.float32)),
        "long clip": write(folder / "long.wav", tone(seconds=4.0)),
        "a: colon: b": write(folder / "a: colon: b.wav", tone(310)),
        "caf\u00e9": write(folder / "caf\u00e9.wav", tone(320)),
        "nai\u0308ve": write(folder / "nai\u0308ve.wav", tone(330)),  # NFD
        "n" * 240: write(folder / ("n" * 240 + ".wav"), tone(340)),
    }
    return {f"{file_id}:dog": str(path) for file_id, path in written.items()}


def write_bad(folder: Path) -> dict[str, tuple[str, str]]:
    """Files that give none: sample id → (path, a word of the reason)."""
    spoilt = tone()
    spoilt[100] = np.nan
    infinite = tone()
    infinite[100] = np.inf
    written = {
        "text": (_bytes(folder / "text.wav", b"<html>404</html>"), "not readable as audio"),
        "empty": (_bytes(folder / "empty.wav", b""), "0 bytes"),
        "header": (write(folder / "header.wav", np.zeros(0, np.float32)), "0 frames"),
        "short": (write(folder / "short.wav", tone()[:100]), "too short"),
        "nan": (write(folder / "nan.wav", spoilt, subtype="FLOAT"), "NaN"),
        "inf": (write(folder / "inf.wav", infinite, subtype="FLOAT"), "Inf"),
        "folder": (folder / "folder.wav", "folder"),
        "vanished": (folder / "vanished.wav", "no such file"),
    }
    (folder / "folder.wav").mkdir()
    return {f"{file_id}:dog": (str(path), reason) for file_id, (path, reason) in written.items()}


def _bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class Steps:
    """Features that cost nothing."""

    min_samples = 1

    def __call__(self, waveform):
        return waveform[:400].reshape(4, 100)

    def provenance(self):
        return {}
