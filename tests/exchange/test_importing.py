"""What an import stores, refuses, and does again."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from exchange.old_caches import FACTS, save_folder, save_manifests, save_seed, save_torch, values
from small_disks import empty, fill, small_disk

from lmdbcache import CacheConfig, EmbeddingCache, export_embeddings, import_embeddings
from lmdbcache.errors import (
    CacheFullError,
    ConfigError,
    ProvenanceMismatchError,
    ReadOnlyCacheError,
)
from lmdbcache.exchange import intake


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sample_rate": 22050}, ("sample_rate", "16000", "22050")),
        ({"duration": 10}, ("duration", "5.0", "10.0")),
        ({"model_name": "other"}, ("model_name", "MIT/", "other")),
        ({"dataset": "esc50"}, ("namespace", "vegas", "esc50")),
        ({"sample_rate": "x"}, ("sample_rate", "'x'")),
        ({"colour": 1}, ("colour",)),
    ],
)
def test_disagreement_names_the_field_and_both_values(bring, cache, tmp_path, given, words):
    """A file that says otherwise than the caller is refused, and nothing is stored."""
    path = save_seed(tmp_path / "old.pt", dataset="VEGAS")
    with pytest.raises(ConfigError) as error:
        bring(path, given)
    assert all(word in str(error.value) for word in words)
    assert cache.stores() == []


def test_the_same_in_other_words_is_no_disagreement(bring, tmp_path):
    """5 is 5.0, and "ast" the full name."""
    path = save_seed(tmp_path / "old.pt", sample_rate=torch.tensor(16000), duration="5")
    report = bring(path, {"sample_rate": 16000.0, "duration": 5, "model_name": "ast"})
    assert report.num_new == 12


def test_a_file_may_be_overruled(bring, tmp_path):
    """ignore_metadata takes the caller's word for everything."""
    path = save_seed(tmp_path / "old.pt", sample_rate=22050, dataset="x y")
    with pytest.raises(ConfigError):
        bring(path)
    report = bring(path, ignore_metadata=True)
    assert report.config.sample_rate == 16000
    with pytest.raises(ConfigError, match="duration"):
        bring(path, {"sample_rate": 16000, "model_name": "ast"}, ignore_metadata=True)


def test_what_nobody_says_is_asked_for(bring, cache, tmp_path):
    """No default stands in for sample rate, duration or model."""
    path = save_torch(tmp_path / "old.pt", values())
    with pytest.raises(ConfigError, match="sample_rate, duration, model_name"):
        bring(path, None)
    with pytest.raises(ConfigError, match="model_name"):
        bring(path, {"sample_rate": 16000, "duration": 5})
    assert not cache.root.exists()


def test_a_whole_config(came_along, tmp_path):
    """A CacheConfig stands for all fields."""
    config = CacheConfig(model_name="mine", output="mean", namespace="vegas")
    arrays = values()
    report = came_along(save_torch(tmp_path / "old.pt", arrays), arrays, config)
    assert report.config == config


def test_the_dtype_to_store_in_is_a_choice(bring, cache, tmp_path):
    """An export of float32 may be stored as float16: that contradicts nothing."""
    config = bring(save_seed(tmp_path / "old.pt")).config
    export_embeddings(cache, config, tmp_path / "new.npz", format="npz")
    report = bring(tmp_path / "new.npz", {"dtype": "float16"})
    assert (report.config, report.num_new) == (config.replace(dtype="float16"), 12)


def test_dry_run_says_the_same_and_stores_nothing(bring, cache, tmp_path):
    """Everything is read and judged as in the run that follows."""
    arrays = {**values(), "nan:dog": np.full(8, np.nan, "f4"), "no class": np.ones(8)}
    path = save_torch(tmp_path / "old.pt", arrays)
    planned = bring(path, {**FACTS, "dtype": "float32"}, dry_run=True)
    assert not cache.root.exists()
    done = bring(path, {**FACTS, "dtype": "float32"})
    for name in ("config", "classes", "embedding_shape", "refused", "num_bytes", "num_new"):
        assert getattr(planned, name) == getattr(done, name)
    again = bring(path, {**FACTS, "dtype": "float32"}, dry_run=True)
    assert (planned.num_new, again.num_new, again.num_same) == (12, 0, 12)


def test_again_and_more(bring, tmp_path):
    """What is there is compared and left; what is new comes."""
    bring(save_seed(tmp_path / "old.pt", values(6)))
    report = bring(save_seed(tmp_path / "more.pt", values(12)))
    assert (report.num_new, report.num_same) == (6, 6)
    assert report.exit_code == 0


def test_other_values_under_the_same_names(bring, stored, tmp_path):
    """skip keeps the stored one, error reports it too, overwrite replaces."""
    old = values(6)
    bring(save_seed(tmp_path / "old.pt", old))
    new = {**values(8, seed=1), "video_00000:drum": old["video_00000:drum"]}
    path = save_seed(tmp_path / "new.pt", new)
    report = bring(path)
    assert (report.num_new, report.num_same) == (2, 1)
    assert {c.sample_id for c in report.conflicts} == set(old) - {"video_00000:drum"}
    assert {(c.stored.writer, c.kept) for c in report.conflicts} == {("this store", "stored")}
    assert (report.exit_code, bring(path, on_duplicate="skip").exit_code) == (1, 0)
    assert (stored(report)["video_00001:dog"] == old["video_00001:dog"]).all()
    report = bring(path, on_duplicate="overwrite")
    assert (report.num_new, len(report.conflicts), report.exit_code) == (0, 5, 0)
    assert (stored(report)["video_00001:dog"] == new["video_00001:dog"]).all()
    with pytest.raises(ConfigError):
        bring(path, on_duplicate="maybe")


def test_a_shape_the_store_does_not_hold(bring, tmp_path):
    """The store's shape counts, not that of most in the file."""
    bring(save_seed(tmp_path / "old.pt", values(2)))
    report = bring(save_seed(tmp_path / "new.pt", values(4, shape=(9,))))
    assert (report.num_new, len(report.refused)) == (0, 4)
    assert all("(9,)" in one.reason for one in report.refused)


def test_lengths_that_differ(bring, came_along, tmp_path):
    """Refused, with the argument; with that, stored as they are."""
    arrays = {f"v{n}:dog": np.full((n % 3 + 2, 4), n, "f4") for n in range(7)}
    path = save_seed(tmp_path / "old.pt", arrays)
    report = bring(path, dry_run=True)
    assert report.num_new == 3
    assert "ragged" in report.refused[0].reason
    assert came_along(path, arrays, None, ragged=True).embedding_shape == (None, 4)


def test_a_wrong_count_is_told(bring, tmp_path):
    """A file that says how many it should hold, and holds fewer."""
    report = bring(save_seed(tmp_path / "old.pt", num_embeddings=99))
    assert any("99" in note and "12" in note for note in report.notes)


def test_where_they_come_from_is_kept(bring, cache, tmp_path):
    """File, size and time of each source, and when it was imported."""
    path = save_seed(tmp_path / "old.pt", values(6))
    report = bring(path)
    bring(path)
    more = save_manifests(tmp_path / "more", values(12))
    bring(more)
    provenance = cache.info(report.config).provenance
    assert set(provenance) == {
        "imported_from", "imported_at", "imported_from_2", "imported_at_2",
    }  # fmt: skip
    size = path.stat().st_size
    assert provenance["imported_from"].startswith(f"old.pt ({size} bytes, modified 20")
    assert provenance["imported_from_2"].startswith("more (6 files, ")


def test_unknown_weights_do_not_come_to_known_ones(bring, cache, tmp_path):
    """An extracted store takes imported embeddings only on somebody's word about the weights."""
    path = save_seed(tmp_path / "old.pt")
    config = bring(path, dry_run=True).config
    with cache.writer(config, provenance={"weights_digest": "abc"}) as writer:
        writer.put("other:dog", np.ones(8))
    with pytest.raises(ProvenanceMismatchError, match="abc"):
        bring(path)
    with pytest.raises(ProvenanceMismatchError, match="'abc'.*'xyz'"):
        bring(path, weights_digest="xyz")
    assert bring(path, weights_digest="abc").num_new == 12
    assert bring(path, {**FACTS, "front_end": "mine/1"}).num_new == 12


def test_an_extraction_into_imported_embeddings_warns_once(bring, cache, tmp_path, caplog):
    """The first commit of known weights says what it meets; the import still goes on after it."""
    path = save_seed(tmp_path / "old.pt")
    report = bring(path)
    assert any("weights" in note for note in report.notes)
    assert caplog.messages == []
    for number in range(2):
        with cache.writer(report.config, provenance={"weights_digest": "abc"}) as writer:
            writer.put(f"new{number}:dog", np.ones(8))
    (message,) = caplog.messages
    assert "imported from old.pt" in message
    assert "abc" in message
    assert bring(path).num_same == 12


class StoppedError(Exception):
    pass


def _import_until(path, root, done):
    def progress(now, _):
        if now >= done:
            os.kill(os.getpid(), signal.SIGKILL)

    intake._BATCH_RECORDS = 2
    import_embeddings(root, None, path, progress=progress)


def test_a_killed_import_goes_on(bring, cache, tmp_path):
    """What was committed when it was killed is there; the same call brings the rest."""
    path = save_seed(tmp_path / "old.pt", values(40))
    child = os.fork()
    if child == 0:
        try:
            _import_until(path, cache.root, 15)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (info,) = cache.stores()
    assert 15 <= info.num_embeddings < 40
    report = bring(path)
    assert report.num_same == info.num_embeddings
    assert report.num_new == 40 - info.num_embeddings
    assert cache.verify(report.config).is_sound


def test_an_interrupted_import_keeps_its_batches(bring, cache, tmp_path, monkeypatch):
    """An exception in the middle, such as Ctrl-C, leaves whole batches."""

    def progress(now, total):
        assert total == 12
        if now >= 6:
            raise StoppedError

    monkeypatch.setattr(intake, "_BATCH_RECORDS", 3)

    path = save_seed(tmp_path / "old.pt")
    with pytest.raises(StoppedError):
        bring(path, progress=progress)
    assert cache.stores()[0].num_embeddings == 6
    assert bring(path).num_new == 6


def test_a_full_disk(bring, tmp_path):
    """What can't fit isn't begun; what fills up meanwhile stays sound and goes on later."""
    path = save_folder(tmp_path / "old", values(12, shape=(1 << 18,)))
    with small_disk(tmp_path / "disk", 64) as disk:
        cache = EmbeddingCache(disk / "cache")
        fill(disk, 20 << 20)
        with pytest.raises(CacheFullError):
            import_embeddings(cache, FACTS, path)
        assert cache.stores() == []
        empty(disk)
        assert import_embeddings(cache, FACTS, path).exit_code == 0


def test_many_in_batches(came_along, tmp_path, monkeypatch):
    """More than one batch by count, and by size."""
    monkeypatch.setattr(intake, "_BATCH_RECORDS", 2048)
    arrays = {f"v{n:05d}:dog": np.full(2, n, "f4") for n in range(5000)}
    steps = []
    came_along(
        save_torch(tmp_path / "old.pt", arrays), arrays, progress=lambda n, _: steps.append(n)
    )
    assert steps == [2048, 4096, 5000, 5000]


def test_a_read_only_root(bring, tmp_path, cache):
    """Told before anything is read."""
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    cache.root.mkdir()
    cache.root.chmod(0o500)
    with pytest.raises(ReadOnlyCacheError):
        bring(save_seed(tmp_path / "old.pt"))
