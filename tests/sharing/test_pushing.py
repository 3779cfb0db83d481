"""`push`: what a place lacks goes there, once, and nothing that is damaged."""

from __future__ import annotations

import getpass
import os
import socket

import pytest
from sharing.shared_samples import put_manifest, ragged_embeddings, shard_of, some_embeddings
from sharing.shared_stores import assert_shared, shared, state_of, store

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
from lmdbcache.exchange.sharing import pushing


def files(remote, config):
    """Name → bytes of all shards and manifests."""
    folder = config.fingerprint
    return {**remote.list_files(f"{folder}/shards"), **remote.list_files(f"{folder}/manifests")}


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
        assert (report.num_pushed, report.num_shards, len(files(place, config))) == (20, 1, 2)
        assert report.exit_code == 0
        assert_shared(place, config, values)
        before = files(place, config)
        again = push(cache, config, place.url)
        assert (again.num_there, again.num_pushed, again.num_bytes) == (20, 0, 0)
        assert again.manifest == report.manifest
        assert files(place, config) == before


@pytest.fixture
def small(monkeypatch):
    """Makes the shards of so many bytes."""
    return lambda num_bytes: monkeypatch.setattr(pushing, "SHARD_BYTES", num_bytes)


def test_ragged_stores(place, cache, config, small):
    """Embeddings of different lengths, in shards of about the size asked for."""
    values = ragged_embeddings(30)
    store(cache, config, values, ragged=True)
    small(200)
    report = push(cache, config, place.url)
    assert report.num_shards > 5
    assert_shared(place, config, values)


def test_a_hundred_new_samples_are_two_files(remote, cache, config, small):
    """A shard and a manifest; what was there stays."""
    small(32 * 100)
    store(cache, config, some_embeddings(0, 300))
    first = push(cache, config, remote.url)
    before = files(remote, config)
    assert first.num_shards == 3
    values = some_embeddings(0, 400)
    store(cache, config, values)
    second = push(cache, config, remote.url)
    after = files(remote, config)
    assert len(after) == len(before) + 2
    assert before.items() <= after.items()
    assert (second.num_pushed, second.num_there) == (100, 300)
    assert_shared(remote, config, values)


def test_many_pushes_leave_few_manifests_to_read(remote, cache, config, tmp_path):
    """Small ones are listed again by a later one; each id stands for its own moment."""
    pins = []
    for number in range(20):
        store(cache, config, some_embeddings(number, 1))
        pins.append(push(cache, config, remote.url).manifest)
    assert len(remote.list_files(f"{config.fingerprint}/manifests")) == 20
    assert len(state_of(remote, config).manifests) <= 5
    assert_shared(remote, config, some_embeddings(0, 20))
    for number in (0, 6, 19):
        other = EmbeddingCache(tmp_path / f"{number}")
        assert pull(other, config, remote.url, manifest=pins[number]).num_new == number + 1


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


def test_an_interrupted_push_goes_on(remote, cache, config, monkeypatch, small):
    """Shards that were uploaded aren't uploaded again, nor are those that were listed."""
    values = some_embeddings(0, 100)
    store(cache, config, values)
    small(32 * 10)
    monkeypatch.setattr(pushing, "_SHARDS_PER_MANIFEST", 2)
    monkeypatch.setattr("lmdbcache.exchange.sharing.remote.CONNECTIONS", 1)
    written = []
    original = Remote.write

    def failing(self, path, data):
        if len(written) == 5:
            raise RemoteError("cut")
        written.append(path)
        original(self, path, data)

    monkeypatch.setattr(Remote, "write", failing)
    with pytest.raises(RemoteError):
        push(cache, config, remote.url)
    # two shards, a manifest, two shards, and the manifest failed
    kinds = [path.split("/")[1] for path in written]
    assert kinds == ["shards", "shards", "manifests", "shards", "shards"]
    monkeypatch.setattr(Remote, "write", original)
    report = push(cache, config, remote.url)
    assert (report.num_there, report.num_pushed) == (20, 80)
    assert (report.num_shards, report.num_uploaded) == (8, 6)
    assert_shared(remote, config, values)


def test_the_last_manifest_pins_all_that_is_shared(remote, tmp_path, config):
    """Its own shards, and the manifests of others that were there."""
    caches = [EmbeddingCache(tmp_path / name) for name in ("a", "b")]
    for number, cache in enumerate(caches):
        store(cache, config, some_embeddings(10 * number, 10))
    first = push(caches[0], config, remote.url).manifest
    pinned = push(caches[1], config, remote.url).manifest
    store(caches[0], config, some_embeddings(20, 10))
    last = push(caches[0], config, remote.url).manifest
    assert push(caches[1], config, remote.url).manifest == last
    for manifest, number in ((first, 10), (pinned, 20), (last, 30)):
        other = EmbeddingCache(tmp_path / manifest)
        assert pull(other, None, remote.url, manifest=manifest).num_new == number


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
    with pytest.raises(SampleNotFoundError):
        push(cache, config, remote.url, sample_ids=["nobody:dog"])
    with pytest.raises(ConfigError, match="cat"):
        push(cache, config, remote.url, classes=["cat"])
    with pytest.raises(CacheNotFoundError):
        push(cache, config.replace(duration=1.0), remote.url)


def test_a_writers_value_takes_the_place_of_its_earlier_one(remote, cache, config):
    """Of the same store the new value alone counts, of whatever manifest the old one was."""
    old, new = some_embeddings(0, 6), some_embeddings(0, 3, seed=1)
    store(cache, config, old)
    push(cache, config, remote.url)
    store(cache, config, some_embeddings(6, 1))
    push(cache, config, remote.url)
    store(cache, config, new, on_duplicate="overwrite")
    report = push(cache, config, remote.url)
    assert (report.num_pushed, report.num_different) == (3, 3)
    assert_shared(remote, config, {**old, **some_embeddings(6, 1), **new})
    assert push(cache, config, remote.url).num_pushed == 0


def test_another_writers_value_stays_beside(remote, tmp_path, config, small):
    """Both count, so that a pull finds the conflict; or it is left out, and listed if asked."""
    one, two = EmbeddingCache(tmp_path / "a"), EmbeddingCache(tmp_path / "b")
    old, new, more = some_embeddings(0, 6), some_embeddings(0, 3, seed=1), some_embeddings(6, 30)
    store(one, config, old)
    store(two, config, {**new, **more})
    push(one, config, remote.url)
    with pytest.raises(ConfigError):
        push(two, config, remote.url, on_duplicate="theirs")
    small(200)
    report = push(two, config, remote.url, on_duplicate="skip")
    assert (report.num_pushed, report.num_different, report.exit_code) == (30, 3, 0)
    with pytest.raises(ConfigError, match=min(new)):
        push(two, config, remote.url, on_duplicate="error")
    assert_shared(remote, config, {**old, **more})
    found = [sample_id for sample_id in shared(remote, config) if sample_id in more]
    assert found == sorted(more)  # one order: a push that goes on makes the same shards
    assert push(two, config, remote.url).num_pushed == 3
    assert {len(values) for values in shared(remote, config).values()} == {1, 2}
    assert push(two, config, remote.url).num_pushed == 0
    assert push(one, config, remote.url).num_pushed == 0


def test_other_weights_and_shapes_are_not_mixed(remote, tmp_path, config):
    """The place is left as it is, and the error names it."""
    one, two = EmbeddingCache(tmp_path / "a"), EmbeddingCache(tmp_path / "b")
    store(one, config, some_embeddings(0, 3), provenance={"weights_digest": "one"})
    store(two, config, some_embeddings(3, 3), provenance={"weights_digest": "two"})
    push(one, config, remote.url)
    before = files(remote, config)
    with pytest.raises(ProvenanceMismatchError):
        push(two, config, remote.url)
    three = EmbeddingCache(tmp_path / "c")
    store(three, config, some_embeddings(6, 3, shape=(9,)))
    with pytest.raises(ConfigError):
        push(three, config, remote.url)
    assert files(remote, config) == before


def test_a_dry_run_writes_nothing(remote, cache, config):
    """Only numbers."""
    store(cache, config, some_embeddings(0, 4))
    report = push(cache, config, remote.url, dry_run=True)
    assert (report.num_chosen, report.num_pushed, report.dry_run) == (4, 4, True)
    assert files(remote, config) == {}


def test_a_foreign_manifest_is_named_and_left_alone(remote, cache, config):
    """A manifest of another config in this folder counts for nothing."""
    store(cache, config, some_embeddings(0, 5))
    other = config.replace(duration=1.0)
    manifest = put_manifest(remote, other, [shard_of(other, some_embeddings(0, 9))[0]])
    (size,) = remote.list_files(f"{other.fingerprint}/manifests").values()
    data = remote.read(f"{other.fingerprint}/{manifest.path}", 0, size)
    remote.write(f"{config.fingerprint}/{manifest.path}", data)
    report = push(cache, config, remote.url)
    assert report.num_pushed == 5
    assert list(report.problems) == [manifest.path]


def test_the_writer_is_a_random_id_that_a_store_keeps(remote, tmp_path, config):
    """Two stores have two; a name may be given, if it can be a file's."""
    caches = [EmbeddingCache(tmp_path / name) for name in ("a", "b")]
    for cache in caches:
        store(cache, config, some_embeddings(0, 3))
    writers = [push(cache, config, remote.url).writer for cache in (*caches, *caches)]
    assert len(set(writers)) == 2
    assert writers[:2] == writers[2:]
    assert push(caches[0], config, remote.url, writer="node-a").writer == "node-a"
    for name in ("", "a\nb", "../é", "-a", "a" * 65):
        with pytest.raises(ConfigError):
            push(caches[0], config, remote.url, writer=name)


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


def test_neither_folders_nor_names_of_this_machine_are_shared(remote, cache, config, tmp_path):
    """Neither where the model lies nor where the audio does; nor is one taken from others."""
    path = "/home/somebody/models/ast"
    provenance = {"checkpoint": path, "torch": "2.11"}
    dataset_root = "/home/somebody/recordings"
    store(cache, config, some_embeddings(0, 3), provenance=provenance, dataset_root=dataset_root)
    push(cache, config, remote.url)
    pushed = [one.read_bytes() for one in (tmp_path / "shared").rglob("*") if one.is_file()]
    assert len(pushed) == 2
    secrets = [b"somebody", socket.gethostname().encode(), getpass.getuser().encode() + b"/"]
    assert not any(secret in one for one in pushed for secret in secrets)
    entry, data = shard_of(config, some_embeddings(3, 4), (8,))
    remote.write(f"{config.fingerprint}/{entry.path}", data)
    put_manifest(remote, config, [entry], shape=(8,), provenance=provenance)
    other = EmbeddingCache(tmp_path / "other")
    assert pull(other, None, remote.url).num_new == 7
    assert other.info(config).provenance == {"torch": "2.11"}
