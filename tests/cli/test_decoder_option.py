"""`--decoder` of the commands that read a dataset."""

from __future__ import annotations

import json

import pytest
import soundfile
from audio.encoded_audio import tone, write_m4a

from lmdbcache import EmbeddingCache

pytest.importorskip("av")


def test_a_dataset_that_only_ffmpeg_reads(cli, tmp_path, ast_folder):
    """`extract`, `coverage` and `dataset` take the option, and `coverage` finds what is stored."""
    for name in ("bell", "dog"):
        folder = tmp_path / "folder" / name
        folder.mkdir(parents=True)
        samples = tone(seconds=1.0, rate=16000)
        soundfile.write(folder / "one.wav", samples, 16000)
        write_m4a(folder / "other.m4a", samples, 16000)

    def run(*arguments):
        result = cli(*arguments, "--decoder", "ffmpeg", "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    data, model = tmp_path / "folder", ("--model", ast_folder, "--duration", 1)
    assert run("dataset", data)["clips"] == 4
    assert run("extract", data, *model, "--num-workers", 0)["num_extracted"] == 4
    (info,) = EmbeddingCache(tmp_path / "cache").stores()
    assert info.config.front_end.startswith("ffmpeg+")
    assert run("coverage", data, *model)["num_present"] == 4
