"""`Intake`: what one `add` does with embeddings that are new, the same, close, far, or no good."""

from __future__ import annotations

import numpy as np
import pytest
from exchange.conftest import contents, numbered, same
from storage.damage import data_file, flip_value

from lmdbcache.cache import (
    THIS_STORE,
    Origin,
    Source,
    SourceRecords,
    count_origins,
    recorded_sources,
)
from lmdbcache.errors import (
    ConfigError,
    IntegrityError,
    InvalidEmbeddingError,
    ProvenanceMismatchError,
)
from lmdbcache.exchange import Intake, Rows, intake as intake_module
from lmdbcache.storage import checksum, sample_key

NODE = Origin("node-a", {"commit": "c1"}, {"weights_digest": "w1", "torch": "2"})


def checksums_of(embeddings):
    return [checksum(sample_key(name), value.tobytes()) for name, value in embeddings.items()]


def add(intake, embeddings, origin=NODE, **options):
    rows = intake.checked(list(embeddings), list(embeddings.values()), origin, **options)
    intake.add(rows, origin.provenance)


def test_new_embeddings_come_with_origin_and_source(target, config):
    """A store is made; who computed each sample, and from which file, is kept with it."""
    values = numbered(0, 20)
    source = Source("a.wav", 10, 1, b"d" * 16, "/data")
    intake = Intake(target, config, dataset_root="/data")
    (rows,) = intake.checked(
        list(values), list(values.values()), NODE, checksums=checksums_of(values)
    )
    sources = [source if number == 3 else None for number in range(20)]
    intake.add([rows._replace(sources=sources)], NODE.provenance)
    assert same(contents(target, config), values)
    assert (intake.report.num_new, intake.report.num_bytes, intake.report.exit_code) == (20, 640, 0)
    info = target.info(config)
    assert info.provenance == NODE.provenance
    assert info.dataset_root == "/data"
    assert count_origins(target.path(config)) == [(NODE, 20)]
    found = {name: source for name, _, source in recorded_sources(target.path(config)) if source}
    assert found == {"clip_00003:dog": source}


def test_what_is_there_is_written_once(store, config):
    """The same bytes are counted; nothing is committed, and what was computed here stays ours."""
    values = numbered(0, 20)
    cache = store("target", values)
    before = cache.info(config).last_written
    intake = Intake(cache, config)
    keys = list(map(sample_key, values))
    assert intake.stored(keys) == dict(zip(keys, checksums_of(values), strict=True))
    add(intake, values)
    assert intake.report.num_same == 20
    assert cache.info(config).last_written == before
    assert count_origins(cache.path(config)) == []


def test_close_ones_keep_ours(store, config):
    """Within the tolerance ours stays, bit for bit."""
    values = numbered(0, 10)
    cache = store("target", values)
    intake = Intake(cache, config, tolerance=1e-3)
    add(intake, {name: value + np.float32(5e-4) for name, value in values.items()})
    assert same(contents(cache, config), values)
    assert (intake.report.num_close, intake.report.exit_code) == (10, 0)


@pytest.mark.parametrize(("apart", "num_close"), [(0.25, 1), (0.25 + 2**-20, 0)])
def test_the_tolerance_itself_is_close(store, target, config, apart, num_close):
    """A difference of just the tolerance counts as none, stored or between two given ones."""
    pair = np.stack([np.zeros(8, np.float32), np.full(8, apart, np.float32)])
    between = Intake(target, config, tolerance=0.25)
    between.add(between.checked(["a:x", "a:x"], pair, NODE), {})
    stored = Intake(store("one", {"a:x": pair[0]}), config, tolerance=0.25)
    add(stored, {"a:x": pair[1]})
    for report in (between.report, stored.report):
        assert (report.num_close, len(report.conflicts)) == (num_close, 1 - num_close)


@pytest.mark.parametrize("choice", ["error", "skip", "overwrite"])
def test_conflicts(choice, store, config):
    """Each is told with both origins and the difference; the choice decides; the rest is merged."""
    values, merged = numbered(0, 10), numbered(10, 20)
    cache = store("target", values)
    add(Intake(cache, config), merged, Origin("first", {"commit": "c0"}))
    theirs = {**numbered(8, 12, seed=1), **numbered(20, 25)}
    intake = Intake(cache, config, on_duplicate=choice)
    add(intake, theirs)
    report = intake.report
    assert [c.sample_id for c in report.conflicts] == list(theirs)[:4]
    assert [c.stored.writer for c in report.conflicts] == [THIS_STORE.writer] * 2 + ["first"] * 2
    assert {c.given for c in report.conflicts} == {NODE}
    assert {c.kept for c in report.conflicts} == {"given" if choice == "overwrite" else "stored"}
    worst = report.conflicts[0]
    apart = np.abs(values[worst.sample_id] - theirs[worst.sample_id].astype(np.float64)).max()
    assert worst.max_abs == pytest.approx(apart)
    expected = {**values, **merged, **theirs}
    if choice != "overwrite":
        expected |= {**values, **merged}
    assert same(contents(cache, config), expected)
    assert report.exit_code == (1 if choice == "error" else 0)
    assert report.num_new == 5
    assert _by_writer(cache, config)["node-a"] == (9 if choice == "overwrite" else 5)
    again = Intake(cache, config, on_duplicate=choice)
    add(again, theirs)
    assert len(again.report.conflicts) == (0 if choice == "overwrite" else 4)


def _by_writer(cache, config):
    return {origin.writer: number for origin, number in count_origins(cache.path(config))}


def test_what_can_not_be_stored_is_refused_one_by_one(store, config):
    """NaN, Inf, another shape, no sample id, a value that doesn't match: told; the rest is kept."""
    cache = store("target", numbered(0, 2))
    good = numbered(5, 8)
    bad = {
        "nan:dog": np.full(8, np.nan, np.float32),
        "inf:dog": np.full(8, np.inf, np.float32),
        "shape:dog": np.zeros(9, np.float32),
        "no class": np.zeros(8, np.float32),
        "nul\0:dog": np.zeros(8, np.float32),
        "text:dog": np.array(["x"] * 8),
    }
    intake = Intake(cache, config)
    given = {**bad, **good}
    add(intake, given)
    assert {refusal.sample_id for refusal in intake.report.refused} == set(bad)
    assert intake.report.num_new == 3
    sums = checksums_of(numbered(20, 23))
    add(intake, numbered(20, 23), checksums=[sums[0], b"other123", sums[2]])
    assert intake.report.refused[-1].sample_id == "clip_00021:dog"
    assert "checksum" in intake.report.refused[-1].reason
    assert intake.report.exit_code == 1
    assert set(contents(cache, config)) == {*numbered(0, 2), *good, *numbered(20, 23)} - {
        "clip_00021:dog"
    }


def test_other_weights_are_refused_as_a_whole(store, config):
    """The rule of writers holds: nothing is merged."""
    cache = store("target", numbered(0, 2), provenance={"weights_digest": "w2"})
    with pytest.raises(ProvenanceMismatchError):
        add(Intake(cache, config), numbered(2, 4))
    assert same(contents(cache, config), numbered(0, 2))


def test_wrong_arguments(target, config):
    """Each is refused before anything is made."""
    with pytest.raises(ConfigError):
        Intake(target, config, on_duplicate="both")
    with pytest.raises(ConfigError):
        Intake(target, config, tolerance=float("nan"))
    with pytest.raises(InvalidEmbeddingError):
        Intake(target, config).checked(["a:x"], np.zeros((2, 3)), NODE)
    assert not target.root.exists()


@pytest.mark.parametrize(
    ("choice", "taken", "kept"),
    [("error", 0, "neither"), ("skip", 1, "stored"), ("overwrite", 2, "given")],
)
def test_a_sample_twice_in_one_call(choice, taken, kept, target, config):
    """The same again is counted, another one is a conflict, and the choice decides."""
    values = np.repeat(np.array([[1], [1], [2]], np.float32), 8, axis=1)
    intake = Intake(target, config, on_duplicate=choice)
    intake.add(intake.checked(["a:x"] * 3, values, NODE), NODE.provenance)
    report = intake.report
    assert (report.num_new, report.num_same, len(report.conflicts)) == (taken > 0, 1, 1)
    assert report.conflicts[0].kept == kept
    found = contents(target, config) if taken else {}
    assert same(found, {"a:x": np.full(8, taken, np.float32)} if taken else {})


def test_ragged_and_bfloat16(target, config):
    """Lengths may differ where the store is made so; a conflict may be one of shape."""
    import ml_dtypes

    config = config.replace(dtype="bfloat16", output="last_hidden_state")
    values = {f"{n}:x": np.full((n, 4), n, ml_dtypes.bfloat16) for n in range(1, 6)}
    intake = Intake(target, config, ragged=True)
    add(intake, values)
    assert same(contents(target, config), values)
    assert target.info(config).embedding_shape == (None, 4)
    add(intake, {"2:x": np.full((3, 4), 2, ml_dtypes.bfloat16)})
    (conflict,) = intake.report.conflicts
    assert conflict.max_abs == np.inf
    assert conflict.to_dict()["max_abs"] is None
    add(intake, {"9:x": np.zeros((3, 5), ml_dtypes.bfloat16)})
    assert "shape" in intake.report.refused[0].reason


def test_a_dry_run_writes_nothing(store, target, config):
    """It tells the same, of what is there and of what it met before."""
    intake = Intake(target, config, dry_run=True)
    add(intake, numbered(0, 5))
    add(intake, numbered(3, 8))
    assert (intake.report.num_new, intake.report.num_same) == (8, 2)
    assert not target.root.exists()
    cache = store("other", numbered(0, 5))
    intake = Intake(cache, config, dry_run=True, on_duplicate="overwrite")
    add(intake, numbered(0, 6, seed=1))
    assert (len(intake.report.conflicts), intake.report.num_new) == (5, 1)
    assert same(contents(cache, config), numbered(0, 5))


@pytest.mark.parametrize(
    ("first", "second", "counts"), [((5, 7), (7, 9), (2, 2, 2)), ((4, 8), (8, 10), (0, 4, 2))]
)
def test_others_write_in_between(store, config, monkeypatch, first, second, counts):
    """What somebody wrote between the look and the commit is compared: some of it, or all."""
    cache = store("target", numbered(0, 2))
    write = Intake._write
    rivals = [numbered(*first), numbered(*second, seed=1)]

    def write_late(self, changes, provenance):
        if rivals:
            rival = rivals.pop(0)
            with cache.writer(config) as writer:
                writer.put_batch(rival, list(rival.values()))
        write(self, changes, provenance)

    monkeypatch.setattr(Intake, "_write", write_late)
    intake = Intake(cache, config)
    add(intake, numbered(4, 10))
    report = intake.report
    assert not rivals
    assert (report.num_new, report.num_same, len(report.conflicts)) == counts
    expected = {**numbered(0, 2), **numbered(4, 10), **numbered(*second, seed=1)}
    assert same(contents(cache, config), expected)


@pytest.mark.parametrize("is_theirs", [True, False])
def test_others_replace_in_between(store, config, monkeypatch, is_theirs):
    """What is replaced between the look and the commit is compared as it is by then."""
    ours, theirs, rivals = ({"a:x": np.full(8, n, np.float32)} for n in (0, 1, 5))
    cache = store("target", ours)
    write = Intake._write
    rival = [theirs if is_theirs else rivals]

    def write_late(self, changes, provenance):
        if rival:
            with cache.writer(config, on_duplicate="overwrite") as writer:
                writer.put("a:x", rival.pop()["a:x"])
        write(self, changes, provenance)

    monkeypatch.setattr(Intake, "_write", write_late)
    intake = Intake(cache, config, on_duplicate="overwrite")
    add(intake, theirs)
    assert same(contents(cache, config), theirs)
    apart = [conflict.max_abs for conflict in intake.report.conflicts]
    assert (intake.report.num_same, apart) == ((1, []) if is_theirs else (0, [4.0]))


def test_a_damaged_value_of_ours(store, config):
    """It is compared with nothing: told, or replaced if theirs are to be taken."""
    cache = store("target", numbered(0, 4))
    flip_value(data_file(cache, config), numbered(2, 3)["clip_00002:drum"], 3)
    intake = Intake(cache, config)
    add(intake, numbered(0, 4, seed=1))
    assert [r.sample_id for r in intake.report.refused] == ["clip_00002:drum"]
    assert "repair" in intake.report.refused[0].reason
    assert len(intake.report.conflicts) == 3
    add(Intake(cache, config, on_duplicate="overwrite"), numbered(0, 4, seed=1))
    assert same(contents(cache, config), numbered(0, 4, seed=1))


def test_a_target_with_damaged_pages_is_refused(store, config):
    """LMDB never gets to follow them."""
    cache = store("target", numbered(0, 400))
    path = cache.path(config) / "gen-000001" / "data.mdb"
    content = bytearray(path.read_bytes())
    for at in range(2 * 4096, len(content), 4096):
        content[at + 10 : at + 16] = b"\xff" * 6
    path.write_bytes(content)
    with pytest.raises(IntegrityError):
        Intake(cache, config)


def test_records_that_can_not_be_written_stop_the_merge(store, config):
    """No embedding comes in without its origin."""
    cache = store("target", numbered(0, 2))
    (cache.path(config) / "sources.sqlite3").write_bytes(b"garbage" * 1000)
    with pytest.raises(IntegrityError, match="sources.sqlite3"):
        add(Intake(cache, config), numbered(2, 4))
    assert same(contents(cache, config), numbered(0, 2))


def test_records_of_origins_follow_the_embedding(store, config):
    """Overwritten here, an embedding is this store's again."""
    cache = store("target", numbered(0, 2))
    add(Intake(cache, config), numbered(2, 4))
    rewritten = numbered(2, 3, seed=5)
    with cache.writer(config, on_duplicate="overwrite", without_provenance=True) as writer:
        writer.put_batch(rewritten, list(rewritten.values()))
    assert _by_writer(cache, config) == {"node-a": 1, THIS_STORE.writer: 3}
    cache.compact(config)
    assert _by_writer(cache, config) == {"node-a": 1, THIS_STORE.writer: 3}
    with SourceRecords(cache.path(config)) as records:
        records.check()


def test_a_value_is_read_when_it_is_needed(store, config):
    """Not if it is stored already; one that can't be read is refused, the others come in."""
    values = numbered(0, 6)
    names, sums = list(values), checksums_of(values)
    asked = []

    def read(number):
        name = names[number]
        asked.append(name)
        if name == names[4]:
            raise IntegrityError(f"{name}: damaged")
        return values[name]

    keys = list(map(sample_key, names))
    rows = Rows(keys, sums, read, ["elsewhere"] * 6, [NODE] * 6, [None] * 6)
    cache = store("target", dict(list(values.items())[:3]))
    intake, seen = Intake(cache, config), []
    intake.add([rows], NODE.provenance, advance=seen.append)
    assert (intake.report.num_new, intake.report.num_same) == (2, 3)
    assert intake.report.refused == [("elsewhere", names[4], "damaged")]
    assert set(asked) == set(names[3:])
    assert sum(seen) == 6
    assert names[4] not in contents(cache, config)


def test_rows_come_in_batches(target, config, monkeypatch):
    """Each is a transaction of its own; rows of one sample stay together."""
    monkeypatch.setattr(intake_module, "_BATCH_RECORDS", 7)
    values = numbered(0, 30)
    twice = {name: [value, value + 1] for name, value in values.items()}
    intake, seen = Intake(target, config, on_duplicate="overwrite"), []
    names = [name for name in twice for _ in range(2)]
    rows = intake.checked(names, [value for pair in twice.values() for value in pair], NODE)
    intake.add(rows, NODE.provenance, advance=seen.append)
    assert seen == [8] * 7 + [4]
    assert (intake.report.num_new, len(intake.report.conflicts)) == (30, 30)
    assert same(contents(target, config), {name: pair[1] for name, pair in twice.items()})


@pytest.mark.parametrize("fault", ["none", "NaN", "sample id", "checksum"])
def test_an_array_is_checked_like_its_rows(fault, target, config):
    """As a whole or one by one: the same rows, and the same refusals."""
    values = numbered(0, 6)
    names, array, sums = list(values), np.stack(list(values.values())), checksums_of(values)
    if fault == "NaN":
        array[4, 2] = np.nan
    elif fault == "sample id":
        names[4] = "no class"
    elif fault == "checksum":
        sums[4] = b"other123"
    found = []
    for embeddings in (array, list(array)):
        intake = Intake(target, config)
        (rows,) = intake.checked(names, embeddings, NODE, checksums=sums)
        each = [rows.read(n).tobytes() for n in range(len(rows.keys))]
        found.append((rows.keys, rows.checksums, each, intake.report.refused))
    assert found[0] == found[1]
    assert len(found[0][0]) == (6 if fault == "none" else 5)
