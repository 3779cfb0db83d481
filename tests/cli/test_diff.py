"""`diff`."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from lmdbcache import EmbeddingCache


def test_diff_of_stores(cli, cache, configs):
    """0 for equal stores; 1 for others, with what differs."""
    name = configs[0].fingerprint
    result = cli("diff", name, name)
    assert result.returncode == 0, result.stderr
    assert "6 bit for bit equal" in result.stdout
    result = cli("diff", name, configs[2].fingerprint, "--progress")
    assert result.returncode == 1
    assert "float16" in result.stdout
    assert "furthest apart" in result.stdout
    assert "comparing" in result.stderr
    found = json.loads(cli("diff", name, configs[2].fingerprint, "--json", "--no-values").stdout)
    assert found["config"] == {"dtype": ["float32", "float16"]}
    assert (found["is_equal"], found["num_common"], found["has_values"]) == (False, 6, False)
    assert not cache.info(configs[0]).last_used


def test_diff_of_roots(cli, cache, configs, tmp_path):
    """Stores are paired by name; what is on one side only is named."""
    copy = EmbeddingCache(tmp_path / "copy")
    shutil.copytree(cache.root, copy.root)
    assert cli("diff", cache.root, copy.root).returncode == 0
    copy.clear(configs[1])
    with copy.writer(configs[0], without_provenance=True) as writer:
        writer.put("new:dog", np.ones(8))
    result = cli("diff", cache.root, copy.root)
    assert result.returncode == 1
    assert f"only in {cache.root}: {cache.path(configs[1]).name}" in result.stdout
    assert f"second: {copy.path(configs[0])}" in result.stdout
    assert "1 sample only in the second: new:dog" in result.stdout
    found = json.loads(cli("diff", cache.root, copy.root, "--json").stdout)
    assert found["only_a"] == [cache.path(configs[1]).name]
    assert [one["num_only_b"] for one in found["stores"]].count(1) == 1


@pytest.mark.parametrize("more_in", ["first", "second"])
@pytest.mark.parametrize("of", ["stores", "roots"])
def test_a_sample_of_one_side_is_a_difference(cli, cache, configs, tmp_path, of, more_in):
    """Exit code 1 and is_equal false, whichever side has more and whatever else is equal."""
    copy = EmbeddingCache(tmp_path / "copy")
    shutil.copytree(cache.root, copy.root)
    with (cache if more_in == "first" else copy).writer(
        configs[0], without_provenance=True
    ) as writer:
        writer.put("new:dog", np.ones(8))
    sides = [one.path(configs[0]) if of == "stores" else one.root for one in (cache, copy)]
    result = cli("diff", *sides, "--json")
    assert result.returncode == 1, result.stderr
    assert json.loads(result.stdout)["is_equal"] is False


@pytest.mark.parametrize("lacks", [0, 1])
def test_a_store_of_one_root_is_a_difference(cli, cache, configs, tmp_path, lacks):
    """All that both have is equal, and yet the roots aren't."""
    copy = EmbeddingCache(tmp_path / "copy")
    shutil.copytree(cache.root, copy.root)
    (cache, copy)[lacks].clear(configs[1])
    result = cli("diff", cache.root, copy.root, "--json")
    assert (result.returncode, json.loads(result.stdout)["is_equal"]) == (1, False)


def test_diff_of_configs(cli, cache, configs, tmp_path):
    """JSON files, of fields or as `info --json` prints them, with each other and with a store."""
    (tmp_path / "a.json").write_text(json.dumps(configs[0].to_dict()))
    (tmp_path / "b.json").write_text(cli("info", configs[2].fingerprint, "--json").stdout)
    assert cli("diff", tmp_path / "a.json", configs[0].fingerprint).returncode == 0
    result = cli("diff", tmp_path / "a.json", tmp_path / "b.json")
    assert result.returncode == 1
    assert result.stdout.split()[-3:] == ["dtype", "float32", "float16"]


def test_what_can_not_be_compared(refused, cache, configs, tmp_path):
    """No store, no config, a store with a root: one line."""
    assert "isn't a store" in refused("diff", "zzzz", configs[0].fingerprint)
    (tmp_path / "c.json").write_text("[1]")
    assert "isn't a JSON object" in refused("diff", tmp_path / "c.json", configs[0].fingerprint)
    (tmp_path / "c.json").write_text('{"colour": 1}')
    assert "colour" in refused("diff", tmp_path / "c.json", configs[0].fingerprint)
    assert "two of a kind" in refused("diff", cache.root, configs[0].fingerprint)
