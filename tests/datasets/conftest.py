"""Folders of real clips for the tests of this room."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from synthetic_vegas import make_synthetic_vegas


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory):
    """Ten classes of six one-second clips; tests don't change it."""
    root = tmp_path_factory.mktemp("shared") / "VEGAS"
    return make_synthetic_vegas(root, clips_per_class=6, duration=1.0, broken=False)


@pytest.fixture
def root(shared_root, tmp_path):
    """The same clips of three classes, for a test to change."""
    for name in ("baby_cry", "dog", "drum"):
        shutil.copytree(shared_root / name, tmp_path / "VEGAS" / name)
    return tmp_path / "VEGAS"


@pytest.fixture
def write_clip():
    """Write a short tone under any name."""

    def write(path: Path, frequency: float = 440.0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        time = np.arange(1600) / 16000
        # A file object, as not every name survives the path of a C library.
        with path.open("wb") as file:
            soundfile.write(file, 0.5 * np.sin(2 * np.pi * frequency * time), 16000, format="WAV")
        return path

    return write
