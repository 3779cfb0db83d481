"""What an extraction stores, and what it doesn't do twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from extraction.clips import write_tones

from lmdbcache import CacheConfig, open_dataset
from lmdbcache.audio import load_waveform
from lmdbcache.embedders import ASTEmbedder, find_checkpoint
from lmdbcache.errors import ConfigError, DatasetError, ProvenanceMismatchError


def never(*_):
    raise AssertionError("the model was built")


@pytest.fixture(scope="session")
def by_hand(ast_folder):
    """One clip's model output by transformers alone."""
    from transformers import ASTFeatureExtractor, ASTModel

    extractor = ASTFeatureExtractor.from_pretrained(ast_folder)
    model = ASTModel.from_pretrained(ast_folder).eval()

    def by_hand(path, duration=0.5):
        waveform = load_waveform(path, 16000, duration)
        features = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_values
        with torch.no_grad():
            return model(features)

    return by_hand


def test_first_run_stores_all_and_second_computes_nothing(run, stored, clips):
    """Every sound clip is stored by the first run; the second one builds no model."""
    first = run(clips)
    assert (first.num_samples, first.num_cached, first.num_extracted) == (10, 0, 10)
    assert first.built_model
    assert first.exit_code == 0
    assert stored().keys() == clips.keys()
    second = run(clips, make_embedder=never)
    assert (second.num_cached, second.num_extracted, second.built_model) == (10, 0, False)
    assert second.compute_seconds == 0


@pytest.mark.parametrize("given", ["VEGAS", ["a.wav"], [("a:b", "a.wav", 1)], [3]])
def test_what_gives_no_clips(run, given):
    """A folder's path, and files without sample ids, are refused."""
    with pytest.raises(DatasetError):
        run(given)


def test_only_what_is_missing_is_computed(run, stored, clips, ast_folder):
    """A partly filled store keeps its embeddings and gets the others."""
    some = dict(list(clips.items())[3:7])
    run(some)
    before = stored()
    computed = []

    class Counting(ASTEmbedder):
        def embed(self, features):
            computed.append(len(features))
            return super().embed(features)

    summary = run(clips, make_embedder=lambda: Counting(find_checkpoint(ast_folder)))
    assert (summary.num_cached, summary.num_extracted) == (4, 6)
    # The units of all ten, without what is stored; after the first, copies of one of its clips.
    assert computed == [3, 2, 1, 2]
    after = stored()
    assert after.keys() == clips.keys()
    assert all(np.array_equal(after[sample_id], before[sample_id]) for sample_id in some)


def test_stored_values_are_the_models(run, stored, clips, by_hand):
    """Stored is what ASTFeatureExtractor and ASTModel give when they are called by hand."""
    run(clips)
    for sample_id, embedding in stored().items():
        expected = by_hand(clips[sample_id]).pooler_output[0].numpy()
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("output", ["pooler_output", "last_hidden_state", "mean"])
def test_outputs(run, stored, clips, config, by_hand, output):
    """The three outputs, their shapes and values; each has a store of its own."""
    config = config.replace(output=output)
    some = dict(list(clips.items())[:2])
    run(some, config)
    result = by_hand(clips["video_00000:dog"])
    expected = {
        "pooler_output": result.pooler_output,
        "last_hidden_state": result.last_hidden_state,
        "mean": result.last_hidden_state[:, 2:].mean(1),
    }[output][0].numpy()
    embedding = stored(config)["video_00000:dog"]
    assert embedding.shape == expected.shape == ((146, 64) if "hidden" in output else (64,))
    np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-5)


def test_number_of_workers_changes_nothing(run, stored, clips, config):
    """0, 1 and 2 decoding processes give the same bits."""
    found = []
    for num_workers in (0, 1, 2):
        named = config.replace(namespace=f"workers{num_workers}")
        assert run(clips, named, num_workers=num_workers).num_extracted == 10
        found.append(stored(named))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(other[i].tobytes() == found[0][i].tobytes() for i in other)


def test_order_of_clips_changes_nothing(run, clips, config, ast_folder):
    """However clips are listed, the model sees the same batches: sorted, of a fixed size."""
    seen = []

    class Recording(ASTEmbedder):
        def embed(self, features):
            seen.append(features.clone())
            return super().embed(features)

    for number, order in enumerate((list(clips.items()), reversed(list(clips.items())))):
        named = config.replace(namespace=f"order{number}")
        run(order, named, make_embedder=lambda: Recording(find_checkpoint(ast_folder)))
    # The second has copies of a clip of the first.
    assert [len(features) for features in seen] == [4, 2, 4, 2] * 2
    assert all(torch.equal(seen[unit], seen[unit + 4]) for unit in range(4))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_small_dtypes(run, stored, clips, config, by_hand, dtype, tolerance):
    """float16 and bfloat16 stores hold the rounded values."""
    config = config.replace(dtype=dtype)
    run(dict(list(clips.items())[:2]), config)
    embedding = stored(config)["video_00000:dog"]
    assert embedding.dtype.name == dtype
    expected = by_hand(clips["video_00000:dog"]).pooler_output[0].numpy()
    np.testing.assert_allclose(embedding.astype(np.float32), expected, rtol=tolerance, atol=1e-3)


def test_another_config_is_another_store(run, clips, config, cache, other_ast_folder):
    """Duration, model and output are part of what a store is."""
    one = dict(list(clips.items())[:1])
    run(one)
    for changed in (
        config.replace(duration=0.4),
        config.replace(output="mean"),
        config.replace(model_name="mine"),
    ):
        assert changed not in cache
        assert run(one, changed).num_extracted == 1
    assert len(cache.stores()) == 4


def test_other_weights_are_refused(run, stored, clips, config, cache, other_ast_folder):
    """Other weights under the same model_name end the run before anything is computed."""
    named = config.replace(model_name="mine")
    run(dict(list(clips.items())[:3]), named)
    before = stored(named)

    class Unused(ASTEmbedder):
        embed = staticmethod(never)

    with pytest.raises(ProvenanceMismatchError, match=r"weights_digest.*model_name"):
        run(
            clips,
            named,
            model=other_ast_folder,
            make_embedder=lambda: Unused(find_checkpoint(other_ast_folder)),
        )
    assert stored(named).keys() == before.keys()


def test_provenance_is_kept(run, clips, config, cache, ast_folder):
    """The store names the weights, the features' implementation and the dataset's folder."""
    run(dict(list(clips.items())[:1]), dataset_root="/somewhere")
    info = cache.info(config)
    assert info.provenance["weights_digest"] == find_checkpoint(ast_folder).weights_digest
    assert {"feature_extractor", "torch", "transformers"} <= info.provenance.keys()
    assert info.dataset_root == "/somewhere"


def test_repeated_and_contradicting_clips(run, clips):
    """A clip that is listed twice is computed once; two files for one sample id are refused."""
    first, second = list(clips.items())[:2]
    assert run([first, first]).num_samples == 1
    with pytest.raises(DatasetError):
        run([first, (first[0], second[1])])
    with pytest.raises(DatasetError):
        run({"x:dog": first[1], "x:DOG": second[1]})


def test_nothing_to_do(run, cache):
    """No clips at all: no store, no model, no error."""
    summary = run({}, make_embedder=never)
    assert (summary.num_samples, summary.exit_code) == (0, 0)
    assert cache.stores() == []
    assert not cache.root.exists()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"commit_seconds": -1.0}, "commit_seconds"),
        ({"commit_seconds": float("nan")}, "commit_seconds"),
        ({"device": "abacus"}, "device"),
        ({"config": CacheConfig(output="logits")}, "output"),
        ({"config": CacheConfig(sample_rate=8000)}, "sample_rate"),
        ({"config": CacheConfig(duration=0.02)}, "duration"),
    ],
)
def test_wrong_options(run, clips, cache, options, field):
    """A value that can't be used is named, and nothing is stored."""
    with pytest.raises(ConfigError, match=f"^{field}: "):
        run(clips, **options)
    assert cache.stores() == []


def test_a_dataset_is_taken_as_it_is(run, cache, config, tmp_path):
    """An adapter's samples are what is extracted."""
    write_tones(tmp_path / "VEGAS", 2, "dog")
    dataset = open_dataset(tmp_path / "VEGAS")
    assert run(dataset).num_extracted == 2
    assert not cache.coverage(config, dataset.sample_ids).missing
