"""Files at a place that nobody's push made: refused, named, and never more than that."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from sharing.nodes import CONFIG, embeddings

ITEMS = embeddings(0, 20)
CONFIG_RECORD = CONFIG.to_dict()


@pytest.fixture
def shared(on_file, nodes_at):
    """A place with one honest commit; the node that pushed it and one that will pull."""
    one, two = nodes_at(on_file)
    one.store(ITEMS)
    one.push()
    return on_file, one, two


def put_commit(place, record, writer="stranger"):
    """A commit file with the right digest in its name, whatever is in it."""
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    name = f"{CONFIG.fingerprint}/commits/{writer}-{hashlib.sha256(data).hexdigest()}.json"
    place.objects.write(name, data)
    return name


def honest(place):
    (name,) = place.names("commits/")
    return json.loads(place.objects.read(name))


def changed(record, **changes):
    return {**record, **changes}


HUGE = {"sha256": "0" * 64, "num_bytes": (1 << 40) - 1, "samples": [["new:dog", "00" * 8]]}
ABSENT = {"sha256": "1" * 64, "num_bytes": 1000, "samples": [["new:dog", "00" * 8]]}
OUTSIDE = {"sha256": "../" * 20 + "etcd", "num_bytes": 100, "samples": [["new:dog", "00" * 8]]}
HOSTILE = {
    "no JSON": lambda _: b"{",
    "an empty file": lambda _: b"",
    "no UTF-8": lambda _: b'{"format": "\xff"}',
    "a list": lambda _: [],
    "deep nesting": lambda _: b"[" * 100_000,
    "many digits": lambda _: b'{"format": ' + b"9" * 100_000 + b"}",
    "infinity": lambda _: b'{"format": 1e999}',
    "another fingerprint": lambda r: changed(r, fingerprint="0" * 16),
    "another config": lambda r: changed(r, config={**CONFIG_RECORD, "duration": 2.0}),
    "a config of lists": lambda r: changed(r, config={**CONFIG_RECORD, "model_name": ["a"]}),
    "a newer format": lambda r: changed(r, format=2),
    "format true": lambda r: changed(r, format=True),
    "a shape of texts": lambda r: changed(r, embedding_shape=["256"]),
    "a negative shape": lambda r: changed(r, embedding_shape=[-256]),
    "another shape": lambda r: changed(r, embedding_shape=[128]),
    "a shard of a terabyte": lambda r: changed(r, shards=[HUGE]),
    "a shard that isn't there": lambda r: changed(r, shards=[ABSENT]),
    "a path outside": lambda r: changed(r, shards=[OUTSIDE]),
    "a parent outside": lambda r: changed(r, parents=["../../x"]),
    "a parent that isn't there": lambda r: changed(r, parents=["me-" + "0" * 64]),
    "shards that are none": lambda r: changed(r, shards=[None, 3, "x"]),
    "a writer that is a number": lambda r: changed(r, writer=3),
    "a writer in half a character": lambda r: changed(r, writer="\ud800"),
    "a writer that paints": lambda r: changed(r, writer="\x1b[31m\nlmdbcache: all is well"),
    "provenance in half a character": lambda r: changed(r, provenance={"a": "\udfff"}),
    "provenance of lists": lambda r: changed(r, provenance={"weights_digest": []}),
    "a long text": lambda r: changed(r, writer="x" * 1_000_000),
    "a sample id in half a character": lambda r: changed(
        r, shards=[{**ABSENT, "samples": [["\ud800:dog", "00" * 8]]}]
    ),
    "replaced, a number": lambda r: changed(r, replaced=3),
    "withdrawn, a path": lambda r: changed(r, withdrawn=["../x"]),
}


ALONE = [pytest.param([kind], marks=pytest.mark.stress, id=kind) for kind in HOSTILE]


@pytest.mark.parametrize("kinds", [pytest.param([*HOSTILE], id="all"), *ALONE])
def test_commits_of_strangers(shared, kinds):
    """The honest commit's samples come all the same; nothing crashes, nothing leaves its folder."""
    place, one, two = shared
    record = honest(place)
    for kind in kinds:
        put_commit(place, HOSTILE[kind](record))
    before = place.contents()
    command = two.run("pull", place.url)
    assert command.returncode in (0, 1)
    assert command.stderr.isprintable() or "\x1b" not in command.stdout + command.stderr
    assert all(line.startswith("lmdbcache: ") for line in command.stderr.splitlines())
    assert two.holds(ITEMS)
    two.run("info", CONFIG.fingerprint)
    assert one.run("push", place.url).returncode in (0, 1)
    assert one.run("verify", place.url).returncode in (0, 1)
    assert place.contents() == before


NAMES = ["x", "x.json", "../x.json", "-.json", "a-" + "0" * 64 + ".json", "é-" + "0" * 64 + ".json"]


def test_names_of_strangers(shared):
    """Files and folders that nobody asked for are in nobody's way."""
    place, one, two = shared
    for name in [*NAMES, "a/b/c"]:
        place.objects.write(f"{CONFIG.fingerprint}/commits/{name.replace('../', '')}", b"1")
        place.objects.write(f"{CONFIG.fingerprint}/shards/{name.replace('../', '')}", b"1")
        place.objects.write(f"0123456789abcdef{name.replace('/', '')}/commits/x", b"1")
        place.objects.write(name.replace("../", ""), b"1")
    assert two.run("pull", place.url, CONFIG.fingerprint).returncode in (0, 1)
    assert two.holds(ITEMS)
    assert one.run("push", place.url).returncode in (0, 1)


@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.stress)])
def test_values_that_no_store_takes(shared, value):
    """A stranger's NaN is refused by name; all other samples come."""
    from lmdbcache.exchange import encode_shard
    from lmdbcache.exchange.sharing.commits import new_commit

    place, _, two = shared
    bad = embeddings(100, 3)
    bad["clip_000101:dog"][7] = value
    entry, data = encode_shard(CONFIG, (256,), list(bad), list(bad.values()))
    commit, record = new_commit(CONFIG, (256,), "stranger", "now", shards=[entry])
    place.objects.write(f"{CONFIG.fingerprint}/{entry.path}", data)
    place.objects.write(f"{CONFIG.fingerprint}/{commit.path}", record)
    command = two.run("pull", place.url)
    assert command.returncode == 1
    assert "clip_000101:dog" in command.stderr
    del bad["clip_000101:dog"]
    assert two.holds({**ITEMS, **bad})


def test_clocks_do_not_matter(shared):
    """Commits of any time count, in the order of their parents."""
    from lmdbcache.exchange import encode_shard
    from lmdbcache.exchange.sharing.commits import new_commit

    place, _, two = shared
    everything = dict(ITEMS)
    for number, year in enumerate(["1970-01-01", "9999-12-31", "yesterday", ""], 1):
        more = embeddings(100 * number, 3)
        entry, data = encode_shard(CONFIG, (256,), list(more), list(more.values()))
        commit, record = new_commit(CONFIG, (256,), "elsewhere", year, shards=[entry])
        place.objects.write(f"{CONFIG.fingerprint}/{entry.path}", data)
        place.objects.write(f"{CONFIG.fingerprint}/{commit.path}", record)
        everything |= more
    two.pull()
    assert two.holds(everything)
