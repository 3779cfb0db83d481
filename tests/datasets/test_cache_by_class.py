"""The cache methods by class, and embeddings in memory over those that are loaded."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.datasets import VEGASDataset
from lmdbcache.errors import CacheError, ProvenanceMismatchError

OPTIONS = {"load_audio": False, "split": "all"}


def by_class(dataset, shape=(3, 8), classes=None):
    """Class → file id → an embedding that can be told from every other."""
    found = {}
    for index, sample in enumerate(dataset.samples):
        if classes is None or sample["class_name"] in classes:
            group = found.setdefault(sample["class_name"], {})
            group[sample["file_id"]] = torch.full(shape, float(index))
    return found


def flat(embeddings):
    return {
        f"{f}:{name}": value for name, group in embeddings.items() for f, value in group.items()
    }


def stored_in(dataset, **options):
    embeddings = by_class(dataset, **options)
    dataset.save_ast_embeddings_to_cache(ast_outputs_dict=embeddings)
    return embeddings


@pytest.mark.parametrize("as_positional", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_saving_by_class_counts_what_is_new(root, tmp_path, as_positional, elsewhere):
    """Only new ones count; a class with nothing new gives 0, an empty one is left out."""
    dataset = VEGASDataset(root, **OPTIONS)
    cache_dir = tmp_path / "other" if elsewhere else None

    def save(embeddings):
        if as_positional:
            return dataset.save_ast_embeddings_to_cache(embeddings, cache_dir)
        return dataset.save_ast_embeddings_to_cache(
            ast_outputs_dict=embeddings, cache_dir=cache_dir
        )

    every = by_class(dataset)
    first = {"dog": dict(list(every["dog"].items())[:2]), "drum": {}}
    assert save(first) == {"dog": 2}
    assert save(every) == {"baby_cry": 6, "dog": 4, "drum": 6}
    assert save(every) == {"baby_cry": 0, "dog": 0, "drum": 0}
    assert (root / "ast_cache").exists() is not elsewhere
    loaded = dataset.load_ast_embeddings_from_cache(cache_dir=cache_dir)
    assert {name: info["manifest"]["total_samples"] for name, info in loaded.items()} == {
        "baby_cry": 6,
        "dog": 6,
        "drum": 6,
    }
    for item, value in zip(dataset, flat(every).values(), strict=True):
        assert torch.equal(item["audio_emb"], value)


def test_the_forms_are_told_apart(root):
    """A flat dict gives a bool, also if its values are dicts that hold an embedding."""
    dataset = VEGASDataset(root, **OPTIONS)
    every = by_class(dataset, (8,))
    legacy = {
        sample_id: {"class_name": sample_id.rpartition(":")[2], "embeddings": value}
        for sample_id, value in flat(every).items()
    }
    assert dataset.save_ast_embeddings_to_cache(legacy) is True
    within = {"dog": {name: {"embeddings": value} for name, value in every["dog"].items()}}
    assert dataset.save_ast_embeddings_to_cache(within) == {"dog": 0}
    unnamed = {"video_1": {"class_name": "dog", "embeddings": torch.ones(8)}}
    assert dataset.save_ast_embeddings_to_cache(unnamed) is False
    assert dataset.save_ast_embeddings_to_cache({}) is False
    assert dataset.save_ast_embeddings_to_cache(ast_outputs_dict={}) == {}
    assert dataset.load_ast_embeddings_from_cache(16000, 5.0, "ast") is True
    assert dataset.load_ast_embeddings_from_cache(duration=9.0) is False
    assert list(dataset.load_ast_embeddings_from_cache()) == list(dataset.active_classes)[:1] + [
        "dog",
        "drum",
    ]
    assert len(dataset.audio_embs_from_file) == 18
    assert list(dataset.load_ast_embeddings_from_cache(None, ["drum", "printer"])) == ["drum"]
    assert list(dataset.load_ast_embeddings_from_cache(None, None, False)) == [
        "baby_cry",
        "dog",
        "drum",
    ]
    assert dataset.load_ast_embeddings_from_cache(str(root / "none"), ["dog"]) == {}
    disabled = VEGASDataset(root, enable_ast_cache=False, **OPTIONS)
    assert disabled.load_ast_embeddings_from_cache(classes=["dog"]) == {}
    assert disabled.save_ast_embeddings_to_cache(ast_outputs_dict=every) == {}


def test_the_config_is_that_of_the_clips(root):
    """What isn't named is the data set's: sample rate, duration, and the output by dimensions."""
    dataset = VEGASDataset(root, audio_sample_rate=8000, audio_duration=0.5, **OPTIONS)
    stored_in(dataset, classes=["dog"])
    assert list(EmbeddingCache(root / "ast_cache")) == [
        CacheConfig(8000, 0.5, output="last_hidden_state", namespace="vegas")
    ]
    assert list(dataset.load_ast_embeddings_from_cache()) == ["dog"]
    assert dataset.load_ast_embeddings_from_cache(8000, 0.5)
    assert not VEGASDataset(root, **OPTIONS).load_ast_embeddings_from_cache()


def test_a_loaded_class_reads_as_manifest_and_chunks(root):
    """Every way that scripts look into what is loaded."""
    dataset = VEGASDataset(root, **OPTIONS)
    every = stored_in(dataset)
    loaded = dataset.load_ast_embeddings_from_cache(classes=["dog", "drum"])
    assert dataset._ast_cache == loaded
    info = loaded["dog"]
    assert set(info) == {"manifest", "chunks", "index_map"}
    manifest = json.loads(json.dumps(info["manifest"]))
    assert manifest["class_name"] == "dog"
    assert manifest["embedding_shape"] == [3, 8]
    assert manifest["total_samples"] == len(info["index_map"]) == 6
    assert manifest["file_id_to_index"] == info["index_map"]
    assert [chunk["shape"] for chunk in manifest["chunks"]] == [[6, 3, 8]]
    for file_id, value in every["dog"].items():
        chunk, offset = info["index_map"][file_id]
        assert np.array_equal(info["chunks"][chunk][offset], value)
    [chunk] = info["chunks"]
    whole = np.stack([every["dog"][name].numpy() for name in info["index_map"]])
    assert chunk.shape == whole.shape
    assert chunk.ndim == 3
    assert chunk.dtype == np.float32
    assert np.array_equal(np.asarray(chunk), whole)
    for index in (-1, slice(1, 4), [2, 0], (2, 1), (slice(None), 1, 3), np.arange(6) > 3):
        assert np.array_equal(chunk[index], whole[index])
    with pytest.raises(IndexError):
        chunk[6]
    with pytest.raises(ValueError, match="read-only"):
        chunk[0][:] = 1
    with pytest.raises(TypeError):
        info["manifest"] = {}
    again = pickle.loads(pickle.dumps(info))
    assert again["manifest"] == info["manifest"]


def test_one_embedding_of_the_cache(root):
    """A read-only array of a class that is loaded by either form, else None."""
    dataset = VEGASDataset(root, **OPTIONS)
    every = stored_in(dataset)
    assert dataset.get_cached_ast_embedding("dog", "video_00001") is None
    dataset.load_ast_embeddings_from_cache(classes=["dog"])
    found = dataset.get_cached_ast_embedding("dog", "video_00001")
    assert np.array_equal(found, every["dog"]["video_00001"])
    assert not found.flags.writeable
    assert dataset.get_cached_ast_embedding("dog", "video_99999") is None
    assert dataset.get_cached_ast_embedding("drum", "video_00001") is None
    assert dataset.get_cached_ast_embedding("a:b", "video_00001") is None
    assert dataset.load_ast_embeddings_from_cache(16000, 5.0)
    found = dataset.get_cached_ast_embedding("drum", "video_00001")
    assert np.array_equal(found, every["drum"]["video_00001"])


def test_items_see_the_loaded_classes_only(root):
    """A class that wasn't loaded is a miss; a second load adds or replaces."""
    dataset = VEGASDataset(root, **OPTIONS)
    stored_in(dataset)

    def seen():
        return {item["class_name"] for item in dataset if "audio_emb" in item}

    dataset.load_ast_embeddings_from_cache(classes=["dog"])
    assert seen() == {"dog"}
    dataset.load_ast_embeddings_from_cache(classes=["drum"], close_previous=False)
    assert seen() == {"dog", "drum"}
    dataset.load_ast_embeddings_from_cache(classes=["baby_cry"])
    assert seen() == {"baby_cry"}
    dataset.load_ast_embeddings_from_cache()
    assert seen() == {"baby_cry", "dog", "drum"}
    dataset.close_ast_cache()
    assert not seen()
    assert dataset._ast_cache == {}


def test_classes_of_several_roots(root, tmp_path):
    """Each class is read from where it was loaded, also within one batch."""
    dataset = VEGASDataset(root, **OPTIONS)
    every = by_class(dataset, (4,))
    for name, group in every.items():
        dataset.save_ast_embeddings_to_cache({name: group}, tmp_path / name)
        dataset.load_ast_embeddings_from_cache(tmp_path / name, [name], False)
    [batch] = DataLoader(dataset, 18, collate_fn=dataset.get_collate_fn())
    assert torch.equal(batch["audio_emb"], torch.stack(list(flat(every).values())))


def test_parts_share_what_is_loaded_by_class(root):
    """Loading and closing on the whole reaches the parts, and loading on a part the whole."""
    dataset = VEGASDataset(root, load_audio=False)
    stored_in(dataset)
    dataset.load_ast_embeddings_from_cache(classes=["dog"])
    assert dataset.train._ast_cache is dataset._ast_cache
    dataset.test.load_ast_embeddings_from_cache(classes=["drum"], close_previous=False)
    for part in (dataset, dataset.train, dataset.test):
        assert {item["class_name"] for item in part if "audio_emb" in item} == {"dog", "drum"}
    dataset.close_ast_cache()
    assert not any("audio_emb" in item for item in dataset.train)


def test_a_dataset_shares_what_its_parent_has(root):
    """Loading by class, filtering, assigning and moving in the parent reach the child."""
    parent = VEGASDataset(root, **OPTIONS)
    every = flat(stored_in(parent))
    child = VEGASDataset(
        root,
        parent_ast_cache=parent._ast_cache,
        parent_audio_embs=parent.audio_embs,
        selected_classes=["dog"],
        load_audio=False,
    )
    parent.load_ast_embeddings_from_cache()
    for part in (child, child.train):
        for name, item in zip(part.sample_ids, part, strict=True):
            assert torch.equal(item["audio_emb"], every[name])
    parent.filter_audio_embeddings_from_file()
    parent.audio_embs["video_00003:dog"] = torch.ones(3, 8)
    assert len(child.audio_embs) == 18
    items = dict(zip(child.sample_ids, child, strict=True))
    assert torch.equal(items["video_00003:dog"]["audio_emb"], torch.ones(3, 8))
    parent.to("meta")
    assert child.audio_embs["video_00003:dog"].device.type == "meta"
    assert len(child.audio_embs.memory) == 1
    child.close_ast_cache()
    assert parent._ast_cache


def test_assigned_embeddings_lie_over_the_stored_ones(root):
    """After filtering: assigned, replaced, removed and cleared, and all views of it agree."""
    dataset = VEGASDataset(root, load_audio=False)
    stored = flat(stored_in(dataset, classes=["dog", "drum"]))
    assert dataset.load_ast_embeddings_from_cache(16000, 5.0)
    before = dataset.audio_embs
    dataset.filter_audio_embeddings_from_file()
    embeddings = dataset.audio_embs
    assert embeddings is before
    assert embeddings is dataset.train.audio_embs
    expected = dict(stored)

    def agree():
        assert len(embeddings) == len(expected)
        assert set(embeddings) == set(expected)
        assert len(list(embeddings)) == len(expected)
        for name in {*stored, *expected, "video_00000:baby_cry"}:
            assert (name in embeddings) == (name in expected)
            if name in expected:
                assert torch.equal(embeddings[name], expected[name])
                assert embeddings.get(name) is not None
            else:
                with pytest.raises(KeyError):
                    embeddings[name]

    agree()
    new = torch.full((3, 8), -1.0)
    for name in ("video_00000:baby_cry", "video_00002:dog"):
        embeddings[name] = expected[name] = new
        agree()
    for part in (dataset, dataset.train, dataset.val, dataset.test):
        for name, item in zip(part.sample_ids, part, strict=True):
            assert ("audio_emb" in item) == (name in expected)
            assert name not in expected or torch.equal(item["audio_emb"], expected[name])
    for name in ("video_00000:baby_cry", "video_00002:dog", "video_00001:dog"):
        del embeddings[name], expected[name]
        agree()
        with pytest.raises(KeyError):
            del embeddings[name]
    embeddings["video_00001:dog"] = expected["video_00001:dog"] = new
    agree()
    again = pickle.loads(pickle.dumps(dataset))
    assert again.audio_embs is again.train.audio_embs
    assert set(again.audio_embs) == set(expected)
    embeddings.clear()
    expected.clear()
    agree()
    with dataset._cache().reader(dataset.cache_config(output="last_hidden_state")) as reader:
        assert len(reader) == len(stored)


def test_embeddings_assigned_before_anything_is_loaded(root):
    """As clients do in their first round; what is loaded later fills in the rest."""
    dataset = VEGASDataset(root, load_audio=False)
    dataset.audio_embs["video_00000:dog"] = torch.ones(3, 8)
    assert len(dataset.train.audio_embs) == len(dataset.audio_embs) == 1
    every = flat(stored_in(dataset))
    dataset.load_ast_embeddings_from_cache()
    items = dict(zip(dataset.sample_ids, dataset, strict=True))
    assert torch.equal(items["video_00000:dog"]["audio_emb"], torch.ones(3, 8))
    assert torch.equal(items["video_00001:dog"]["audio_emb"], every["video_00001:dog"])


def test_workers_see_assigned_embeddings(root):
    """Forked or new, they have what was assigned and what is stored."""
    dataset = VEGASDataset(root, **OPTIONS)
    every = flat(stored_in(dataset, shape=(4,)))
    dataset.load_ast_embeddings_from_cache()
    every["video_00002:dog"] = dataset.audio_embs["video_00002:dog"] = torch.full((4,), -1.0)
    for context in ("fork", "forkserver"):
        loader = DataLoader(
            dataset, 6, collate_fn=dataset.get_collate_fn(), num_workers=1,
            multiprocessing_context=context,
        )  # fmt: skip
        found = torch.cat([batch["audio_emb"] for batch in loader])
        assert torch.equal(found, torch.stack(list(every.values())))


def test_a_read_only_mapping_that_is_assigned_can_be_written_over(root):
    """The Mapping itself stays as it is."""
    dataset = VEGASDataset(root, load_audio=False)
    every = flat(stored_in(dataset))
    dataset.load_ast_embeddings_from_cache(16000, 5.0)
    dataset.audio_embs = dataset.audio_embs_from_file
    dataset.audio_embs["video_00000:dog"] = torch.ones(3, 8)
    assert torch.equal(dataset.audio_embs_from_file["video_00000:dog"], every["video_00000:dog"])
    assert dataset.train.audio_embs is dataset.audio_embs


def test_coverage_of_what_is_loaded_is_logged(root, caplog):
    """One line: a warning if something is missing."""
    dataset = VEGASDataset(root, **OPTIONS)
    stored_in(dataset)
    for classes, count in (((), 0), (["dog"], 6), (None, 18)):
        dataset.load_ast_embeddings_from_cache(classes=classes, close_previous=True)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            dataset._log_cache_coverage()
        [record] = caplog.records
        assert f"{count} of 18" in record.getMessage()
        assert record.levelno == (logging.INFO if count == 18 else logging.WARNING)


def test_what_can_t_be_stored_by_class(root, tmp_path, caplog):
    """A bad embedding is named and not counted; where nothing can be stored, it raises."""
    dataset = VEGASDataset(root, **OPTIONS)
    values = {
        "dog": {"a": torch.full((8,), torch.nan), "b": torch.ones(8)},
        "x:y": {"c": torch.ones(8)},
    }
    found = dataset.save_ast_embeddings_to_cache(ast_outputs_dict=values)
    assert found == {"dog": 1, "x:y": 0}
    assert "a:dog" in caplog.text
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises((CacheError, OSError)):
        dataset.save_ast_embeddings_to_cache(by_class(dataset), tmp_path / "file" / "cache")
    known = {"weights_digest": "0" * 64}
    config = dataset.cache_config(output="last_hidden_state")
    with EmbeddingCache(root / "ast_cache").writer(config, provenance=known) as writer:
        writer.put("a:dog", np.ones((3, 8), np.float32))
    with pytest.raises(ProvenanceMismatchError):
        dataset.save_ast_embeddings_to_cache(by_class(dataset), None)
