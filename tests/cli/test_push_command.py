"""`lmdbcache push` and `verify URL`, as they are typed."""

from __future__ import annotations

import json

import pytest
from sharing.shared_samples import some_embeddings

from lmdbcache import CacheConfig, EmbeddingCache


@pytest.fixture
def config():
    return CacheConfig()


@pytest.fixture
def cache(tmp_path):
    """The root that commands take here, still empty."""
    return EmbeddingCache(tmp_path / "cache")


@pytest.fixture
def place(tmp_path):
    """A folder to push to, and its URL."""
    return tmp_path / "shared", f"file://{tmp_path}/shared"


def store(cache, config, values):
    with cache.writer(config) as writer:
        writer.put_batch(list(values), list(values.values()))


def test_push_and_verify(cli, cache, config, place):
    """What is pushed is shown with the id that pins it; again there is nothing to do."""
    folder, url = place
    store(cache, config, some_embeddings(0, 10))
    result = cli("push", url, "--writer", "node-a")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "pushed 10 of 10 embeddings" in result.stdout
    (manifest,) = (folder / config.fingerprint / "manifests").iterdir()
    assert f"manifest {manifest.stem}" in result.stdout
    assert manifest.stem.startswith("node-a-")
    assert "nothing to push" in cli("push", url).stdout
    (report,) = json.loads(cli("push", url, config.fingerprint[:6], "--json").stdout)
    assert report["manifest"] == manifest.stem
    assert (report["num_there"], report["num_pushed"]) == (10, 0)
    result = cli("verify", url)
    assert result.returncode == 0, result.stderr
    assert f"{config.fingerprint}: sound, 10 samples in 1 sound shard" in result.stdout


def test_a_part_is_pushed(cli, refused, cache, config, place, tmp_path):
    """By class, by a list of ids, and only told with --dry-run."""
    folder, url = place
    values = some_embeddings(0, 10)
    store(cache, config, values)
    assert "would push 5 of 5" in cli("push", url, "--class", "dog", "--dry-run").stdout
    assert not folder.exists()
    assert "pushed 5 of 5" in cli("push", url, "--class", "dog").stdout
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(sorted(values)[:3]))
    assert "pushed 2 of 3" in cli("push", url, "--ids", ids, "--own").stdout
    assert "cat" in refused("push", url, "--class", "cat")


def test_a_wrong_option_is_one_line(refused, cache, config, place, tmp_path):
    """A list that can't be read says what to give; an empty name isn't taken for the host's."""
    _, url = place
    store(cache, config, some_embeddings(0, 3))
    for path in (tmp_path / "nope", tmp_path):
        line = refused("push", url, "--ids", path)
        assert "one sample id a line" in line
        assert "Errno" not in line
    for name in ("", "  ", "a" * 256):
        assert "writer" in refused("push", url, "--writer", name)
    assert not place[0].exists()


def test_which_store_is_asked_for(cli, refused, cache, config, place):
    """One store needs no name; of several they are named, or all are meant."""
    _, url = place
    assert "no store" in refused("push", url)
    store(cache, config, some_embeddings(0, 3))
    store(cache, config.replace(duration=1.0), some_embeddings(0, 4))
    assert "--all" in refused("push", url)
    result = cli("push", url, "--all")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("pushed") == 2
    result = cli("verify", url, config.fingerprint, "--json")
    (one,) = json.loads(result.stdout)["stores"]
    assert one["num_samples"] == 3


def test_damage_is_found_and_repaired(cli, refused, cache, config, place, tmp_path):
    """Exit code 1 until a store that has the embeddings pushes again."""
    folder, url = place
    values = some_embeddings(0, 5)
    store(cache, config, values)
    cli("push", url)
    (shard,) = (folder / config.fingerprint / "shards").iterdir()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    result = cli("verify", url)
    assert result.returncode == 1
    assert shard.name in result.stdout
    assert f"lmdbcache push {url} --repair" in result.stdout
    result = cli("push", url, "--repair")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"uploaded again: shards/{shard.name}" in result.stdout
    assert shard.read_bytes() == whole
    assert cli("verify", url).returncode == 0


def test_another_value_there_is_counted(cli, cache, config, place, tmp_path):
    """Beside it, or left out: as asked."""
    _, url = place
    store(cache, config, some_embeddings(0, 5))
    cli("push", url)
    other = EmbeddingCache(tmp_path / "other")
    store(other, config, some_embeddings(0, 2, seed=1))
    result = cli("push", url, "--on-duplicate", "error", root=other.root)
    assert result.returncode == 1
    assert "2 samples are at" in result.stderr
    assert "2 samples there with another value" in cli("push", url, root=other.root).stdout


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("/tmp/folder", "isn't a place"),
        ("s3://", "isn't a place"),
        ("nonsense://a/b", "nonsense"),
        ("gs://bucket/x", "pip install"),
        ("file:///proc/nowhere", "/proc/nowhere"),
        ("ssh://me:secret@127.0.0.1:1/x", "ssh://me@127.0.0.1:1/x"),
    ],
)
def test_a_place_that_is_none_is_one_line(refused, cache, config, url, says):
    """No traceback, no password."""
    store(cache, config, some_embeddings(0, 3))
    line = refused("push", url)
    assert says in line
    assert "secret" not in line


def test_a_server_that_does_not_answer_is_one_line(refused, cache, config):
    """Neither credentials nor a server: what is missing, and where."""
    store(cache, config, some_embeddings(0, 3))
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    assert "connect" in refused("push", "s3://bucket/x", **nowhere, **keys)
    none = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    none |= {"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_CONFIG_FILE": "/dev/null"}
    line = refused("push", "s3://bucket/x", **nowhere, **none, AWS_EC2_METADATA_DISABLED="true")
    assert "credentials" in line


def test_nothing_shared_is_one_line(refused, place):
    """A folder that nobody has pushed to."""
    assert place[1] in refused("verify", place[1])


def test_one_damaged_store_does_not_keep_the_others(cli, cache, config, place):
    """It is told on standard error; exit code 1."""
    _, url = place
    store(cache, config, some_embeddings(0, 3))
    other = config.replace(duration=1.0)
    store(cache, other, some_embeddings(0, 4))
    (cache.path(config) / "CURRENT").write_text("nonsense")
    result = cli("push", url, "--all")
    assert result.returncode == 1
    assert "pushed 4 of 4" in result.stdout
    assert "CURRENT" in result.stderr
