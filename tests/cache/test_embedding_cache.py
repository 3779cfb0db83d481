"""EmbeddingCache: all stores under one root."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.errors import (
    CacheNotFoundError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
    ReadOnlyCacheError,
    StorageError,
)

OTHER = CacheConfig(duration=10, dtype="float16")


def compute_ones(calls):
    def compute(sample_ids):
        calls.append(sample_ids)
        return np.stack([np.full(4, len(name), np.float32) for name in sample_ids])

    return compute


def test_root_is_argument_then_variable_then_platform(monkeypatch, tmp_path):
    """The nearest choice wins; `~` and relative paths become absolute."""
    monkeypatch.setenv("LMDBCACHE_ROOT", str(tmp_path / "variable"))
    assert EmbeddingCache(tmp_path / "argument").root == tmp_path / "argument"
    assert EmbeddingCache().root == tmp_path / "variable"
    monkeypatch.setenv("LMDBCACHE_ROOT", "")
    assert EmbeddingCache().root == Path(platformdirs.user_cache_dir("lmdbcache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert EmbeddingCache("~/x").root == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    assert EmbeddingCache("x").root == tmp_path / "x"


def test_only_looking_creates_nothing(cache, config):
    """Every question may be asked of a root that doesn't exist, and it still doesn't."""
    assert config not in cache
    assert cache.stores() == []
    assert list(cache) == []
    assert cache.size() == cache.size(config) == 0
    assert cache.coverage(config, ["a:x"]).missing == ("a:x",)
    assert cache.clear() == cache.clear(config) == []
    for use in (cache.reader, cache.info, cache.verify, cache.compact):
        with pytest.raises(CacheNotFoundError):
            use(config)
    cache.writer(config).close()
    assert cache.get_or_compute(config, [], pytest.fail).shape == (0,)
    assert not cache.root.exists()


def test_stores_lists_what_is_there(filled, config, embeddings):
    """Each store with its config, count, size, shape and origin; other folders aren't stores."""
    with filled.writer(OTHER, dataset_root="/data", provenance={"weights_digest": "w"}) as writer:
        writer.put("a:x", np.ones((2, 3)))
    (filled.root / "notes").mkdir()
    (filled.root / "file").write_text("")
    by_config = {store.config: store for store in filled.stores()}
    assert set(by_config) == set(filled) == {config, OTHER}
    assert by_config[config] == filled.info(config)
    assert by_config[config].num_embeddings == 20
    other = by_config[OTHER]
    assert (other.embedding_shape, other.dataset_root) == ((2, 3), "/data")
    assert other.provenance == {"weights_digest": "w"}
    assert other.damage is None
    assert other.path == filled.path(OTHER)
    assert other.path.name == f"{OTHER.slug}-{OTHER.fingerprint}"
    assert filled.size() == filled.size(config) + filled.size(OTHER)
    assert filled.size(config) == by_config[config].size_bytes > 0


def test_damaged_store_is_listed_with_its_damage(filled, config):
    """One broken store hides neither itself nor the others, and can be cleared."""
    with filled.writer(OTHER) as writer:
        writer.put("a:x", np.ones(3))
    next(filled.path(config).rglob("data.mdb")).write_bytes(b"broken")
    broken, sound = sorted(filled.stores(), key=lambda store: store.damage is None)
    assert (broken.config, broken.path, broken.num_embeddings) == (None, filled.path(config), 0)
    assert "data.mdb isn't an LMDB file" in broken.damage
    assert broken.to_dict()["fingerprint"] is None
    assert sound.config == OTHER
    assert list(filled) == [OTHER]
    assert [store.damage is None for store in filled.clear(config)] == [False]
    assert config not in filled


def test_coverage_counts_by_class(filled, config, embeddings):
    """Stored and asked per class; ids that can't be stored are missing; repeats count once."""
    asked = [*embeddings, "new:dog", "new:cat", "no class", "video_00001:dog", ":dog"]
    coverage = filled.coverage(config, asked)
    assert coverage.num_asked == 24
    assert coverage.num_present == 20
    assert coverage.fraction == pytest.approx(20 / 24)
    assert coverage.missing == ("new:dog", "new:cat", "no class", ":dog")
    assert coverage.by_class == {
        "drum": (10, 10),
        "dog": (10, 11),
        "cat": (0, 1),
        "(no class)": (0, 2),
    }


def test_coverage_of_nothing(filled, config):
    """Nothing asked is covered; nothing stored covers nothing."""
    assert filled.coverage(config, []).fraction == 1.0
    assert filled.coverage(OTHER, iter(["a:x"])).by_class == {"x": (0, 1)}


def test_clear_removes_one_or_all(filled, config):
    """What was removed is returned, and its folder is gone; the rest stays."""
    with filled.writer(OTHER) as writer:
        writer.put("a:x", np.ones(3))
    (filled.root / "notes.txt").write_text("mine")
    (removed,) = filled.clear(config)
    assert (removed.config, removed.num_embeddings) == (config, 20)
    assert not filled.path(config).exists()
    assert OTHER in filled
    assert [store.config for store in filled.clear()] == [OTHER]
    assert [child.name for child in filled.root.iterdir()] == ["notes.txt"]


def test_clear_leaves_what_it_does_not_know(filled, config):
    """A stranger's folder inside the store stays."""
    (filled.path(config) / "mine").mkdir()
    filled.clear(config)
    assert [child.name for child in filled.path(config).iterdir()] == ["mine"]
    assert config not in filled


def test_only_stores_of_this_root_are_removed(filled, config, tmp_path):
    """Another root's store, and a folder that isn't one, are refused and stay."""
    other = EmbeddingCache(tmp_path / "other")
    (other.root / "sub").mkdir(parents=True)
    for folder in (filled.path(config), other.root / "sub", other.root / "absent"):
        with pytest.raises(CacheNotFoundError):
            other.remove(folder)
    assert (other.root / "sub").is_dir()
    assert filled.info(config).num_embeddings == 20


def test_writer_goes_on_after_a_clear(cache, config):
    """A commit after the store was cleared makes a new one."""
    with cache.writer(config) as writer:
        writer.put("a:x", np.ones(3))
        writer.commit()
        cache.clear(config)
        writer.put("b:x", np.ones(3))
    assert list(cache.reader(config)) == ["b:x"]
    assert cache.verify(config).is_sound


def test_get_or_compute_computes_misses_only(cache, config):
    """Stored ones aren't computed, repeats are computed once, the order is that asked for."""
    calls = []
    compute = compute_ones(calls)
    asked = ["bb:x", "a:x", "bb:x", "ccc:X"]
    found = cache.get_or_compute(config, asked, compute)
    assert calls == [["bb:x", "a:x", "ccc:x"]]
    np.testing.assert_array_equal(found[:, 0], [4, 3, 4, 5])
    np.testing.assert_array_equal(cache.get_or_compute(config, asked, pytest.fail), found)
    more = cache.get_or_compute(config, ["dddd:x", *asked], compute)
    assert calls[1:] == [["dddd:x"]]
    np.testing.assert_array_equal(more[1:], found)
    assert cache.get_or_compute(config, [], pytest.fail).shape == (0, 4)


def test_get_or_compute_returns_what_is_stored(cache):
    """The first call gives the same bits as every later one, dtype included."""
    third = torch.full((1, 5), 1 / 3, requires_grad=True)
    first = cache.get_or_compute(OTHER, ["a:x"], lambda _: third)
    assert first.dtype == np.float16
    assert first.tobytes() == cache.get_or_compute(OTHER, ["a:x"], pytest.fail).tobytes()


def test_get_or_compute_refuses_a_wrong_number(cache, config):
    """A compute function that loses a sample, or makes one up, stores nothing."""
    for number in (2, 4):
        with pytest.raises(InvalidEmbeddingError, match=str(number)):
            cache.get_or_compute(config, ["a:x", "b:x", "c:x"], lambda _, n=number: np.ones((n, 4)))
    for nothing in (None, 3.0, iter([np.ones(4)])):
        with pytest.raises(InvalidEmbeddingError):
            cache.get_or_compute(config, ["a:x"], lambda _, found=nothing: found)
    with pytest.raises(InvalidEmbeddingError, match=r"b:x.*NaN"):
        cache.get_or_compute(config, ["a:x", "b:x"], lambda _: [np.ones(2), [1, np.nan]])
    with pytest.raises(InvalidSampleIdError):
        cache.get_or_compute(config, ["a:x", "bad"], pytest.fail)
    assert not cache.root.exists()


def test_absence_names_the_nearest_config(filled, config):
    """A miss says which stored config comes close and in which field it differs."""
    with filled.writer(OTHER) as writer:
        writer.put("a:x", np.ones(3))
    with pytest.raises(CacheNotFoundError) as caught:
        filled.reader(config.replace(duration=4))
    message = str(caught.value)
    assert config.fingerprint in message
    assert "`duration=4.0` asked, 5.0 stored" in message
    assert "20 embeddings" in message
    assert "dtype" not in message
    with pytest.raises(CacheNotFoundError, match="dtype"):
        filled.info(OTHER.replace(dtype="bfloat16"))


def test_cache_pickles_and_shows_its_root(filled, config):
    """A cache is its root."""
    copy = pickle.loads(pickle.dumps(filled))
    assert copy.root == filled.root
    assert config in copy
    assert repr(filled) == f"EmbeddingCache({str(filled.root)!r})"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_root_that_cannot_be_listed_is_an_error(tmp_path):
    """A root without permission isn't taken for an empty one."""
    from storage.child_processes import NOBODY, in_fork

    cache = EmbeddingCache(tmp_path / "cache")
    cache.root.mkdir(mode=0o700)

    def look():
        with pytest.raises(StorageError):
            cache.stores()

    in_fork(look, user=NOBODY)


def test_unwritable_root_is_told_before_any_work(tmp_path, config):
    """A root that is a file, or below one, is refused by name."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(ReadOnlyCacheError):
        EmbeddingCache(blocked).check_writable(config)
    EmbeddingCache(tmp_path / "new" / "root").check_writable(config)
    assert not (tmp_path / "new").exists()
