"""Objects that are damaged, cut or gone: found, named, pushed again; all others come meanwhile."""

from __future__ import annotations

import random

from sharing.nodes import embeddings
from stress.figures import fault_seed
from stress.rounds import rounds

ITEMS = embeddings(0, 100)  # 7 shards, 4 manifests


def damage(place, dice):
    """Flip a bit of an object, cut it, lengthen it, or remove it; returns its name."""
    name = dice.choice(place.names())
    content = place.objects.read(name)
    kind = dice.randrange(5)
    if kind == 0:
        place.objects.remove(name)
    elif kind == 1:
        place.objects.write(name, content[: dice.randrange(len(content))])
    elif kind == 2:
        place.objects.write(name, content + b"\0" * dice.randrange(1, 100))
    else:
        place.flip(name, dice.randrange(len(content)), 1 << dice.randrange(8))
    return name


@rounds(60)
def test_damage_is_found_and_repaired(on_moto, nodes_at, round_number):
    """verify names it; who pulls gets nothing wrong; pushing again brings everything back."""
    dice = random.Random(fault_seed() + 3 + 1000 * round_number)
    one, two = nodes_at(on_moto)
    one.store(ITEMS)
    one.push()
    sound = on_moto.contents()
    damaged = {damage(on_moto, dice) for _ in range(dice.randint(1, 3))}
    damaged = {name for name in damaged if on_moto.contents().get(name) != sound.get(name)}
    report = one.report("verify", on_moto.url, code=1 if damaged else 0)
    assert report["is_sound"] is not bool(damaged)
    # A shard that only a damaged manifest lists isn't known as a part of the store.
    manifests = {name for name in damaged if "/manifests/" in name}
    named = str(report)
    assert all(name.partition("/")[2] in named for name in manifests or damaged), named
    command = two.run("pull", on_moto.url)
    # A manifest that is gone can be missed only if another was written beside it.
    if any(name in on_moto.names() for name in damaged):
        assert command.returncode == 1, command.stdout + command.stderr
    stored = two.stored()
    assert all(stored[name].tobytes() == ITEMS[name].tobytes() for name in stored)
    one.push("--repair")
    two.pull()
    assert two.holds(ITEMS)
    assert one.report("verify", on_moto.url)["is_sound"]
