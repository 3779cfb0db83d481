"""`lmdbcache pull`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sharing.shared_samples import some_embeddings
from sharing.shared_stores import shard_file, share, stored

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.exchange import Remote

CONFIG = CacheConfig(namespace="vegas")


@pytest.fixture
def place(tmp_path):
    return Remote(f"file://{tmp_path}/bucket")


@pytest.fixture
def root(tmp_path):
    return EmbeddingCache(tmp_path / "cache")


def test_pull_says_what_came_and_from_which_state(cli, place, root):
    """One line of counts, the id that pins the state, the store; again: nothing fetched."""
    manifest = share(place, CONFIG, some_embeddings(0, 10))
    result = cli("pull", place.url)
    assert (result.returncode, result.stderr) == (0, "")
    for words in ("10 new, 0 stored already", f"manifest {manifest.id}", str(root.path(CONFIG))):
        assert words in result.stdout
    assert len(stored(root, CONFIG)) == 10
    again = cli("pull", place.url, CONFIG.fingerprint[:5], "--json")
    found = json.loads(again.stdout)
    assert (found["num_same"], found["bytes_fetched"]) == (10, 0)
    assert found["manifest"] == manifest.id


def test_dry_run_tells_the_bytes(cli, place, root):
    """Shards and bytes to fetch, and nothing is stored."""
    (entry,) = share(place, CONFIG, some_embeddings(0, 10)).shards
    result = cli("pull", place.url, "--dry-run")
    assert "10 samples shared" in result.stdout
    assert "1 shard to fetch" in result.stdout
    found = json.loads(cli("pull", place.url, "--dry-run", "--json").stdout)
    assert found["bytes_to_fetch"] == entry.num_bytes - entry.header_bytes
    assert not root.root.exists()


def test_a_conflict_shows_both_origins(cli, place, root):
    """A table with both writers, exit code 1 and a line that says how to decide."""
    with root.writer(CONFIG) as writer:
        writer.put("clip_00001:dog", np.ones(8))
    share(place, CONFIG, some_embeddings(0, 3))
    result = cli("pull", place.url)
    assert result.returncode == 1
    for words in ("clip_00001:dog", "this store", "node-a"):
        assert words in result.stdout
    assert "--on-duplicate skip or overwrite decides" in result.stderr
    assert cli("pull", place.url, "--on-duplicate", "overwrite").returncode == 0
    assert stored(root, CONFIG)["clip_00001:dog"][0] != 1


def test_what_is_damaged_or_absent_is_said(cli, place, root, tmp_path):
    """A bad shard names the repair; a sample that isn't shared is named; the rest is imported."""
    manifest = share(place, CONFIG, some_embeddings(0, 3), some_embeddings(3, 3))
    path = shard_file(place, CONFIG, manifest.shards[0])
    path.write_bytes(path.read_bytes()[:-1])
    result = cli("pull", place.url)
    assert result.returncode == 1
    assert f"lmdbcache push {place.url} --repair" in result.stderr
    assert "3 samples lost: clip_00000:drum" in result.stderr
    (tmp_path / "ids").write_text("clip_00004:drum\nnobody:dog\n")
    listed = cli("pull", place.url, "--ids", tmp_path / "ids")
    assert listed.returncode == 1
    assert "1 sample not shared there: nobody:dog" in listed.stderr
    assert cli("pull", place.url, "--class", "dog", "--manifest", manifest.id).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["not-a-url"], "isn't a place to share through"),
        (["file:///nowhere/at/all"], "nothing is shared at file:///nowhere/at/all"),
        (["nosuch://bucket/x"], "nosuch"),
        (["{url}", "0000"], "0000"),
        (["{url}", "--manifest", "zzz"], "zzz"),
        (["{url}", "--class", "cow"], "cow"),
        (["{url}", "--ids", "/nowhere"], "No such file"),
    ],
)
def test_what_cannot_be_pulled_is_one_line(refused, place, arguments, words):
    """Each wrong argument is one line that says what is wrong, and nothing is stored."""
    share(place, CONFIG, some_embeddings(0, 3))
    assert words in refused("pull", *[one.format(url=place.url) for one in arguments])


def test_all_that_is_shared(cli, place, root):
    """`--all` pulls each store of a place; without it several are named."""
    other = CacheConfig(namespace="vegas", sample_rate=8000)
    for config in (CONFIG, other):
        share(place, config, some_embeddings(0, 10))
    refused = cli("pull", place.url)
    assert refused.returncode == 1
    assert all(one.fingerprint in refused.stderr for one in (CONFIG, other))
    found = json.loads(cli("pull", place.url, "--all", "--json").stdout)
    assert [one["num_samples"] for one in found] == [10, 10]
    assert len(stored(root, CONFIG)) == len(stored(root, other)) == 10
    assert cli("pull", place.url, "--all", CONFIG.fingerprint).returncode == 1
