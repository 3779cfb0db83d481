"""What the constructors of the datasets with a cache take, beyond which clips they hold."""

from __future__ import annotations

import logging

import pytest
import torch
from synthetic_layouts import make_esc50, make_vggsound

from lmdbcache import ESC50Dataset, VEGASDataset, VGGSoundDataset
from lmdbcache.errors import DatasetError

OPTIONS = {"load_audio": False, "ast_output": "pooler_output"}


def vectors_of(dataset):
    """Another vector for every sample."""
    return {
        sample_id: torch.full((4,), float(number))
        for number, sample_id in enumerate(dataset.sample_ids)
    }


def test_the_root_by_the_environment(root, tmp_path, monkeypatch):
    """Each dataset has its variable; an argument wins; without either the error names both."""
    roots = {
        VEGASDataset: root,
        ESC50Dataset: make_esc50(tmp_path / "ESC-50"),
        VGGSoundDataset: make_vggsound(tmp_path / "VGGSound"),
    }
    for kind, folder in roots.items():
        variable = f"LMDBCACHE_{kind.namespace.upper()}_ROOT"
        monkeypatch.delenv(variable, raising=False)
        with pytest.raises(DatasetError, match=rf"`root_dir`.*{variable}"):
            kind()
        monkeypatch.setenv(variable, str(folder))
        assert kind(split="all").root_dir == str(folder)
        with pytest.raises(DatasetError):
            kind(tmp_path / "elsewhere")


def test_a_text_embedding_file_that_is_not_there(root, tmp_path, caplog):
    """One warning names it, also with three splits; a file that can't be read raises."""
    with caplog.at_level(logging.WARNING, logger="lmdbcache"):
        dataset = VEGASDataset(root, embedding_file=tmp_path / "none.pt", selected_classes=["dog"])
    assert [record.levelname for record in caplog.records if "none.pt" in record.message] == [
        "WARNING"
    ]
    assert dataset.text_embs is dataset.train.text_embs is None
    (tmp_path / "broken.pt").write_bytes(b"x")
    with pytest.raises(DatasetError):
        VEGASDataset(root, embedding_file=tmp_path / "broken.pt")


def test_loading_at_construction(root, tmp_path):
    """`auto_load_cache` loads for the dataset and its splits; by default nothing is loaded."""
    options = {"ast_cache_dir": tmp_path / "cache", "selected_classes": ["dog", "drum"], **OPTIONS}
    dataset = VEGASDataset(root, **options)
    embeddings = vectors_of(dataset)
    dataset.save_ast_embeddings_to_cache(embeddings, 16000, 5.0)
    assert "audio_emb" not in VEGASDataset(root, **options)[0]
    loaded = VEGASDataset(root, auto_load_cache=True, **options)
    for part in (loaded, loaded.train, loaded.val, loaded.test):
        for item, sample_id in zip(part, part.sample_ids, strict=True):
            assert torch.equal(item["audio_emb"], embeddings[sample_id])
    switched_off = VEGASDataset(root, auto_load_cache=True, enable_ast_cache=False, **options)
    assert "audio_emb" not in switched_off[0]
    empty = VEGASDataset(root, auto_load_cache=True, ast_cache_dir=tmp_path / "none", **OPTIONS)
    assert "audio_emb" not in empty[0]
    assert not (tmp_path / "none").exists()


def test_the_mappings_of_a_parent(root, tmp_path):
    """What one of two datasets gets, the other has: they are the same objects."""
    options = {"ast_cache_dir": tmp_path / "cache", "split": "all", **OPTIONS}
    parent = VEGASDataset(root, **options)
    parent.save_ast_embeddings_to_cache(vectors_of(parent), 16000, 5.0)
    child = VEGASDataset(
        root,
        parent_ast_cache=parent._ast_cache,
        parent_audio_embs=parent.audio_embs,
        auto_load_cache=True,
        **options,
    )
    assert child.audio_embs is parent.audio_embs
    assert child._ast_cache is parent._ast_cache
    assert "audio_emb" not in child[0]  # a parent loads for both
    parent.load_ast_embeddings_from_cache(classes=["dog"])
    hits = [sample_id for sample_id in child.sample_ids if sample_id.endswith(":dog")]
    found = zip(child.sample_ids, child, strict=True)
    assert [sample_id for sample_id, item in found if "audio_emb" in item] == hits
    parent.audio_embs[child.sample_ids[0]] = torch.ones(3)
    assert torch.equal(child[0]["audio_emb"], torch.ones(3))


def test_moving_to_a_device(root, tmp_path):
    """Text embeddings at any depth and embeddings in memory move, for the splits as well."""
    torch.save({"Dog": {"sd": torch.ones(3), "flux": {"t5": torch.ones(2)}}}, tmp_path / "text.pt")
    dataset = VEGASDataset(
        root, embedding_file=tmp_path / "text.pt", selected_classes=["dog"], **OPTIONS
    )
    held = dataset.audio_embs
    first = dataset.train.sample_ids[0]
    held[first] = torch.ones(4)
    assert dataset.to("meta") is dataset
    for part in (dataset, dataset.train):
        assert part.device == torch.device("meta")
        assert part.text_embs["dog"]["flux"]["t5"].device.type == "meta"
        assert part[part.sample_ids.index(first)]["audio_emb"].device.type == "meta"
    assert dataset.audio_embs is held


def test_moving_leaves_stored_embeddings(root, tmp_path):
    """An embedding of a store is on the CPU whatever the device."""
    options = {"ast_cache_dir": tmp_path / "cache", "split": "all", **OPTIONS}
    dataset = VEGASDataset(root, **options)
    dataset.save_ast_embeddings_to_cache(vectors_of(dataset), 16000, 5.0)
    dataset.load_ast_embeddings_from_cache(16000, 5.0)
    dataset.filter_audio_embeddings_from_file()
    assert dataset.to("meta")[0]["audio_emb"].device.type == "cpu"
