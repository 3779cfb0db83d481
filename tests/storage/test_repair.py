"""repair keeps what is sound, lists what it drops, and never loses a sound store."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from storage.damage import data_file, flip_value

from lmdbcache.errors import CacheNotFoundError, IntegrityError
from lmdbcache.storage.maintenance import repair as repair_module
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
    flip_value(data, values["clip_007:x"])
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


def broken_page(path, wanted):
    """Overwrite the kind of a leaf page of the main database: the one with this key."""
    with PageFile(path) as file:
        numbers = [file.meta.main.root]
        for number in numbers:
            page = file.read(number * 4096, 4096)
            entries = list(file._entries(page, number)) if page[10] == 2 else []
            if any(entry.key == wanted for entry in entries):
                overwrite(path, number * 4096 + 10, bytes(2))
                return {entry.key.decode() for entry in entries}
            numbers += file._children(page, number) if page[10] == 1 else []
    raise LookupError(wanted)


def test_broken_page_loses_what_it_led_to(cache, config, data, values):
    """The checksums of the page's values are left, and name them; all others are kept."""
    lost = broken_page(data, b"clip_123:x")
    assert cache.verify(config).structure
    report = cache.repair(config)
    assert set(report.dropped) >= lost
    assert report.num_kept == NUM_SAMPLES - len(lost)
    with cache.reader(config) as reader:
        assert set(reader) == values.keys() - lost
        for sample_id, value in reader.items():
            np.testing.assert_array_equal(value, values[sample_id])


def test_broken_root_loses_all(cache, config, data):
    """Nothing leads to a value or a checksum any more; the next extraction begins anew."""
    overwrite(data, main_root(data) * 4096 + 10, bytes(2))
    report = cache.repair(config)
    assert (report.num_kept, report.was_sound) == (0, False)
    assert cache.verify(config).is_sound


def test_lost_meta_pages_lose_nothing(cache, config, data, values):
    """The newest, and even both: the record beside data.mdb has a copy."""
    overwrite(data, 0, bytes(8192))
    with pytest.raises(IntegrityError):
        cache.reader(config)["clip_007:x"]
    report = cache.repair(config)
    assert (report.num_kept, report.dropped) == (NUM_SAMPLES, ())
    assert cache.reader(config) == values


def test_overwritten_values_never_come_back(cache, config, data, values):
    """Old pairs of value and checksum are still in the file, and nothing leads to them."""
    with cache.writer(config, on_duplicate="overwrite", commit_records=50) as writer:
        for sample_id in values:
            writer.put(sample_id, values[sample_id] + 1)
    broken_page(data, b"clip_123:x")
    (data.parent / "committed").unlink()
    assert cache.repair(config).num_kept > 200
    with cache.reader(config) as reader:
        for sample_id, value in reader.items():
            np.testing.assert_array_equal(value, values[sample_id] + 1)


@pytest.mark.parametrize("percent", [60, 75, 95])
def test_truncated_store_keeps_what_is_left(cache, config, data, values, percent):
    """What lies before the cut."""
    os.truncate(data, data.stat().st_size * percent // 100)
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
    with pytest.raises(IntegrityError):
        cache.repair(config)
    assert data.read_bytes() == content


def test_interrupted_repair_changes_nothing(cache, config, data, values, monkeypatch):
    """The old generation stays live until the new one is checked."""
    flip_value(data, values["clip_007:x"])

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
        flip_value(data, values["clip_007:x"])
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
    with pytest.raises(IntegrityError):
        len(cache.reader(config))
    assert cache.repair(config).num_kept == 50
    with cache.reader(config) as reader:
        assert (reader.get_batch(names) == 19).all()
