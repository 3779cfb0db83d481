"""The space that an extraction needs, known before it begins."""

from __future__ import annotations

import itertools
import mmap
import shutil

import numpy as np
import pytest
from small_ast import save_small_ast

from lmdbcache import CacheConfig, model_identity
from lmdbcache.embedders import ASTEmbedder, find_checkpoint, find_model
from lmdbcache.errors import CacheFullError
from lmdbcache.extraction import plan_extraction, space


def never(*_):
    raise AssertionError("the model was built")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        *itertools.product([(8,), (300,), (768,)], ["sorted", "reversed", "random"]),
        # These have pages of their own, in whatever order.
        ((50, 64), "sorted"),
        ((1214, 768), "sorted"),
    ],
)
def test_estimate_holds(cache, shape, dtype, order):
    """What is estimated is what data.mdb then has, or somewhat more."""
    config = CacheConfig(dtype=dtype)
    sample_ids = [f"video_{n:05d}:dog" for n in range(20 if len(shape) > 1 else 3000)]
    estimate = space.estimated_bytes(sample_ids, shape, dtype)
    if order != "sorted":
        sample_ids.sort(reverse=True)
    if order == "random":
        np.random.default_rng(0).shuffle(sample_ids)
    with cache.writer(config, commit_records=300) as writer:
        for sample_id in sample_ids:
            writer.put(sample_id, np.zeros(shape, np.float32))
    used = next(cache.path(config).glob("gen-*/data.mdb")).stat().st_size
    if order == "sorted":  # as an extraction stores them
        assert used <= estimate + (64 << 10)
        assert estimate <= 1.6 * used
    assert used <= 2.5 * estimate + (1 << 20)
    if len(shape) > 1:
        assert estimate <= 1.3 * used


@pytest.mark.parametrize("output", ASTEmbedder.outputs)
@pytest.mark.parametrize("max_length", [128, 200])
def test_shape_from_settings(tmp_path, output, max_length):
    """config.json alone tells the shape that the model then gives."""
    folder = save_small_ast(tmp_path / "ast", max_length=max_length)
    checkpoint = find_checkpoint(folder)
    told = find_model(folder).embedding_shape(CacheConfig(output=output))
    assert told == ASTEmbedder(checkpoint, output).embedding_shape


def test_published_shape(tmp_path):
    """The published model has 1214 tokens of 768."""
    folder = save_small_ast(tmp_path / "ast")
    (folder / "config.json").write_text('{"model_type": "audio-spectrogram-transformer"}')
    (folder / "preprocessor_config.json").write_text("{}")
    told = find_model(folder).embedding_shape
    assert told(CacheConfig(output="last_hidden_state")) == (1214, 768)
    assert told(CacheConfig(output="mean")) == (768,)


def test_too_little_space_is_told_before_the_model_loads(run, cache, config, clips, monkeypatch):
    """The message names what is needed, what is free, and the ways out; nothing is created."""
    monkeypatch.setattr(space, "free_bytes", lambda _: 1 << 20)
    monkeypatch.setattr("lmdbcache.embedders.transformers_family.load_weights", never)
    with pytest.raises(CacheFullError) as caught:
        run(clips, config.replace(output="last_hidden_state"))
    message = str(caught.value)
    assert "10 embeddings of shape (146, 64) need " in message
    assert "1.0 MiB are free" in message
    for remedy in ("free space", "`root`", "pooler_output", "float16", "Nothing was computed"):
        assert remedy in message
    assert "\n" not in message
    assert not cache.root.exists()


def test_shape_of_an_embedder_of_ones_own(run, clips, config, monkeypatch):
    """Where no config.json tells it, the embedder does; from then on the store."""
    monkeypatch.setattr(space, "free_bytes", lambda _: 20 << 20)

    class Large:
        outputs = ("pooler_output",)
        embedding_shape = (1 << 20,)

        embed = never

        def provenance(self):
            return {}

    with pytest.raises(CacheFullError):
        run(clips, config.replace(model_name="mine"), make_embedder=Large)


def test_plan(cache, config, clips, run, ast_folder):
    """A plan counts like the run that follows, and changes nothing."""
    plan = plan_extraction(cache, config, {**clips, "no-class": "x.wav"}, model=ast_folder)
    assert (plan.num_samples, plan.num_cached, plan.num_missing, plan.num_refused) == (11, 0, 10, 1)
    assert plan.embedding_shape == (64,)
    assert plan.fits
    assert plan.bytes_free <= shutil.disk_usage(cache.root.parent).free + (64 << 20)
    assert not cache.root.exists()
    run(clips)
    plan = plan_extraction(cache, config, clips, model=ast_folder)
    assert (plan.num_cached, plan.num_missing, plan.bytes_needed) == (10, 0, 0)


def test_plan_of_a_model_that_is_not_here(cache, clips, monkeypatch, tmp_path):
    """Nothing is downloaded for a plan: what isn't known is said to be so."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = CacheConfig(model_name="nobody/nothing")
    plan = plan_extraction(cache, config, clips)
    assert plan.bytes_needed is None
    assert plan.fits


def test_identity_and_plan_agree(ast_folder, cache, clips):
    """Without a model argument the config's model name is looked up."""
    assert plan_extraction(
        cache, CacheConfig(duration=1.0), clips, model=ast_folder
    ).embedding_shape == (64,)
    assert model_identity(ast_folder).startswith("small-ast@")


@pytest.mark.parametrize("num_pages", [1, 2, 4])
def test_values_that_fill_their_pages_need_another(num_pages):
    """LMDB puts a header in front of a value on pages of its own."""
    ids = [f"video_{n:05d}:dog" for n in range(1000)]
    page = mmap.PAGESIZE
    assert space.estimated_bytes(ids, (num_pages * page // 4,), "float32") >= (
        1000 * page * (num_pages + 1)
    )
