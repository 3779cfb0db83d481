"""Files at a place that nobody's push made: refused, named, and never more than that."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sharing.nodes import CONFIG, embeddings
from sharing.shared_stores import share

from lmdbcache.exchange import Remote

ITEMS = embeddings(0, 20)
CONFIG_RECORD = CONFIG.to_dict()


@pytest.fixture
def shared(on_file, nodes_at):
    """A place with one honest manifest; the node that pushed it and one that will pull."""
    one, two = nodes_at(on_file)
    one.store(ITEMS)
    one.push()
    return on_file, one, two


def put_manifest(place, record, writer="stranger"):
    """A manifest with the right digest in its name, whatever is in it."""
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    name = f"{CONFIG.fingerprint}/manifests/{writer}-{hashlib.sha256(data).hexdigest()}.json"
    place.objects.write(name, data)
    return name


def honest(place):
    (name, *_) = place.names("manifests/")
    return {**json.loads(place.objects.read(name)), "writer": "stranger"}


def changed(record, **changes):
    return {**record, **changes}


ENTRY = {
    "sha256": "1" * 64,
    "num_bytes": 2000,
    "header_bytes": 1000,
    "header_sha256": "2" * 64,
    "num_samples": 1,
    "first": "new:dog",
    "last": "new:dog",
}


def listing(**changes):
    """A manifest that lists one more shard, of these properties."""
    return lambda r: {**r, "shards": [*r["shards"], {**ENTRY, **changes}]}


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
    "a newer format": lambda r: changed(r, format=3),
    "format true": lambda r: changed(r, format=True),
    "a shape of texts": lambda r: changed(r, embedding_shape=["256"]),
    "a negative shape": lambda r: changed(r, embedding_shape=[-256]),
    "another shape": lambda r: changed(r, embedding_shape=[128]),
    "a shard of a terabyte": listing(num_bytes=1 << 40),
    "a header of a terabyte": listing(num_bytes=1 << 30, header_bytes=1 << 30),
    "billions of samples": listing(num_samples=1 << 40),
    "a shard that isn't there": listing(),
    "a path outside": listing(sha256="../" * 20 + "etcd"),
    "a field more": listing(more=1),
    "an id in half a character": listing(first="\ud800:dog"),
    "samples without end": listing(without=["new:dog"] * 100_000),
    "shards that are none": lambda r: changed(r, shards=[None, 3, "x"]),
    "the same shard a thousand times": lambda r: changed(r, shards=r["shards"] * 1000),
    "withdrawn, another writer's": lambda r: changed(r, withdraws=[f"me-{'0' * 64}"]),
    "withdrawn, a path": lambda r: changed(r, withdraws=["../x"]),
    "alongside what isn't there": lambda r: changed(r, alongside=[f"me-{'0' * 64}"]),
    "alongside a path": lambda r: changed(r, alongside=["../../x"]),
    "a writer that is a number": lambda r: changed(r, writer=3),
    "a writer that paints": lambda r: changed(r, writer="\x1b[31m\nlmdbcache: all is well"),
    "provenance in half a character": lambda r: changed(r, provenance={"a": "\udfff"}),
    "provenance of lists": lambda r: changed(r, provenance={"weights_digest": []}),
    "a long text": lambda r: changed(r, created="x" * 1_000_000),
}


ALONE = [pytest.param([kind], marks=pytest.mark.stress, id=kind) for kind in HOSTILE]


@pytest.mark.parametrize("kinds", [pytest.param([*HOSTILE], id="all"), *ALONE])
def test_manifests_of_strangers(shared, kinds):
    """The honest samples come all the same; nothing crashes, nothing leaves its folder."""
    place, one, two = shared
    record = honest(place)
    for kind in kinds:
        put_manifest(place, HOSTILE[kind](record))
    before = place.contents()
    command = two.run("pull", place.url)
    assert command.returncode in (0, 1)
    assert command.stderr.isprintable() or "\x1b" not in command.stdout + command.stderr
    assert all(line.startswith("lmdbcache: ") for line in command.stderr.splitlines())
    assert two.holds(ITEMS)
    two.run("info", CONFIG.fingerprint)
    assert one.run("push", place.url).returncode in (0, 1)
    assert one.run("verify", place.url).returncode in (0, 1)
    assert before.items() <= place.contents().items()


NAMES = ["x", "x.json", "../x.json", "-.json", "a-" + "0" * 64 + ".json", "é-" + "0" * 64 + ".json"]


def test_names_of_strangers(shared):
    """Files and folders that nobody asked for are in nobody's way."""
    place, one, two = shared
    for name in [*NAMES, "a/b/c"]:
        place.objects.write(f"{CONFIG.fingerprint}/manifests/{name.replace('../', '')}", b"1")
        place.objects.write(f"{CONFIG.fingerprint}/shards/{name.replace('../', '')}", b"1")
        place.objects.write(f"0123456789abcdef{name.replace('/', '')}/manifests/x", b"1")
        place.objects.write(name.replace("../", ""), b"1")
    assert two.run("pull", place.url, CONFIG.fingerprint).returncode in (0, 1)
    assert two.holds(ITEMS)
    assert one.run("push", place.url).returncode in (0, 1)


@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.stress)])
def test_values_that_no_store_takes(shared, value):
    """A stranger's NaN is refused by name; all other samples come."""
    place, _, two = shared
    bad = embeddings(100, 3)
    bad["clip_000101:dog"][7] = value
    share(Remote(place.url), CONFIG, bad, writer="stranger")
    command = two.run("pull", place.url)
    assert command.returncode == 1
    assert "clip_000101:dog" in command.stderr
    del bad["clip_000101:dog"]
    assert two.holds({**ITEMS, **bad})


def test_a_long_list_of_manifests_costs_little(shared):
    """Thousands of them, as large as they may be: neither minutes nor gigabytes."""
    place, _, two = shared
    record = {**honest(place), "shards": [], "withdraws": [], "alongside": []}
    for number in range(2000):
        put_manifest(place, {**record, "created": str(number)})
    padding = json.dumps({**record, "x": "[" * (8 << 20)}).encode()
    for number in range(10):
        put_manifest(place, padding[: 8 << 20].replace(b"[", b"%d" % number, 1))
    # In a process of its own, whose memory and time are counted.
    script = (
        "import resource, sys\n"
        "from lmdbcache.errors import IntegrityError\n"
        "from lmdbcache.exchange import pull\n"
        "try:\n    pull(sys.argv[1], None, sys.argv[2])\n"
        "except IntegrityError:\n    pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        # Its maxrss would be that of the process that started it, if that is larger.
        "peak = open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]\n"
        "print(int(peak) >> 10, used.ru_utime + used.ru_stime)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, two.cache.root, place.url],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    megabytes, seconds = map(float, done.stdout.split())
    assert megabytes < 400
    assert seconds < 30


def test_what_the_previous_form_has_pushed_is_refused(shared):
    """One line names the place and what to do; nothing is read or written there."""
    place, one, two = shared
    for name in place.names():
        content = place.objects.read(name)
        place.objects.remove(name)
        place.objects.write(name.replace("/manifests/", "/commits/"), content)
    before = place.contents()
    for node, command in ((one, "push"), (two, "pull"), (two, "verify")):
        assert "push again to an empty folder" in node.refused(command, place.url)
    assert place.contents() == before
