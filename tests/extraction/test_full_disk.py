"""An extraction on a disk that fills up."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from lmdbcache import EmbeddingCache
from lmdbcache.errors import CacheFullError

_RESERVE = 16 << 20  # a commit wants this much free beyond what it writes


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if (
        not shutil.which("mount")
        or subprocess.run(command, check=False, capture_output=True).returncode
    ):
        pytest.skip("a small file system can't be mounted here: that needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder, leave):
    """A file that leaves so many bytes free."""
    free = shutil.disk_usage(folder).free
    with (folder / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)


@pytest.fixture
def cache(small_disk):
    return EmbeddingCache(small_disk / "cache")


def test_disk_that_fills_up(run, stored, cache, config, clips, small_disk):
    """The run ends in one line, what was committed is readable, and the next run goes on."""
    config = config.replace(output="last_hidden_state")
    fill(small_disk, _RESERVE + (256 << 10))
    with pytest.raises(CacheFullError) as caught:
        run(clips, config, batch_size=1, commit_seconds=0)
    assert "\n" not in str(caught.value)
    assert "ree space" in str(caught.value)
    kept = len(stored(config))
    assert 0 < kept < len(clips)
    assert cache.verify(config).is_sound
    (small_disk / "ballast").unlink()
    summary = run(clips, config)
    assert (summary.num_cached, summary.num_extracted) == (kept, len(clips) - kept)


@pytest.mark.parametrize("leave", [0, 4096, 65536, 1 << 20])
def test_disk_that_is_full_already(run, stored, cache, config, clips, small_disk, leave):
    """Nothing can be written at all, the list of failures neither: still the error that says so."""
    fill(small_disk, leave)
    with pytest.raises(CacheFullError) as caught:
        run({**clips, "vanished:dog": "vanished.wav"})
    assert "\n" not in str(caught.value)
    (small_disk / "ballast").unlink()
    assert run(clips).num_extracted == len(clips)
    assert stored().keys() == clips.keys()
