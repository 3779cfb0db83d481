"""The AST cache methods of VEGASDataset, as scripts call them."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.datasets import VEGASDataset
from lmdbcache.errors import DatasetError

CONFIG = {"sample_rate": 16000, "duration": 5.0, "model_name": "ast-finetuned"}


def embeddings_of(dataset, shape=(8,)):
    """An embedding per sample that can be told from every other."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name in dataset.sample_ids}


def test_a_script_for_the_old_interface_runs_unchanged(root):
    """Extract, save, load, filter, train, change the config, clear: as the old example did."""
    options = {"root_dir": str(root), "split": "train", "enable_ast_cache": True}
    dataset = VEGASDataset(selected_classes=["dog", "baby_cry"], load_audio=True, **options)
    assert not dataset.load_ast_embeddings_from_cache(**CONFIG)
    embeddings = {}
    for sample in dataset.samples:
        audio = dataset._load_audio(sample["audio_path"])
        with torch.no_grad():
            embedding = audio.unsqueeze(0).reshape(1, 800, 100).mean(1)
        sample_id = f"{sample['file_id']}:{sample['class_name'].lower()}"
        embeddings[sample_id] = embedding.squeeze(0).cpu()
    assert dataset.save_ast_embeddings_to_cache(embeddings=embeddings, **CONFIG)

    dataset = VEGASDataset(selected_classes=["dog"], load_audio=False, **options)
    assert dataset.load_ast_embeddings_from_cache(**CONFIG)
    assert len(dataset.audio_embs_from_file) == len(embeddings) == 8
    dataset.filter_audio_embeddings_from_file()
    assert len(dataset.audio_embs) == len(list(dataset.audio_embs)) == 4
    item = dataset[0]
    assert torch.equal(item["audio_emb"], embeddings[f"{item['file_id']}:dog"])
    assert "audio" not in item

    path = dataset._get_ast_cache_filepath(16000, 5.0, "ast-finetuned")
    assert Path(path).is_dir()
    assert Path(path).parent == root / "ast_cache"
    assert dataset._verify_ast_cache_compatibility(path, 16000, 5, "ast")
    assert not dataset._verify_ast_cache_compatibility(path, 16000, 10.0, "ast-finetuned")
    for change in ({"duration": 10.0}, {"sample_rate": 44100}, {"model_name": "other"}):
        assert not dataset.load_ast_embeddings_from_cache(**{**CONFIG, **change})

    dataset.clear_ast_cache(sample_rate=16000, duration=5.0, model_name="ast-finetuned")
    assert not dataset.load_ast_embeddings_from_cache(**CONFIG)
    assert "audio_emb" not in dataset[0]


def test_a_dict_of_fresh_embeddings_is_filtered_too(root):
    """Scripts assign what they have just computed; tensors and legacy dicts both work."""
    dataset = VEGASDataset(root, selected_classes=["dog"], split="all", load_audio=False)
    every = embeddings_of(VEGASDataset(root))
    dataset.audio_embs_from_file = every
    dataset.filter_audio_embeddings_from_file()
    assert set(dataset.audio_embs) == set(dataset.sample_ids)
    dataset.audio_embs_from_file = {
        name: {"class_name": name.rpartition(":")[2], "embeddings": value}
        for name, value in every.items()
    }
    dataset.filter_audio_embeddings_from_file()
    assert set(dataset.audio_embs) == set(dataset.sample_ids)
    assert torch.equal(dataset[2]["audio_emb"], every[dataset.sample_ids[2]])


def test_saving_adds_and_skips_what_is_there(root):
    """Saves are incremental: a second one adds new samples and leaves stored ones as they are."""
    dataset = VEGASDataset(root, split="all")
    every = embeddings_of(dataset)
    some = dict(list(every.items())[:5])
    assert dataset.save_ast_embeddings_to_cache(some)
    assert dataset.save_ast_embeddings_to_cache({name: value + 1 for name, value in every.items()})
    assert dataset.load_ast_embeddings_from_cache()
    stored = dataset.audio_embs_from_file
    assert len(stored) == 18
    for name, value in every.items():
        assert torch.equal(stored[name], value if name in some else value + 1)


def test_every_form_of_an_embedding_is_saved(root):
    """Tensors with a graph, arrays, and dicts around either are stored alike."""
    dataset = VEGASDataset(root, selected_classes=["dog"], split="all")
    values = list(embeddings_of(dataset).values())
    forms = [
        values[0].clone().requires_grad_(),
        values[1].numpy(),
        {"embeddings": values[2], "class_name": "dog"},
        {"embedding": values[3].numpy()},
        (values[4].clone().requires_grad_() * 1),
        values[5].double(),
    ]
    assert dataset.save_ast_embeddings_to_cache(dict(zip(dataset.sample_ids, forms, strict=True)))
    assert dataset.load_ast_embeddings_from_cache()
    for item, value in zip(dataset, values, strict=True):
        assert torch.equal(item["audio_emb"], value)


def test_bad_embeddings_are_named_and_the_others_saved(root, caplog):
    """NaN, a wrong shape or no tensor at all: False, the sample is named, the rest is stored."""
    dataset = VEGASDataset(root, split="all")
    values = embeddings_of(dataset)
    values["video_00001:dog"] = torch.full((8,), torch.nan)
    values["video_00002:dog"] = torch.zeros(9)
    values["video_00003:dog"] = "no tensor"
    values["no class"] = torch.zeros(8)
    assert not dataset.save_ast_embeddings_to_cache(values, embedding_shape=(8,))
    for name in ("video_00001:dog", "video_00002:dog", "video_00003:dog", "no class"):
        assert name in caplog.text
    assert dataset.load_ast_embeddings_from_cache()
    assert len(dataset.audio_embs_from_file) == 15


def test_output_follows_the_dimensions_and_what_is_stored(root, caplog):
    """1-D is the pooled output, 2-D the hidden states; loading takes what covers most samples."""
    dataset = VEGASDataset(root, split="all")
    hidden = embeddings_of(dataset, (3, 8))
    assert dataset.save_ast_embeddings_to_cache(hidden)
    stored = list(EmbeddingCache(root / "ast_cache"))
    assert [config.output for config in stored] == ["last_hidden_state"]
    assert stored == [dataset.cache_config(output="last_hidden_state")]
    assert dataset.load_ast_embeddings_from_cache()
    assert dataset[0]["audio_emb"].shape == (3, 8)
    assert dataset._get_ast_cache_filepath(16000, 5.0).count("last-hidden-state") == 1

    pooled = embeddings_of(dataset)
    some = dict(list(pooled.items())[:7])
    assert dataset.save_ast_embeddings_to_cache(some)
    assert dataset.load_ast_embeddings_from_cache()
    assert dataset[0]["audio_emb"].shape == (3, 8)
    assert dataset.load_ast_embeddings_from_cache(output="pooler_output")
    assert dataset[0]["audio_emb"].shape == (8,)
    assert dataset.save_ast_embeddings_to_cache(pooled)
    with caplog.at_level(logging.INFO):
        assert dataset.load_ast_embeddings_from_cache()
    assert dataset[0]["audio_emb"].shape == (8,)
    assert "several outputs are stored" in caplog.text

    dataset = VEGASDataset(root, split="all", ast_output="mean")
    assert not dataset.load_ast_embeddings_from_cache()
    assert dataset.save_ast_embeddings_to_cache(pooled)
    assert dataset.cache_config() in EmbeddingCache(root / "ast_cache")


def test_a_miss_names_the_nearest_config(root, caplog):
    """The log tells which field differs from what is stored."""
    dataset = VEGASDataset(root)
    dataset.save_ast_embeddings_to_cache(embeddings_of(dataset), duration=5.0)
    with caplog.at_level(logging.INFO):
        assert not dataset.load_ast_embeddings_from_cache(duration=10.0)
    assert "`duration=10.0` asked, 5.0 stored" in caplog.text


def test_one_model_has_one_name(root):
    """Aliases and int durations hit the same store."""
    dataset = VEGASDataset(root)
    dataset.save_ast_embeddings_to_cache(embeddings_of(dataset), 16000, 5, "ast")
    assert dataset.load_ast_embeddings_from_cache(
        16000.0, 5.0, "MIT/ast-finetuned-audioset-10-10-0.4593"
    )
    assert dataset.cache_config(model_name="ast") == CacheConfig(namespace="vegas")


def test_clearing_is_narrowed_by_each_argument(root):
    """What is given narrows; other data sets under the same root are never touched."""
    cache = EmbeddingCache(root / "ast_cache")
    dataset = VEGASDataset(root)
    values = embeddings_of(dataset)
    for duration, model_name in ((5.0, "ast"), (10.0, "ast"), (5.0, "mine")):
        dataset.save_ast_embeddings_to_cache(values, 16000, duration, model_name)
    with cache.writer(CacheConfig(namespace="esc50")) as writer:
        writer.put("1-100:dog", np.zeros(8, np.float32))
    dataset.clear_ast_cache(sample_rate=8000)
    assert len(cache.stores()) == 4
    dataset.clear_ast_cache(duration=5, model_name="ast")
    assert len(cache.stores()) == 3
    dataset.clear_ast_cache(duration=5)
    assert len(cache.stores()) == 2
    dataset.clear_ast_cache()
    assert [config.namespace for config in cache] == ["esc50"]


def test_a_damaged_store_is_no_hit_and_can_be_cleared(root, caplog):
    """Loading a truncated store gives False, not a crash; clearing it makes room for a new one."""
    dataset = VEGASDataset(root)
    values = embeddings_of(dataset, (4000,))
    dataset.save_ast_embeddings_to_cache(values)
    [data] = (root / "ast_cache").glob("*/gen-*/data.mdb")
    os.truncate(data, 8192)
    assert not dataset.load_ast_embeddings_from_cache(output="pooler_output")
    assert "can't be loaded" in caplog.text
    dataset.clear_ast_cache(16000, 5.0, "ast")
    assert dataset.save_ast_embeddings_to_cache(values)
    assert dataset.load_ast_embeddings_from_cache()
    assert len(dataset.audio_embs_from_file) == 18


def test_what_is_loaded_is_shared_with_the_splits(root):
    """Loading, filtering and clearing on a data set with splits reaches .train, .val and .test."""
    dataset = VEGASDataset(root, load_audio=False)
    dataset.save_ast_embeddings_to_cache(embeddings_of(dataset))
    assert dataset.load_ast_embeddings_from_cache()
    assert all("audio_emb" in item for part in (dataset.train, dataset.test) for item in part)
    dataset.filter_audio_embeddings_from_file()
    assert len(dataset.val.audio_embs) == 18
    dataset.clear_ast_cache()
    assert "audio_emb" not in dataset.train[0]


def test_another_config_replaces_what_was_filtered(root):
    """After loading a second config no item shows an embedding of the first."""
    dataset = VEGASDataset(root, load_audio=False)
    values = embeddings_of(dataset)
    dataset.save_ast_embeddings_to_cache(values)
    dataset.save_ast_embeddings_to_cache({k: v + 1 for k, v in values.items()}, duration=10.0)
    dataset.load_ast_embeddings_from_cache()
    dataset.filter_audio_embeddings_from_file()
    dataset.load_ast_embeddings_from_cache(duration=10.0)
    assert torch.equal(dataset[0]["audio_emb"], values[dataset.sample_ids[0]] + 1)


def test_a_cache_that_is_switched_off_does_nothing(root):
    """enable_ast_cache=False: nothing is saved, loaded or made on disk."""
    dataset = VEGASDataset(root, enable_ast_cache=False)
    assert not dataset.save_ast_embeddings_to_cache(embeddings_of(dataset))
    assert not dataset.load_ast_embeddings_from_cache()
    dataset.clear_ast_cache()
    assert not (root / "ast_cache").exists()


def test_nothing_to_save_and_impossible_arguments_give_false(root, caplog):
    """The interface promises a bool: errors are logged, not raised."""
    dataset = VEGASDataset(root)
    assert not dataset.save_ast_embeddings_to_cache({})
    assert not dataset.save_ast_embeddings_to_cache(embeddings_of(dataset), sample_rate=-1)
    assert not dataset.load_ast_embeddings_from_cache(duration=0)
    assert "sample_rate" in caplog.text
    assert not (root / "ast_cache").exists()


def test_reading_needs_no_write_permission(root, tmp_path):
    """A root on a read-only place can be read, with a cache inside it or elsewhere."""
    if os.geteuid() == 0:
        # Root may write anywhere; a cache root that can't be made shows the same.
        blocked = tmp_path / "file"
        blocked.write_text("", encoding="utf-8")
        dataset = VEGASDataset(root, ast_cache_dir=blocked / "cache")
        assert not dataset.load_ast_embeddings_from_cache()
        assert not dataset.save_ast_embeddings_to_cache(embeddings_of(dataset))
        assert len(dataset[0]["audio"]) == 80000
        return
    dataset = VEGASDataset(root)
    values = embeddings_of(dataset)
    dataset.save_ast_embeddings_to_cache(values)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        dataset = VEGASDataset(root)
        assert dataset.load_ast_embeddings_from_cache()
        assert torch.equal(dataset[0]["audio_emb"], values[dataset.sample_ids[0]])
        assert not dataset.save_ast_embeddings_to_cache({"new:dog": torch.zeros(8)})
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)


def test_embeddings_from_a_torch_file(root, tmp_path, caplog):
    """A torch.save'd dict is read without running pickled code; a missing file is told."""
    dataset = VEGASDataset(root, selected_classes=["dog"], split="all", load_audio=False)
    values = embeddings_of(dataset)
    torch.save(values, tmp_path / "embeddings.pt")
    assert dataset.load_audio_embeddings_from_file(str(tmp_path / "embeddings.pt"))
    assert torch.equal(dataset[1]["audio_emb"], values[dataset.sample_ids[1]])
    at_start = VEGASDataset(root, audio_embedding_file=tmp_path / "embeddings.pt")
    items = dict(zip(at_start.sample_ids, at_start, strict=True))
    assert "audio_emb" in items["video_00001:dog"]
    assert not dataset.load_audio_embeddings_from_file(tmp_path / "none.pt")
    assert "not found" in caplog.text
    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump(Evil(tmp_path / "ran"), file)
    with pytest.raises(DatasetError, match="weights_only"):
        dataset.load_audio_embeddings_from_file(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_assigned_embeddings_win_over_the_file(root, tmp_path):
    """`audio_embs` is what a script has just set; only what it lacks comes from the file."""
    dataset = VEGASDataset(root, selected_classes=["dog"], split="all", load_audio=False)
    from_file = embeddings_of(dataset)
    torch.save(from_file, tmp_path / "embeddings.pt")
    dataset.load_audio_embeddings_from_file(tmp_path / "embeddings.pt")
    first, second = dataset.sample_ids[:2]
    dataset.audio_embs = {first: torch.full((8,), 7.0)}
    assert dataset[0]["audio_emb"].tolist() == [7.0] * 8
    assert torch.equal(dataset[1]["audio_emb"], from_file[second])


class Evil:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "ran"))


def test_a_cache_moves_with_its_folder(root, tmp_path):
    """ast_cache_dir may point anywhere, and the folder may be copied to another place."""
    dataset = VEGASDataset(root, ast_cache_dir=tmp_path / "central")
    dataset.save_ast_embeddings_to_cache(embeddings_of(dataset))
    assert not (root / "ast_cache").exists()
    shutil.copytree(tmp_path / "central", tmp_path / "copy")
    dataset = VEGASDataset(root, ast_cache_dir=str(tmp_path / "copy"))
    assert dataset.load_ast_embeddings_from_cache()
