"""`verify_remote`: every kind of damage is found, and a repair loses nothing that somebody has."""

from __future__ import annotations

import shutil

import pytest
from sharing.shared_samples import ragged_embeddings, some_embeddings
from sharing.test_pushing import assert_shared, files, shared, store

from lmdbcache import EmbeddingCache
from lmdbcache.errors import CacheNotFoundError, RemoteError
from lmdbcache.exchange import Remote, push, verify_remote
from lmdbcache.exchange.sharing.history import read_history


@pytest.fixture
def nobody(tmp_path):
    """A cache that has nothing to repair from."""
    return EmbeddingCache(tmp_path / "nobody")


@pytest.fixture
def pushed(remote, cache, config):
    """30 samples in three shards and one commit."""
    values = some_embeddings(0, 30)
    store(cache, config, values)
    push(cache, config, remote.url, shard_bytes=32 * 10, writer="node-a")
    return values


def paths(remote, config, kind):
    return [
        f"{config.fingerprint}/{kind}/{name}"
        for name in sorted(remote.list_files(f"{config.fingerprint}/{kind}"))
    ]


def change(remote, path, edit):
    folder, _, name = path.rpartition("/")
    data = remote.read(path, remote.list_files(folder)[name])
    remote.write(path, edit(data))


def flip_last(data):
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGES = {
    "flipped": flip_last,
    "flipped in the header": lambda data: data[:40] + b"!" + data[41:],
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: data[:0],
    "longer": lambda data: data + b"more",
}


def test_what_is_sound_is_sound(remote, cache, config, pushed):
    """Nothing is found, nothing is changed."""
    before = files(remote, config)
    for options in ({}, {"known_to": cache}, {"repair_from": cache}):
        report = verify_remote(remote.url, **options)
        assert report.is_sound
        (one,) = report.stores
        assert (one.num_commits, one.num_shards, one.num_samples) == (1, 3, 30)
        assert not one.findings
    assert files(remote, config) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_made_again(remote, cache, config, pushed, damage):
    """Who has the embeddings writes the very same bytes."""
    before = files(remote, config)
    path = paths(remote, config, "shards")[1]
    change(remote, path, DAMAGES[damage])
    report = verify_remote(remote.url)
    assert report.exit_code == 1
    assert [found.path for found in report.stores[0].findings] == [path.partition("/")[2]]
    report = verify_remote(remote.url, repair_from=cache)
    assert report.exit_code == 0
    assert files(remote, config) == before
    assert verify_remote(remote.url).is_sound
    assert_shared(remote, config, pushed)


def test_a_missing_shard_is_made_again(remote, cache, config, pushed):
    """A shard that somebody removed is found by the commit that lists it."""
    path = paths(remote, config, "shards")[0]
    remote.remove(path)
    (found,) = verify_remote(remote.url).stores[0].findings
    assert found.state == "missing"
    assert verify_remote(remote.url, repair_from=cache).exit_code == 0
    assert_shared(remote, config, pushed)


def test_what_is_sound_of_a_damaged_shard_is_kept(remote, nobody, config, pushed):
    """Without the store one embedding is lost; it is named once, and can be pushed again."""
    path = paths(remote, config, "shards")[1]
    change(remote, path, flip_last)
    report = verify_remote(remote.url, repair_from=nobody)
    assert report.exit_code == 1
    (lost,) = report.lost
    assert_shared(remote, config, {name: v for name, v in pushed.items() if name != lost})
    assert path not in paths(remote, config, "shards")
    again = verify_remote(remote.url)
    assert again.is_sound
    assert again.stores[0].num_samples == 29
    # Who computed them is still told.
    commits = read_history(remote, config.fingerprint).commits.values()
    assert {commit.writer for commit in commits if commit.shards} == {"node-a"}


def test_what_was_lost_can_be_pushed_again(remote, cache, nobody, config, pushed):
    """The store that has it heals the place, under the shard's old name even."""
    for path in paths(remote, config, "shards"):
        remote.remove(path)
    report = verify_remote(remote.url, repair_from=nobody)
    assert len(report.lost) == 30
    assert verify_remote(remote.url).is_sound
    assert push(cache, config, remote.url, shard_bytes=32 * 10).num_pushed == 30
    assert verify_remote(remote.url).is_sound
    assert_shared(remote, config, pushed)


def test_a_store_that_has_a_part_helps(remote, tmp_path, config, pushed):
    """Local embeddings and what is sound of the file together are the very same shard."""
    path = paths(remote, config, "shards")[0]
    first = next(iter(read_history(remote, config.fingerprint).offers())).entry
    victim = first.sample_ids[-1]
    part = EmbeddingCache(tmp_path / "part")
    store(part, config, {victim: pushed[victim]})
    before = files(remote, config)
    change(remote, f"{config.fingerprint}/{first.path}", flip_last)
    assert verify_remote(remote.url, repair_from=part).exit_code == 0
    assert files(remote, config) == before
    assert path in paths(remote, config, "shards")


@pytest.mark.parametrize("damage", [*DAMAGES, "removed"])
def test_a_damaged_commit_comes_back_from_a_copy(remote, cache, config, pushed, damage):
    """Who has pushed keeps a copy of the commit."""
    before = files(remote, config)
    (path,) = paths(remote, config, "commits")
    if damage == "removed":
        remote.remove(path)
    else:
        change(remote, path, DAMAGES[damage])
    assert not verify_remote(remote.url, known_to=cache).is_sound
    assert verify_remote(remote.url, repair_from=cache).exit_code == 0
    assert files(remote, config) == before
    assert_shared(remote, config, pushed)


def test_without_a_copy_its_shards_are_listed_anew(remote, cache, nobody, config, pushed):
    """The damaged file is put aside, and who builds on it is no problem any more."""
    (path,) = paths(remote, config, "commits")
    store(cache, config, some_embeddings(30, 3))
    push(cache, config, remote.url)
    change(remote, path, flip_last)
    assert len(shared(remote, config)) == 3
    report = verify_remote(remote.url, repair_from=nobody)
    assert report.exit_code == 1  # whether it listed more than what is there, nobody can tell
    assert (report.stores[0].given_up, report.lost) == ([path.partition("/")[2]], [])
    assert report.stores[0].num_samples == 33
    assert_shared(remote, config, some_embeddings(0, 33))
    assert verify_remote(remote.url).is_sound
    history = read_history(remote, config.fingerprint)
    assert not history.problems
    assert remote.list_files(f"{config.fingerprint}/damaged")
    # The copy of the old one is of no interest any more.
    assert verify_remote(remote.url, known_to=cache).is_sound


def test_everything_at_once(remote, cache, nobody, config, pushed):
    """Commit and shards damaged: the copy is back first, then what it lists."""
    change(remote, paths(remote, config, "commits")[0], flip_last)
    change(remote, paths(remote, config, "shards")[0], flip_last)
    remote.remove(paths(remote, config, "shards")[1])
    assert verify_remote(remote.url, repair_from=cache).exit_code == 0
    assert verify_remote(remote.url, known_to=cache).is_sound
    assert_shared(remote, config, pushed)


def commit_and_shard(remote, config, edit=flip_last):
    """Damage the only commit and the first shard; returns the shard's name and sound bytes."""
    path = paths(remote, config, "shards")[0]
    folder, _, name = path.rpartition("/")
    data = remote.read(path, remote.list_files(folder)[name])
    change(remote, paths(remote, config, "commits")[0], flip_last)
    change(remote, path, edit)
    return name, data


def forget_copies(cache, config):
    shutil.rmtree(cache.path(config) / "commits")


def test_without_a_copy_the_header_names_the_samples(remote, cache, config, pushed):
    """Commit and shard damaged: the very bytes come from the store, and are listed anew."""
    forget_copies(cache, config)
    before = files(remote, config)
    commit_and_shard(remote, config)
    report = verify_remote(remote.url, repair_from=cache)
    assert_shared(remote, config, pushed)
    after = files(remote, config)
    assert {name: at for name, at in before.items() if "shards" in name}.items() <= after.items()
    assert (report.exit_code, report.lost) == (1, [])  # a commit was given up
    assert (report.stores[0].num_samples, report.stores[0].num_unlisted) == (30, 0)
    assert verify_remote(remote.url).is_sound


def test_a_part_of_it_here_and_the_rest_in_the_file(remote, tmp_path, config, pushed):
    """What the damaged file has right and what the store has make the very bytes together."""
    victim = max(shared(remote, config), key=lambda one: one.encode())
    part = EmbeddingCache(tmp_path / "part")
    store(part, config, {victim: pushed[victim]})
    (path,) = [one for one in paths(remote, config, "shards") if victim in str(_ids(remote, one))]
    change(remote, path, flip_last)
    change(remote, paths(remote, config, "commits")[0], flip_last)
    report = verify_remote(remote.url, repair_from=part)
    assert (report.exit_code, report.lost) == (1, [])
    assert_shared(remote, config, pushed)


def _ids(remote, path):
    folder, _, name = path.rpartition("/")
    return remote.read(path, remote.list_files(folder)[name])[:2000]


def test_a_copy_of_another_url_restores_it(remote, cache, config, pushed):
    """The copy that was kept under another name of the place is the same commit."""
    copies = cache.path(config) / "commits"
    (folder,) = copies.iterdir()
    folder.rename(copies / "0123456789abcdef")
    before = files(remote, config)
    commit_and_shard(remote, config)
    assert verify_remote(remote.url, repair_from=cache).exit_code == 0
    assert files(remote, config) == before


@pytest.mark.parametrize("damage", ["flipped in the header", "cut to nothing", "of another store"])
def test_what_cannot_be_made_again_is_put_aside(remote, cache, config, pushed, damage):
    """It is named, nothing is thrown away, the exit code is 1, and a push brings all back."""
    forget_copies(cache, config)
    edit = {
        "flipped in the header": DAMAGES["flipped in the header"],
        "cut to nothing": DAMAGES["empty"],
        "of another store": lambda data: data.replace(b"clip_000", b"clip_900"),
    }[damage]
    name, data = commit_and_shard(remote, config, edit)
    report = verify_remote(remote.url, repair_from=cache)
    assert (report.exit_code, report.is_sound) == (1, False)
    assert f"shards/{name}" in report.stores[0].given_up
    folder = f"{config.fingerprint}/damaged"
    size = remote.list_files(folder)[name]
    assert remote.read(f"{folder}/{name}", size) == edit(data)
    assert push(cache, config, remote.url).num_pushed == 10
    assert_shared(remote, config, pushed)
    assert verify_remote(remote.url).is_sound


def test_putting_aside_writes_over_nothing(remote, nobody, config, pushed):
    """A second file of the same name is kept beside the first."""
    name = f"{'0' * 64}.safetensors"
    for content in (b"one", b"two", b"two"):
        remote.write(f"{config.fingerprint}/shards/{name}", content)
        assert verify_remote(remote.url, repair_from=nobody).exit_code == 1
    assert len(remote.list_files(f"{config.fingerprint}/damaged")) == 2


def test_what_cannot_be_put_aside_stays(remote, nobody, config, pushed, monkeypatch):
    """A place that takes no further file loses none."""
    name = f"{config.fingerprint}/shards/{'0' * 64}.safetensors"
    remote.write(name, b"one")
    original = Remote.write

    def refusing(self, path, data):
        if "/damaged/" in path:
            raise RemoteError("no")
        original(self, path, data)

    monkeypatch.setattr(Remote, "write", refusing)
    assert verify_remote(remote.url, repair_from=nobody).exit_code == 1
    assert name in paths(remote, config, "shards")


def test_a_second_value_is_lost_by_name(remote, tmp_path, config, nobody):
    """Another value of the same sample is no stand-in for the one that was damaged."""
    one, two = EmbeddingCache(tmp_path / "a"), EmbeddingCache(tmp_path / "b")
    store(one, config, some_embeddings(0, 1))
    store(two, config, some_embeddings(0, 1, seed=1))
    push(one, config, remote.url)
    (path,) = paths(remote, config, "shards")
    push(two, config, remote.url)
    remote.remove(path)
    report = verify_remote(remote.url, repair_from=nobody)
    assert (report.exit_code, report.lost) == (1, ["clip_00000:drum"])


def test_ragged_shards_are_made_again(remote, cache, nobody, config):
    """Lengths are in the commit, so that each row is found in a damaged file."""
    values = ragged_embeddings(12)
    store(cache, config, values, ragged=True)
    push(cache, config, remote.url)
    (path,) = paths(remote, config, "shards")
    change(remote, path, flip_last)
    report = verify_remote(remote.url, repair_from=nobody)
    (lost,) = report.lost
    assert_shared(remote, config, {name: v for name, v in values.items() if name != lost})
    push(cache, config, remote.url)
    assert_shared(remote, config, values)


def test_a_repaired_shard_of_replaced_values_loses_nothing(remote, tmp_path, config, nobody):
    """What counts no more isn't lost when it is damaged."""
    one, two = EmbeddingCache(tmp_path / "a"), EmbeddingCache(tmp_path / "b")
    store(one, config, some_embeddings(0, 3))
    store(two, config, some_embeddings(0, 3, seed=1))
    push(one, config, remote.url)
    (path,) = paths(remote, config, "shards")
    push(two, config, remote.url, replace=True)
    remote.remove(path)
    assert not verify_remote(remote.url).is_sound
    assert verify_remote(remote.url, repair_from=nobody).exit_code == 0
    assert verify_remote(remote.url).is_sound
    assert_shared(remote, config, some_embeddings(0, 3, seed=1))


def test_what_cannot_be_read_is_not_given_up(remote, nobody, config, pushed, monkeypatch):
    """A refusal isn't damage: nothing is changed."""
    before = files(remote, config)
    original = Remote._try

    def refusing(self, action, path):
        if "shards/" in path:
            action = _refuse
        return original(self, action, path)

    monkeypatch.setattr(Remote, "_try", refusing)
    report = verify_remote(remote.url, repair_from=nobody)
    assert report.exit_code == 1
    assert {found.state for found in report.stores[0].findings} == {"unreadable"}
    monkeypatch.setattr(Remote, "_try", original)
    assert files(remote, config) == before
    assert verify_remote(remote.url).is_sound


def _refuse(_):
    raise PermissionError("no")


def test_unlisted_shards_and_leftovers(remote, cache, config, pushed, tmp_path):
    """Of a push under way nothing is touched; damaged files that nobody lists are put aside."""
    folder = tmp_path / "shared" / config.fingerprint / "shards"
    (folder / ".uploading-00-x").write_bytes(b"half")
    (folder / f"{'0' * 64}.safetensors").write_bytes(b"not what its name says")
    (folder / "README").write_text("hello")
    report = verify_remote(remote.url)
    assert report.exit_code == 1
    assert report.stores[0].leftovers == ["shards/.uploading-00-x"]
    assert verify_remote(remote.url, repair_from=cache).exit_code == 1
    assert (folder / ".uploading-00-x").exists()  # it is new: somebody may be at it
    assert (folder / "README").exists()
    assert not (folder / f"{'0' * 64}.safetensors").exists()
    assert (folder.parent / "damaged" / f"{'0' * 64}.safetensors").exists()
    assert verify_remote(remote.url).exit_code == 0


def test_a_newer_release_is_left_alone(remote, cache, nobody, config, pushed):
    """A commit in a later format is told, and no repair takes it for damage."""
    import hashlib
    import json

    (path,) = paths(remote, config, "commits")
    data = remote.read(path, remote.list_files(path.rpartition("/")[0])[path.rpartition("/")[2]])
    newer = json.dumps({**json.loads(data), "format": 2}).encode()
    name = f"node-c-{hashlib.sha256(newer).hexdigest()}.json"
    remote.write(f"{config.fingerprint}/commits/{name}", newer)
    before = files(remote, config)
    report = verify_remote(remote.url, repair_from=nobody)
    (found,) = report.stores[0].findings
    assert found.state == "unreadable"
    assert "Upgrade" in found.reason
    assert files(remote, config) == before


def test_one_of_several_stores(remote, cache, config, pushed):
    """A fingerprint, or its first digits, chooses; nothing there is an error."""
    other = config.replace(duration=1.0)
    store(cache, other, some_embeddings(0, 3))
    push(cache, other, remote.url)
    assert len(verify_remote(remote.url).stores) == 2
    (one,) = verify_remote(remote.url, other.fingerprint[:8]).stores
    assert one.num_samples == 3
    for url, fingerprint in [(remote.url, "ffff"), (f"{remote.url}/nowhere", None)]:
        with pytest.raises(CacheNotFoundError):
            verify_remote(url, fingerprint)
