"""The main calls in a script that mypy checks with --strict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache import (
    CacheConfig,
    CachedAudioDataset,
    CachedEncoder,
    EmbeddingCache,
    EmbeddingDataset,
    EmbeddingReader,
    ModuleEmbedder,
    collate_mixed,
    config_for,
    extract,
    make_dataloader,
    open_dataset,
)
from lmdbcache.errors import CoverageError


def embedder(num_samples: int) -> ModuleEmbedder:
    """A frozen module in the place of a real model."""
    torch.manual_seed(0)
    module = torch.nn.Linear(num_samples, 8).eval().requires_grad_(False)
    return ModuleEmbedder(module, name="example/1", sample_rate=16000)


def experiment(data: Path, root: Path) -> float:
    """Extract, read and train; return the last loss."""
    dataset = open_dataset(data)
    model = embedder(16000)
    config: CacheConfig = config_for(model, duration=1.0, namespace=dataset.namespace)
    cache = EmbeddingCache(root)
    summary = extract(cache, config, dataset, model=model, num_workers=0)
    print(summary.num_extracted, [failure.sample_id for failure in summary.failures])
    try:
        cache.require(config, dataset)
    except CoverageError as error:
        print(error)

    reader: EmbeddingReader = cache.reader(config)
    mapping: Mapping[str, npt.NDArray[np.float32]] = reader
    one = mapping[dataset.sample_ids[0]]
    batch = reader.get_batch(dataset.sample_ids[:4])
    print(one.shape, batch.dtype, len(EmbeddingDataset(reader)))
    with cache.reader(config) as opened:
        print(opened.nearest(dataset.sample_ids[0], k=3).scores)

    probe = torch.nn.Linear(8, len(dataset.class_labels))
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    loss = torch.zeros(())
    for embeddings, labels in make_dataloader(reader, batch_size=8, labels=dataset.class_labels):
        loss = torch.nn.functional.cross_entropy(probe(embeddings), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    clips = CachedAudioDataset(cache, config, dataset)
    with CachedEncoder(cache, config, model) as encoder:
        complete: torch.Tensor = encoder.complete(collate_mixed([clips[0], clips[1]]))
    print(complete.shape)
    return loss.item()
