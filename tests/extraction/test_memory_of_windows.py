"""The memory of an extraction doesn't grow with the length of a recording."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from lmdbcache import EmbeddingCache, ModuleEmbedder, config_for, extract


def write_recording(path, minutes, rate, channels):
    """A minute of tones, again and again; as flac it takes seconds and little space."""
    times = np.arange(60 * rate) / rate
    block = np.stack([np.sin(440.0 * (1 + c) * times) for c in range(channels)], axis=1)
    with soundfile.SoundFile(path, "w", rate, channels, "PCM_16", compression_level=0.0) as file:
        for _ in range(minutes):
            file.write(block / 4)


def memory_of(pid):
    """Bytes of a process and its children; what they share is counted once."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += sum(map(memory_of, (task / "children").read_text().split()))
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return total + 1024 * int(rollup.partition("\nPss:")[2].split()[0])


def peak_of_extraction(root, path):
    """Bytes that a forked process and its workers take at most while they embed a file."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(240)
        try:
            model = ModuleEmbedder(torch.nn.Linear(80000, 16), name="linear", sample_rate=16000)
            config = config_for(model, window=5.0)
            cache = EmbeddingCache(root)
            summary = extract(cache, config, {"long:x": str(path)}, model=model, num_workers=2)
            os._exit(0 if summary.num_extracted == 1 else 1)
        finally:
            os._exit(2)
    peak = 0
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0
            return peak
        try:
            peak = max(peak, memory_of(pid))
        except (OSError, IndexError):  # a process that has just ended
            continue
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("short", "long", "rate", "channels"),
    [(1, 20, 22050, 1), pytest.param(3, 180, 44100, 2, marks=pytest.mark.stress)],
)
def test_a_long_recording_takes_the_memory_of_a_short_one(tmp_path, short, long, rate, channels):
    """Of all processes together; 300 MB are promised, whatever the length."""
    peaks = []
    for minutes in (short, long):
        path = tmp_path / f"{minutes}.flac"
        write_recording(path, minutes, rate, channels)
        peaks.append(peak_of_extraction(tmp_path / str(minutes), path))
    assert peaks[1] < peaks[0] + (100 << 20)
