"""`merge_stores`: stores that overlap, differ, are damaged, empty, ragged, or no stores at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from exchange.conftest import contents, numbered, same
from exchange.damaged_sources import merge_damaged
from storage.child_processes import NOBODY, in_fork
from storage.damage import cuts, data_file, flip_value, flips, outcomes

from lmdbcache import EmbeddingCache
from lmdbcache.cache import (
    THIS_STORE,
    ClipFailure,
    Origin,
    Source,
    compare_stores,
    count_origins,
    read_failures,
    recorded_sources,
    update_failures,
    write_sources,
)
from lmdbcache.errors import StorageError
from lmdbcache.exchange import Intake, merge as merge_module, merge_stores
from lmdbcache.storage import checksum, sample_key


def counts(report):
    """Embeddings by what became of them."""
    return (
        report.num_new,
        report.num_same,
        report.num_close,
        len(report.conflicts),
        len(report.refused),
    )


def test_stores_that_overlap(store, target, config):
    """Each sample comes once, whatever the form the source is given in; the sources stay."""
    a, b = store("roots/a", numbered(0, 60)), store("roots/b", numbered(40, 100))
    before = {path: path.read_bytes() for path in a.root.rglob("data.mdb")}
    reports = merge_stores(target, [a.root.parent])
    assert [counts(report) for report in reports.stores] == [(100, 20, 0, 0, 0)]
    assert (reports.exit_code, reports.refused) == (0, [])
    assert same(contents(target, config), numbered(0, 100))
    assert before == {path: path.read_bytes() for path in a.root.rglob("data.mdb")}
    again = merge_stores(target, [a.path(config), b.root])
    assert [counts(report) for report in again.stores] == [(0, 120, 0, 0, 0)]
    origins = {origin.writer: number for origin, number in count_origins(target.path(config))}
    assert origins == {str(a.path(config)): 60, str(b.path(config)): 40}
    found = compare_stores(target.path(config), a.path(config))
    assert (found.num_equal, found.num_only_a, found.num_only_b) == (60, 40, 0)


@pytest.mark.parametrize("step", [2, 5, 40])
def test_however_few_are_missing(store, target, config, monkeypatch, step):
    """Values that are read several at a time are those of their samples, dense or sparse."""
    monkeypatch.setattr(merge_module, "_VALUES_AT_ONCE", 6)
    everything = numbered(0, 120)
    a = store("a", everything)
    there = {name: value for n, (name, value) in enumerate(everything.items()) if n % step > 1}
    with target.writer(config) as writer:
        for sample_id, value in there.items():
            writer.put(sample_id, value)
    (report,) = merge_stores(target, [a.root]).stores
    assert counts(report) == (120 - len(there), len(there), 0, 0, 0)
    assert same(contents(target, config), everything)
    assert target.verify(config).is_sound


def test_the_pages_of_a_merged_store_are_full(store, target, config):
    """Sources are read side by side, in the order of the keys."""
    sources = [store(f"roots/{n}", dict(list(numbered(0, 3000).items())[n::3])) for n in range(3)]
    whole = store("whole", numbered(0, 3000))
    merge_stores(target, [source.root for source in sources])
    assert data_file(target, config).stat().st_size <= data_file(whole, config).stat().st_size


@pytest.mark.parametrize("choice", ["error", "skip", "overwrite"])
def test_sources_that_differ_from_each_other(choice, store, target, config):
    """Neither of two is taken by the order they are given in, unless that is asked for."""
    a, b = store("a", numbered(0, 10)), store("b", numbered(8, 20, seed=1))
    c = store("c", {name: value + np.float32(1e-7) for name, value in numbered(0, 10).items()})
    reports = merge_stores(target, [a.root, b.root, c.root], on_duplicate=choice)
    (report,) = reports.stores
    kept = {"error": "neither", "skip": "stored", "overwrite": "given"}[choice]
    assert {conflict.kept for conflict in report.conflicts} == {kept}
    if choice == "error":
        assert counts(report) == (18, 0, 10, 2, 0)
        expected = {**numbered(0, 8), **numbered(10, 20, seed=1)}
    elif choice == "skip":
        assert counts(report) == (20, 0, 10, 2, 0)
        expected = {**numbered(8, 20, seed=1), **numbered(0, 10)}
    else:  # c differs from b again
        assert counts(report) == (20, 0, 8, 4, 0)
        with c.reader(config) as reader:
            expected = {**numbered(0, 8), **numbered(10, 20, seed=1)}
            expected |= {name: reader[name] for name in numbered(8, 10)}
    assert reports.exit_code == (1 if choice == "error" else 0)
    assert same(contents(target, config), expected)
    again = merge_stores(target, [a.root, b.root, c.root], on_duplicate=choice)
    assert again.stores[0].num_new == 0
    assert same(contents(target, config), expected)


@pytest.mark.parametrize(
    ("stored", "values", "choice", "taken"),
    [
        (None, (1, 2, 1), "overwrite", 1),
        (None, (1, 2, 1), "skip", 1),
        (0, (1, 2, 1), "overwrite", 1),
        (0, (1, 2, 1), "skip", 0),
        (0, (2, 0), "overwrite", 0),
    ],
)
def test_the_last_source_counts_whatever_an_earlier_one_repeats(
    store, target, config, stored, values, choice, taken
):
    """Of values 1, 2 and 1 the last is 1; the last may also be what is stored already."""
    sources = [
        store(f"source-{number}", {"a:x": np.full(8, value, np.float32)})
        for number, value in enumerate(values)
    ]
    if stored is not None:
        store("target", {"a:x": np.full(8, stored, np.float32)})
    merge_stores(target, [source.root for source in sources], on_duplicate=choice)
    assert same(contents(target, config), {"a:x": np.full(8, taken, np.float32)})


def test_links_that_lead_round_in_a_circle(store, target, config, tmp_path):
    """A folder that links to one above it holds its stores once."""
    source = store("roots/a", numbered(0, 5))
    (tmp_path / "roots" / "back").symlink_to(tmp_path / "roots")
    reports = merge_stores(target, [source.root.parent])
    assert [counts(report) for report in reports.stores] == [(5, 0, 0, 0, 0)]
    assert (reports.notes, reports.refused) == ([], [])


def test_every_embedding_is_accounted_for(store, target, config):
    """New, same, close, in conflict or refused: the sum is what the sources hold."""
    store("target", {**numbered(0, 30), **numbered(60, 70, seed=2)})
    near = {name: value * np.float32(1 + 1e-7) for name, value in numbered(20, 40).items()}
    sources = [
        store("a", {**near, **numbered(50, 65)}),
        store("b", {**numbered(10, 45), **numbered(62, 80)}),
        store("c", numbered(55, 66)),
    ]
    for choice in ("error", "skip", "overwrite"):
        for dry_run in (True, False):
            (report,) = merge_stores(
                target, [s.root for s in sources], on_duplicate=choice, dry_run=dry_run
            ).stores
            total = sum(s.info(config).num_embeddings for s in sources)
            assert sum(counts(report)) == total, (choice, dry_run)


def test_stores_of_other_configs_go_to_stores_of_their_own(store, target, config):
    """Another dtype is another store; `configs` takes some only."""
    half = config.replace(dtype="float16")
    source = store("a", numbered(0, 5))
    values = {name: value.astype(np.float16) for name, value in numbered(0, 5).items()}
    store("a", values, config=half)
    reports = merge_stores(target, [source.root], configs=[half])
    assert [report.config for report in reports.stores] == [half]
    assert config not in target
    merge_stores(target, [source.root])
    assert same(contents(target, config), numbered(0, 5))
    assert same(contents(target, half), values)


def test_other_weights_and_other_shapes_are_refused(store, target, config):
    """The store as a whole, in a message of ours; the others are merged."""
    store("target", numbered(0, 2), provenance={"weights_digest": "w1"})
    good = store("a", numbered(2, 4), provenance={"weights_digest": "w1", "torch": "9"})
    other = store("b", numbered(4, 6), provenance={"weights_digest": "w2"})
    wide = store("c", numbered(6, 8, size=9))
    reports = merge_stores(target, [wide.root, other.root, good.root])
    (report,) = reports.stores
    assert counts(report) == (2, 0, 0, 0, 2)
    wrong = {refusal.where: refusal.reason for refusal in report.refused}
    assert "w2" in wrong[str(other.path(config))]
    assert "(9,)" in wrong[str(wide.path(config))]
    assert reports.exit_code == 1
    assert target.info(config).provenance == {"weights_digest": "w1", "torch": "9"}
    assert same(contents(target, config), numbered(0, 4))


def test_two_sources_of_other_weights(store, target, config):
    """The first settles it for a new store."""
    a = store("a", numbered(0, 2), provenance={"weights_digest": "w1"})
    b = store("b", numbered(2, 4), provenance={"weights_digest": "w2"})
    (report,) = merge_stores(target, [a.root, b.root]).stores
    assert counts(report) == (2, 0, 0, 0, 1)
    assert same(contents(target, config), numbered(0, 2))


def test_ragged_and_fixed_stores(store, target, config):
    """A new store is ragged if one source is; into a fixed one come the values that fit."""
    config = config.replace(output="last_hidden_state", dtype="bfloat16")
    fixed = {f"f{n}:x": np.full((5, 4), n, ml_dtypes.bfloat16) for n in range(3)}
    free = {f"r{n}:x": np.full((n, 4), n, ml_dtypes.bfloat16) for n in range(1, 7)}
    a = store("a", fixed, config=config)
    b = store("b", free, config=config, ragged=True)
    (report,) = merge_stores(target, [a.root, b.root]).stores
    assert counts(report) == (9, 0, 0, 0, 0)
    assert same(contents(target, config), {**fixed, **free})
    (report,) = merge_stores(a, [b.root]).stores
    assert counts(report) == (1, 0, 0, 0, 5)
    assert same(contents(a, config), {**fixed, "r5:x": free["r5:x"]})


def test_what_holds_nothing(store, target, config, tmp_path):
    """An empty store, one that was never written, no store, no folder, a file."""
    empty = store("empty", numbered(0, 1))
    with empty.writer(config) as writer:
        writer.remove(numbered(0, 1))
    killed = tmp_path / "killed" / "rank-0" / "x-0123456789abcdef" / "gen-000001"
    killed.mkdir(parents=True)
    (killed / "data.mdb").write_bytes(b"")
    nothing, file = tmp_path / "nothing", tmp_path / "file"
    nothing.mkdir()
    file.write_text("x")
    reports = merge_stores(target, [empty.root, tmp_path / "killed"])
    assert reports.exit_code == 0
    assert "never written to" in reports.notes[0]
    assert not target.root.exists() or config not in target
    reports = merge_stores(target, [nothing, file, tmp_path / "absent"])
    sources = [str(nothing), str(file), str(tmp_path / "absent")]
    assert [refusal.where for refusal in reports.refused] == sources
    assert reports.exit_code == 1


def test_the_store_itself_and_the_same_twice(store, config, tmp_path):
    """By whatever path, it is taken once or not at all."""
    cache, other = store("cache", numbered(0, 5)), store("other", numbered(3, 8))
    (tmp_path / "link").symlink_to(cache.path(config))
    shutil.copytree(cache.root, tmp_path / "hard", copy_function=os.link)
    reports = merge_stores(cache, [cache.root, cache.path(config), tmp_path / "link"])
    reports_of_links = merge_stores(cache, [tmp_path / "hard"])
    assert not (reports.stores)
    assert not (reports_of_links.stores)
    assert (reports.exit_code, reports_of_links.exit_code) == (0, 0)
    assert len(reports.notes) == 3
    (report,) = merge_stores(cache, [other.root, other.path(config), tmp_path]).stores
    assert counts(report)[:2] == (3, 2)
    shutil.copytree(other.path(config), cache.root / "kept-by-hand")
    (report,) = merge_stores(cache, [cache.root]).stores
    assert counts(report) == (0, 5, 0, 0, 0)


def test_origins_and_sources_come_along(store, target, config):
    """An origin of the source's own is kept through two merges; so are the records of files."""
    first, second = store("first", numbered(0, 4)), EmbeddingCache(target.root.parent / "second")
    node = Origin("node-a", {"commit": "c1"}, {"weights_digest": "w"})
    values = numbered(4, 6)
    intake = Intake(first, config)
    intake.add(intake.checked(list(values), list(values.values()), node), node.provenance)
    name, value = next(iter(numbered(0, 1).items()))
    source = Source("a.wav", 3, 4, b"d" * 16, "/data")
    digest = checksum(sample_key(name), value.tobytes())
    write_sources(first.path(config), [(name, digest, digest, source)])
    merge_stores(second, [first.root])
    merge_stores(target, [second.root])
    by_writer = {origin.writer: number for origin, number in count_origins(target.path(config))}
    assert by_writer == {str(first.path(config)): 4, "node-a": 2}
    known = [(n, s) for n, _, s in recorded_sources(target.path(config)) if s]
    assert known == [(name, source)]
    merged = merge_stores(second, [store("own", numbered(20, 22)).root])
    assert merged.stores[0].num_new == 2
    assert THIS_STORE not in dict(count_origins(second.path(config)))
    explained = target.explain(config, "clip_00004:drum")
    assert explained.origin == node
    assert "node-a" in str(explained)


def test_damaged_records_of_a_source(store, target, config):
    """They concern nothing else: the embeddings are merged, and it is said."""
    source = store("a", numbered(0, 5))
    (source.path(config) / "sources.sqlite3").write_bytes(b"garbage" * 100)
    reports = merge_stores(target, [source.root])
    assert counts(reports.stores[0]) == (5, 0, 0, 0, 0)
    assert "sources.sqlite3" in reports.stores[0].notes[0]


def test_a_damaged_value_comes_from_another_source(store, target, config):
    """Two sources have the same sample, one of them damaged: told, and taken from the other."""
    a, b = store("a", numbered(0, 6)), store("b", numbered(0, 4))
    for name in ("clip_00001:dog", "clip_00005:dog"):
        flip_value(data_file(a, config), numbered(0, 6)[name])
    reports = merge_stores(target, [a.root, b.root])
    (report,) = reports.stores
    assert {r.sample_id for r in report.refused} == {"clip_00001:dog", "clip_00005:dog"}
    assert reports.exit_code == 1
    expected = numbered(0, 5)
    assert same(contents(target, config), expected)


@pytest.mark.parametrize("to", [b"clip_00021:dpg", b"zlip_00021:dog", b"alip_00021:dog"])
def test_a_damaged_key(to, store, config):
    """Of an embedding or of its checksum: the sample is named, and all others are merged."""
    values = numbered(0, 64)
    cache = store("cache", values)
    content, name = data_file(cache, config).read_bytes(), b"clip_00021:dog"
    places = [at for at in range(len(content)) if content.startswith(name, at)]
    assert len(places) >= 2
    files = [content[:at] + to + content[at + len(name) :] for at in places]
    for number, file in enumerate(files):
        data_file(cache, config).write_bytes(file)
        target = EmbeddingCache(cache.root.parent / f"target-{number}")
        reports = merge_stores(target, [cache.root])
        told = {refusal.sample_id for refusal in reports.stores[0].refused}
        found = contents(target, config)
        assert same(found, {name: values[name] for name in found})
        assert set(values) - set(found) <= told
        assert len(found) >= 63
        assert reports.exit_code == 1 or len(found) == 64


@pytest.mark.parametrize("is_foreign", [False, True])
def test_damaged_stores(is_foreign, store, config):
    """Bits flipped and files cut anywhere: no wrong value comes in, none is lost without a word."""
    values = {**numbered(0, 60), **numbered(60, 64)}
    cache = store("cache", {name: value + 1 for name, value in values.items()})
    with cache.writer(config, on_duplicate="overwrite") as writer:
        writer.put_batch(values, list(values.values()))
    if is_foreign:
        (data_file(cache, config).parent / "checked").unlink()
    content = data_file(cache, config).read_bytes()
    for files in (flips(content, 8, 1), flips(content, 8, 2, reach=64), cuts(content, 4, 3)):
        found = outcomes(cache, config, values, files, merge_damaged)
        assert set(found) <= {"complete", "partly"}, found


def test_stores_with_missing_parts(store, target, config):
    """CURRENT gone or garbage, no data.mdb, no lock file, a metadata record of noise."""
    names = ["current gone", "garbage", "no data", "no lock", "noise", "sound"]
    roots = {name: store(name, numbered(n, n + 1)) for n, name in enumerate(names)}
    folders = {name: root.path(config) for name, root in roots.items()}
    (folders["current gone"] / "CURRENT").unlink()
    (folders["garbage"] / "CURRENT").write_bytes(b"\xff\x00garbage")
    (folders["no data"] / "gen-000001" / "data.mdb").unlink()
    (folders["no lock"] / "gen-000001" / "lock.mdb").unlink()
    path = folders["noise"] / "gen-000001" / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"sample_rate", b"sample\xff\xff\xff\xff\xff"))
    reports = merge_stores(target, [root.root for root in roots.values()])
    refused = [*reports.refused, *reports.stores[0].refused]
    told = {name for name, root in roots.items() for r in refused if str(root.root) in r.where}
    assert told >= {"current gone", "garbage", "no data", "noise"}
    assert told.isdisjoint({"no lock", "sound"})
    merged = {**numbered(1, 2), **numbered(3, 4), **numbered(5, 6)}  # the only generation there is
    assert same(contents(target, config), merged)


def test_a_source_that_can_only_be_read(store, config):
    """No right to write, neither in the store nor in its folder: sound, and damaged."""
    folder = Path(tempfile.mkdtemp())
    try:
        sound, damaged = (
            store(folder / "sound", numbered(0, 5)),
            store(folder / "bad", numbered(5, 9)),
        )
        path = data_file(damaged, config)
        (path.parent / "checked").unlink()
        flip_value(path, numbered(6, 7)["clip_00006:drum"])
        (folder / "overwrite").mkdir()
        for path in [*folder.rglob("*"), folder]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        (folder / "overwrite").chmod(0o777)

        def merge():
            target = EmbeddingCache(folder / "overwrite" / "cache")
            (report,) = merge_stores(target, [sound.root, damaged.root]).stores
            return counts(report), sorted(target.reader(config))

        found, names = in_fork(merge, user=NOBODY if os.geteuid() == 0 else None)
        assert found == (8, 0, 0, 0, 2)
        assert names == sorted({*numbered(0, 9)} - {"clip_00006:drum"})
    finally:
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_root_that_can_not_be_written(store, config, tmp_path):
    """Told before anything is read."""
    source = store("a", numbered(0, 5))
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        merge_stores(EmbeddingCache(tmp_path / "file"), [source.root])


def test_many_stores_few_at_a_time(store, target, config, monkeypatch):
    """More than are open at once; progress counts all of them."""
    monkeypatch.setattr(merge_module, "_STORES_AT_ONCE", 3)
    for rank in range(10):
        store(f"roots/rank-{rank}", dict(list(numbered(0, 100).items())[rank::10]))
    seen = []
    reports = merge_stores(
        target, [target.root.parent / "roots"], progress=lambda *done: seen.append(done)
    )
    assert counts(reports.stores[0]) == (100, 0, 0, 0, 0)
    assert seen[-1] == (100, 100)
    assert all(done <= total for done, total in seen)
    assert same(contents(target, config), numbered(0, 100))


def test_failed_clips_come_along(store, target, config):
    """Of all sources and the target, but for those that one of them holds."""
    roots = [store("a", numbered(0, 4)), store("b", numbered(4, 8)), store("c", numbered(8, 9))]
    names = ["broken:dog", "clip_00005:dog", "silent:dog"]
    failed = [ClipFailure(name, f"{name}.wav", "cut short") for name in names]
    update_failures(roots[0].path(config), names, failed[:2])
    update_failures(roots[2].path(config), names, failed[2:])
    assert merge_stores(target, [cache.root for cache in roots]).exit_code == 0
    assert read_failures(target.path(config)) == [failed[0], failed[2]]
    update_failures(target.path(config), names[:1], [replace(failed[0], reason="empty")])
    merge_stores(target, [roots[1].root])
    assert [one.reason for one in read_failures(target.path(config))] == ["empty", "cut short"]
