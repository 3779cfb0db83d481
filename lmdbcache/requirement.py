"""Refusing to begin a training whose embeddings aren't there, with the command that makes them."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import Any, Final

from lmdbcache.config import DEFAULT_FRONT_END, CacheConfig
from lmdbcache.dataset_coverage import DatasetCoverage
from lmdbcache.errors import ConfigError
from lmdbcache.storage.layout import class_of

__all__ = ["extraction_command", "is_covered", "shortfall"]

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


def shortfall(found: DatasetCoverage, min_coverage: float, reason: str, command: str) -> str:
    """What to tell if too little is stored.

    Args:
        found: What is.
        min_coverage: Share that must be.
        reason: What is stored of the config, one sentence.
        command: What fills the gap.
    """
    told = (
        f"{found.num_present:,} of {found.num_asked:,} samples are stored "
        f"({100 * found.fraction:.1f} %); {100 * min_coverage:g} % are asked for: {reason}"
    )
    lines = [told, "", found.table()]
    if len(found.failed) < len(found.missing):
        lines += ["", "This computes what is missing:", "", f"    {command}"]
        if _FOLDER in command:
            lines += [f"    ({_FOLDER}: give require data_dir= and the command names the folder)"]
        if _CHECKPOINT in command:
            lines += [f"    ({_CHECKPOINT}: give require model= and the command names the folder)"]
    if found.failed:
        lines += ["", f"{len(found.failed)} failed when last tried, such as {found.failed[0]!r}:"]
        lines += ["mend these clips, leave them out, or pass allow_failed=True (--allow-failed)"]
    return "\n".join(lines)


def extraction_command(
    config: CacheConfig,
    root: Path,
    dataset: Any,
    found: DatasetCoverage,
    *,
    model: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> str:
    """The command line that computes what is missing, quoted for a shell.

    Args:
        config: The store's.
        root: The cache's.
        dataset: Whose folder and selection are taken, as far as it has them.
        found: What is missing.
        model: Checkpoint folder or Hub name; None takes the config's name.
        data_dir: The dataset's folder; None takes the dataset's own.
    """
    folder = data_dir or getattr(dataset, "root_dir", None)
    # From any working directory; a name that begins with a dash is no option then.
    words = ["lmdbcache", "extract", str(Path(folder).absolute()) if folder else _FOLDER]
    words += ["--root", os.fspath(root)]
    if model is None:
        words += ["--model", _CHECKPOINT if "@" in config.model_name else config.model_name]
    else:
        is_folder = Path(model).is_dir()
        words += ["--model", str(Path(model).absolute()) if is_folder else os.fspath(model)]
        if "@" not in config.model_name:
            words += ["--model-name", config.model_name]
    words += ["--output", config.output, "--sample-rate", str(config.sample_rate)]
    words += ["--duration", repr(config.duration), "--dtype", config.dtype]
    if config.compute_dtype != "float32":
        words += ["--compute-dtype", config.compute_dtype]
    if config.front_end != DEFAULT_FRONT_END:
        words += ["--front-end", config.front_end]
    words += _selection(dataset, found)
    return shlex.join(words)


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
    if per_class and getattr(dataset, "samples_per_node", None) is None:
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
