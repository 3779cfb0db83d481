"""A batch fetched as a whole equals the one made of its items, and is a list of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.datasets import CachedAudioDataset, VEGASDataset, collate_mixed, vegas_collate_fn

OWN = CacheConfig(16000, 0.5, "small")


def same(one, other):
    """Whether two nested values are of one kind and equal, tensors by dtype and bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def vegas(root, every, **options):
    dataset = VEGASDataset(root, split="all", audio_duration=0.5, **options)
    values = {
        name: torch.full((4,), float(index))
        for index, name in enumerate(dataset.sample_ids)
        if index % every == 0
    }
    assert dataset.save_ast_embeddings_to_cache(values)
    assert dataset.load_ast_embeddings_from_cache()
    return dataset


@pytest.mark.parametrize(
    "source", ["store", "narrowed", "dict", "none", "classes", "one class", "changed"]
)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("load_audio", [False, True])
def test_a_batch_of_vegas_is_that_of_its_items(root, source, every, load_audio):
    """Any source of embeddings, all or some of them stored, with and without waveforms."""
    dataset = vegas(root, every, load_audio=load_audio)
    dataset.text_embs = {"dog": {"a": torch.ones(2)}, "drum": {"a": torch.zeros(2)}}
    if source == "narrowed":
        dataset.filter_audio_embeddings_from_file()
    elif source in ("classes", "one class"):
        dataset.load_ast_embeddings_from_cache(
            classes=["baby_cry"] if source == "one class" else None, close_previous=True
        )
        assert dataset.audio_embs_from_file is None
    elif source == "changed":
        dataset.filter_audio_embeddings_from_file()
        dataset.audio_embs[dataset.sample_ids[0]] = torch.full((4,), -1.0)
        dataset.audio_embs[dataset.sample_ids[1]] = torch.full((4,), -2.0)
        del dataset.audio_embs[dataset.sample_ids[3]]
    elif source != "store":
        known = dict(dataset.audio_embs_from_file) if source == "dict" else {}
        dataset.audio_embs_from_file = known
    for indices in ([5, 0, 3, 3, -1], [2], list(range(len(dataset)))):
        fetched = dataset.__getitems__(indices)
        expected = vegas_collate_fn([dataset[index] for index in indices])
        assert same(dict(vegas_collate_fn(fetched)), dict(expected))
        masked = vegas_collate_fn([dataset[index] for index in indices], partial="mask")
        assert same(dict(vegas_collate_fn(fetched, partial="mask")), dict(masked))
        assert fetched.columns is not None  # no item was made for that
        made = list(fetched)
        assert all(
            same(dict(item), dict(dataset[i])) for item, i in zip(made, indices, strict=True)
        )
        # Their waveforms were read: how much of those of hits is padding isn't known any more.
        some_hit = not all("audio_num_valid" in item for item in made)
        known = {k: v for k, v in dict(expected).items() if k != "audio_num_valid" or not some_hit}
        assert same(dict(vegas_collate_fn(fetched)), known)


@pytest.mark.parametrize("source", ["store", "narrowed"])
def test_what_is_written_to_an_item_stays_in_it(root, source):
    """Read by LMDB at first and from the mapped file later, tensors are each item's alone."""
    dataset = vegas(root, 1, load_audio=False)
    if source == "narrowed":
        dataset.filter_audio_embeddings_from_file()
    expected = list(dataset.__getitems__(range(len(dataset))))
    for _ in range(3):
        items = [dataset[index] for index in range(len(dataset))]
        assert same(items, expected)
        for item in items:
            item["label"].fill_(-1)
            item["audio_emb"].fill_(-1).requires_grad_()


@pytest.mark.parametrize("every", [1, 3, 99])
def test_a_batch_of_cached_audio_is_that_of_its_items(root, tmp_path, every):
    """Hits only, hits and misses, misses only but one; and with clips that fail."""
    clips = VEGASDataset(root, split="all")
    cache = EmbeddingCache(tmp_path / "cache")
    with cache.writer(OWN) as writer:
        for index in range(0, len(clips), every):
            writer.put(clips.sample_ids[index], torch.full((4,), float(index)).numpy())
    with open(clips.samples[1]["audio_path"], "w") as file:
        file.write("no audio")
    dataset = CachedAudioDataset(cache, OWN, clips, on_decode_error="skip")
    indices = [4, 0, 1, 3, -1]
    fetched = dataset.__getitems__(indices)
    expected = collate_mixed([dataset[index] for index in indices])
    assert same(collate_mixed(fetched), expected)
    assert same(collate_mixed(list(fetched)), expected)
    assert len(expected["failures"]) == (every > 1)


USES = [
    len,
    list,
    bool,
    lambda batch: batch[1],
    lambda batch: batch[-2:],
    lambda batch: list(reversed(batch)),
    lambda batch: batch + [{}],
    lambda batch: [{}] + batch,
    lambda batch: batch.copy(),
    copy.copy,
    copy.deepcopy,
    lambda batch: pickle.loads(pickle.dumps(batch)),
    lambda batch: batch.sort(key=lambda item: -item["sample_idx"]) or batch,
    lambda batch: batch.append({"label": 1}) or batch,
    lambda batch: [batch.pop(), *batch],
    lambda batch: batch[0].update(caption="other") or vegas_collate_fn(batch),
    default_collate,
]


@pytest.mark.parametrize("use", USES)
def test_a_batch_is_a_list_for_any_other_use(root, use):
    """Collate functions of any kind find the items, may change them, and see that they did."""
    dataset = vegas(root, 1, load_audio=False)
    for sample in dataset.samples:
        sample.update(image_filename="", video_filename="")
    indices = [2, 0, 1]
    found = use(dataset.__getitems__(indices))
    expected = use([dataset[index] for index in indices])
    plain = list(found) if hasattr(found, "columns") else found
    assert same(plain, expected)


def test_workers_bring_items(root):
    """A collate function that hands the batch on gives a list of dicts, from workers as well."""
    dataset = vegas(root, 1, load_audio=False)
    for batch in DataLoader(dataset, 3, num_workers=1, collate_fn=lambda batch: batch):
        assert type(batch) is list
        assert [item["audio_emb"][0].item() for item in batch] == [
            item["sample_idx"] for item in batch
        ]


def test_parts_know_what_is_left_out_now(root):
    """After a reload, train, val and test name what the data set names."""
    dataset = VEGASDataset(root, selected_classes=["dog"])
    folder = root / "drum" / "audios"
    (folder / "clip.m4a").write_bytes(b"")
    dataset.selected_classes = ["drum"]
    assert [item.name for item in dataset.left_out] == [str(folder / "clip.m4a")]
    assert dataset.train.left_out == dataset.test.left_out == dataset.left_out
