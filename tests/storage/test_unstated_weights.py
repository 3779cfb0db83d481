"""Embeddings of unstated weights don't come into a store whose weights are known."""

from __future__ import annotations

import numpy as np
import pytest

from lmdbcache import CacheConfig, CachedEncoder, EmbeddingCache, VEGASDataset
from lmdbcache.cache import Origin
from lmdbcache.errors import ProvenanceMismatchError
from lmdbcache.exchange import Intake, merge_stores

CONFIG = CacheConfig(duration=1.0, namespace="vegas")
KNOWN = {"weights_digest": "0123456789abcdef"}
ONE, OTHER = np.ones(3, np.float32), np.full(3, 7, np.float32)


@pytest.fixture
def cache(tmp_path):
    """With one embedding of known weights."""
    cache = EmbeddingCache(tmp_path / "cache")
    with cache.writer(CONFIG, provenance=KNOWN) as writer:
        writer.put("a:dog", ONE)
    return cache


def put(cache, **options):
    with cache.writer(CONFIG, **options) as writer:
        writer.put("b:dog", OTHER)


def put_batch(cache, **options):
    with cache.writer(CONFIG, **options) as writer:
        writer.put_batch(["b:dog"], OTHER[None])


def put_over(cache, **options):
    with cache.writer(CONFIG, on_duplicate="overwrite", **options) as writer:
        writer.put_batch(["a:dog", "b:dog"], [OTHER, OTHER])


def get_or_compute(cache, **options):
    cache.get_or_compute(
        CONFIG, ["a:dog", "b:dog"], lambda missing: [OTHER] * len(missing), **options
    )


WRITES = [put, put_batch, put_over, get_or_compute]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("provenance", [None, {}, {"torch": "2"}, {"weights_digest": ""}])
def test_refused(cache, write, provenance):
    """And nothing of it is stored."""
    with pytest.raises(ProvenanceMismatchError):
        write(cache, provenance=provenance)
    with cache.reader(CONFIG) as reader:
        assert list(reader) == ["a:dog"]
        assert np.array_equal(reader["a:dog"], ONE)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("options", [{"provenance": KNOWN}, {"without_provenance": True}])
def test_stated_or_asked_for(cache, write, options):
    """The digest of the same weights, or the word for it."""
    write(cache, **options)
    assert np.array_equal(cache.reader(CONFIG)["b:dog"], OTHER)


@pytest.mark.parametrize("write", WRITES)
def test_a_store_without_a_digest_takes_either(tmp_path, write, caplog):
    """As it always did; with a digest it then counts as filled with these weights, and warns."""
    cache = EmbeddingCache(tmp_path / "cache")
    write(cache)
    assert not caplog.records
    for name in ("c:dog", "d:dog"):
        with cache.writer(CONFIG, provenance=KNOWN) as writer:
            writer.put(name, ONE)
    (warning,) = caplog.messages
    assert str(cache.path(CONFIG)) in warning
    assert cache.info(CONFIG).provenance == KNOWN


def test_what_adds_nothing_is_fine(cache):
    """Samples that are stored are skipped and removed without a digest; hits need none."""
    with cache.writer(CONFIG) as writer:
        assert not writer.put("a:dog", OTHER)
        assert writer.put_batch(["a:dog"], [OTHER]) == 0
        assert writer.put_batch(["a:dog"], OTHER[None]) == 0
    assert np.array_equal(cache.get_or_compute(CONFIG, ["a:dog"], lambda _: 1 / 0), ONE[None])
    with cache.writer(CONFIG) as writer:
        assert writer.remove(["a:dog"]) == 1


def test_nothing_is_computed_in_vain(cache):
    """The refusal comes before `compute` and before a forward pass."""
    with pytest.raises(ProvenanceMismatchError):
        cache.get_or_compute(CONFIG, ["b:dog"], lambda _: pytest.fail("computed"))
    torch = pytest.importorskip("torch")

    def model(inputs):
        return inputs[:, :3] if hits else pytest.fail("computed")

    hits = False
    encoder = CachedEncoder(cache, CONFIG, model)
    assert torch.equal(encoder(torch.ones(1, 9), sample_ids=["a:dog"]), torch.ones(1, 3))
    with pytest.raises(ProvenanceMismatchError):
        encoder(torch.ones(2, 9), sample_ids=["a:dog", "b:dog"])


def test_another_writer_states_its_weights_first(tmp_path):
    """A writer that was opened before looks again at its commit."""
    cache = EmbeddingCache(tmp_path / "cache")
    late = cache.writer(CONFIG)
    late.put("b:dog", OTHER)
    with cache.writer(CONFIG, provenance=KNOWN) as writer:
        writer.put("a:dog", ONE)
    with pytest.raises(ProvenanceMismatchError):
        late.commit()
    late.discard()
    late.close()
    assert list(cache.reader(CONFIG)) == ["a:dog"]


def test_a_merge_says_so(cache, tmp_path):
    """Of a whole store, whose path stays with each embedding; what a pull brings is refused."""
    unstated = EmbeddingCache(tmp_path / "unstated")
    put(unstated)
    (report,) = merge_stores(cache, [unstated.root]).stores
    assert any(str(unstated.root) in note for note in report.notes)
    assert sorted(cache.reader(CONFIG)) == ["a:dog", "b:dog"]
    intake = Intake(cache, CONFIG)
    with pytest.raises(ProvenanceMismatchError):
        intake.add(intake.checked(["c:dog"], ONE[None], Origin("node")), {})


def test_a_vegas_script_is_told(cache, tmp_path, caplog):
    """`save_ast_embeddings_to_cache` returns False, unless it is asked for."""
    (tmp_path / "dog" / "audios").mkdir(parents=True)
    dataset = VEGASDataset(
        root_dir=str(tmp_path), enable_ast_cache=True, ast_cache_dir=str(cache.root)
    )
    new = {"a:dog": ONE, "b:dog": OTHER}
    assert dataset.save_ast_embeddings_to_cache({"a:dog": ONE}, 16000, 1.0)
    assert not dataset.save_ast_embeddings_to_cache(new, 16000, 1.0)
    assert "without_provenance" in caplog.text
    assert list(cache.reader(CONFIG)) == ["a:dog"]
    assert dataset.save_ast_embeddings_to_cache(new, 16000, 1.0, without_provenance=True)
    assert sorted(cache.reader(CONFIG)) == ["a:dog", "b:dog"]
