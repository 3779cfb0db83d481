"""Every adapter of this package keeps the contract that others are asked to keep."""

from __future__ import annotations

import tarfile

import pytest
from synthetic_layouts import make_audio_folder, make_esc50, make_vggsound, tone, write_audio

from lmdbcache.datasets import open_dataset
from lmdbcache.datasets.audio_folder import AudioFolder
from lmdbcache.datasets.esc50 import ESC50Folder
from lmdbcache.datasets.huggingface import HuggingFaceDataset
from lmdbcache.datasets.tar_shards import TarShards
from lmdbcache.datasets.vegas import VEGASFolder
from lmdbcache.datasets.vggsound import VGGSoundFolder
from lmdbcache.testing import DatasetContract


class TestESC50(DatasetContract):
    published_name = "esc50"

    def make(self, tmp_path):
        return ESC50Folder(make_esc50(tmp_path / "ESC-50"))


class TestVGGSound(DatasetContract):
    published_name = "vggsound"

    def make(self, tmp_path):
        return VGGSoundFolder(make_vggsound(tmp_path / "VGGSound"))


class TestAudioFolder(DatasetContract):
    def make(self, tmp_path):
        return AudioFolder(make_audio_folder(tmp_path / "some sounds"))


class TestTarShards(DatasetContract):
    """Members of two shards."""

    def make(self, tmp_path):
        sounds = make_audio_folder(tmp_path / "sounds", suffixes=["wav"])
        (tmp_path / "shards").mkdir(exist_ok=True)
        paths = sorted(sounds.rglob("*.wav"))
        for number in range(2):
            with tarfile.open(tmp_path / "shards" / f"part-{number}.tar", "w") as shard:
                for path in paths[number::2]:
                    shard.add(path, str(path.relative_to(sounds)))
        return TarShards(tmp_path / "shards")


class TestAudioFolderWithSplits(DatasetContract):
    def make(self, tmp_path):
        for split in ("train", "Validation", "test"):
            make_audio_folder(tmp_path / "sounds" / split, suffixes=["wav"])
        return AudioFolder(tmp_path / "sounds")


class TestVEGAS(DatasetContract):
    published_name = "vegas"

    def make(self, tmp_path):
        for name in ("dog", "drum"):
            for number in range(5):
                path = tmp_path / "VEGAS" / name / "audios" / f"video_{number:05d}.wav"
                write_audio(path, tone(name, number))
        return VEGASFolder(tmp_path / "VEGAS")


class TestHuggingFaceSaved(DatasetContract):
    """Bytes in the Arrow files of a saved DatasetDict."""

    def make(self, tmp_path):
        tables = pytest.importorskip("huggingface_tables")
        if not (tmp_path / "saved").exists():
            tables.two_splits().save_to_disk(tmp_path / "saved")
        return HuggingFaceDataset(tmp_path / "saved")


class TestHuggingFaceInMemory(DatasetContract):
    """Rows that name files, known by their number."""

    def make(self, tmp_path):
        tables = pytest.importorskip("huggingface_tables")
        rows = []
        for number in range(6):
            name = tables.CLASSES[number % 3]
            path = tmp_path / "clips" / str(number) / "clip.wav"
            rows.append((name, None, str(write_audio(path, tone(name, number)))))
        return open_dataset(tables.table(rows), namespace="mine")
