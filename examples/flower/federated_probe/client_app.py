"""A node: it trains the probe on its own embeddings, and computes none."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federated_probe.node_embeddings import open_node, settings_of
from lmdbcache import make_dataloader

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Go on with the server's probe for some epochs."""
    settings = settings_of(context)
    reader, loader = _loader(settings, shuffle=True)
    probe = _probe(message)
    optimizer = torch.optim.SGD(probe.parameters(), lr=settings["learning-rate"])
    with reader:
        for _ in range(settings["local-epochs"]):
            for embeddings, labels in loader:
                loss = torch.nn.functional.cross_entropy(probe(embeddings), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    metrics = {"num-examples": len(loader.dataset), "train-loss": float(loss.detach())}
    return _answer(message, metrics, ArrayRecord(probe.state_dict()))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Count how many of the node's clips the probe gets right."""
    reader, loader = _loader(settings_of(context), shuffle=False)
    probe = _probe(message)
    with reader, torch.no_grad():
        correct = sum(int((probe(x).argmax(1) == y).sum()) for x, y in loader)
    number = len(loader.dataset)
    return _answer(message, {"num-examples": number, "accuracy": correct / number})


def _loader(settings: dict[str, Any], *, shuffle: bool) -> Any:
    reader, sample_ids = open_node(settings)
    names = settings["classes"].split(",")
    labels = {name: number for number, name in enumerate(names)}
    return reader, make_dataloader(
        reader, batch_size=16, shuffle=shuffle, sample_ids=sample_ids, labels=labels
    )


def _probe(message: Message) -> torch.nn.Linear:
    state = message.content["arrays"].to_torch_state_dict()
    num_classes, hidden_size = state["weight"].shape
    probe = torch.nn.Linear(hidden_size, num_classes)
    probe.load_state_dict(state)
    return probe


def _answer(
    message: Message, metrics: dict[str, Any], arrays: ArrayRecord | None = None
) -> Message:
    content = RecordDict({"metrics": MetricRecord(metrics)})
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content=content, reply_to=message)
