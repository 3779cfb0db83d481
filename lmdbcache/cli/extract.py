"""`lmdbcache extract`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.console import print_json, say
from lmdbcache.cli.options import (
    DataDir,
    Dtype,
    Duration,
    ExcludedClasses,
    Json,
    Model,
    ModelName,
    NodeSplitId,
    NumNodes,
    Output,
    Root,
    SampleRate,
    SamplesPerClass,
    SamplesPerNode,
    SelectedClasses,
    Split,
    build_config,
    select_clips,
)
from lmdbcache.datasets.vegas_selection import VEGASSelection
from lmdbcache.extraction.pipeline import extract

__all__ = ["extract_command"]


def extract_command(
    data_dir: DataDir,
    *,
    root: Root = None,
    model: Model = "ast",
    model_name: ModelName = None,
    output: Output = "pooler_output",
    sample_rate: SampleRate = 16000,
    duration: Duration = 5.0,
    dtype: Dtype = "float32",
    classes: SelectedClasses = None,
    exclude: ExcludedClasses = None,
    split: Split = "all",
    samples_per_class: SamplesPerClass = None,
    node_split_id: NodeSplitId = None,
    num_nodes: NumNodes = None,
    samples_per_node: SamplesPerNode = None,
    batch_size: Annotated[int, typer.Option(help="Clips per forward pass.")] = 8,
    num_workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Decoding processes; default: half of the cores, at most 8."),
    ] = None,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="cpu, cuda, cuda:1, …; default: a CUDA GPU if there is one."),
    ] = None,
    commit_seconds: Annotated[
        float, typer.Option(help="Commit at least this often; a kill loses no more.")
    ] = 10.0,
    progress: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--progress/--no-progress",
            help="A bar on standard error; default: if that is a terminal.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Extract and store the embeddings of a dataset; only what is missing is computed.

    Stopped at any moment, it goes on where it was when run again. Exit code 1 if a clip failed.
    """
    clips = select_clips(
        data_dir,
        classes,
        exclude,
        split,
        samples_per_class,
        node_split_id,
        num_nodes,
        samples_per_node,
    )
    config = build_config(
        sample_rate, duration, model, model_name, output, dtype, VEGASSelection.namespace
    )
    summary = extract(
        EmbeddingCache(root),
        config,
        clips,
        model=model,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        progress=progress,
        dataset_root=data_dir.absolute(),
        commit_seconds=commit_seconds,
    )
    if as_json:
        print_json({**summary.to_dict(), "fingerprint": config.fingerprint})
    else:
        say(f"{summary}\n{summary.store}")
    raise typer.Exit(summary.exit_code)
