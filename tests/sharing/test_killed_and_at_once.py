"""SIGKILL for pushes and pulls at any moment, and several of them at once: nothing is lost."""

from __future__ import annotations

import random
import time

import pytest
from sharing.nodes import CONFIG, embeddings
from stress.figures import fault_seed
from stress.rounds import rounds

ITEMS = embeddings(0, 160)  # 10 shards, 5 manifests


@pytest.fixture(
    params=[
        "on_file",
        pytest.param("on_moto", marks=pytest.mark.stress),
        pytest.param("on_sftp", marks=pytest.mark.stress),
    ]
)
def place(request):
    return request.getfixturevalue(request.param)


def kill_some(node, command, dice, number):
    """Start, kill, start again; lives are as long as a whole run takes at most."""
    url = node.place.url
    life, killed = 0.5, 0
    while killed < number:
        running = node.start(command, url)
        time.sleep(dice.uniform(0, life))
        if running.is_running():
            running.kill()
            killed += 1
            life *= 1.1
            yield
        else:
            assert running.returncode == 0, running.stdout + running.stderr
            return


@rounds(15)
def test_killed_pushes(place, nodes_at, round_number):
    """Who pulls meanwhile gets sound values; the last push completes it, and nothing is twice."""
    dice = random.Random(fault_seed() + 1000 * round_number)
    one, two = nodes_at(place)
    for number in range(2):
        one.store(embeddings(160 * number, 160))
        everything = embeddings(0, 160 * (number + 1))
        for _ in kill_some(one, "push", dice, 4):
            if place.names("manifests/"):
                two.pull()
                assert two.stored().keys() <= everything.keys()
        one.push()
        assert one.push()["num_pushed"] == 0
        assert len(place.names(".safetensors")) <= 10 * (number + 1) + 3
        two.pull()
        assert two.holds(everything)
    assert two.report("verify", place.url)["is_sound"]


@rounds(15)
def test_killed_pulls(place, nodes_at, round_number):
    """What was imported stays, what was fetched is gone on with, and nothing is fetched twice."""
    dice = random.Random(fault_seed() + 1 + 1000 * round_number)
    one, two = nodes_at(place)
    one.store(ITEMS)
    one.push()
    known = 0
    for _ in kill_some(two, "pull", dice, 4):
        stored = two.stored()
        assert len(stored) >= known
        assert len(stored) % 16 == 0  # each shard is one transaction
        assert all(stored[name].tobytes() == ITEMS[name].tobytes() for name in stored)
        known = len(stored)
    two.pull()
    assert two.holds(ITEMS)
    assert [path.name for path in two.cache.path(CONFIG).glob("**/*.part")] == []


@pytest.mark.parametrize(
    ("kind", "seed", "number"),
    [
        ("on_moto", 0, 1),
        *[
            pytest.param(kind, seed, 3, marks=pytest.mark.stress)
            for kind in ("on_moto", "on_sftp", "on_file")
            for seed in range(5)
        ],
    ],
)
def test_pushes_at_once(request, nodes_at, kind, seed, number):
    """Three nodes whose stores overlap push together while a fourth pulls: it gets all of it."""
    dice = random.Random(fault_seed() + 2 + 1000 * seed)
    place = request.getfixturevalue(kind)
    *pushing, pulling = nodes_at(place, 4)
    everything = {}
    for round_number in range(number):
        for node in pushing:
            first = 120 * round_number + dice.randrange(60)
            items = embeddings(first, 60)
            node.store({name: items[name] for name in items if name not in node.stored()})
            everything |= items
        running = [node.start("push", place.url, "--writer", node.folder.name) for node in pushing]
        while any(command.is_running() for command in running):
            if place.names("manifests/"):
                pulling.pull()
        assert [command.returncode for command in running] == [0, 0, 0], [
            command.stderr for command in running
        ]
        pulling.pull()
        assert pulling.holds(everything)
    assert pulling.report("verify", place.url)["is_sound"]
    for node in pushing:
        assert node.push()["num_pushed"] == 0


def test_two_pulls_into_one_store(on_moto, nodes_at):
    """They take turns, and everything is fetched once."""
    one, two = nodes_at(on_moto)
    one.store(ITEMS)
    one.push()
    on_moto.proxy.clear()
    running = [two.start("pull", on_moto.url) for _ in range(2)]
    assert [command.wait().returncode for command in running] == [0, 0]
    assert two.holds(ITEMS)
    shards = [get.name for get in on_moto.proxy.select("GET", ".safetensors")]
    whole = sum(len(on_moto.objects.read(name)) for name in on_moto.names(".safetensors"))
    fetched = sum(get.num_bytes_down for get in on_moto.proxy.select("GET", ".safetensors"))
    assert len(set(shards)) == 10
    assert fetched == whole


@pytest.mark.parametrize("number", [2, pytest.param(15, marks=pytest.mark.stress)])
def test_signals(on_moto, nodes_at, number):
    """Ctrl-C and SIGTERM end a push with one line; the next one goes on."""
    one, two = nodes_at(on_moto)
    one.store(ITEMS)
    on_moto.proxy.fault("stall answer", method="PUT", fits=lambda put: "manifests" in put.path)
    running = one.start("push", on_moto.url)
    while not any(put.fault for put in on_moto.proxy.select(answered=False)):
        assert running.is_running(), running.stderr
        time.sleep(0.01)
    running.kill(number)
    running.wait()
    assert running.returncode == 128 + number
    assert "Traceback" not in running.stderr
    one.push()
    two.pull()
    assert two.holds(ITEMS)
