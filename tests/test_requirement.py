"""Coverage before training: the table, the threshold, and a command that fills the gap."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
from extraction.clips import write_tones
from small_ast import save_small_ast
from typer.testing import CliRunner

from lmdbcache import CacheConfig, VEGASDataset, model_identity
from lmdbcache.cli.main import app
from lmdbcache.errors import ConfigError, CoverageError
from lmdbcache.failures import ClipFailure, update_failures


def command_of(error):
    (line,) = [line for line in str(error).splitlines() if line.startswith("    lmdbcache ")]
    words = shlex.split(line)
    assert words[0] == "lmdbcache"
    return words[1:]


class Clips:
    """A dataset by the protocol, its samples with split and node."""

    namespace = "mine"
    root_dir = "/data/my clips"

    def __init__(self, sample_ids):
        self.samples = [
            {
                "file_id": name.split(":")[0],
                "class_name": name.split(":")[1],
                "split": "train" if number % 2 else "val",
                "node": number // 10,
            }
            for number, name in enumerate(sample_ids)
        ]
        self.sample_ids = list(sample_ids)


def test_enough_is_stored(filled, config, embeddings):
    """The coverage comes back, by class, split and node."""
    found = filled.require(Clips(embeddings), config)
    assert (found.num_present, found.num_asked, found.fraction) == (20, 20, 1.0)
    assert found.by_split == {"val": (10, 10), "train": (10, 10)}
    assert found.by_node == {"0": (10, 10), "1": (10, 10)}
    assert filled.require(list(embeddings), config).by_class == {"drum": (10, 10), "dog": (10, 10)}
    assert filled.require([], config).fraction == 1.0


def test_too_little_is_stored(filled, config, embeddings):
    """The table has every class, split and node; the threshold decides."""
    wanted = {
        "a": {"train": [*embeddings, "new:dog"], "val": ["new:cat"]},
        "b": {"train": ["x:cat"]},
    }
    with pytest.raises(CoverageError) as caught:
        filled.require(wanted, config)
    rows = [line.split() for line in str(caught.value).splitlines()]
    assert ["class", "node", "a", "train", "node", "a", "val", "node", "b", "train"] in rows
    assert ["dog", "10/11", "-", "-"] in rows
    assert ["cat", "-", "0/1", "0/1"] in rows
    assert ["all", "20/21", "0/1", "0/1"] in rows
    assert filled.require(wanted, config, min_coverage=20 / 23).num_present == 20
    with pytest.raises(CoverageError):
        filled.require(wanted, config, min_coverage=0.88)
    with pytest.raises(ConfigError, match="min_coverage"):
        filled.require(wanted, config, min_coverage=95)
    with pytest.raises(ConfigError, match="isn't a dataset"):
        filled.require(7, config)


def test_nothing_is_stored_names_the_nearest_config(filled, config, embeddings):
    """A wrong duration is told before the command that would compute everything anew."""
    with pytest.raises(CoverageError, match=r"duration: 10.0 asked, 5.0 stored; 20 embeddings"):
        filled.require(list(embeddings), config.replace(duration=10))


def test_failed_clips_are_counted_apart(filled, config, embeddings):
    """No run fills them: the table says so, and allow_failed leaves them out."""
    update_failures(filled.path(config), [], [ClipFailure("x:dog", "x.wav", "empty")])
    asked = [*embeddings, "x:dog"]
    with pytest.raises(CoverageError) as caught:
        filled.require({"train": asked}, config)
    assert "10/11, 1 failed" in str(caught.value)
    assert "lmdbcache extract" not in str(caught.value)
    found = filled.require(asked, config, allow_failed=True)
    assert found.failed == ("x:dog",)
    assert found.fraction_of_possible == 1.0
    with pytest.raises(CoverageError):
        filled.require([*asked, "y:dog"], config, allow_failed=True)


def test_command_is_quoted_and_complete(filled, config):
    """Every field of the config, and folders with spaces, as one shell command."""
    other = config.replace(duration=0.1 + 0.2, dtype="bfloat16", compute_dtype="float16")
    with pytest.raises(CoverageError) as caught:
        filled.require(Clips(["a:b c", "b:x"]), other)
    words = command_of(caught.value)
    assert words[:2] == ["extract", "/data/my clips"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options == {
        "--root": str(filled.root),
        "--model": config.model_name,
        "--output": "pooler_output",
        "--sample-rate": "16000",
        "--duration": "0.30000000000000004",
        "--dtype": "bfloat16",
        "--compute-dtype": "float16",
    }


@pytest.mark.parametrize("part", [{}, {"split": "val"}, {"node_split_id": 1, "num_nodes": 2}])
def test_command_fills_the_gap_and_nothing_else(cache, tmp_path, part):
    """Run as it stands it computes what is missing: of this split, node and class."""
    folder = tmp_path / "my clips"
    write_tones(folder, 10, "dog")
    write_tones(folder, 10, "drum")
    model = save_small_ast(tmp_path / "small ast", max_length=128)
    config = CacheConfig(duration=0.5, model_name=model_identity(model), dataset="vegas")
    dataset = VEGASDataset(folder, load_audio=False, **part)
    with cache.writer(config) as writer:
        for name in dataset.sample_ids:
            if name.endswith("dog"):
                writer.put(name, np.zeros(64, np.float32))
    with pytest.raises(CoverageError, match="CHECKPOINT_FOLDER: give require model="):
        cache.require(dataset, config)
    with pytest.raises(CoverageError) as caught:
        cache.require(dataset, config, model=model)
    result = CliRunner().invoke(app, [*command_of(caught.value), "--num-workers", "0"])
    assert result.exit_code == 0, result.output
    found = cache.require(dataset, config)
    with cache.reader(config) as reader:
        assert len(reader) == found.num_asked
    if not part:
        assert found.by_split == {"train": (14, 14), "val": (2, 2), "test": (4, 4)}
