"""Items and batches: a hit decodes nothing, a miss says so, and DataLoaders get both."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Subset, default_collate
from worker_errors import raises_in_worker

from lmdbcache.datasets import VEGASDataset, create_vegas_dataloader, vegas_collate_fn
from lmdbcache.datasets.ast_cached import items as items_module
from lmdbcache.errors import AudioDecodeError, DatasetError

OPTIONS = {"split": "all", "audio_duration": 0.5, "selected_classes": ["dog", "drum"]}


def cached(root, *, every=1, **options):
    """A data set whose every n-th sample is cached, in one value that names the sample."""
    dataset = VEGASDataset(root, **{**OPTIONS, **options})
    values = {
        name: torch.full((4,), float(index))
        for index, name in enumerate(dataset.sample_ids)
        if index % every == 0
    }
    assert dataset.save_ast_embeddings_to_cache(values)
    assert dataset.load_ast_embeddings_from_cache()
    return dataset


def remove_audio(dataset):
    for sample in dataset.samples:
        Path(sample["audio_path"]).unlink()


def half_level(waveform):
    return waveform / 2


def test_waveform_is_what_was_asked_for(root):
    """float32, mono, at the rate and of the length asked for; a short clip ends in zeros."""
    dataset = VEGASDataset(root, **{**OPTIONS, "audio_duration": 2.0})
    for item in dataset:
        assert item["audio"].dtype == torch.float32
        assert item["audio"].shape == (32000,)
        assert item["audio"][:16000].abs().max() > 0.05
        assert item["audio"][16000:].abs().max() == 0


def test_transform_sees_a_channel(root):
    """transform_audio gets (1, num_samples), as it always did."""
    seen = []

    def transform(waveform):
        seen.append(waveform.shape)
        return torch.stack([waveform, waveform], dim=1)

    item = VEGASDataset(root, transform_audio=transform, **OPTIONS)[0]
    assert seen == [(1, 8000)]
    assert item["audio"].shape == (2, 8000)


def test_a_broken_file_raises_instead_of_giving_silence(root):
    """A file that isn't audio is an error that names it, for items and for _load_audio."""
    dataset = VEGASDataset(root, **OPTIONS)
    path = Path(dataset.samples[0]["audio_path"])
    path.write_text("no audio", encoding="utf-8")
    with pytest.raises(AudioDecodeError, match=path.name):
        dataset[0]
    with pytest.raises(AudioDecodeError, match=path.name):
        dataset._load_audio(str(path))


def test_a_hit_decodes_nothing_until_the_waveform_is_asked_for(root):
    """With the audio files gone, hits still work; only reading 'audio' fails."""
    dataset = cached(root)
    remove_audio(dataset)
    item = dataset[3]
    assert torch.equal(item["audio_emb"], torch.full((4,), 3.0))
    assert "audio" in item
    assert next(iter(item)) == "audio"
    assert len(item) == len(item.keys()) == 14
    assert item["label"] == 2
    with pytest.raises(AudioDecodeError):
        item["audio"]
    with pytest.raises(AudioDecodeError):
        dict(item)


WAYS_TO_READ = [
    lambda item: item["audio"],
    lambda item: item.get("audio"),
    lambda item: dict(item.items())["audio"],
    lambda item: next(iter(item.values())),
    lambda item: dict(item)["audio"],
    lambda item: {**item}["audio"],
    lambda item: (item | {"more": 1})["audio"],
    lambda item: ({"more": 1} | item)["audio"],
    lambda item: copy.copy(item)["audio"],
    lambda item: copy.deepcopy(item)["audio"],
    lambda item: item.copy()["audio"],
    lambda item: pickle.loads(pickle.dumps(item))["audio"],
    lambda item: pickle.loads(pickle.dumps(item, protocol=2)).get("audio"),
    lambda item: item.pop("audio"),
    lambda item: item.setdefault("audio", None),
    lambda item: [item.popitem() for _ in range(len(item))][-1][1],
    lambda item: default_collate([item, item])["audio"][1],
    lambda item: vegas_collate_fn([item, item])["audio"][1],
    lambda item: dict(vegas_collate_fn([item]))["audio"][0],
    lambda item: pickle.loads(pickle.dumps(vegas_collate_fn([item])))["audio"][0],
]


@pytest.mark.parametrize("transform", [None, half_level, lambda waveform: waveform / 2])
def test_every_way_of_reading_gives_the_waveform(root, transform):
    """Whoever reads the 'audio' of a hit gets the tensor that a miss would have had."""
    expected = VEGASDataset(root, transform_audio=transform, **OPTIONS)[0]["audio"]
    dataset = cached(root, transform_audio=transform)
    for number, read in enumerate(WAYS_TO_READ):
        assert torch.equal(read(dataset[0]), expected), number


def test_missing_keys_of_an_item(root):
    """An item is a dict: KeyError, defaults, assignment and comparison work as usual."""
    item = cached(root)[0]
    assert item.get("image") is None
    assert item.get("image", 5) == 5
    assert item.pop("image", 6) == 6
    with pytest.raises(KeyError):
        item["image"]
    item["audio"] = 1
    assert item["audio"] == 1
    assert item != {"a": 1}


def test_batch_of_a_partly_cached_data_set(root):
    """No audio_emb unless asked for with a mask, and then a row for each label; nothing is lost."""
    dataset = cached(root, every=3, audio_duration=1.5)
    some = [dataset[i] for i in (1, 3, 2, 0)]
    masked = vegas_collate_fn(some, partial="mask")
    assert masked["audio_emb_mask"].tolist() == [False, True, False, True]
    assert masked["audio_emb"].tolist() == [[0.0] * 4, [3.0] * 4, [0.0] * 4, [0.0] * 4]
    batch = vegas_collate_fn(some)
    assert batch.keys() == masked.keys() - {"audio_emb", "audio_emb_mask"}
    plain = VEGASDataset(root, **{**OPTIONS, "audio_duration": 1.5})
    uncached = vegas_collate_fn([plain[i] for i in (1, 3, 2, 0)])
    assert torch.equal(batch["audio_num_valid"], uncached["audio_num_valid"])
    assert torch.equal(batch["audio"], uncached["audio"])
    again = pickle.loads(pickle.dumps(vegas_collate_fn(some)))
    assert torch.equal(again["audio_num_valid"], uncached["audio_num_valid"])
    assert batch["audio"].shape == (4, 24000)
    assert torch.equal(batch["audio"][1], dataset[3]["audio"])
    assert batch["labels"].tolist() == [2, 2, 2, 2]
    assert batch["file_id"] == batch["metadata"]["file_ids"]
    assert batch["audio_filename"][0] == "video_00001.wav"
    assert batch["metadata"]["sample_indices"] == [1, 3, 2, 0]
    assert set(batch["metadata"]) == {
        *("class_names", "video_ids", "file_ids", "sample_indices"),
        *("ytids", "start_seconds", "end_seconds", "captions"),
    }


def test_batches_without_any_hit_and_with_hits_only(root):
    """No hit: no audio_emb. All hits: (batch, *shape), and the batch decodes nothing."""
    miss = VEGASDataset(root, **OPTIONS)
    batch = vegas_collate_fn([miss[0], miss[1]])
    assert "audio_emb" not in batch
    assert "audio_emb_mask" not in batch
    masked = vegas_collate_fn([miss[0], miss[1]], partial="mask")
    assert masked["audio_emb_mask"].tolist() == [False, False]
    hit = cached(root)
    remove_audio(hit)
    batch = vegas_collate_fn([hit[i] for i in range(5)])
    assert batch["audio_emb"].shape == (5, 4)
    assert batch["audio_emb_mask"].all()
    with pytest.raises(AudioDecodeError):
        batch["audio"]


@pytest.mark.parametrize(
    ("context", "num_workers", "collate"),
    [
        ("fork", 2, vegas_collate_fn),
        ("fork", 2, default_collate),
        ("forkserver", 1, vegas_collate_fn),
    ],
)
def test_worker_processes(root, context, num_workers, collate):
    """Workers, forked or new, bring every sample with embedding and waveform."""
    dataset = cached(root)
    assert dataset[0]["audio_emb"][0] == 0  # the parent has read before it forks
    loader = DataLoader(
        dataset, 4, num_workers=num_workers, collate_fn=collate, multiprocessing_context=context
    )
    seen = []
    for batch in loader:
        seen += batch["audio_emb"][:, 0].tolist()
        assert batch["audio"].shape == (4, 8000)
        assert torch.equal(batch["audio"][0], dataset[int(batch["audio_emb"][0, 0])]["audio"])
    assert seen == list(range(12))


def test_workers_decode_no_hits(root):
    """Batches of hits pass through workers with the audio files gone."""
    dataset = cached(root)
    remove_audio(dataset)
    loader = create_vegas_dataloader(dataset, 4, shuffle=False, num_workers=2)
    assert [batch["audio_emb"][0, 0].item() for batch in loader] == [0, 4, 8]


def test_a_broken_file_is_named_across_processes(root):
    """The error of a worker arrives as itself."""
    dataset = VEGASDataset(root, **OPTIONS)
    Path(dataset.samples[5]["audio_path"]).write_text("no audio", encoding="utf-8")
    loader = create_vegas_dataloader(dataset, 4, shuffle=False, num_workers=1)
    with raises_in_worker(AudioDecodeError, match=r"video_00005\.wav"):
        list(loader)


def test_data_set_pickles(root):
    """With splits, loaded and narrowed embeddings, a copy in another process is the same."""
    dataset = VEGASDataset(root, **{**OPTIONS, "split": None})
    dataset.save_ast_embeddings_to_cache(dict.fromkeys(dataset.sample_ids, torch.ones(4)))
    dataset.load_ast_embeddings_from_cache()
    dataset.filter_audio_embeddings_from_file()
    found = pickle.loads(pickle.dumps(dataset))
    assert found.samples == dataset.samples
    assert found.train.sample_ids == dataset.train.sample_ids
    for item, same in zip(found.train, dataset.train, strict=True):
        assert item.keys() == same.keys()
        assert torch.equal(item["audio"], same["audio"])
        assert torch.equal(item["audio_emb"], same["audio_emb"])
    assert len(found.audio_embs) == 12


def test_text_embeddings(root, tmp_path):
    """Given a file, items and batches have text_emb of their own class; without, they don't."""
    torch.save({"Dog": {"sd": torch.ones(3)}, "drum": {"sd": torch.zeros(3)}}, tmp_path / "text.pt")
    dataset = VEGASDataset(root, embedding_file=tmp_path / "text.pt", **OPTIONS)
    assert dataset.get_text_embeddings("DOG")["sd"].sum() == 3
    assert dataset.get_text_embeddings("printer") is None
    batch = dataset.get_collate_fn()([dataset[0], dataset[11]])
    assert batch["text_emb"] is dataset.text_embs["dog"]
    assert torch.equal(batch["text_emb"]["sd"], torch.ones(3))
    assert "text_emb" not in VEGASDataset(root, **OPTIONS)[0]


@pytest.mark.gpu
def test_pinning_decodes_no_hits(root):
    """A DataLoader that pins its batches leaves the waveforms of hits alone."""
    dataset = cached(root)
    remove_audio(dataset)
    [batch] = create_vegas_dataloader(dataset, 12, num_workers=0, pin_memory=True)
    assert batch["audio_emb"].is_pinned()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_says_what_its_batches_hold(root, num_workers):
    """`partial` reaches every loader that the data set makes or names a collate function for."""
    for partial in ("omit", "mask"):
        dataset = cached(root, every=3, partial=partial)
        loaders = (
            create_vegas_dataloader(dataset, 6, shuffle=False, num_workers=num_workers),
            create_vegas_dataloader(
                Subset(dataset, range(12)), 6, shuffle=False, num_workers=num_workers
            ),
            DataLoader(dataset, 6, collate_fn=dataset.get_collate_fn(), num_workers=num_workers),
        )
        for loader in loaders:
            for batch in loader:
                assert ("audio_emb" in batch) == (partial == "mask")
                if partial == "mask":
                    assert batch["audio_emb"].shape == (6, 4)
                    assert batch["audio_emb_mask"].tolist() == [True, False, False] * 2
    with pytest.raises(DatasetError):
        VEGASDataset(root, partial="some", **OPTIONS)
    with pytest.raises(DatasetError):
        vegas_collate_fn([dataset[0]], partial="some")


def test_partly_cached_batches_warn_once(root, caplog):
    """One warning in a process, not one a batch."""
    items_module._warn_of_partial_hits.cache_clear()
    dataset = cached(root, every=3)
    caplog.clear()
    for _ in range(3):
        vegas_collate_fn([dataset[0], dataset[1]])
    assert sum("partial" in message for message in caplog.messages) == 1
