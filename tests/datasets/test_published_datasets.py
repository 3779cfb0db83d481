"""ESC-50 and VGGSound as datasets with a cache, and all three in one root."""

from __future__ import annotations

import pytest
import torch
from synthetic_layouts import ESC50_CLASSES, VGGSOUND_CLASSES, make_esc50, make_vggsound

from lmdbcache import ESC50Dataset, VEGASDataset, VGGSoundDataset
from lmdbcache.datasets import create_vegas_dataloader
from lmdbcache.errors import DatasetError


@pytest.fixture(scope="module")
def esc50(tmp_path_factory):
    """Two clips of each of six classes in each of five folds; tests don't change it."""
    return make_esc50(tmp_path_factory.mktemp("e") / "ESC-50", clips_per_fold=2)


@pytest.fixture(scope="module")
def vggsound(tmp_path_factory):
    """Eight clips of each of three classes, two of them of the test split."""
    return make_vggsound(tmp_path_factory.mktemp("v") / "VGGSound", clips_per_class=8)


def parts_of(dataset):
    return [set(part.sample_ids) for part in (dataset.train, dataset.val, dataset.test)]


def folds_of(dataset):
    return {sample["fold"] for sample in dataset.samples}


def values_of(dataset, start):
    """Another vector for every sample of a dataset."""
    return {
        sample_id: torch.full((4,), start + number, dtype=torch.float32)
        for number, sample_id in enumerate(dataset.sample_ids)
    }


def test_an_item_of_esc50(esc50):
    """Names, the table's label and its fold less 1, as tensors and plain values."""
    dataset = ESC50Dataset(esc50, selected_classes=["rain"], split="all", audio_duration=0.3)
    item = dataset[0]
    assert item["audio"].shape == (4800,)
    assert item["audio"].dtype == torch.float32
    name = item["audio_filename"]
    assert (item["file_id"], item["class_name"]) == (name.removesuffix(".wav"), "rain")
    assert int(item["label"]) == ESC50_CLASSES["rain"][0] == dataset.CLASS_LABELS["rain"]
    assert item["fold"] == int(name[0]) - 1
    assert (item["start_second"], item["end_second"], item["ytid"]) == (0.0, 0.3, "")
    assert dataset.LABEL_TO_CLASS[int(item["label"])] == "rain"


def test_an_item_of_vggsound(vggsound):
    """The place in the video comes from the table; clips are ten seconds."""
    dataset = VGGSoundDataset(vggsound, split="all", load_audio=False)
    item = dataset[3]
    assert item["file_id"] == f"{item['ytid']}_{int(item['start_second']):06d}"
    assert item["end_second"] - item["start_second"] == dataset.audio_duration == 10.0
    assert "fold" not in item
    assert "audio" not in item


def test_batches_of_all_keys(esc50):
    """A batch that is fetched as a whole has what its items have."""
    dataset = ESC50Dataset(esc50, split="all", audio_duration=0.1)
    (batch,) = create_vegas_dataloader(dataset, batch_size=60, shuffle=False, num_workers=0)
    assert batch["file_id"] == [dataset[n]["file_id"] for n in range(60)]
    assert [item["fold"] for item in dataset.__getitems__(range(60))] == [
        dataset[n]["fold"] for n in range(60)
    ]


def test_splits_by_folds(esc50):
    """Parts are whole folds, counted from 0; without val folds, val is drawn from train."""
    dataset = ESC50Dataset(esc50, use_folds=True, train_folds=[0, 1], val_folds=[2], test_folds=[3])
    parts = (dataset.train, dataset.val, dataset.test)
    assert [folds_of(part) for part in parts] == [{0, 1}, {2}, {3}]
    dataset = ESC50Dataset(esc50, use_folds=True)
    train, val, test = parts_of(dataset)
    assert folds_of(dataset.test) == {4}
    assert len(test) == 12
    assert (len(train), len(val)) == (42, 6)
    assert not train & val
    assert train | val | test == set(dataset.sample_ids)
    assert folds_of(ESC50Dataset(esc50, use_folds=True, splits_to_load=["test"])) == {4}
    without = ESC50Dataset(esc50, use_folds=True, train_ratio=0.8, val_ratio=0.0)
    assert [len(part) for part in parts_of(without)] == [48, 0, 12]


@pytest.mark.parametrize(
    "folds",
    [
        {"test_folds": [3, 4]},
        {"train_folds": [0, 1], "val_folds": [1]},
        {"val_folds": [4], "train_folds": [0]},
        {"train_folds": [1, 2], "test_folds": [5]},
    ],
)
def test_folds_that_share_clips_or_do_not_exist(esc50, folds):
    """Both are errors with `use_folds`, and have no effect without it."""
    with pytest.raises(DatasetError):
        ESC50Dataset(esc50, use_folds=True, **folds)
    assert len(ESC50Dataset(esc50, **folds)) == 60


def test_the_official_split(vggsound):
    """Test is the table's; val is drawn from its train; ratios are used on request."""
    dataset = VGGSoundDataset(vggsound, train_ratio=0.5, val_ratio=0.25, test_ratio=0.25)
    train, val, test = parts_of(dataset)
    assert all(sample["split"] == "test" for sample in dataset.test.samples)
    assert (len(train), len(val), len(test)) == (12, 6, 6)
    assert not train & val
    assert train | val | test == set(dataset.sample_ids)
    by_ratios = VGGSoundDataset(vggsound, use_official_split=False)
    assert {sample["split"] for sample in by_ratios.test.samples} == {"train", "test"}


def test_a_table_with_val_or_without_splits(vggsound, tmp_path):
    """A val part of the table is val; without splits the error names the argument."""
    rows = (vggsound / "vggsound.csv").read_text().splitlines()
    table = tmp_path / "vggsound.csv"
    table.write_text("\n".join([rows[0].replace(",train", ",val"), *rows[1:]]))
    assert len(VGGSoundDataset(vggsound, table=table).val) == 1
    table.write_text("\n".join(row.rsplit(",", 1)[0] for row in rows))
    with pytest.raises(DatasetError, match="`use_official_split=False`"):
        VGGSoundDataset(vggsound, table=table)
    assert len(VGGSoundDataset(vggsound, table=table, use_official_split=False)) == 24


def test_classes_of_vggsound_with_underscores(vggsound, tmp_path):
    """Wherever a user names a class it may be spelled with underscores."""
    name = next(name for name in VGGSOUND_CLASSES if " " in name)
    spelled = name.replace(" ", "_")
    torch.save({spelled: torch.ones(3)}, tmp_path / "text.pt")
    dataset = VGGSoundDataset(
        vggsound,
        selected_classes=[spelled],
        text_embedding_file=tmp_path / "text.pt",
        ast_cache_dir=tmp_path / "cache",
        load_audio=False,
    )
    assert dataset.get_class_names() == [name]
    assert torch.equal(dataset.train[0]["text_emb"], torch.ones(3))
    assert torch.equal(dataset.get_text_embeddings(spelled), torch.ones(3))
    file_id = dataset.train[0]["file_id"]
    assert dataset.save_ast_embeddings_to_cache({spelled: {file_id: torch.ones(4)}}) == {spelled: 1}
    assert set(dataset.load_ast_embeddings_from_cache(classes=[spelled])) == {name}
    assert dataset.get_cached_ast_embedding(spelled, file_id).tolist() == [1] * 4
    assert dataset.train[0]["audio_emb"].tolist() == [1] * 4


def test_the_node_seeds_the_splits_of_scikit_learn(esc50):
    """`node_id` is added to the seed; by hash all nodes have the same splits."""

    def test_part(node, method):
        return parts_of(ESC50Dataset(esc50, node_id=node, split_method=method))[2]

    assert test_part(1, "sklearn") == test_part(1, "sklearn") != test_part(2, "sklearn")
    assert test_part(0, "sklearn") == test_part(None, "sklearn")
    assert test_part(1, "hash") == test_part(2, "hash")


def test_three_datasets_share_a_root(root, esc50, vggsound, tmp_path):
    """Equal ids of two datasets are two samples: each finds its embeddings and clears its own."""
    for number, clip in enumerate(sorted((root / "dog" / "audios").iterdir())):
        if number == 0:
            same = ESC50Dataset(esc50, selected_classes=["dog"], split="all").samples[0]["file_id"]
            clip.rename(clip.with_name(f"{same}.wav"))
    options = {"ast_cache_dir": tmp_path / "cache", "load_audio": False, "split": "all"}
    datasets = [
        VEGASDataset(root, **options),
        ESC50Dataset(esc50, **options),
        VGGSoundDataset(vggsound, audio_duration=5.0, **options),
    ]
    assert f"{same}:dog" in {*datasets[0].sample_ids} & {*datasets[1].sample_ids}
    stored = [values_of(dataset, 1000 * number) for number, dataset in enumerate(datasets)]
    for dataset, embeddings in zip(datasets, stored, strict=True):
        assert dataset.save_ast_embeddings_to_cache(embeddings, 16000, 5.0)
    for dataset, embeddings in zip(datasets, stored, strict=True):
        assert dataset.load_ast_embeddings_from_cache(16000, 5.0)
        assert len(dataset.audio_embs_from_file) == len(dataset)
        for item, sample_id in zip(dataset, dataset.sample_ids, strict=True):
            assert torch.equal(item["audio_emb"], embeddings[sample_id])
    datasets[1].clear_ast_cache()
    assert [d.load_ast_embeddings_from_cache(16000, 5.0) for d in datasets] == [True, False, True]
