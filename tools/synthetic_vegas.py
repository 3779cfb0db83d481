"""Write a small folder of clips laid out like VEGAS: ten classes, each with a sound of its own.

For demos and tests. Every clip is synthesised from a seed, so a folder can be made again bit by
bit anywhere:

    python tools/synthetic_vegas.py /tmp/VEGAS --clips-per-class 12
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import soundfile

__all__ = ["BROKEN_CLASS", "SAMPLE_RATES", "SYNTHESISERS", "STEREO_CLASS", "make_synthetic_vegas"]

Waveform = npt.NDArray[np.float64]
Synthesiser = Callable[[np.random.Generator, Waveform], Waveform]

SAMPLE_RATES: Final = (16000, 22050, 44100, 48000)
BROKEN_CLASS: Final = "water_flowing"  # its last clip is the one that isn't audio
STEREO_CLASS: Final = "dog"  # its first clip has two channels


def make_synthetic_vegas(
    root: str | Path,
    *,
    clips_per_class: int = 12,
    seed: int = 0,
    duration: float = 5.0,
    broken: bool = True,
) -> Path:
    """Write `<root>/<class>/audios/video_00000.wav …` for the ten VEGAS classes.

    Sample rates are mixed (16, 22.05, 44.1 and 48 kHz); the first clip of `dog` is stereo.

    Args:
        root: Folder to write into; created if needed, equal file names are overwritten.
        clips_per_class: Clips of each class.
        seed: Same seed, same clips.
        duration: Length of a clip, in seconds.
        broken: Make the last clip of `water_flowing` a text file called `.wav`.

    Returns:
        The root.
    """
    root = Path(root)
    for class_index, (class_name, synthesise) in enumerate(SYNTHESISERS.items()):
        folder = root / class_name / "audios"
        folder.mkdir(parents=True, exist_ok=True)
        for clip in range(clips_per_class):
            rng = np.random.default_rng([seed, zlib.crc32(class_name.encode()), clip])
            sample_rate = SAMPLE_RATES[(class_index + clip) % len(SAMPLE_RATES)]
            time = np.arange(round(duration * sample_rate)) / sample_rate
            waveform = _levelled(synthesise(rng, time), rng)
            if class_name == STEREO_CLASS and clip == 0:
                waveform = np.stack([waveform, 0.6 * np.roll(waveform, 40)], axis=1)
            soundfile.write(folder / f"video_{clip:05d}.wav", waveform, sample_rate)
    if broken and clips_per_class > 0:
        path = root / BROKEN_CLASS / "audios" / f"video_{clips_per_class - 1:05d}.wav"
        path.write_text("This file is called .wav but holds no audio.\n", encoding="utf-8")
    return root


def _levelled(waveform: Waveform, rng: np.random.Generator) -> Waveform:
    peak = float(np.abs(waveform).max(initial=0.0))
    return waveform * (rng.uniform(0.3, 0.9) / peak if peak > 0 else 0.0)


def _phase(frequency: Waveform, time: Waveform) -> Waveform:
    """Phase, in radians, of a tone whose frequency (Hz) changes over time."""
    step = time[1] - time[0] if len(time) > 1 else 0.0
    return 2 * np.pi * np.cumsum(frequency) * step


def _band(rng: np.random.Generator, time: Waveform, low: float, high: float) -> Waveform:
    """Noise between two frequencies, in Hz, with soft edges."""
    length = len(time)
    sample_rate = 1.0 / (time[1] - time[0]) if length > 1 else 1.0
    frequency = np.fft.rfftfreq(length, 1.0 / sample_rate)
    gain = 1.0 / (1.0 + (frequency / high) ** 6) / (1.0 + (low / np.maximum(frequency, 1e-3)) ** 6)
    noise: Waveform = np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * gain, length)
    noise /= noise.std() + 1e-12
    return noise


def _hits(time: Waveform, starts: Waveform, decay: float) -> Waveform:
    """Envelope of strokes: a jump to 1 at each start, then an exponential decay (seconds)."""
    starts = np.sort(starts)
    last = np.searchsorted(starts, time, side="right") - 1
    since = time - starts[np.maximum(last, 0)]
    envelope: Waveform = np.where(last >= 0, np.exp(-np.maximum(since, 0.0) / decay), 0.0)
    return envelope


def _regular(rng: np.random.Generator, time: Waveform, rate: float, jitter: float) -> Waveform:
    """Start times, in seconds, of `rate` strokes per second that are a little uneven."""
    period = 1.0 / rate
    starts = np.arange(rng.uniform(0, period), time[-1] + period, period)
    return starts + jitter * period * rng.standard_normal(len(starts))


def _baby_cry(rng: np.random.Generator, time: Waveform) -> Waveform:
    base, breath = rng.uniform(380, 520), rng.uniform(0.7, 1.1)
    cycle = np.sin(2 * np.pi * breath * time + rng.uniform(0, 6))
    pitch = base * (1 + 0.18 * cycle + 0.02 * np.sin(2 * np.pi * 6 * time))
    phase = _phase(pitch, time)
    voice: Waveform = np.sum([np.sin(k * phase) / k**0.7 for k in range(1, 8)], axis=0)
    voice *= np.clip(cycle + 0.4, 0, None)
    return voice + 0.01 * _band(rng, time, 500, 4000)


def _chainsaw(rng: np.random.Generator, time: Waveform) -> Waveform:
    throttle = np.sin(2 * np.pi * rng.uniform(0.15, 0.4) * time + rng.uniform(0, 6))
    phase = _phase(rng.uniform(85, 130) * (1 + 0.25 * throttle), time)
    saw = (phase / np.pi) % 2.0 - 1.0
    return np.tanh(3 * saw) + 0.5 * saw * _band(rng, time, 1000, 5000)


def _dog(rng: np.random.Generator, time: Waveform) -> Waveform:
    starts = rng.uniform(0, time[-1], rng.integers(4, 9))
    envelope = _hits(time, starts, rng.uniform(0.05, 0.09))
    phase = _phase(rng.uniform(350, 600) * (0.6 + 0.6 * envelope), time)
    growl = np.sin(phase) + 0.6 * np.sin(2 * phase) + 0.3 * np.sin(3 * phase)
    return envelope * (growl + 0.5 * _band(rng, time, 400, 2500))


def _drum(rng: np.random.Generator, time: Waveform) -> Waveform:
    rate = rng.uniform(1.5, 3.0)
    kick = _hits(time, _regular(rng, time, rate, 0.01), 0.12)
    snare = _hits(time, _regular(rng, time, rate / 2, 0.01), 0.06)
    phase = _phase(rng.uniform(50, 70) + 90 * kick**2, time)
    return kick * np.sin(phase) + 0.5 * snare * _band(rng, time, 1500, 7000)


def _fireworks(rng: np.random.Generator, time: Waveform) -> Waveform:
    booms = _hits(time, rng.uniform(0, time[-1], rng.integers(2, 5)), 0.5)
    crackle = _hits(time, rng.uniform(0, time[-1], rng.integers(60, 140)), 0.004)
    return booms * _band(rng, time, 30, 250) + 0.5 * crackle * _band(rng, time, 2000, 7500)


def _helicopter(rng: np.random.Generator, time: Waveform) -> Waveform:
    blades = _hits(time, _regular(rng, time, rng.uniform(10, 16), 0.005), 0.03)
    turbine = 0.1 * np.sin(2 * np.pi * rng.uniform(2200, 3200) * time)
    return blades * _band(rng, time, 40, 500) + turbine


def _printer(rng: np.random.Generator, time: Waveform) -> Waveform:
    step = np.floor(time * rng.uniform(6, 10)).astype(int)
    tones = rng.choice(np.array([620.0, 780.0, 930.0, 1240.0]), size=int(step[-1]) + 1)
    motor = np.sign(np.sin(_phase(tones[step], time)))
    sweep = np.abs(np.sin(2 * np.pi * rng.uniform(0.4, 0.7) * time))
    return 0.6 * motor * (sweep > 0.25) + 0.3 * sweep * _band(rng, time, 3000, 7000)


def _rail_transport(rng: np.random.Generator, time: Waveform) -> Waveform:
    first = _regular(rng, time, rng.uniform(0.9, 1.6), 0.01)
    clacks = _hits(time, np.concatenate([first, first + 0.16]), 0.03)
    return 0.35 * _band(rng, time, 30, 180) + 1.5 * clacks * _band(rng, time, 600, 2200)


def _snoring(rng: np.random.Generator, time: Waveform) -> Waveform:
    breath = np.sin(2 * np.pi * rng.uniform(0.25, 0.4) * time + rng.uniform(0, 6))
    flutter = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * rng.uniform(22, 35) * time))
    inhale, exhale = np.clip(breath, 0, None), np.clip(-breath, 0, None)
    return inhale * flutter * _band(rng, time, 80, 450) + 0.2 * exhale * _band(rng, time, 300, 1500)


def _water_flowing(rng: np.random.Generator, time: Waveform) -> Waveform:
    swell = 1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.2, 0.8) * time)
    bubbles = _hits(time, rng.uniform(0, time[-1], rng.integers(30, 60)), 0.02)
    tone = np.sin(_phase(rng.uniform(500, 900) * (1 + 0.5 * (1 - bubbles)), time))
    return swell * _band(rng, time, rng.uniform(300, 700), 6000) + 0.8 * bubbles * tone


SYNTHESISERS: Final[dict[str, Synthesiser]] = {
    "baby_cry": _baby_cry,
    "chainsaw": _chainsaw,
    "dog": _dog,
    "drum": _drum,
    "fireworks": _fireworks,
    "helicopter": _helicopter,
    "printer": _printer,
    "rail_transport": _rail_transport,
    "snoring": _snoring,
    "water_flowing": _water_flowing,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder to write into")
    parser.add_argument("--clips-per-class", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--duration", type=float, default=5.0, help="seconds (default 5.0)")
    parser.add_argument(
        "--no-broken", dest="broken", action="store_false", help="leave out the broken file"
    )
    arguments = parser.parse_args()
    root = make_synthetic_vegas(
        arguments.root,
        clips_per_class=arguments.clips_per_class,
        seed=arguments.seed,
        duration=arguments.duration,
        broken=arguments.broken,
    )
    print(f"{len(SYNTHESISERS) * arguments.clips_per_class} clips of 10 classes under {root}")


if __name__ == "__main__":
    main()
