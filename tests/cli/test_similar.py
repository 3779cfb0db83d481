"""`lmdbcache similar`, and the queries that a model embeds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from extraction.clips import write_tones
from small_models import save_small_model

from lmdbcache import EmbeddingCache, config_for, extract, open_dataset
from lmdbcache.errors import ConfigError, ProvenanceMismatchError
from lmdbcache.extraction import embed_clip, embed_text


def test_similar_samples_of_a_sample(cli, refused, cache, configs):
    """As `nearest`: the nearest first, as a table and as JSON; of several stores one is named."""
    refused("similar", "video_00000:drum")
    store = configs[0].fingerprint
    with cache.reader(configs[0]) as reader:
        expected = reader.nearest("video_00000:drum", 2, "l2")
    asked = ("similar", "video_00000:drum", "--config", store, "-k", 2, "--metric", "l2")
    found = json.loads(cli(*asked, "--json").stdout)
    assert list(found["samples"]) == expected.sample_ids
    assert list(found["samples"].values()) == pytest.approx(expected.scores.tolist())
    assert [line.split()[0] for line in cli(*asked).stdout.splitlines()[1:]] == expected.sample_ids


def test_several_roots_are_one(cli, cache, configs, tmp_path):
    """A sample of one root finds those of another."""
    other = EmbeddingCache(tmp_path / "other")
    with cache.reader(configs[0]) as reader, other.writer(configs[0]) as writer:
        writer.put("copy:drum", reader["video_00000:drum"])
    result = cli(
        *("similar", "video_00000:drum", "-k", 1, "--json", "--config", configs[0].fingerprint),
        *("--root", cache.root, "--root", other.root),
    )
    assert list(json.loads(result.stdout)["samples"]) == ["copy:drum"]


def test_hidden_states_are_searched_by_a_view(cli, refused, cache, configs):
    """Without --view it is named."""
    store = ("--config", configs[1].fingerprint)
    assert "--view" in refused("similar", "video_00000:drum", *store)
    result = cli("similar", "video_00000:drum", "--view", "mean", "--json", *store)
    assert len(json.loads(result.stdout)["samples"]) == 5


def test_a_store_of_a_module_needs_the_module(refused, cache, configs, data):
    """No name leads to a model that Python code has made: none is looked for on the Hub."""
    config = configs[0].replace(model_name="my-net/1")
    with cache.writer(config, provenance={"module": "__main__.Net"}) as writer:
        writer.put("a:x", np.ones(8))
    clip = next(data.rglob("*.wav"))
    assert "__main__.Net" in refused("similar", clip, "--config", config.fingerprint)


@pytest.mark.parametrize("arguments", [[], ["a:x", "--text", "a dog"]])
def test_one_query(refused, cache, arguments):
    """Neither none nor two."""
    assert "--text" in refused("similar", *arguments)


@pytest.fixture(scope="module")
def clap_store(tmp_path_factory):
    """A small CLAP with a tokenizer of four words, and a store of its `audio_embeds`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("similar")
    checkpoint = save_small_model("clap", folder / "clap")
    words = {word: n for n, word in enumerate(["<pad>", "<unk>", "a", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=16
    ).save_pretrained(checkpoint)
    write_tones(folder / "VEGAS", 3, "dog")
    dataset = open_dataset(folder / "VEGAS")
    cache = EmbeddingCache(folder / "cache")
    config = config_for(checkpoint, output="audio_embeds", duration=1.0)
    extract(cache, config, dataset, model=checkpoint, num_workers=0, device="cpu")
    return cache, config, checkpoint, dataset


def test_a_file_finds_itself(cli, clap_store):
    """An audio file that was extracted is embedded alike, by the model that the store names."""
    cache, _, _, dataset = clap_store
    path = dataset.samples[1]["audio_path"]
    result = cli("similar", path, "-k", 1, "--json", "--device", "cpu", root=cache.root)
    (found,) = json.loads(result.stdout)["samples"].items()
    assert found == (f"{dataset.samples[1]['file_id']}:dog", pytest.approx(1))


def test_a_text_is_embedded_as_transformers_does(cli, clap_store):
    """The direction of `get_text_features`; the command ranks the sounds by it."""
    from transformers import AutoTokenizer, ClapModel

    cache, config, checkpoint, _ = clap_store
    tokens = AutoTokenizer.from_pretrained(checkpoint)("a dog", return_tensors="pt")
    model = ClapModel.from_pretrained(checkpoint).eval()
    features = model.get_text_features(tokens.input_ids, tokens.attention_mask)
    expected = getattr(features, "pooler_output", features).detach().numpy()[0]
    with cache.reader(config) as reader:
        found = embed_text(reader, "a dog")
        nearest = reader.nearest(expected)
    np.testing.assert_allclose(
        found / np.linalg.norm(found), expected / np.linalg.norm(expected), atol=1e-6
    )
    result = cli("similar", "--text", "a dog", "--json", root=cache.root)
    assert list(json.loads(result.stdout)["samples"]) == nearest.sample_ids


def test_other_weights_and_other_outputs_are_refused(clap_store, tmp_path):
    """What can't be compared isn't: another checkpoint, a store without the shared space."""
    cache, config, checkpoint, dataset = clap_store
    other = save_small_model("clap", tmp_path / "clap", seed=1)
    pooled = config.replace(output="pooler_output")
    with cache.writer(pooled) as writer:
        writer.put("a:x", np.ones(64))
    with cache.reader(config) as reader, cache.reader(pooled) as of_pooled:
        with pytest.raises(ProvenanceMismatchError):
            embed_clip(reader, dataset.samples[0]["audio_path"], model=other, device="cpu")
        with pytest.raises(ConfigError, match="audio_embeds"):
            embed_text(of_pooled, "a dog", model=checkpoint)
    cache.clear(pooled)
