"""Refusing to begin a training whose embeddings aren't there, with the command that makes them."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lmdbcache.cache.dataset_coverage import DatasetCoverage
from lmdbcache.config import DEFAULT_FRONT_END, UNSTATED_FRONT_END, CacheConfig
from lmdbcache.errors import ConfigError
from lmdbcache.files import expand_user
from lmdbcache.storage import class_of

__all__ = ["how_to_fill", "is_covered", "shortfall"]

_SPLIT_RATIOS: Final = (0.7, 0.1, 0.2)  # those of the command line
_NODE_SEED: Final = 42
_FOLDER: Final = "DATA_DIR"
_CHECKPOINT: Final = "CHECKPOINT_FOLDER"


def is_covered(found: DatasetCoverage, min_coverage: float, *, allow_failed: bool) -> bool:
    """Whether enough is stored.

    Args:
        found: What is.
        min_coverage: Share that must be, 0 to 1.
        allow_failed: Leave out clips that are known to fail.

    Raises:
        ConfigError: `min_coverage` isn't 0 to 1.
    """
    if not 0 <= min_coverage <= 1:
        raise ConfigError(f"min_coverage: {min_coverage}; it must be 0 to 1, such as 0.95")
    asked = found.num_asked - (len(found.failed) if allow_failed else 0)
    return found.num_present >= math.ceil(min_coverage * asked - 1e-9)


def shortfall(
    found: DatasetCoverage, min_coverage: float, reason: str, remedy: Sequence[str]
) -> str:
    """What to tell if too little is stored.

    Args:
        found: What is.
        min_coverage: Share that must be.
        reason: What is stored of the config, one sentence.
        remedy: Lines that say how the gap is filled.
    """
    told = (
        f"{found.num_present:,} of {found.num_asked:,} samples are stored "
        f"({100 * found.fraction:.1f} %); {100 * min_coverage:g} % are asked for: {reason}"
    )
    lines = [told, "", found.table()]
    if len(found.failed) < len(found.missing):
        lines += ["", *remedy]
    if found.failed:
        lines += ["", f"{len(found.failed)} failed when last tried, such as {found.failed[0]!r}:"]
        lines += ["mend these clips, leave them out, or pass allow_failed=True (--allow-failed)"]
    return "\n".join(lines)


def how_to_fill(
    config: CacheConfig,
    root: Path,
    dataset: Any,
    found: DatasetCoverage,
    *,
    model: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Lines with the command that computes what is missing, or with the Python that does.

    Args:
        config: The store's.
        root: The cache's.
        dataset: Whose folder, options and selection are taken, as far as it has them.
        found: What is missing.
        model: Checkpoint folder or Hub name; None takes the config's name.
        data_dir: The dataset's folder; None takes the dataset's own.
    """
    datasets = _datasets_in(dataset)
    for name in (getattr(each, "namespace", config.namespace) for each in datasets):
        if name != config.namespace:
            told = (
                f"No run fills this: the dataset's namespace is {name!r}, the config's is "
                f"{config.namespace!r}. Ask with config.replace(namespace={name!r}), or open the "
                f"dataset with namespace={config.namespace!r}"
            )
            return [told]
    if config.front_end == UNSTATED_FRONT_END:
        told = (
            "No extraction fills this: the config doesn't state the front end. Ask with "
            "config_for(model, ...), or compute the missing embeddings with the code that "
            "computed the others"
        )
        return [told]
    first = datasets[0] if datasets else None
    options = getattr(first, "command_line_options", None)
    if not config.namespace or (data_dir is None and first is not None and options is None):
        return _in_python(config, dataset, model)
    if len({_place(each) for each in datasets}) > 1:
        return ["The datasets have several folders: ask for each of them, to see its command"]
    own = getattr(first, "root", _FOLDER)
    folder = str(own if data_dir is None else expand_user(data_dir).absolute())
    options = dict(options or {})
    if folder != own or first is None:
        options.setdefault("--namespace", config.namespace)  # not that of this folder's name
    # From any working directory; a name that begins with a dash is no option then.
    words = ["lmdbcache", "extract", _FOLDER if folder == _FOLDER else str(Path(folder).absolute())]
    words += [word for pair in options.items() for word in pair]
    words += ["--root", os.fspath(root), *_model_and_config(config, model)]
    words += _selection(None if isinstance(dataset, Mapping) else first, found)
    lines = ["This computes what is missing:", "", f"    {shlex.join(words)}"]
    if _FOLDER in words:
        lines += [f"    ({_FOLDER}: give require data_dir= and the command names the folder)"]
    if _CHECKPOINT in words:
        lines += [f"    ({_CHECKPOINT}: give require model= and the command names the folder)"]
    return lines


def _datasets_in(dataset: Any) -> list[Any]:
    """The datasets that were given: this one, or those of a dict; sample ids are none."""
    if isinstance(dataset, Mapping):
        return [each for value in dataset.values() for each in _datasets_in(value)]
    if not hasattr(dataset, "samples"):
        dataset = getattr(dataset, "dataset", None)  # of a `CachedAudioDataset`
    return [dataset] if hasattr(dataset, "samples") else []


def _place(dataset: Any) -> tuple[str, ...]:
    options = getattr(dataset, "command_line_options", None) or {}
    return (str(getattr(dataset, "root", "")), *map(str, options.items()))


def _in_python(
    config: CacheConfig, dataset: Any, model: str | os.PathLike[str] | None
) -> list[str]:
    why = "The command line can't open this dataset"
    if not config.namespace:
        why = "The config has no namespace, which every store of the command line has"
    chosen = _CHECKPOINT if model is None and "@" in config.model_name else model
    given = "" if chosen is None else f", model={os.fspath(chosen)!r}"
    if not _datasets_in(dataset):
        return [
            f"{why}; in Python, with clips, a dict of sample id → audio file:",
            "",
            f"    lmdbcache.extract(cache, config, clips{given})",
        ]
    each = " (for each dataset of the dict)" if isinstance(dataset, Mapping) else ""
    name = "dataset" if each or hasattr(dataset, "samples") else "dataset.dataset"
    return [
        f"{why}; in Python this computes what is missing{each}:",
        "",
        "    from lmdbcache.extraction.samples import to_clips",
        f"    lmdbcache.extract(cache, config, to_clips({name}.samples){given})",
    ]


def _model_and_config(config: CacheConfig, model: str | os.PathLike[str] | None) -> list[str]:
    if model is None:
        words = ["--model", _CHECKPOINT if "@" in config.model_name else config.model_name]
    else:
        is_folder = Path(model).is_dir()
        words = ["--model", str(Path(model).absolute()) if is_folder else os.fspath(model)]
        if "@" not in config.model_name:
            words += ["--model-name", config.model_name]
    words += ["--output", config.output, "--sample-rate", str(config.sample_rate)]
    words += ["--duration", repr(config.duration), "--dtype", config.dtype]
    if config.compute_dtype != "float32":
        words += ["--compute-dtype", config.compute_dtype]
    if config.front_end != DEFAULT_FRONT_END:
        words += ["--front-end", config.front_end]
    return words


def _selection(dataset: Any, found: DatasetCoverage) -> list[str]:
    """The options that narrow the extraction to the dataset's own clips and the missing classes."""
    failed = set(found.failed)
    incomplete = {class_of(sample_id) for sample_id in found.missing if sample_id not in failed}
    words: list[str] = []
    if incomplete < set(found.by_class):
        for name in sorted(incomplete):
            words += ["--class", name]
    elif getattr(dataset, "selected_classes", None) or getattr(dataset, "excluded_classes", None):
        for name in sorted(found.by_class):
            words += ["--class", name]
    per_class = getattr(dataset, "num_samples_per_class", None)
    if per_class and per_class > 0 and getattr(dataset, "samples_per_node", None) is None:
        words += ["--samples-per-class", str(per_class)]
    if getattr(dataset, "node_split_seed", None) != _NODE_SEED:
        return words  # more than is missing, but all of it
    for option in ("node_split_id", "num_nodes", "samples_per_node"):
        if getattr(dataset, option, None) is not None:
            words += [f"--{option.replace('_', '-')}", str(getattr(dataset, option))]
    names = ("train_ratio", "val_ratio", "test_ratio")
    ratios = tuple(getattr(dataset, name, None) for name in names)
    is_usual = ratios == _SPLIT_RATIOS and getattr(dataset, "stratify", False)
    if is_usual and dataset.splits_to_load is None and dataset.split != "all":
        words += ["--split", dataset.split]
    return words
