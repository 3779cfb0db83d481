"""`clear` and `compact`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_disks import empty, fill, small_disk
from storage.damage import data_file, flip_value

from lmdbcache import EmbeddingCache


@pytest.mark.parametrize(("answer", "left"), [("y\n", 2), ("n\n", 3), ("", 3)])
def test_clear_asks(cli, cache, configs, answer, left):
    """Only a yes removes; no and no answer leave everything, with exit code 1."""
    result = cli("clear", configs[0].fingerprint, stdin=answer)
    assert result.returncode == (0 if left == 2 else 1)
    assert "Remove 1 store from" in result.stdout
    assert "6 embeddings" in result.stdout
    assert len(cache.stores()) == left
    if left == 2:
        assert "removed 1 store, " in result.stdout


def test_clear_yes(cli, cache, configs):
    """--yes doesn't ask; what was removed is told; a store named twice is removed once."""
    name = configs[0].fingerprint
    result = cli("clear", name, name[:8], cache.path(configs[0]), "--yes")
    assert result.returncode == 0, result.stderr
    assert "?" not in result.stdout
    assert configs[0] not in cache
    (removed,) = json.loads(cli("clear", configs[1].fingerprint, "--yes", "--json").stdout)
    assert removed["fingerprint"] == configs[1].fingerprint
    assert cli("clear", "--all", "--yes").stdout.startswith("removed 1 store, ")
    assert cache.stores() == []


def test_clear_wants_to_know_what(refused, cache):
    """Without a name or --all nothing happens, nor with both."""
    assert "--all" in refused("clear", "--yes")
    assert "--all" in refused("clear", "zz", "--all", "--yes")
    assert len(cache.stores()) == 3


def test_clear_with_one_wrong_name_removes_nothing(refused, cache, configs):
    """All names are looked up before anything is removed."""
    refused("clear", configs[0].fingerprint, "zzzz", "--yes")
    assert len(cache.stores()) == 3


def test_clear_takes_no_store_of_another_root(refused, cache, configs, tmp_path):
    """A path outside the root isn't taken for the store of the same name inside."""
    elsewhere = EmbeddingCache(tmp_path / "elsewhere")
    with elsewhere.writer(configs[0]) as writer:
        writer.put("a:dog", [1.0])
    assert "isn't a store under" in refused("clear", elsewhere.path(configs[0]), "--yes")
    assert configs[0] in cache
    assert configs[0] in elsewhere


def test_clear_json_needs_yes(refused, cache):
    """A question would spoil the JSON."""
    assert "--yes" in refused("clear", "--all", "--json")
    assert len(cache.stores()) == 3


def test_clear_damaged(cli, cache, configs):
    """A damaged store can be removed, and the question says that it is damaged."""
    (database,) = cache.path(configs[0]).glob("gen-*/data.mdb")
    database.write_bytes(b"")
    result = cli("clear", configs[0].fingerprint, stdin="y\n")
    assert result.returncode == 0
    assert "damaged" in result.stdout
    assert len(cache.stores()) == 2


def test_compact(cli, cache, configs):
    """Sizes before and after; the content stays."""
    with cache.writer(
        configs[0], on_duplicate="overwrite", without_provenance=True, commit_records=1
    ) as writer:
        for _ in range(3):
            for number in range(6):
                name = "dog" if number % 2 else "drum"
                writer.put(f"video_{number:05d}:{name}", [float(number)] * 8)
    result = cli("compact", configs[0].fingerprint)
    assert result.returncode == 0
    assert configs[0].title in result.stdout
    results = json.loads(cli("compact", "--all", "--json").stdout)
    assert len(results) == 3
    for entry in results:
        assert entry.keys() == {"path", "bytes_before", "bytes_after", "num_embeddings"}
        assert entry["num_embeddings"] == 6
        assert entry["bytes_after"] <= entry["bytes_before"]
    with cache.reader(configs[0]) as reader:
        assert reader["video_00005:dog"].tolist() == [5.0] * 8


def test_compact_dry_run_and_bar(cli, cache, configs):
    """--dry-run tells what a compaction then does and changes nothing; --progress shows a bar."""
    name = configs[0].fingerprint
    with cache.writer(
        configs[0], on_duplicate="overwrite", without_provenance=True, commit_records=1
    ) as writer:
        for n in range(60):
            writer.put(f"video_{n % 6:05d}:dog", np.full(8, n))
    before = {path: path.stat().st_mtime_ns for path in cache.root.rglob("data.mdb")}
    (plan,) = json.loads(cli("compact", name, "--dry-run", "--json").stdout)
    assert {path: path.stat().st_mtime_ns for path in cache.root.rglob("data.mdb")} == before
    result = cli("compact", name, "--progress", "--json")
    (done,) = json.loads(result.stdout)
    assert done == plan
    assert configs[0].fingerprint in result.stderr
    assert cli("compact", name).stderr == ""


def test_compact_on_a_full_disk(cli, configs, tmp_path):
    """Exit code 3, both figures, and the store is as before."""
    with small_disk(tmp_path / "disk", 32) as disk:
        cache = EmbeddingCache(disk / "cache")
        with cache.writer(configs[0]) as writer:
            writer.put("a:x", np.ones(1 << 20, np.float32))
        fill(disk, 1 << 20)
        result = cli("compact", "--all", root=cache.root)
        assert result.returncode == 3
        (line,) = result.stderr.splitlines()
        assert "1 MiB free, compaction needs 6 MiB" in line
        assert cache.verify(configs[0]).is_sound
        empty(disk)
        assert cli("compact", "--all", root=cache.root).returncode == 0


def test_nothing_to_compact_or_clear(cli):
    """--all of nothing is no error."""
    for command in ("compact", "verify", "clear"):
        arguments = [command, "--all", *(["--yes"] if command == "clear" else [])]
        assert cli(*arguments).returncode == 0
        assert json.loads(cli(*arguments, "--json").stdout) == []


def test_repair(cli, cache, configs):
    """It shows what would be dropped, asks, and leaves a sound store; exit code 0."""
    with cache.reader(configs[0]) as reader:
        flip_value(data_file(cache, configs[0]), reader["video_00003:dog"])
    name = configs[0].fingerprint
    planned = cli("repair", name, "--dry-run")
    assert "5 embeddings can be kept, 1 can't" in planned.stdout
    assert "dropped: video_00003:dog" in planned.stdout
    assert cli("repair", name, stdin="n\n").returncode != 0
    assert cli("verify", name).returncode == 1
    assert "--yes" in cli("repair", name, "--json").stderr
    (report,) = json.loads(cli("repair", name, "--json", "--yes").stdout)
    assert (report["is_repaired"], report["dropped"]) == (True, ["video_00003:dog"])
    assert cli("verify", "--all").returncode == 0
    again = cli("repair", "--all")
    assert again.returncode == 0
    assert again.stdout.count("sound, ") == 3


def test_one_hopeless_store_doesn_t_hide_the_others(cli, cache, configs):
    """`verify --all` goes on behind a stump."""
    store = cache.path(configs[0])
    for path in store.glob("gen-*/*"):
        path.write_bytes(b"") if path.name != "lock.mdb" else None
    result = cli("verify", "--all")
    assert result.returncode == 1
    assert result.stdout.count("DAMAGED") == 1
    assert result.stdout.count("sound, 6 embeddings") == 2
    assert "Traceback" not in result.stderr
