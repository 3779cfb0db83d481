"""`extract_or_load_ast_embeddings`: a dataset gets its embeddings in one call."""

from __future__ import annotations

import pytest
import torch
from extraction.clips import tone, write, write_tones

from lmdbcache import EmbeddingCache, VEGASDataset, extract_or_load_ast_embeddings


@pytest.fixture
def folder(tmp_path):
    """Three classes of three clips."""
    for class_name in ("dog", "drum", "snoring"):
        write_tones(tmp_path / "VEGAS", 3, class_name)
    return tmp_path / "VEGAS"


@pytest.fixture
def dataset(folder, tmp_path):
    def dataset(**options):
        options = {"ast_cache_dir": tmp_path / "cache", "audio_duration": 0.5, **options}
        return VEGASDataset(folder, **options)

    return dataset


@pytest.fixture
def give(ast_folder):
    """The call under test, decoding in this process."""

    def give(dataset, **options):
        options = {"model_name": str(ast_folder), "num_workers": 0, **options}
        return extract_or_load_ast_embeddings(dataset, **options)

    return give


def never():
    raise AssertionError("the model was built")


def test_extracts_then_loads(dataset, give):
    """The first call computes all, the second loads all; the items carry their embeddings."""
    one = dataset()
    assert give(one).num_extracted == 9
    assert one[0]["audio_emb"].shape == (64,)
    two = dataset()
    summary = give(two, make_embedder=never)
    assert (summary.num_cached, summary.num_extracted) == (9, 0)
    assert all(torch.equal(one[i]["audio_emb"], two[i]["audio_emb"]) for i in range(9))
    assert len(two.audio_embs) == 9


def test_extracts_only_what_is_missing(dataset, give, folder):
    """New clips of a known dataset are computed alone."""
    give(dataset())
    write(folder / "dog" / "audios" / "new.wav", tone(999))
    grown = dataset()
    assert give(grown).num_extracted == 1
    assert grown.audio_embs["new:dog"].shape == (64,)


def test_active_classes_only(dataset, give):
    """After the call `audio_embs` holds the active classes; the file's has all that is stored."""
    give(dataset())
    dogs = dataset(selected_classes=["dog"])
    assert give(dogs).num_samples == 3
    assert {sample_id.rpartition(":")[2] for sample_id in dogs.audio_embs} == {"dog"}
    assert len(dogs.audio_embs_from_file) == 9


def test_broken_clip_has_no_embedding(dataset, give, folder):
    """A clip that can't be decoded is a failure and has no embedding; the others have theirs."""
    (folder / "dog" / "audios" / "video_00001.wav").write_bytes(b"not audio")
    broken = dataset()
    summary = give(broken)
    assert [failure.sample_id for failure in summary.failures] == ["video_00001:dog"]
    assert "video_00001:dog" not in broken.audio_embs
    assert len(broken.audio_embs) == 8


@pytest.mark.parametrize("output", ["pooler_output", "last_hidden_state"])
def test_without_cache_nothing_is_written(dataset, give, tmp_path, folder, output, caplog):
    """With enable_ast_cache=False the embeddings are in memory, equal to the stored ones."""
    (folder / "drum" / "audios" / "video_00001.wav").write_bytes(b"not audio")
    unstored = dataset(enable_ast_cache=False)
    summary = give(unstored, output=output)
    assert not (tmp_path / "cache").exists()
    assert (summary.num_extracted, len(summary.failures), summary.store) == (8, 1, None)
    assert "lmdbcache-" not in str(summary) + caplog.text  # the scratch folder, gone by now
    stored = dataset()
    give(stored, output=output)
    assert unstored.audio_embs.keys() == stored.audio_embs.keys()
    for sample_id, embedding in stored.audio_embs.items():
        assert torch.equal(unstored.audio_embs[sample_id], embedding)


def test_output_follows_what_is_stored(dataset, give, tmp_path):
    """Without an output asked for, a store of hidden states is used and extended."""
    give(dataset(selected_classes=["dog"]), output="last_hidden_state")
    summary = give(dataset())
    assert (summary.num_cached, summary.num_extracted) == (3, 6)
    (config,) = EmbeddingCache(tmp_path / "cache")
    assert config.output == "last_hidden_state"


def test_nothing_usable(dataset, give, folder):
    """A dataset of broken files alone: all fail, none has an embedding, no exception."""
    for path in folder.rglob("*.wav"):
        path.write_bytes(b"")
    broken = dataset()
    assert len(give(broken).failures) == 9
    assert len(broken.audio_embs) == 0
