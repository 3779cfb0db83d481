"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from lmdbcache.cache import ROOT_VARIABLE, EmbeddingCache
from lmdbcache.config import DEFAULT_MODEL_NAME, CacheConfig
from lmdbcache.datasets.vegas_selection import VEGASSelection
from lmdbcache.embedders.checkpoints import model_identity
from lmdbcache.errors import CacheNotFoundError
from lmdbcache.extraction.samples import clips_of
from lmdbcache.store_info import StoreInfo, info_or_damage

__all__ = [
    "ComputeDtype",
    "DataDir",
    "Dtype",
    "Duration",
    "ExcludedClasses",
    "Json",
    "Model",
    "ModelName",
    "NodeSplitId",
    "NumNodes",
    "Output",
    "Progress",
    "Root",
    "SampleRate",
    "SamplesPerClass",
    "SamplesPerNode",
    "SelectedClasses",
    "Split",
    "Store",
    "Yes",
    "build_config",
    "find_folder",
    "find_store",
    "select_clips",
]

# typer reads these at run time, on Python 3.10, too.
Root = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--root",
        envvar=ROOT_VARIABLE,
        help="Cache directory; default: the user's cache directory.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]
Store = Annotated[
    str, typer.Argument(help="Fingerprint (its first digits do), or a store's folder name.")
]
SampleRate = Annotated[int, typer.Option(help="Sample rate of the waveform, in Hz.")]
Duration = Annotated[float, typer.Option(help="Clips are cut or padded to this, in seconds.")]
Model = Annotated[str, typer.Option(help="Alias (ast), Hub name, or a folder with a checkpoint.")]
ModelName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Name of the model in the cache; default: --model, or for a folder its name and "
        "digest.",
        show_default=False,
    ),
]
Output = Annotated[str, typer.Option(help="pooler_output, last_hidden_state, or mean (over time).")]
Dtype = Annotated[str, typer.Option(help="Stored as float32, float16 or bfloat16.")]
ComputeDtype = Annotated[
    str,
    typer.Option(
        help="The model computes in float32, bfloat16 or float16. bfloat16 is faster on recent "
        "GPUs and differs by about 1 %; each has a store of its own."
    ),
]
Progress = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--progress/--no-progress",
        help="A bar on standard error; default: if that is a terminal.",
        show_default=False,
    ),
]
DataDir = Annotated[Path, typer.Argument(help="Folder with <class>/audios/*.wav.")]
SelectedClasses = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--class", help="Only this class; may be given several times."),
]
ExcludedClasses = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--exclude-class", help="Not this class; may be given several times."),
]
Split = Annotated[str, typer.Option(help="all, train, val or test.")]
SamplesPerClass = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Only the first so many of each class."),
]
NodeSplitId = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Only this node's samples, from 0."),
]
NumNodes = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Number of nodes that share the samples."),
]
SamplesPerNode = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Samples of each class that a node has."),
]


def select_clips(
    data_dir: Path,
    classes: list[str] | None,
    exclude: list[str] | None,
    split: str,
    samples_per_class: int | None,
    node_split_id: int | None,
    num_nodes: int | None,
    samples_per_node: int | None,
) -> list[tuple[str, str]]:
    """(sample id, audio file) of the clips that the options stand for."""
    selection = VEGASSelection(
        data_dir,
        selected_classes=classes,
        excluded_classes=exclude,
        split=split,
        num_samples_per_class=samples_per_class,
        node_split_id=node_split_id,
        num_nodes=num_nodes,
        samples_per_node=samples_per_node,
    )
    return clips_of(selection.samples)


def build_config(
    sample_rate: int,
    duration: float,
    model: str,
    model_name: str | None,
    output: str,
    dtype: str,
    compute_dtype: str,
    dataset: str,
) -> CacheConfig:
    """The config that the options stand for."""
    return CacheConfig(
        sample_rate=sample_rate,
        duration=duration,
        model_name=model_name or model_identity(model or DEFAULT_MODEL_NAME),
        output=output,
        dtype=dtype,
        compute_dtype=compute_dtype,
        dataset=dataset,
    )


def find_store(cache: EmbeddingCache, text: str) -> StoreInfo:
    """What the store holds that `find_folder` finds."""
    return info_or_damage(find_folder(cache, text))


def find_folder(cache: EmbeddingCache, text: str) -> Path:
    """The one store that a fingerprint, its beginning, or a folder's name or path stands for.

    Nothing is opened: the store, or one beside it, may be damaged.

    Raises:
        CacheNotFoundError: None, or more than one.
    """
    stores = cache.folders()
    found = [store for store in stores if _means(text, store)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(store.name for store in found or stores)
    if found:
        raise CacheNotFoundError(
            f"{text!r} stands for {len(found)} stores under {cache.root}: {names}. Give more digits"
        )
    there = f"there: {names}" if stores else "there is none; is --root right?"
    raise CacheNotFoundError(f"{text!r} isn't a store under {cache.root}; {there}")


def _means(text: str, store: Path) -> bool:
    if os.sep in text:
        # A path is that folder alone: a store of another root may have the same name.
        return Path(text).expanduser().resolve() == store.resolve()
    digits = store.name.rpartition("-")[2]
    return text == store.name or (text != "" and digits.startswith(text.lower()))
