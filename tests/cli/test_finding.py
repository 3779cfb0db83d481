"""`lmdbcache explain` and `stats`, and the coverage by split."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lmdbcache.cache import ClipFailure, update_failures


def parsed(result):
    return json.loads(result.stdout)


OPTIONS = ("--model-name", "mine", "--duration", 1)


def test_explain(cli, cache, configs):
    """One sentence; exit code 0 if it is stored, 1 if not; the same as JSON."""
    result = cli("explain", *OPTIONS)
    assert (result.returncode, "6 embeddings" in result.stdout) == (0, True)
    result = cli("explain", "--model-name", "mine", "--duration", 2)
    assert result.returncode == 1
    assert "--duration 2.0 asked, 1.0 stored; 6 embeddings there" in result.stdout
    assert cli("explain", *OPTIONS, "video_00001:dog").returncode == 0
    result = cli("explain", *OPTIONS, "video_00001:cat", "--json")
    assert result.returncode == 1
    assert parsed(result)["reason"] == "other_class"
    assert parsed(result)["nearest_names"] == ["video_00001:dog"]


def test_explain_finds_the_namespace(cli, cache, configs):
    """Without --namespace the only store that has the rest of the config is meant."""
    own = configs[0].replace(namespace="folder-birds", output="mean")
    with cache.writer(own) as writer:
        writer.put("a:b", np.ones(8))
    assert cli("explain", *OPTIONS, "--output", "mean", "a:b").returncode == 0
    assert cli("explain", *OPTIONS, "--output", "mean", "--namespace", "vegas").returncode == 1


@pytest.mark.parametrize("file_id", ["---g-f_I2yQ_000030", "-abc", "--json-like", "-v"])
def test_a_sample_id_that_begins_with_a_dash(cli, cache, configs, file_id):
    """Taken for an option, it is wrong usage with the `--` that helps, and that helps."""
    sample_id = f"{file_id}:people shouting"
    with cache.writer(configs[0], without_provenance=True) as writer:
        writer.put(sample_id, np.ones(8, np.float32))
    result = cli("explain", *OPTIONS, sample_id)
    assert result.returncode == 2
    assert f"-- '{sample_id}'" in " ".join(result.stderr.replace("│", " ").split())
    assert cli("explain", *OPTIONS, "--", sample_id).returncode == 0
    removed = cli("rm", configs[0].fingerprint, "--sample", sample_id, "--yes")
    assert removed.returncode == 0, removed.stderr
    assert cli("explain", *OPTIONS, "--", sample_id).returncode == 1


def test_an_unknown_option_is_not_called_a_sample_id(cli, cache):
    """What has no class after a colon is a slip of the pen."""
    result = cli("explain", *OPTIONS, "--jsno")
    assert result.returncode == 2
    assert "sample id" not in result.stderr


def test_stats(cli, refused, cache, configs):
    """Hits and misses by class, of one store or of all; reset begins again, when told so."""
    with cache.reader(configs[0]) as reader:
        reader.get_batch(["video_00001:dog", "video_00000:drum"])
        assert reader.get("x:dog") is None
    result = cli("stats", configs[0].fingerprint)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["dog", "1", "1"] in rows
    assert ["all", "2", "1"] in rows
    assert "hit rate 66.7 %" in result.stdout
    listed = parsed(cli("stats", "--json"))
    assert sorted(entry["hits"] for entry in listed) == [0, 0, 2]
    assert cli("stats").stdout.count(" -\n") == 2
    cli("stats", "--reset", stdin="n\n")
    assert parsed(cli("stats", configs[0].fingerprint, "--json"))[0]["hits"] == 2
    assert "--yes" in refused("stats", "--reset", "--json")
    (entry,) = parsed(cli("stats", configs[0].fingerprint, "--reset", "--yes", "--json"))
    assert (entry["hits"], entry["misses"], entry["hit_rate"]) == (0, 0, 1.0)


@pytest.mark.parametrize(("share", "code"), [(0.5, 0), (0.51, 1), (1, 1)])
def test_coverage_threshold(cli, cache, configs, data, share, code):
    """Three of six are stored: --min-coverage decides the exit code."""
    assert cli("coverage", data, *OPTIONS, "--min-coverage", share).returncode == code


def test_coverage_by_split(cli, cache, configs, data):
    """A column for each split; failed clips stand apart and can be left out."""
    update_failures(
        cache.path(configs[0]),
        [],
        [
            ClipFailure(name, "", "empty")
            for name in ("video_00000:dog", "video_00001:drum", "video_00002:dog")
        ],
    )
    result = cli("coverage", data, *OPTIONS, "--by-split")
    assert result.returncode == 1
    assert result.stdout.splitlines()[0].split() == ["class", "train", "test"]
    assert "2 failed" in result.stdout
    assert cli("coverage", data, *OPTIONS, "--by-split", "--allow-failed").returncode == 0
    found = parsed(cli("coverage", data, *OPTIONS, "--by-split", "--json"))
    assert {row["split"] for row in found["rows"]} <= {"train", "val", "test"}
    assert sum(row["num_failed"] for row in found["rows"]) == len(found["failed"]) == 3
