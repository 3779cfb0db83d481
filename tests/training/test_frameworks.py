"""Training epochs under Lightning and accelerate, over torch's DataLoader and over ours."""

from __future__ import annotations

import warnings

import pytest
import torch
from storage.child_processes import numbered
from torch.utils.data import DataLoader

from lmdbcache import EmbeddingDataset, collate_embeddings
from lmdbcache.training import make_dataloader

SAMPLES = numbered(0, 50, size=6)
LABELS = list(range(50))


@pytest.fixture
def dataset(cache, config):
    """50 embeddings that hold their number, labelled with it."""
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLES, list(SAMPLES.values()))
    with cache.reader(config) as reader:
        yield EmbeddingDataset(reader, list(SAMPLES), LABELS)


def torch_loader(dataset):
    return DataLoader(dataset, 8, shuffle=True, num_workers=2, collate_fn=collate_embeddings)


def our_loader(dataset):
    return make_dataloader(dataset, 8, shuffle=True, pin_memory=False)


def seen_numbers(batch):
    embeddings, labels = batch
    assert (embeddings == labels[:, None]).all()
    return labels.tolist()


loaders = pytest.mark.parametrize("make", [torch_loader, our_loader])


@loaders
def test_accelerate(dataset, make):
    """Two epochs in a prepared loop: each sample once in each, and the model learns."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Linear(6, 1)
    before = model.weight.detach().clone()
    loader = make(dataset)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1e-5), loader
    )
    for _ in range(2):
        seen = []
        for batch in loader:
            seen += seen_numbers(batch)
            optimizer.zero_grad()
            loss = (model(batch[0])[:, 0] - batch[1]).square().mean()
            accelerator.backward(loss)
            optimizer.step()
        assert sorted(seen) == LABELS
    assert not torch.equal(model.weight, before)


@loaders
def test_lightning(dataset, make, tmp_path):
    """Two epochs of a Trainer with validation: each sample once in each epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 1)
            self.seen, self.validated = [], []

        def training_step(self, batch, _):
            self.seen += seen_numbers(batch)
            return (self.layer(batch[0])[:, 0] - batch[1]).square().mean()

        def validation_step(self, batch, _):
            self.validated += seen_numbers(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    model = Model()
    before = model.layer.weight.detach().clone()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, make(dataset), make(dataset))
    assert trainer.global_step == 14
    assert sorted(model.seen) == sorted(LABELS * 2) == sorted(model.validated)
    assert not torch.equal(model.layer.weight, before)


def test_a_checkpoint_holds_where_our_loader_is(dataset, tmp_path):
    """A checkpoint within an epoch holds the loader's state; a new loader goes on from it."""
    loader = our_loader(dataset)
    iterator = iter(loader)
    first = [seen_numbers(next(iterator)) for _ in range(3)]
    torch.save({"loader": loader.state_dict()}, tmp_path / "checkpoint")
    rest = [seen_numbers(batch) for batch in iterator]
    resumed = our_loader(dataset)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True)["loader"])
    assert [seen_numbers(batch) for batch in resumed] == rest
    assert sorted(number for batch in first + rest for number in batch) == LABELS
