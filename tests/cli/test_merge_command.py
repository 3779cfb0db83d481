"""`merge`, and what `info`, `explain` and `diff` say afterwards."""

from __future__ import annotations

import json

import numpy as np
from storage.damage import data_file, flip_value

from lmdbcache import EmbeddingCache


def with_another(cache, config, tmp_path):
    """A root whose store of this config has one sample more, and one that differs."""
    other = EmbeddingCache(tmp_path / "nodes" / "b")
    with cache.reader(config) as reader, other.writer(config, provenance={"torch": "9"}) as writer:
        for sample_id, value in reader.items():
            writer.put(sample_id, value + (1 if sample_id == "video_00002:drum" else 0))
        writer.put("video_00009:dog", np.ones(8))
    return other


def test_merge_and_its_conflicts(cli, cache, configs, tmp_path):
    """Told with both sides, exit code 1; the rest is merged; a choice decides, exit code 0."""
    other = with_another(cache, configs[0], tmp_path)
    merge = ("merge", tmp_path / "nodes")
    result = cli(*merge, "--dry-run")
    assert result.returncode == 1
    assert "1 would be new" in result.stdout
    assert cache.info(configs[0]).num_embeddings == 6
    result = cli(*merge, "--progress")
    assert result.returncode == 1
    assert "1 new, 5 stored already, 1 in conflict" in result.stdout
    row = next(line for line in result.stdout.splitlines() if line.startswith("video_00002:drum"))
    assert row.split()[1:3] == ["stored", "this"]
    assert f" {other.root} " in row  # the root: the store's name is in the line below
    assert "--on-duplicate" in result.stderr
    result = cli(*merge, "--on-duplicate", "overwrite", "--json")
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)["stores"]
    assert [conflict["kept"] for conflict in found["conflicts"]] == ["given"]
    assert cli("diff", cache.path(configs[0]), other.path(configs[0]), "--json").returncode == 1
    found = json.loads(cli("diff", cache.path(configs[0]), other.path(configs[0]), "--json").stdout)
    assert (found["num_equal"], found["num_different"], found["num_only_a"]) == (7, 0, 0)
    assert found["provenance"] == {"weights_digest": ["abc", None]}


def test_origins_are_shown(cli, cache, configs, tmp_path):
    """By `info`, with counts; for one sample; compaction and repair keep them."""
    other = with_another(cache, configs[0], tmp_path)
    name = configs[0].fingerprint
    assert "computed in" not in cli("info", name).stdout
    cli("merge", other.root, "--on-duplicate", "skip")
    result = cli("info", name)
    assert "this store" in result.stdout
    assert f"{other.path(configs[0])} merged_at=" in result.stdout
    origins = json.loads(cli("info", name, "--json").stdout)["origins"]
    assert [(o["writer"], o["embeddings"]) for o in origins] == [
        ("this store", 6),
        (str(other.path(configs[0])), 1),
    ]
    assert origins[1]["provenance"] == {"torch": "9"}
    assert str(other.path(configs[0])) in str(cache.explain(configs[0], "video_00009:dog"))
    assert cache.explain(configs[0], "video_00001:dog").origin is None
    assert cli("compact", name).returncode == 0
    with cache.reader(configs[0]) as reader:
        flip_value(data_file(cache, configs[0]), reader["video_00001:dog"])
    assert cli("repair", name, "--yes").returncode == 0
    origins[0]["embeddings"] -= 1
    assert json.loads(cli("info", name, "--json").stdout)["origins"] == origins


def test_sources_that_are_none(cli, refused, cache, configs, tmp_path):
    """One line each, exit code 1; the others are merged."""
    assert "absent" in refused("merge", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("merge", tmp_path / "empty")
    other = with_another(cache, configs[0], tmp_path)
    result = cli("merge", tmp_path / "absent", other.root, "--on-duplicate", "skip")
    assert result.returncode == 1
    assert "1 new" in result.stdout
    assert len(result.stderr.splitlines()) == 1
    result = cli("merge", cache.root)
    assert result.returncode == 0
    assert "itself" in result.stdout
    assert cli("merge").returncode == 2
    assert cli("merge", other.root, "--on-duplicate", "both").returncode == 2
