"""Sources with something odd in them: named one by one, and all at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exchange.old_caches import FACTS, save_folder, save_seed, save_torch, values

from lmdbcache import export_embeddings, import_embeddings
from lmdbcache.cache import compare_stores
from lmdbcache.errors import ConfigError
from lmdbcache.storage import statistics_of


def test_all_that_is_missing_or_unusable_is_told_at_once(bring, cache, tmp_path):
    """One error names the fields, what the file says, and the arguments."""
    path = save_seed(
        tmp_path / "old.pt", duration="5.0s", model_name=None, dataset="x y", sample_rate=44100
    )
    with pytest.raises(ConfigError) as error:
        bring(path, {"sample_rate": 16000})
    for words in (
        "`model_name`", "'5.0s'", "`duration`", "'x y'", "`namespace`",
        "44100", "16000", "`ignore_metadata=True`",
    ):  # fmt: skip
        assert words in str(error.value)
    assert cache.stores() == []


def test_an_option_stands_in_for_an_unusable_field(bring, tmp_path):
    """What can't be understood can't disagree; it is said."""
    path = save_seed(tmp_path / "old.pt", duration="5.0s")
    report = bring(path, {"duration": 5})
    assert report.config.duration == 5.0
    assert any("'5.0s'" in note for note in report.notes)


@pytest.mark.parametrize("name", ["video_00001:dog", "video_00001"])
def test_several_outputs_of_one_clip(bring, tmp_path, name):
    """They are refused under the clip's name, with what to do."""
    values_ = {"hidden": torch.ones(3, 8), "pooled": torch.ones(8)}
    report = bring(save_torch(tmp_path / "old.pt", {"embeddings": {name: values_}}))
    (refusal,) = report.refused
    assert refusal.where == name
    assert "'hidden', 'pooled'" in refusal.reason


def test_a_class_that_its_value_contradicts(bring, tmp_path):
    """Both are named, and what to do."""
    content = {"a:dog": {"class_name": "cat", "embeddings": torch.ones(8)}}
    (refusal,) = bring(save_torch(tmp_path / "old.pt", content)).refused
    assert "'dog'" in refusal.reason
    assert "'cat'" in refusal.reason


def test_big_endian_files_come_along(came_along, tmp_path):
    """One among others doesn't need a dtype: the same numbers, in the other order of bytes."""
    arrays = values(4)
    root = save_folder(tmp_path / "old", arrays)
    np.save(root / "dog" / "video_00001.npy", arrays["video_00001:dog"].astype(">f4"))
    came_along(root, arrays)
    odd = {name: array.astype(">f4") for name, array in arrays.items()}
    came_along(save_torch(tmp_path / "old.pt", odd), arrays, {**FACTS, "dataset": "b"})


def test_odd_dtypes_are_refused_one_by_one(bring, tmp_path):
    """Complex numbers, truth values, text and objects are named; the others come."""
    root = save_folder(tmp_path / "old", values(4))
    odd = {"complex64": np.ones(8, "c8"), "bool": np.ones(8, bool), "str": np.full(8, "x")}
    for name, array in odd.items():
        np.save(root / "dog" / f"{name}.npy", array)
    np.save(root / "dog" / "object.npy", np.array([{}], object), allow_pickle=True)
    report = bring(root)
    reasons = {one.where: one.reason for one in report.refused}
    assert reasons.keys() == {f"dog/{name}.npy" for name in (*odd, "object")}
    assert "dtype complex64; real numbers are needed" in reasons["dog/complex64.npy"]
    assert (report.num_new, report.config.dtype) == (4, "float32")


def test_doubles_are_named(bring, tmp_path):
    """The dtype that needs a word comes with the first that has it."""
    root = save_folder(tmp_path / "old", values(4))
    np.save(root / "dog" / "double.npy", np.ones(8))
    with pytest.raises(ConfigError, match="dog/double.npy"):
        bring(root)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_zeros_are_counted(bring, stored, tmp_path, dtype):
    """They are imported, and it is said which."""
    arrays = {**values(), "video_00001:dog": np.zeros(8, "f4"), "video_00003:dog": -np.zeros(8)}
    report = bring(save_torch(tmp_path / "old.pt", arrays), {**FACTS, "dtype": dtype})
    assert report.zeros == ["video_00001:dog", "video_00003:dog"]
    assert report.num_new == 12
    assert report.exit_code == 0
    assert report.to_dict()["zeros"] == report.zeros
    assert bring(save_seed(tmp_path / "sound.pt", values(4)), dry_run=True).zeros == []


def test_nothing_imported_is_no_store(bring, cache, tmp_path):
    """No store is made."""
    path = save_torch(tmp_path / "old.pt", {"no class": np.ones(8, "f4")})
    for dry_run in (True, False):
        assert not bring(path, dry_run=dry_run).path.exists()
    assert cache.stores() == []


def test_an_export_that_was_imported_is_equal(bring, cache, tmp_path):
    """Where and when embeddings were imported is no difference between stores."""
    config = bring(save_seed(tmp_path / "old.pt")).config
    export_embeddings(cache, config, tmp_path / "new.npz", format="npz")
    other = import_embeddings(tmp_path / "other", None, tmp_path / "new.npz")
    assert other.num_new == 12
    found = compare_stores(cache.path(config), other.path)
    assert found.provenance == {}
    assert found.is_equal


def test_an_export_is_no_use(bring, cache, tmp_path):
    """Neither import nor export count as hits, nor move the time of last use."""
    config = bring(save_seed(tmp_path / "old.pt")).config
    assert export_embeddings(cache, config, tmp_path / "new.npz", format="npz").num_embeddings == 12
    assert statistics_of(cache.path(config)).hits == 0
    assert cache.info(config).last_used is None
