"""Loading pretrained weights and settings from a folder, with every check that transformers omits.

transformers and torch are imported inside the functions.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdbcache.errors import ConfigError, MissingDependencyError, ModelLoadError
from lmdbcache.files import few

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from lmdbcache.embedders.checkpoints import Checkpoint

__all__ = [
    "check_extractor_type",
    "check_sample_rate",
    "import_transformers",
    "library_versions",
    "load_errors",
    "load_extractor",
    "load_weights",
    "quiet",
    "read_json",
]


def import_transformers(family: str) -> Any:
    """transformers, once torch is known to be there.

    Args:
        family: What is to be run, for the message.

    Raises:
        MissingDependencyError: One is missing or can't be imported; the message has the remedy.
    """
    try:
        import torch  # noqa: F401 - transformers only finds out at first use
        import transformers
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"running {family} needs torch and transformers ({error}); "
            'install them with: pip install "lmdbcache[audio]"'
        ) from error
    return transformers


def load_weights(
    checkpoint: Checkpoint,
    family: str,
    model_class: str,
    *,
    part: str = "",
    unused: Collection[str] = (),
    **options: Any,
) -> Any:
    """A model of transformers with float32 parameters, in eval mode and frozen.

    Args:
        checkpoint: One whose files are on this machine.
        family: For the messages.
        model_class: The name of its class in transformers.
        part: Only weights whose names begin so must be there: the rest isn't run.
        unused: Weights that inference never touches, and that some checkpoints lack.
        options: For `from_pretrained`.

    Raises:
        ModelLoadError: Damaged, or some weights of the model aren't in it.
        MissingDependencyError: transformers or torch is missing.
    """
    transformers = import_transformers(family)
    import torch

    with load_errors(checkpoint, family), quiet():
        # transformers 5 takes the checkpoint's own dtype unless it is told one.
        model, info = getattr(transformers, model_class).from_pretrained(
            checkpoint.location,
            dtype=torch.float32,
            weights_only=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **options,
        )
    # "Unexpected" keys are heads and decoders, which this class hasn't.
    for reason in ("missing_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(map(_key_name, info.get(reason) or ()))
        is_error = reason == "error_msgs"
        problems = [k for k in keys if is_error or (k.startswith(part) and k not in unused)]
        if problems:
            raise ModelLoadError(
                f"{checkpoint.location}: {len(problems)} of the model's weights would stay random "
                f"({reason.replace('_', ' ')}: {few(problems, 5)}"
                f"); this checkpoint is incomplete or was "
                "written for another version of transformers: save or download it again"
            )
    return model.eval().requires_grad_(requires_grad=False)


def load_extractor(checkpoint: Checkpoint, family: str, extractor_class: str) -> Any:
    """A checkpoint's own feature extractor.

    Raises:
        ModelLoadError: It can't be loaded from the checkpoint's folder.
        MissingDependencyError: transformers or torch is missing.
    """
    transformers = import_transformers(family)
    with load_errors(checkpoint, family), quiet():
        return getattr(transformers, extractor_class).from_pretrained(
            checkpoint.location, local_files_only=True
        )


def check_extractor_type(folder: Path, preprocessor: dict[str, Any], expected: str) -> None:
    """Whether preprocessor_config.json is the one of this kind of model.

    Raises:
        ModelLoadError: It is for another extractor.
    """
    found = preprocessor.get("feature_extractor_type", expected)
    if found != expected:
        raise ModelLoadError(
            f"{folder}: preprocessor_config.json is for {found}; expected "
            f"{expected}: take the one that belongs to the model"
        )


def check_sample_rate(checkpoint: Checkpoint, sample_rate: int, trained: int) -> None:
    """Whether waveforms have the rate that the model was trained with.

    Raises:
        ConfigError: They haven't.
    """
    if trained != sample_rate:
        raise ConfigError(
            f"sample_rate: {sample_rate} Hz, but {checkpoint.identity} was trained "
            f"at {trained} Hz; use sample_rate={trained} (clips are resampled to it)"
        )


def read_json(path: Path) -> dict[str, Any]:
    """One of a checkpoint's settings files.

    Raises:
        ModelLoadError: It is missing or isn't a JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(
            f"{path}: missing; expected beside the weights, as save_pretrained of the model and of "
            "its feature extractor write it (without it the features would be a guess)"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelLoadError(f"{path}: not a JSON object; save or download the checkpoint again")
    return settings


@contextlib.contextmanager
def load_errors(checkpoint: Checkpoint, family: str) -> Iterator[None]:
    """Whatever goes wrong inside is a `ModelLoadError` that names the checkpoint."""
    try:
        yield
    except Exception as error:
        article = "an" if family.startswith("A") else "a"
        raise ModelLoadError(
            f"{checkpoint.location}: can't be loaded as {article} {family} checkpoint "
            f"({type(error).__name__}: {error}); save or download it again"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load report off the terminal; we check them instead."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def library_versions(*packages: str) -> dict[str, str]:
    """The installed version of each package, or `"not installed"`."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _key_name(key: str | tuple[str, ...]) -> str:
    # A mismatched key comes with its two shapes.
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} instead of {tuple(key[2])}"
