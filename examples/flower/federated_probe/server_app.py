"""The server: federated averaging of the nodes' probes. It sees no embedding."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and print what the nodes measured."""
    settings = context.run_config
    probe = torch.nn.Linear(settings["hidden-size"], len(settings["classes"].split(",")))
    torch.nn.init.zeros_(probe.weight)
    nodes = settings["num-nodes"]
    strategy = FedAvg(min_available_nodes=nodes, min_train_nodes=nodes, min_evaluate_nodes=nodes)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(probe.state_dict()),
        num_rounds=settings["num-server-rounds"],
    )
    for number, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {number}: accuracy {metrics['accuracy']:.3f}")
