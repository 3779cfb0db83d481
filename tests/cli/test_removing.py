"""`rm` and `prune`."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import click
import lmdb
import msgpack
import numpy as np
import pytest
from storage.child_processes import hold, hold_writer, let_go, peer_process

from lmdbcache.cache import PrunePolicy, plan_pruning, prune
from lmdbcache.cli.doctor.stores import check_stores
from lmdbcache.cli.quantities import age, parse_moment, parse_size
from lmdbcache.storage import checksum, write_lock
from lmdbcache.storage.layout import CHECKSUMS_NAME, METADATA_KEY

DAY = 86400


def parsed(result):
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def make_older(cache, config, days):
    """Last written and read so many days ago."""
    store = cache.path(config)
    for path in (next(store.glob("gen-*/data.mdb")), *store.glob("last_used")):
        os.utime(path, (time.time() - days * DAY,) * 2)


# ---- rm


def test_rm_and_its_old_name(cli, cache, configs):
    """`rm` removes whole stores; `clear` is the same command."""
    (removed,) = parsed(cli("rm", configs[0].fingerprint, "--yes", "--json"))
    assert removed["fingerprint"] == configs[0].fingerprint
    result = cli("clear", configs[1].fingerprint, stdin="y\n")
    assert result.returncode == 0
    assert "Remove 1 store from" in result.stdout
    assert list(cache) == [configs[2]]


def test_rm_dry_run(cli, cache, configs):
    """--dry-run tells what would go, asks nothing and leaves everything."""
    result = cli("rm", "--all", "--dry-run")
    assert "would remove 3 stores" in result.stdout
    assert "?" not in result.stdout
    assert len(parsed(cli("rm", "--all", "--dry-run", "--json"))) == 3
    assert (
        "would remove 3 embeddings"
        in cli("rm", configs[0].fingerprint, "--class", "dog", "--dry-run").stdout
    )
    assert [store.num_embeddings for store in cache.stores()] == [6, 6, 6]


def test_rm_of_a_class(cli, cache, configs):
    """--class removes the class's embeddings in this store alone and says how to get the space."""
    name = configs[0].fingerprint
    result = cli("rm", name, "--class", "DOG", stdin="y\n")
    assert result.returncode == 0, result.stderr
    assert "3 of 6 embeddings (dog: 3)" in result.stdout
    assert "removed 3 embeddings" in result.stdout
    assert "lmdbcache compact" in result.stdout
    with cache.reader(configs[0]) as reader:
        assert {sample_id.rpartition(":")[2] for sample_id in reader} == {"drum"}
    assert cache.info(configs[1]).num_embeddings == 6
    assert cli("verify", "--all").returncode == 0
    assert cli("rm", configs[1].fingerprint, "--class", "dog", stdin="n\n").returncode == 1
    assert cache.info(configs[1]).num_embeddings == 6


def test_rm_of_samples(cli, cache, configs, tmp_path):
    """--sample may be repeated; --ids FILE passes over what isn't stored."""
    listed = tmp_path / "ids.txt"
    listed.write_text("\ufeffvideo_00000:drum\n\nvideo_00099:drum\n")
    name = configs[0].fingerprint
    result = cli(
        *("rm", name, "--sample", "video_00001:dog", "--sample", "video_00003:Dog"),
        *("--ids", listed, "--yes"),
    )
    assert result.returncode == 0, result.stderr
    assert "removed 3 embeddings" in result.stdout
    assert "1 of the 2 listed aren't stored" in result.stdout
    entries = parsed(cli("rm", "--all", "--ids", listed, "--yes", "--json"))
    assert sorted(entry["num_removed"] for entry in entries) == [0, 1, 1]
    assert sorted(entry["num_left"] for entry in entries) == [3, 5, 5]
    result = cli("rm", "--all", "--ids", listed, "--yes")
    assert (result.returncode, "nothing to remove" in result.stdout) == (0, True)


def test_rm_of_what_is_not_there(refused, cache, configs, tmp_path):
    """A class or sample that is named and not stored is an error; nothing is removed."""
    line = refused("rm", "--all", "--class", "dgo", "--class", "dog", "--yes")
    assert "classes there: dog, drum" in line
    line = refused("rm", "--all", "--sample", "x:dog", "--sample", "video_00001:dog", "--yes")
    assert "x:dog: not stored" in line
    assert "file_id:class" in refused("rm", "--all", "--sample", "nonsense", "--yes")
    (tmp_path / "bad").write_bytes(b"\xff\xfe:dog")
    assert "UTF-8" in refused("rm", "--all", "--ids", tmp_path / "bad", "--yes")
    assert "absent" in refused("rm", "--all", "--ids", tmp_path / "absent", "--yes")
    assert "--yes" in refused("rm", "--all", "--class", "dog", "--json")
    assert [store.num_embeddings for store in cache.stores()] == [6, 6, 6]


def test_rm_inside_a_damaged_store(refused, cache, configs):
    """Embeddings are only removed from stores that open; the damage is named."""
    next(cache.path(configs[0]).glob("gen-*/data.mdb")).write_bytes(b"")
    assert "repair" in refused("rm", "--all", "--class", "dog", "--yes").lower()
    assert cache.info(configs[1]).num_embeddings == 6


# ---- prune


def test_prune_by_age(cli, cache, configs):
    """Both ages must hold: one that was read since, or written since, stays."""
    for config in configs:
        with cache.reader(config) as reader:
            len(reader)
        make_older(cache, config, 100)
    make_older(cache, configs[1], 40)
    os.utime(cache.path(configs[2]) / "last_used")  # read now
    planned = cli("prune", "--older-than", "30d", "--dry-run")
    assert "would remove 3 stores" in planned.stdout
    result = parsed(cli("prune", "--older-than", "30d", "--unused-since", "90d", "--yes", "--json"))
    (removed,) = result["removed"]
    assert removed["fingerprint"] == configs[0].fingerprint
    assert "last used" in removed["reason"]
    assert result["bytes_freed"] == removed["size_bytes"]
    assert len(cache.stores()) == 2


def test_prune_asks(cli, cache, configs):
    """Without --yes it names the stores with their reason and asks; --json alone is refused."""
    make_older(cache, configs[0], 100)
    result = cli("prune", "--older-than", "30d", stdin="n\n")
    assert result.returncode == 1
    assert configs[0].title in result.stdout
    assert "unused for 100d" in result.stdout
    assert len(cache.stores()) == 3
    assert "--yes" in cli("prune", "--older-than", "30d", "--json").stderr
    assert cli("prune", "--older-than", "30d", stdin="y\n").stdout.endswith("KiB\n")
    assert len(cache.stores()) == 2


def test_prune_by_size(cli, cache, configs):
    """The stores unused for longest go until the rest fits."""
    for days, config in enumerate(configs):
        make_older(cache, config, 10 - days)
    sizes = [cache.size(config) for config in configs]
    result = parsed(cli("prune", "--max-size", sum(sizes[1:]), "--yes", "--json"))
    assert [entry["fingerprint"] for entry in result["removed"]] == [configs[0].fingerprint]
    assert result["bytes_left"] == sum(sizes[1:]) == cache.size()
    assert "nothing to remove" in cli("prune", "--max-size", "50GB").stdout
    assert len(parsed(cli("prune", "--max-size", "0", "--yes", "--json"))["removed"]) == 2


def test_prune_empty_and_damaged(cli, cache, configs):
    """Kinds add up; an age beside them makes it fewer."""
    with cache.writer(configs[0]) as writer:
        with cache.reader(configs[0]) as reader:
            names = list(reader)
        writer.remove(names)
    data = next(cache.path(configs[1]).glob("gen-*/data.mdb"))
    data.write_bytes(b"")
    assert "would remove 1 store," in cli("prune", "--empty", "--dry-run").stdout
    options = ("prune", "--empty", "--damaged", "--dry-run")
    assert "would remove 2 stores" in cli(*options).stdout
    assert "nothing to remove" in cli(*options, "--older-than", "1d").stdout
    assert cli("prune", "--empty", "--damaged", "--yes").returncode == 0
    assert list(cache) == [configs[2]]


def test_prune_takes_damage_alone_for_damage(cli, cache, configs):
    """A store of a newer format, or one that may not be opened here, isn't damaged."""
    generation = next(cache.path(configs[0]).glob("gen-*"))
    with lmdb.open(str(generation), max_dbs=1) as env:
        checksums = env.open_db(CHECKSUMS_NAME)
        with env.begin(write=True) as transaction:
            record = {**msgpack.unpackb(transaction.get(METADATA_KEY)), "format_version": 2}
            packed = msgpack.packb(record)
            transaction.put(METADATA_KEY, packed)
            transaction.put(METADATA_KEY, checksum(METADATA_KEY, packed), db=checksums)
    (store,) = [store for store in cache.stores() if store.damage]
    assert ("Upgrade" in store.damage, store.is_damaged) == (True, False)
    assert "nothing to remove" in cli("prune", "--damaged", "--dry-run").stdout
    assert any("Upgrade" in finding.text + finding.remedy for finding in check_stores(cache))


def test_prune_looks_again_before_it_removes(cache, configs):
    """What was read, filled or repaired between the plan and the removal is kept."""
    for config in configs:
        make_older(cache, config, 100)
    plan = plan_pruning(cache, PrunePolicy(used_before=parse_moment("90d")))
    assert len(plan.removed) == 3
    with cache.reader(configs[0]) as reader:
        len(reader)
    with cache.writer(configs[1], without_provenance=True) as writer:
        writer.put("new:dog", np.ones((3, 8)))
    done = prune(cache, plan)
    assert [verdict.store.config for verdict in done.removed] == [configs[2]]
    assert {verdict.store.config for verdict in done.kept} == set(configs[:2])
    assert done.bytes_left == sum(verdict.store.size_bytes for verdict in done.kept)
    with peer_process() as peer:
        make_older(cache, configs[0], 100)
        plan = plan_pruning(cache, PrunePolicy(used_before=parse_moment("90d")))
        peer.call(hold_writer, cache.root, configs[0])
        (kept,) = prune(cache, plan).kept
        assert str(peer.process.pid) in kept.reason
        peer.call(let_go)


@pytest.mark.parametrize("use", [hold, hold_writer])
def test_prune_keeps_what_is_in_use(cli, cache, configs, use):
    """A store that another process reads or writes is kept and named, unless --force."""
    for config in configs:
        make_older(cache, config, 100)
    with peer_process() as peer:
        peer.call(use, cache.root, configs[0])
        for path in cache.path(configs[0]).glob("last_used"):
            path.unlink()
        make_older(cache, configs[0], 100)
        result = cli("prune", "--unused-since", "90d", "--yes")
        assert "removed 2 stores" in result.stdout
        assert (
            f"kept {configs[0].fingerprint} {configs[0].title}: in use by {peer.process.pid}"
            in result.stdout
        )
        assert "kept" in cli("prune", "--max-size", "0", "--yes").stdout
        assert list(cache) == [configs[0]]
        assert "in use by" in cli("rm", "--all", "--dry-run").stdout
        result = parsed(cli("prune", "--unused-since", "90d", "--force", "--yes", "--json"))
        assert (len(result["removed"]), result["kept"]) == (1, [])
        peer.call(let_go)
    assert list(cache) == []


def test_prune_does_not_wait_for_a_writer(cli, cache, configs):
    """Who holds the writer lock is named; nothing is removed."""
    make_older(cache, configs[0], 100)
    with write_lock(cache.path(configs[0])):
        result = cli("prune", "--older-than", "90d", "--yes")
    assert result.returncode == 0
    assert f"being written to by {os.getpid()}" in result.stdout
    assert len(cache.stores()) == 3


def test_prune_leftovers(cli, cache, configs):
    """What crashes have left goes, in all stores; the stores stay."""
    store = cache.path(configs[0])
    shutil.copytree(store / "gen-000001", store / "gen-000002")
    half = cache.root / "half-0123456789abcdef"
    half.mkdir()
    (half / "writer.lock").touch()
    assert "would remove 2 leftovers" in cli("prune", "--leftovers", "--dry-run").stdout
    result = parsed(cli("prune", "--leftovers", "--yes", "--json"))
    assert {entry["path"] for entry in result["leftovers"]} == {
        str(half),
        str(store / "gen-000002"),
    }
    assert result["bytes_freed"] > 0
    assert not half.exists()
    assert len(cache.stores()) == 3
    assert "nothing to remove" in cli("prune", "--leftovers").stdout


def test_prune_wants_to_know_what(refused, cli, cache):
    """Without a criterion, or with one that makes no sense, nothing happens."""
    assert "--older-than" in refused("prune", "--yes")
    for option, value in (("--older-than", "3 apples"), ("--max-size", "many")):
        assert cli("prune", option, value, "--yes").returncode == 2
    assert len(cache.stores()) == 3


def test_prune_of_nothing(cli):
    """A root that doesn't exist: nothing to remove, exit code 0."""
    result = cli("prune", "--older-than", "1d", "--leftovers", "--yes")
    assert (result.returncode, "nothing to remove" in result.stdout) == (0, True)


# ---- quantities


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1000000", 10**6), ("50GB", 50 * 10**9), ("500MiB", 500 << 20), ("1.5kb", 1500)],
)
def test_sizes(text, size):
    """Powers of 1000 and of 1024, by their names."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 parsecs", "1e9"])
def test_no_sizes(text):
    with pytest.raises(click.BadParameter):
        parse_size(text)


def test_moments():
    """Durations count from now, dates are local; ages say the same in one unit."""
    now = datetime.now(timezone.utc)
    for text, seconds, shown in (
        ("90s", 90, "1m"),
        ("12h", 12 * 3600, "12h"),
        ("2w", 14 * DAY, "14d"),
        ("1y", 365 * DAY, "1.0y"),
    ):
        moment = parse_moment(text)
        assert abs((now - moment).total_seconds() - seconds) < 60
        assert age(moment) == shown
    date = parse_moment("2026-01-31")
    assert date.astimezone() == datetime(2026, 1, 31).astimezone()
    assert (age(None), age(now), age(now + timedelta(days=1))) == ("-", "0m", "0m")


@pytest.mark.parametrize("text", ["", "d", "5x", "2026-13-01", "9999-01-01", "99999999999y"])
def test_no_moments(text):
    with pytest.raises(click.BadParameter):
        parse_moment(text)


def test_prune_by_size_takes_what_was_used_longest_ago(cache, configs):
    """An old store that is read goes after a newer one that nobody has read."""
    for days, config in zip((100, 10, 20), configs, strict=True):
        make_older(cache, config, days)
    (cache.path(configs[0]) / "last_used").touch()  # read now
    sizes = [cache.size(config) for config in configs]
    plan = plan_pruning(cache, PrunePolicy(max_bytes=sum(sizes) - 1))
    assert [verdict.store.config for verdict in plan.removed] == [configs[2]]
    plan = plan_pruning(cache, PrunePolicy(max_bytes=sizes[0]))
    assert [verdict.store.config for verdict in plan.removed] == [configs[2], configs[1]]


@pytest.mark.parametrize("limit", ["written_before", "used_before"])
def test_prune_by_age_keeps_what_has_no_time(cache, configs, limit):
    """A store whose age isn't known isn't old; by size it goes first."""
    store = cache.info(configs[0])
    policy = PrunePolicy(**{limit: datetime.now(timezone.utc)})
    assert policy.reason(store)
    assert policy.reason(replace(store, last_written=None, last_used=None)) is None


# ---- one store that can't be used


@pytest.fixture(params=["pipe", "link"])
def hostile(request, cache, configs, tmp_path):
    """The second of three stores has a pipe or link in the place of a file."""
    store = cache.path(configs[1])
    (tmp_path / "target").write_text("precious")
    if request.param == "pipe":
        (store / "gen-000001" / "data.mdb").unlink()
        os.mkfifo(store / "gen-000001" / "data.mdb")
    else:
        (store / "writer.lock").unlink()
        (store / "writer.lock").symlink_to(tmp_path / "target")
    yield store
    assert (tmp_path / "target").read_text() == "precious"


@pytest.mark.parametrize("command", ["verify", "compact", "repair"])
def test_one_store_that_can_not_be_used_keeps_no_other_from_its_turn(
    cli, cache, configs, hostile, command
):
    """It is named, the exit code is 1, and all others are served; asked for alone, the same."""
    result = cli(command, "--all")
    assert result.returncode == 1
    for config in (configs[0], configs[2]):
        assert config.fingerprint in result.stdout
    assert configs[1].fingerprint in result.stdout + result.stderr
    alone = cli(command, hostile.name)
    assert alone.returncode == 1
    assert configs[1].fingerprint in alone.stdout + alone.stderr


def test_a_store_that_can_not_be_used_can_be_removed(cli, cache, hostile):
    """With its links and pipes, and nothing beyond them."""
    assert hostile.name in cli("ls", "--json").stdout
    assert list(check_stores(cache))  # the doctor looks at it
    assert cli("rm", hostile.name, "--yes").returncode == 0
    assert not hostile.exists()
    assert len(cache.folders()) == 2
