"""Push and pull over real servers while the network does what it does: nothing is lost or wrong."""

from __future__ import annotations

import pytest
from sharing.nodes import SIZES, embeddings
from sharing.servers import PASSWORD, SECRET_KEY

ITEMS = embeddings(0, 100)  # 7 shards, 4 manifests
FEW_TRIES = {**SIZES, "_TRIES": 2}
FOR_EVER = 10**6


@pytest.fixture(
    params=[
        "on_moto",
        "on_sftp",
        pytest.param("on_file", marks=pytest.mark.stress),
    ]
)
def place(request):
    return request.getfixturevalue(request.param)


def test_there_and_back(place, nodes_at):
    """What one node pushes, another pulls, bit for bit; a second time nothing moves."""
    one, two = nodes_at(place)
    one.store(ITEMS)
    assert one.push()["num_pushed"] == len(ITEMS)
    before = place.contents()
    assert two.pull()["bytes_fetched"] > 0
    assert two.holds(ITEMS)
    assert two.push()["num_pushed"] == one.push()["num_pushed"] == two.pull()["bytes_fetched"] == 0
    assert place.contents() == before
    kept = [path for node in (one, two) for path in node.folder.rglob("*") if path.is_file()]
    secrets = [PASSWORD.encode(), SECRET_KEY.encode()]
    assert not [path for path in kept if any(one in path.read_bytes() for one in secrets)]


def test_a_hundred_new_samples_move_two_objects(on_moto, nodes_at):
    """One shard and one manifest up, the same down, nothing else; and no HEAD at all."""
    one, two = nodes_at(on_moto, sizes={})
    one.store(embeddings(0, 1000))
    one.push()
    two.pull()
    one.store(embeddings(1000, 100))
    on_moto.proxy.clear()
    one.push()
    put = on_moto.proxy.select("PUT")
    assert [request.path.split("/")[-2] for request in put] == ["shards", "manifests"]
    assert [get.name for get in on_moto.proxy.select("GET", "safetensors")] == []
    on_moto.proxy.clear()
    two.pull()
    got = on_moto.proxy.select("GET", "/some/place/")
    assert {request.name for request in got} == {request.name for request in put}
    assert sum(get.num_bytes_down for get in got) == sum(up.num_bytes_up for up in put)
    assert on_moto.proxy.count("HEAD") == 0
    assert two.holds(embeddings(0, 1100))


PUSH_FAULTS = [
    {"kind": "cut upload", "after": 5000, "part": "shards/"},
    {"kind": "cut upload", "after": 10, "part": "manifests/"},
    {"kind": "lose answer", "method": "PUT"},
    {"kind": "answer", "method": "PUT", "status": 503},
    {"kind": "answer", "method": "GET", "status": 500},
    {"kind": "cut download", "method": "GET", "after": 100},
    {"kind": "stall answer", "method": "PUT", "part": "shards/"},
]


@pytest.mark.stress
@pytest.mark.parametrize("fault", PUSH_FAULTS, ids=str)
def test_a_push_goes_on_after_faults(on_moto, nodes_at, fault):
    """Everything arrives, once, whole, and the exit code is 0."""
    one, two = nodes_at(on_moto, is_impatient=fault["kind"].startswith("stall"))
    one.store(ITEMS)
    one.push()
    clean = set(on_moto.names("shards/"))
    one.store(embeddings(100, 40))
    met = on_moto.proxy.fault(**fault)
    one.push()
    assert met.num_met == 1
    assert clean < set(on_moto.names("shards/"))
    assert two.report("verify", on_moto.url)["is_sound"]
    two.pull()
    assert two.holds(embeddings(0, 140))


PULL_FAULTS = [
    {"kind": "cut download", "after": 3000, "part": "shards/"},
    {"kind": "cut download", "after": 10, "part": "manifests/"},
    {"kind": "cut download", "after": 100, "part": "list-type"},
    {"kind": "answer", "status": 503, "part": "shards/"},
    {"kind": "answer", "status": 500, "part": "list-type"},
    {"kind": "stall download", "after": 3000, "part": "shards/"},
    {"kind": "flip download", "after": 6000, "part": "shards/"},
    {"kind": "flip download", "after": 100, "part": "manifests/"},
]


@pytest.mark.stress
@pytest.mark.parametrize("fault", PULL_FAULTS, ids=str)
def test_a_pull_goes_on_after_faults(on_moto, nodes_at, fault):
    """What the network damages or drops is fetched again, and nobody is told of damage there."""
    one, two = nodes_at(on_moto, is_impatient=fault["kind"].startswith("stall"))
    one.store(ITEMS)
    one.push()
    met = on_moto.proxy.fault(method="GET", **fault)
    two.pull()
    assert met.num_met == 1
    assert two.holds(ITEMS)


def test_one_fault_after_the_other(on_moto, nodes_at):
    """Some of these in one push and one pull: what the network does isn't told as damage."""
    one, two = nodes_at(on_moto)
    one.store(ITEMS)
    faults = [on_moto.proxy.fault(**fault) for fault in PUSH_FAULTS[:3]]
    one.push()
    assert [fault.num_met for fault in faults] == [1] * len(faults)
    on_moto.proxy.clear()
    faults = [
        on_moto.proxy.fault(method="GET", **fault) for fault in (PULL_FAULTS[0], *PULL_FAULTS[-2:])
    ]
    two.pull()
    assert [fault.num_met for fault in faults] == [1] * len(faults)
    assert two.holds(ITEMS)


def test_a_pull_that_gave_up_fetches_only_the_rest(on_moto, nodes_at):
    """A connection that breaks again and again ends it; the next one goes on where it was."""
    one, two = nodes_at(on_moto, sizes=FEW_TRIES)
    one.store(ITEMS)
    one.push()
    whole = sum(len(on_moto.objects.read(name)) for name in on_moto.names("shards/"))
    on_moto.proxy.clear()
    shards = []

    def is_fourth_or_later(request):
        if request.name not in shards:
            shards.append(request.name)
        return len(shards) > 3

    on_moto.proxy.fault(
        "cut download", after=5000, part="shards/", times=FOR_EVER, fits=is_fourth_or_later
    )
    assert two.run("pull", on_moto.url).returncode == 1
    assert 0 < len(two.stored()) < len(ITEMS)
    first = sum(get.num_bytes_down for get in on_moto.proxy.select("GET", "shards/"))
    on_moto.proxy.clear()
    two.pull()
    assert two.holds(ITEMS)
    second = sum(get.num_bytes_down for get in on_moto.proxy.select("GET", "shards/"))
    assert first + second == whole


def test_a_push_that_gave_up_uploads_only_the_rest(on_moto, nodes_at):
    """Shards that are there aren't uploaded again, whether a manifest names them or not."""
    one, two = nodes_at(on_moto, sizes=FEW_TRIES)
    one.environment = {"AWS_MAX_ATTEMPTS": "1"}
    one.store(ITEMS)
    shards = []

    def is_fourth_or_later(request):
        shards.append(request.name)
        return len(shards) > 3

    on_moto.proxy.fault(
        "cut upload", after=5000, part="shards/", times=FOR_EVER, fits=is_fourth_or_later
    )
    line = one.refused("push", on_moto.url)
    assert on_moto.url in line
    there = {name.rpartition("/")[2] for name in on_moto.names("shards/")}
    assert len(there) >= 3
    on_moto.proxy.clear()
    one.push()
    uploaded = [put.name for put in on_moto.proxy.select("PUT", "shards/")]
    now = {name.rpartition("/")[2] for name in on_moto.names("shards/")}
    assert sorted(uploaded) == sorted(now - there)
    two.pull()
    assert two.holds(ITEMS)


@pytest.mark.stress
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_sftp_connections_that_break(on_sftp, nodes_at, kind, way):
    """One that is cut, or stands still, is made good by another, without a word."""
    one, two = nodes_at(on_sftp, is_impatient=True)
    one.store(ITEMS)
    if way == "down":
        one.push()
    node, command = (one, "push") if way == "up" else (two, "pull")
    on_sftp.proxy.clear()
    on_sftp.proxy.fault(kind, way, 30_000)
    done = node.run(command, on_sftp.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert on_sftp.proxy.num_connections > 1
    two.pull()
    assert two.holds(ITEMS)
