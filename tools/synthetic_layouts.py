"""Write small folders laid out like ESC-50, VGGSound, or one folder per class, for tests and demos.

Each class is a tone of its own pitch, each clip has a noise of its own; the files are real wav,
flac, ogg and mp3 files, made from a seed.

    python tools/synthetic_layouts.py esc50 /tmp/ESC-50
    python tools/synthetic_layouts.py vggsound /tmp/VGGSound
    python tools/synthetic_layouts.py folder /tmp/sounds
"""

from __future__ import annotations

import argparse
import csv
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import soundfile

__all__ = [
    "ESC50_CLASSES",
    "VGGSOUND_CLASSES",
    "make_audio_folder",
    "make_esc50",
    "make_vggsound",
    "tone",
    "write_audio",
]

# Class → target, a few of the fifty, and whether they are in ESC-10.
ESC50_CLASSES: Final[dict[str, tuple[int, bool]]] = {
    "dog": (0, True),
    "rooster": (1, True),
    "rain": (10, True),
    "crying_baby": (20, True),
    "can_opening": (34, False),
    "hand_saw": (49, False),
}
VGGSOUND_CLASSES: Final = ("people marching", "police car (siren)", "child speech, kid speaking")

_RATE: Final = 16000


def tone(name: str, number: int = 0, seconds: float = 0.3) -> npt.NDArray[np.float64]:
    """The clip `number` of a class: its tone and some noise; (samples,), 16 kHz."""
    time = np.arange(round(seconds * _RATE)) / _RATE
    pitch = 200 + zlib.crc32(name.encode("utf-8", "surrogateescape")) % 3000
    noise = np.random.default_rng([pitch, number]).standard_normal(len(time))
    wave: npt.NDArray[np.float64] = 0.4 * np.sin(2 * np.pi * pitch * time) + 0.02 * noise
    return wave


def write_audio(path: Path, waveform: npt.NDArray[np.float64]) -> Path:
    """Write a file in the format of its suffix, under any name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # not every name survives the path of a C library
        soundfile.write(file, waveform, _RATE, format=path.suffix[1:].upper())
    return path


def make_esc50(root: str | Path, *, clips_per_fold: int = 1, seconds: float = 0.3) -> Path:
    """Write `meta/esc50.csv` and `audio/*.wav`: six classes in five folds.

    Args:
        root: Folder to write into.
        clips_per_fold: Clips of each class in each fold.
        seconds: Length of a clip.

    Returns:
        The root.
    """
    root = Path(root)
    rows = []
    for fold in range(1, 6):
        for name, (target, esc10) in ESC50_CLASSES.items():
            for number in range(clips_per_fold):
                source = 100000 + 1000 * fold + target
                filename = f"{fold}-{source}-{chr(ord('A') + number)}-{target}.wav"
                write_audio(root / "audio" / filename, tone(name, 100 * fold + number, seconds))
                take = chr(ord("A") + number)
                rows.append([filename, fold, target, name, esc10, source, take])
    (root / "meta").mkdir(exist_ok=True)
    with (root / "meta" / "esc50.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
        writer.writerows(rows)
    return root


def make_vggsound(
    root: str | Path, *, clips_per_class: int = 4, missing: int = 2, seconds: float = 0.3
) -> Path:
    """Write `vggsound.csv` and `audio/<YouTube id>_<start>.wav`: three classes, train and test.

    Args:
        root: Folder to write into.
        clips_per_class: Clips of each class on disk; every fourth is of the test split.
        missing: Listed clips that aren't on disk, as videos vanish.
        seconds: Length of a clip.

    Returns:
        The root.
    """
    root = Path(root)
    rows: list[tuple[str, int, str, str]] = []
    for place, name in enumerate(VGGSOUND_CLASSES):
        for number in range(clips_per_class):
            ytid, start = f"--{'AbC_'[place]}Xy-Zw{number:03d}", 10 * number + place
            rows.append((ytid, start, name, "train" if (number + 1) % 4 else "test"))
            path = root / "audio" / f"{ytid}_{start:06d}.wav"
            write_audio(path, tone(name, number, seconds))
    rows += [(f"gone{n:07d}", 30, VGGSOUND_CLASSES[0], "train") for n in range(missing)]
    with (root / "vggsound.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return root


def make_audio_folder(
    root: str | Path,
    *,
    classes: Sequence[str] = ("bell", "siren", "wind"),
    suffixes: Sequence[str] = ("wav", "flac", "ogg", "mp3"),
    seconds: float = 0.3,
) -> Path:
    """Write `<class>/clip_<n>.<suffix>`, and one clip of each class in a deeper folder.

    Args:
        root: Folder to write into.
        classes: Names of the classes.
        suffixes: One clip of each class is made in each of these formats.
        seconds: Length of a clip.

    Returns:
        The root.
    """
    root = Path(root)
    for name in classes:
        for number, suffix in enumerate(suffixes):
            write_audio(root / name / f"clip_{number}.{suffix}", tone(name, number, seconds))
        write_audio(root / name / "more" / "clip_0.wav", tone(name, len(suffixes), seconds))
    return root


_MAKERS: Final[dict[str, Callable[..., Path]]] = {
    "esc50": make_esc50,
    "vggsound": make_vggsound,
    "folder": make_audio_folder,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layout", choices=_MAKERS)
    parser.add_argument("root", type=Path, help="folder to write into")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a clip")
    arguments = parser.parse_args()
    print(_MAKERS[arguments.layout](arguments.root, seconds=arguments.seconds))


if __name__ == "__main__":
    main()
