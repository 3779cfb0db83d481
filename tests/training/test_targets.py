"""Targets of any dtype and rank reach the training loop as they were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lmdbcache import CachedAudioDataset, EmbeddingDataset, collate_mixed, make_dataloader
from lmdbcache.errors import ConfigError, MissingLabelError
from lmdbcache.training import collate_embeddings, target_tensor

IDS = [f"{n}:{'dog' if n % 2 else 'drum'}" for n in range(12)]
FLOATS = [0.3 + n / 7 for n in range(12)]
HOT = [[n % 2, n % 3 == 0, 1] for n in range(12)]

GIVEN = {
    "floats": (FLOATS, torch.tensor(FLOATS)),
    "ints and floats": ([0, *FLOATS[1:]], torch.tensor([0, *FLOATS[1:]])),
    "float64 array": (np.array(FLOATS), torch.tensor(FLOATS, dtype=torch.float64)),
    "float16 array": (np.array(FLOATS, "f2"), torch.tensor(FLOATS, dtype=torch.float16)),
    "big-endian array": (np.array(FLOATS, ">f4"), torch.tensor(FLOATS)),
    "float tensor": (torch.tensor(FLOATS).requires_grad_(), torch.tensor(FLOATS)),
    "tensors": ([torch.tensor(x) for x in FLOATS], torch.tensor(FLOATS)),
    "rows of arrays": ([np.array(row, "f4") for row in HOT], torch.tensor(HOT).float()),
    "bools": ([n % 2 == 0 for n in range(12)], torch.arange(12) % 2 == 0),
    "multi-hot bools": (np.array(HOT, bool), torch.tensor(HOT).bool()),
    "multi-hot ints": (HOT, torch.tensor(HOT, dtype=torch.long)),
    "rank 3": (np.ones((12, 2, 3), "f4"), torch.ones(12, 2, 3)),
    "uint8 array": (np.arange(12, dtype="u1"), torch.arange(12)),
    "int32 tensor": (torch.arange(12, dtype=torch.int32), torch.arange(12)),
    "range": (range(12), torch.arange(12)),
    "floats by class": (
        {"dog": 0.25, "drum": 0.75},
        torch.tensor([0.25 if n % 2 else 0.75 for n in range(12)]),
    ),
    "rows by sample": (dict(zip(IDS, HOT, strict=True)), torch.tensor(HOT, dtype=torch.long)),
    "a sample before its class": (
        {"dog": 1, "drum": 0, "3:dog": 7},
        torch.tensor([7 if n == 3 else n % 2 for n in range(12)]),
    ),
}


@pytest.fixture
def reader(cache, config):
    with cache.writer(config) as writer:
        for n, sample_id in enumerate(IDS):
            writer.put(sample_id, np.full(4, n, np.float32))
    with cache.reader(config) as reader:
        yield reader


def batches_of(reader, labels, way):
    if way == "make_dataloader":
        return make_dataloader(reader, 5, sample_ids=IDS, labels=labels)
    dataset = EmbeddingDataset(reader, IDS, labels, collated=way == "collated")
    collate = collate_embeddings if way == "collated" else None
    return DataLoader(dataset, 5, collate_fn=collate)


@pytest.mark.parametrize("way", ["make_dataloader", "collated", "torch"])
@pytest.mark.parametrize("kind", GIVEN)
def test_targets_keep_dtype_shape_and_value(reader, kind, way):
    """Nothing is truncated, and each target stays with its embedding."""
    labels, expected = GIVEN[kind]
    batches = list(batches_of(reader, labels, way))
    found = torch.cat([targets for _, targets in batches])
    rows = torch.cat([embeddings for embeddings, _ in batches])[:, 0].long()
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected[rows])
    assert not found.requires_grad


@pytest.mark.parametrize(
    "labels",
    [
        ["dog"] * 12,
        [None] * 12,
        [[0]] * 11 + [[0, 1]],
        [np.zeros(2)] * 11 + [np.zeros(3)],
        np.array(["dog"] * 12),
        np.array([2**63] * 12, "u8"),
        np.ma.masked_equal(np.arange(12), 3),
        torch.tensor(3),
        3,
        "dog",
    ],
    ids=lambda labels: f"{labels!r:.30}",
)
def test_what_cannot_be_targets_is_refused(labels):
    """Names, gaps, and rows of several shapes are our error, whatever they came in."""
    with pytest.raises(ConfigError):
        target_tensor(IDS, labels)


def test_a_sample_without_a_target_is_named():
    """By sample where targets are given by sample, by class where by class."""
    with pytest.raises(MissingLabelError, match="4:drum"):
        target_tensor(IDS, {sample_id: 0.5 for sample_id in IDS if sample_id != "4:drum"})
    with pytest.raises(MissingLabelError, match="'drum'"):
        target_tensor(IDS, {"dog": 0.5})
    with pytest.raises(MissingLabelError, match="'drum'"):
        target_tensor(IDS, {3: 0.5, "dog": 0.5})


@pytest.mark.parametrize("kind", ["floats", "multi-hot bools", "rows by sample"])
def test_mixed_batches_carry_the_targets(cache, config, reader, kind):
    """`CachedAudioDataset` and `collate_mixed` hand them on."""

    class Clips:
        namespace = "vegas"
        class_labels = {"dog": 1, "drum": 0}  # noqa: RUF012
        sample_ids = IDS
        samples = [  # noqa: RUF012
            {
                "file_id": sample_id.split(":")[0],
                "class_name": sample_id.split(":")[1],
                "class_label": n % 2,
                "audio_path": "none.wav",
            }
            for n, sample_id in enumerate(IDS)
        ]

    labels, expected = GIVEN[kind]
    for dataset in (
        CachedAudioDataset(cache, config, Clips(), labels=labels),
        CachedAudioDataset(cache, config, _with_targets(Clips(), labels)),
    ):
        batch = next(iter(DataLoader(dataset, 12, collate_fn=collate_mixed)))
        assert batch["labels"].dtype == expected.dtype
        assert torch.equal(batch["labels"], expected)


def _with_targets(clips, labels):
    rows = [labels[sample_id] for sample_id in IDS] if isinstance(labels, dict) else labels
    clips.samples = [
        {**sample, "target": row} for sample, row in zip(clips.samples, rows, strict=True)
    ]
    return clips
