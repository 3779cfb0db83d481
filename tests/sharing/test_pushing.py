"""`push`: what a place lacks goes there, once, and nothing that is damaged."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sharing.shared_samples import put_commit, ragged_embeddings, shard_of, some_embeddings
from sharing.shared_stores import assert_shared, shared, store

from lmdbcache import EmbeddingCache
from lmdbcache.cache import Origin
from lmdbcache.errors import (
    CacheNotFoundError,
    ConfigError,
    ProvenanceMismatchError,
    RemoteError,
    SampleNotFoundError,
)
from lmdbcache.exchange import Intake, Remote, pull, push
from lmdbcache.exchange.sharing import uploading
from lmdbcache.exchange.sharing.history import read_history
from lmdbcache.storage import checksum


def files(remote, config):
    """Name → bytes of all shards and commits."""
    folder = config.fingerprint
    return {**remote.list_files(f"{folder}/shards"), **remote.list_files(f"{folder}/commits")}


@pytest.fixture(params=["remote", "in_memory"])
def place(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_store_is_shared_bit_for_bit(place, cache, config, dtype):
    """Pooled and hidden states in each dtype; a second push moves nothing."""
    for shape in [(8,), (3, 5)]:
        config = config.replace(dtype=dtype, output="mean" if len(shape) == 1 else "hidden")
        values = some_embeddings(0, 20, dtype=dtype, shape=shape)
        store(cache, config, values)
        report = push(cache, config, place.url)
        assert (report.num_pushed, report.num_shards, len(report.commits)) == (20, 1, 1)
        assert report.exit_code == 0
        assert_shared(place, config, values)
        before = files(place, config)
        again = push(cache, config, place.url)
        assert (again.num_there, again.num_pushed, again.num_bytes) == (20, 0, 0)
        assert again.commit == report.commit
        assert files(place, config) == before


def test_ragged_stores(place, cache, config):
    """Embeddings of different lengths, in shards of about the size asked for."""
    values = ragged_embeddings(30)
    store(cache, config, values, ragged=True)
    report = push(cache, config, place.url, shard_bytes=200)
    assert report.num_shards > 5
    assert_shared(place, config, values)


def test_a_hundred_new_samples_are_two_files(remote, cache, config):
    """A shard and a commit that builds on the last one; what was there stays."""
    store(cache, config, some_embeddings(0, 300))
    first = push(cache, config, remote.url, shard_bytes=32 * 100)
    before = files(remote, config)
    assert first.num_shards == 3
    values = some_embeddings(0, 400)
    store(cache, config, values)
    second = push(cache, config, remote.url)
    after = files(remote, config)
    assert len(after) == len(before) + 2
    assert before.items() <= after.items()
    assert (second.num_pushed, second.num_there) == (100, 300)
    assert read_history(remote, config.fingerprint).commits[second.commit].parents == (
        first.commit,
    )
    assert_shared(remote, config, values)


def test_the_same_samples_have_the_same_shards_everywhere(remote, tmp_path, config):
    """Two nodes with the same embeddings upload them once."""
    values = some_embeddings(0, 50)
    caches = [EmbeddingCache(tmp_path / name) for name in ("a", "b")]
    store(caches[0], config, values)
    store(caches[1], config, dict(reversed(values.items())))
    other = Remote(f"{remote.url}-b")
    push(caches[0], config, remote.url)
    push(caches[1], config, other.url)
    shards = [place.list_files(f"{config.fingerprint}/shards") for place in (remote, other)]
    assert shards[0] == shards[1]
    report = push(caches[1], config, remote.url)
    assert report.num_pushed == 0


def test_an_interrupted_push_goes_on(remote, cache, config, monkeypatch):
    """Shards that were uploaded aren't uploaded again, nor are those that were committed."""
    values = some_embeddings(0, 100)
    store(cache, config, values)
    monkeypatch.setattr(uploading, "_SHARDS_PER_COMMIT", 2)
    written = []
    original = Remote.write

    def failing(self, path, data):
        if len(written) == 5:
            raise RemoteError("cut")
        written.append(path)
        original(self, path, data)

    monkeypatch.setattr(Remote, "write", failing)
    with pytest.raises(RemoteError, match="cut"):
        push(cache, config, remote.url, shard_bytes=32 * 10)
    # two shards, a commit, two shards, and the commit failed
    assert [path.split("/")[1] for path in written] == [
        "shards",
        "shards",
        "commits",
        "shards",
        "shards",
    ]
    monkeypatch.setattr(Remote, "write", original)
    report = push(cache, config, remote.url, shard_bytes=32 * 10)
    assert (report.num_there, report.num_pushed) == (20, 80)
    assert (report.num_shards, report.num_uploaded) == (8, 6)
    assert_shared(remote, config, values)


def test_the_last_commit_of_a_push_pins_all_of_it(remote, cache, tmp_path, config):
    """However many commits a push makes, its last one stands for the whole store."""
    values = some_embeddings(0, 30)
    store(cache, config, values)
    report = push(cache, config, remote.url, shard_bytes=32)
    assert len(report.commits) > 2
    other = EmbeddingCache(tmp_path / "other")
    assert pull(other, remote.url, commit=report.commit).merged.num_new == 30
    assert read_history(remote, config.fingerprint).heads == (report.commit,)


def test_two_that_push_at_once_lose_nothing(remote, tmp_path, config):
    """Overlapping stores, many shards: the place holds the union."""
    caches = [EmbeddingCache(tmp_path / name) for name in ("a", "b", "c")]
    for number, cache in enumerate(caches):
        store(cache, config, some_embeddings(40 * number, 80))
    with ThreadPoolExecutor(3) as pool:
        for pushed in [
            pool.submit(push, one, config, remote.url, writer=name, shard_bytes=32 * 7)
            for one, name in zip(caches, "abc", strict=True)
        ]:
            pushed.result()
    everything = some_embeddings(0, 160)
    found = shared(remote, config)
    assert found.keys() == everything.keys()
    for sample_id, values in found.items():
        assert all(np.array_equal(value, everything[sample_id]) for value in values)
    history = read_history(remote, config.fingerprint)
    assert not history.problems
    assert {commit.writer for commit in history.commits.values()} == {"a", "b", "c"}


def test_own_leaves_out_what_came_from_elsewhere(remote, cache, config):
    """What was merged or pulled isn't pushed again with --own."""
    mine, theirs = some_embeddings(0, 5), some_embeddings(5, 5)
    store(cache, config, mine)
    intake = Intake(cache, config)
    intake.add(intake.checked(list(theirs), list(theirs.values()), Origin("node-b")), {})
    assert push(cache, config, remote.url, own=True).num_pushed == 5
    assert_shared(remote, config, mine)
    assert push(cache, config, remote.url).num_pushed == 5
    assert_shared(remote, config, {**mine, **theirs})


def test_classes_and_samples_are_chosen(remote, cache, config):
    """Only what is asked for leaves the machine; what isn't there is an error."""
    values = some_embeddings(0, 10)
    store(cache, config, values)
    assert push(cache, config, remote.url, classes=["DOG"]).num_chosen == 5
    assert_shared(remote, config, {n: v for n, v in values.items() if n.endswith(":dog")})
    names = sorted(values)[:3]
    assert push(cache, config, remote.url, sample_ids=names).num_pushed == 2
    with pytest.raises(SampleNotFoundError, match="nobody:dog"):
        push(cache, config, remote.url, sample_ids=["nobody:dog"])
    with pytest.raises(ConfigError, match="cat"):
        push(cache, config, remote.url, classes=["cat"])
    with pytest.raises(CacheNotFoundError):
        push(cache, config.replace(duration=1.0), remote.url)


def test_another_value_is_pushed_beside_or_in_the_place_of_the_old_one(remote, tmp_path, config):
    """Both count, so that who pulls sees the conflict; with `replace` only the new one does."""
    one, two = EmbeddingCache(tmp_path / "a"), EmbeddingCache(tmp_path / "b")
    old, new = some_embeddings(0, 6), some_embeddings(0, 3, seed=1)
    store(one, config, old)
    store(two, config, new)
    push(one, config, remote.url)
    report = push(two, config, remote.url)
    assert (report.num_pushed, report.num_different) == (3, 3)
    assert {len(values) for values in shared(remote, config).values()} == {1, 2}
    assert push(two, config, remote.url).num_pushed == 0
    assert push(one, config, remote.url).num_pushed == 0
    replacing = push(two, config, remote.url, replace=True)
    assert replacing.num_pushed == 3
    assert_shared(remote, config, {**old, **new})
    commits = read_history(remote, config.fingerprint).commits
    taken_back = {name: [*found] for name, found in commits[replacing.commit].replaced.items()}
    assert taken_back == {name: [checksum(name.encode(), old[name].tobytes())] for name in new}
    assert push(two, config, remote.url, replace=True).num_pushed == 0


def test_other_weights_and_shapes_are_not_mixed(remote, tmp_path, config):
    """The place is left as it is, and the error names it."""
    one, two = EmbeddingCache(tmp_path / "a"), EmbeddingCache(tmp_path / "b")
    store(one, config, some_embeddings(0, 3), provenance={"weights_digest": "one"})
    store(two, config, some_embeddings(3, 3), provenance={"weights_digest": "two"})
    push(one, config, remote.url)
    before = files(remote, config)
    with pytest.raises(ProvenanceMismatchError, match="weights_digest"):
        push(two, config, remote.url)
    three = EmbeddingCache(tmp_path / "c")
    store(three, config, some_embeddings(6, 3, shape=(9,)))
    with pytest.raises(ConfigError, match="shape"):
        push(three, config, remote.url)
    assert files(remote, config) == before


def test_a_dry_run_writes_nothing(remote, cache, config):
    """Only numbers."""
    store(cache, config, some_embeddings(0, 4))
    report = push(cache, config, remote.url, dry_run=True)
    assert (report.num_chosen, report.num_pushed, report.dry_run) == (4, 4, True)
    assert files(remote, config) == {}


def test_a_foreign_commit_is_told_and_left_alone(remote, cache, config):
    """A commit of another config in this folder counts for nothing."""
    values = some_embeddings(0, 5)
    store(cache, config, values)
    other = config.replace(duration=1.0)
    entry, _ = shard_of(other, some_embeddings(0, 9))
    commit = put_commit(remote, other, [entry])
    data = remote.read(f"{other.fingerprint}/{commit.path}", len(read_file(remote, other, commit)))
    remote.write(f"{config.fingerprint}/{commit.path}", data)
    report = push(cache, config, remote.url)
    assert report.num_pushed == 5
    assert "fingerprint" in report.problems[commit.path]


def read_file(remote, config, commit):
    name = commit.path.rpartition("/")[2]
    size = remote.list_files(f"{config.fingerprint}/commits")[name]
    return remote.read(f"{config.fingerprint}/{commit.path}", size)


def test_a_wrong_clock_and_an_odd_name_do_no_harm(remote, cache, config, monkeypatch):
    """Time is for people; the writer's name is kept as it is."""
    store(cache, config, some_embeddings(0, 3))
    push(cache, config, remote.url, writer="../é/§ node")
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    store(cache, config, some_embeddings(3, 3))
    push(cache, config, remote.url, writer="b")
    commits = read_history(remote, config.fingerprint).ordered()
    assert [commit.writer for commit in commits] == ["../é/§ node", "b"]
    with pytest.raises(ConfigError, match="writer"):
        store(cache, config, some_embeddings(6, 1))
        push(cache, config, remote.url, writer="a\nb")


def test_a_push_from_a_forked_process(remote, cache, config):
    """The parent has used the same place before."""
    store(cache, config, some_embeddings(0, 3))
    push(cache, config, remote.url)
    store(cache, config, some_embeddings(3, 3))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if push(cache, config, remote.url).num_pushed == 3 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_shared(remote, config, some_embeddings(0, 6))


def test_no_folder_of_this_machine_is_shared(remote, cache, config, tmp_path):
    """Neither where the model lies nor where the audio does; nor is one taken from others."""
    path = "/home/somebody/models/ast"
    provenance = {"checkpoint": path, "torch": "2.11"}
    dataset_root = "/home/somebody/recordings"
    store(cache, config, some_embeddings(0, 3), provenance=provenance, dataset_root=dataset_root)
    push(cache, config, remote.url, writer="node-1")
    pushed = [one.read_bytes() for one in (tmp_path / "shared").rglob("*") if one.is_file()]
    assert len(pushed) == 2
    assert not any(b"somebody" in one for one in pushed)
    entry, data = shard_of(config, some_embeddings(3, 4), (8,))
    remote.write(f"{config.fingerprint}/{entry.path}", data)
    put_commit(remote, config, [entry], shape=(8,), provenance=provenance)
    other = EmbeddingCache(tmp_path / "other")
    assert pull(other, remote.url).merged.num_new == 7
    assert other.info(config).provenance == {"torch": "2.11"}
