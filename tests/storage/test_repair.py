"""repair keeps what is sound, lists what it drops, and never loses a sound store."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from storage.damage import data_file

from lmdbcache.errors import CacheNotFoundError, IntegrityError
from lmdbcache.storage import checksum
from lmdbcache.storage.maintenance import repair as repair_module
from lmdbcache.storage.maintenance.salvage import _collect_others, _Found, _matched_outside
from lmdbcache.storage.pages.page_file import PageFile

NUM_SAMPLES = 300


@pytest.fixture
def values():
    generator = np.random.default_rng(0)
    return {f"clip_{n:03d}:x": generator.normal(size=600).astype("f4") for n in range(NUM_SAMPLES)}


@pytest.fixture
def data(cache, config, values):
    """data.mdb of a store with several leaf pages."""
    with cache.writer(config, commit_records=50) as writer:
        writer.put_batch(values, values.values())
    return data_file(cache, config)


def overwrite(path, at, content):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def main_root(path):
    with PageFile(path) as file:
        return file.meta.main.root


def test_damaged_value_is_dropped_and_recomputed(cache, config, data, values):
    """Only that sample is gone; the next `get_or_compute` computes it alone."""
    overwrite(data, data.read_bytes().rindex(values["clip_007:x"].tobytes()) + 9, b"\x55")
    plan = cache.repair(config, dry_run=True)
    assert (plan.is_repaired, plan.dropped) == (False, ("clip_007:x",))
    assert data.exists()
    report = cache.repair(config)
    assert (report.num_kept, report.dropped, report.structure) == (299, ("clip_007:x",), ())
    assert not data.exists()
    assert cache.verify(config).is_sound
    asked = []

    def compute(sample_ids):
        asked.extend(sample_ids)
        return [values[sample_id] for sample_id in sample_ids]

    batch = cache.get_or_compute(config, list(values), compute)
    assert asked == ["clip_007:x"]
    np.testing.assert_array_equal(batch, np.stack(list(values.values())))


def test_broken_root_loses_nothing(cache, config, data, values):
    """The leaf pages are found without the branch page that led to them."""
    overwrite(data, main_root(data) * 4096 + 16, os.urandom(64))
    report = cache.verify(config)
    assert report.structure
    assert cache.repair(config).num_outside > 100
    assert cache.reader(config) == values


def test_lost_meta_pages_lose_nothing(cache, config, data, values):
    """The newest, and even both: the record beside data.mdb has a copy."""
    overwrite(data, 0, bytes(8192))
    with pytest.raises(IntegrityError, match="repair"):
        cache.reader(config)["clip_007:x"]
    report = cache.repair(config)
    assert (report.num_kept, report.dropped) == (NUM_SAMPLES, ())
    assert cache.reader(config) == values


def test_overwritten_values_never_come_back(cache, config, data, values):
    """Old pairs of value and checksum verify, too, and are left where they are."""
    with cache.writer(config, on_duplicate="overwrite", commit_records=50) as writer:
        for sample_id in values:
            writer.put(sample_id, values[sample_id] + 1)
    overwrite(data, main_root(data) * 4096 + 16, os.urandom(64))
    (data.parent / "committed").unlink()
    cache.repair(config)
    with cache.reader(config) as reader:
        assert len(reader) > 200
        for sample_id, value in reader.items():
            np.testing.assert_array_equal(value, values[sample_id] + 1)


def test_truncated_store_keeps_what_is_left(cache, config, data, values):
    """What lies before the cut."""
    os.truncate(data, data.stat().st_size * 3 // 4)
    report = cache.verify(config)
    assert "is truncated" in report.structure[0]
    assert set(report.damaged) | set(report.missing)
    repaired = cache.repair(config)
    assert 50 < repaired.num_kept < NUM_SAMPLES
    with cache.reader(config) as reader:
        for sample_id, value in reader.items():
            np.testing.assert_array_equal(value, values[sample_id])
        assert not set(reader) & set(repaired.dropped)


def test_sound_store_is_left_alone(cache, config, data):
    """Nothing is rewritten where nothing is wrong."""
    before = data.stat()
    report = cache.repair(config)
    assert report.was_sound
    assert (report.num_kept, report.is_repaired) == (NUM_SAMPLES, False)
    assert data.stat().st_ino == before.st_ino
    with pytest.raises(CacheNotFoundError):
        cache.repair(config.replace(duration=1))


def test_garbage_in_current_is_repaired(cache, config, data, values):
    """The one generation that there is becomes the live one again."""
    (cache.path(config) / "CURRENT").write_bytes(b"\xff")
    report = cache.repair(config)
    assert report.is_repaired
    assert report.dropped == ()
    assert cache.reader(config) == values


def test_lost_metadata_is_refused(cache, config, data):
    """Without its metadata nothing can be read: the store stays as it is, and the error says so."""
    content = data.read_bytes().replace(b"format_version", b"format_versiom")
    data.write_bytes(content)
    with pytest.raises(IntegrityError, match="metadata record is lost"):
        cache.repair(config)
    assert data.read_bytes() == content


def test_interrupted_repair_changes_nothing(cache, config, data, values, monkeypatch):
    """The old generation stays live until the new one is checked."""
    overwrite(data, data.read_bytes().rindex(values["clip_007:x"].tobytes()) + 9, b"\x55")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(repair_module, "publish_generation", interrupted)
        cache.repair(config)
    assert cache.verify(config).damaged == ("clip_007:x",)
    assert cache.repair(config).num_kept == 299


def test_open_readers_go_on(cache, config, data, values):
    """A reader keeps its snapshot, and moves to the repaired store when it looks."""
    with cache.reader(config) as reader:
        np.testing.assert_array_equal(reader["clip_001:x"], values["clip_001:x"])
        overwrite(data, data.read_bytes().rindex(values["clip_007:x"].tobytes()) + 9, b"\x55")
        cache.repair(config)
        np.testing.assert_array_equal(reader["clip_002:x"], values["clip_002:x"])
        assert reader.refresh()
        assert "clip_007:x" not in reader


@pytest.mark.parametrize("newer", [1, 2, 5, 6])
def test_older_copy_put_in_place_gives_its_own_newest_values(cache, config, tmp_path, newer):
    """Never a mixture: the record of a later commit doesn't lead into pages of earlier ones."""
    names = [f"s{n:03d}:a" for n in range(50)]
    with cache.writer(config, on_duplicate="overwrite") as writer:

        def fill(value):
            for name in names:
                writer.put(name, np.full(768, value, np.float32))
            writer.commit()

        for value in range(20):
            fill(value)
        generation = cache.path(config) / "gen-000001"
        shutil.copy(generation / "data.mdb", tmp_path / "older.mdb")
        for value in range(20, 20 + newer):
            fill(value)
    (tmp_path / "older.mdb").replace(generation / "data.mdb")
    (generation / "lock.mdb").unlink()
    with pytest.raises(IntegrityError, match="older"):
        len(cache.reader(config))
    assert cache.repair(config).num_kept == 50
    with cache.reader(config) as reader:
        assert (reader.get_batch(names) == 19).all()


def checksums_root(path):
    with PageFile(path) as file:
        return file.find_named(b"checksums").root


def test_what_no_page_leads_to_and_no_value_matches_is_named(cache, config, data, values):
    """Its checksum, on a page that is found by searching, tells that it was stored."""
    content = data.read_bytes()
    at = content.rindex(values["clip_123:x"].tobytes())
    overwrite(data, at, bytes(8))
    for root in (main_root(data), checksums_root(data)):
        overwrite(data, root * 4096 + 16, os.urandom(64))
    report = cache.repair(config)
    assert "clip_123:x" in report.dropped
    with cache.reader(config) as reader:
        assert set(reader) | set(report.dropped) == set(values)
        for sample_id, value in reader.items():
            np.testing.assert_array_equal(value, values[sample_id])


def test_of_several_values_that_match_none_is_taken(cache, config, data, values):
    """Which of them is the newest can't be told; one that alone matches any checksum is taken."""
    with PageFile(data) as file:
        entries = {entry.key: entry for entry in file.walk(file.meta.main)}
        first, second = (entries[f"clip_{n:03d}:x".encode()] for n in (1, 2))
        digests = [
            checksum(b"new:x", file.read(entry.offset, entry.length)) for entry in (first, second)
        ]
        for known, expected in (
            (digests, None),
            (digests[:1], (first, digests[0])),
            ([digests[1], b"another!"], (second, digests[1])),
            ([b"another!"], None),
        ):
            found = _Found(
                other_values={b"new:x": [first, second]}, other_checksums={b"new:x": known}
            )
            assert _matched_outside(file, found, b"new:x") == expected


def test_every_checksum_of_a_key_is_collected(cache, config, data, values):
    """Searching the pages finds those of older commits, too."""
    with cache.writer(config, on_duplicate="overwrite") as writer:
        writer.put("clip_005:x", values["clip_005:x"] + 1)
    with PageFile(data) as file:
        found = _Found()
        _collect_others(file, found, set())
    value = np.float32(values["clip_005:x"] + 1)
    expected = {checksum(b"clip_005:x", v.tobytes()) for v in (values["clip_005:x"], value)}
    assert expected <= set(found.other_checksums[b"clip_005:x"])
