"""The history of commits: what a commit id pins, and what counts."""

from __future__ import annotations

import pytest
from sharing.shared_samples import put_commit, shard_of, some_embeddings
from sharing.shared_stores import share

from lmdbcache.errors import ConfigError
from lmdbcache.exchange import Remote, pull
from lmdbcache.exchange.sharing.copies import CommitCopies
from lmdbcache.exchange.sharing.history import read_history


def shards(config, number):
    return [shard_of(config, some_embeddings(10 * one, 10))[0] for one in range(number)]


def offered(history):
    return [offer.entry.sha256 for offer in history.offers()]


def test_a_commit_pins_itself_and_its_ancestors(remote, config):
    """What came later or beside it isn't part of its state."""
    one, two, three, four = shards(config, 4)
    first = put_commit(remote, config, [one])
    second = put_commit(remote, config, [two], parents=[first.id])
    beside = put_commit(remote, config, [three], parents=[first.id], writer="node-b")
    last = put_commit(remote, config, [four], parents=[second.id, beside.id])
    history = read_history(remote, config.fingerprint)
    assert history.heads == (last.id,)
    assert set(history.at(second.id).commits) == {first.id, second.id}
    assert set(offered(history.at(second.id))) == {one.sha256, two.sha256}
    assert set(offered(history.at(last.id[-64:][:12]))) == {
        entry.sha256 for entry in (one, two, three, four)
    }
    ids = [commit.id for commit in history.ordered()]
    assert ids[0] == first.id
    assert ids[-1] == last.id


def test_an_id_is_found_by_its_beginning_or_digest(remote, config):
    """None and several are refused by name."""
    one, two = shards(config, 2)
    commit = put_commit(remote, config, [one])
    put_commit(remote, config, [two])
    history = read_history(remote, config.fingerprint)
    for text in (commit.id, commit.id + ".json", commit.id[-64:], commit.id[-64:][:10]):
        assert history.find(text) == commit
    for text in ("node-a", "f" * 64, ""):
        with pytest.raises(ConfigError, match="commit"):
            history.find(text)


def test_what_one_branch_replaces_another_may_still_share(remote, tmp_path, config):
    """A shard that two writers list counts for the one whose value nobody has replaced."""
    old, new = some_embeddings(0, 3), some_embeddings(0, 1, seed=1)
    for writers in (("a", "b"), ("b", "a")):
        place = Remote(f"{remote.url}-{writers[0]}")
        one = share(place, config, old, writer=writers[0])
        share(place, config, old, writer=writers[1])
        (entry,) = one.shards
        share(
            *(place, config, new),
            writer="c",
            parents=[one.id],
            replaced={entry.sample_ids[0]: [entry.checksums[0]]},
        )
        merged = pull(tmp_path / f"cache-{writers[0]}", place.url).merged
        assert merged.num_new == 3
        assert [conflict.sample_id for conflict in merged.conflicts] == [entry.sample_ids[0]]


def test_a_missing_or_damaged_parent_is_told(remote, config):
    """The rest counts, and the problem names the file."""
    one, two = shards(config, 2)
    first = put_commit(remote, config, [one])
    last = put_commit(remote, config, [two], parents=[first.id])
    path = f"{config.fingerprint}/{first.path}"
    remote.write(
        path,
        remote.read(
            path, remote.list_files(f"{config.fingerprint}/commits")[f"{first.id}.json"]
        ).replace(b"node-a", b"node-x"),
    )
    history = read_history(remote, config.fingerprint)
    assert offered(history) == [two.sha256]
    assert "digest" in history.problems[first.path]
    assert first.path in history.at(last.id).problems
    remote.remove(path)
    assert "isn't there" in read_history(remote, config.fingerprint).problems[first.path]


def test_a_withdrawal_concerns_ancestors_alone(remote, config):
    """Who lists the same shard without knowing of the withdrawal still offers it."""
    one, two, three = shards(config, 3)
    first = put_commit(remote, config, [one, two])
    put_commit(remote, config, [three], parents=[first.id], withdrawn=[one.sha256])
    assert set(offered(read_history(remote, config.fingerprint))) == {two.sha256, three.sha256}
    put_commit(remote, config, [one], writer="node-b")
    assert one.sha256 in offered(read_history(remote, config.fingerprint))


def test_a_replaced_sample_counts_no_more(remote, config):
    """Only that value of that sample, and only where the replacing commit has seen it."""
    old, _ = shard_of(config, some_embeddings(0, 3))
    new, _ = shard_of(config, some_embeddings(0, 1, seed=1))
    first = put_commit(remote, config, [old])
    name = old.sample_ids[0]
    assert name == new.sample_ids[0]
    put_commit(remote, config, [new], parents=[first.id], replaced={name: [old.checksums[0]]})
    history = read_history(remote, config.fingerprint)
    assert [list(offer.rows) for offer in history.offers()] == [[1, 2], [0]]
    assert history.checksums().of(name) == {new.checksums[0]}


def test_foreign_files_are_left_alone(remote, config):
    """What isn't named like a commit is nobody's business."""
    for name in ("README.md", "a.json", f"x-{'0' * 63}.json", f".x-{'0' * 64}.json"):
        remote.write(f"{config.fingerprint}/commits/{name}", b"hello")
    history = read_history(remote, config.fingerprint)
    assert not history.commits
    assert not history.problems
    assert history.config is None


def test_copies_are_read_instead(remote, config, tmp_path):
    """A commit that was read once isn't read again, unless its copy is damaged."""
    (one,) = shards(config, 1)
    commit = put_commit(remote, config, [one])
    copies = CommitCopies(tmp_path, remote.url)
    expected = read_history(remote, config.fingerprint, copies).commits
    read = []
    original = remote.read
    remote.read = lambda path, size: read.append(path) or original(path, size)
    assert read_history(remote, config.fingerprint, copies).commits == expected
    assert read == []
    (copy,) = tmp_path.glob(f"commits/*/{commit.id}.json")
    copy.write_bytes(copy.read_bytes()[:-1])
    assert read_history(remote, config.fingerprint, copies).commits == expected
    assert len(read) == 1
    assert copies.ids() == [commit.id]
    assert CommitCopies(tmp_path, "memory://another").ids() == []


def test_what_was_cut_shows_in_spite_of_a_copy(remote, config, tmp_path):
    """A LIST tells that the file is shorter now."""
    (one,) = shards(config, 1)
    commit = put_commit(remote, config, [one])
    copies = CommitCopies(tmp_path, remote.url)
    read_history(remote, config.fingerprint, copies)
    remote.write(f"{config.fingerprint}/{commit.path}", b"{}")
    assert commit.path in read_history(remote, config.fingerprint, copies).problems
