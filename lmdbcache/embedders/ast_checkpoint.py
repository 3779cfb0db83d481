"""Loading an AST checkpoint from a folder, with every check that transformers leaves out.

transformers and torch are imported inside the functions.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.errors import MissingDependencyError, ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lmdbcache.embedders.checkpoints import Checkpoint

__all__ = [
    "NUM_SPECIAL_TOKENS",
    "feature_implementation",
    "import_transformers",
    "library_versions",
    "load_feature_extractor",
    "load_model",
    "read_settings",
    "stored_shape",
]

_MODEL_TYPE: Final = "audio-spectrogram-transformer"
_EXTRACTOR_TYPE: Final = "ASTFeatureExtractor"
NUM_SPECIAL_TOKENS: Final = 2  # CLS and distillation
# What decides the number of tokens, with ASTConfig's defaults.
_SIZES: Final = {
    "hidden_size": 768,
    "patch_size": 16,
    "frequency_stride": 10,
    "time_stride": 10,
    "num_mel_bins": 128,
    "max_length": 1024,
}


def load_feature_extractor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own `ASTFeatureExtractor`.

    Raises:
        ModelLoadError: It can't be loaded from the checkpoint's folder.
        MissingDependencyError: transformers, torch or a working torchaudio is missing.
    """
    transformers = import_transformers()
    with _load_errors(checkpoint), _quiet():
        return transformers.ASTFeatureExtractor.from_pretrained(
            checkpoint.location, local_files_only=True
        )


def load_model(checkpoint: Checkpoint) -> Any:
    """The checkpoint's `ASTModel` with float32 parameters, in eval mode and frozen.

    Raises:
        ModelLoadError: Not an AST's folder, damaged, or some weights of the model aren't in it.
        MissingDependencyError: transformers, torch or a working torchaudio is missing.
    """
    transformers = import_transformers()
    import torch

    read_settings(checkpoint)
    with _load_errors(checkpoint), _quiet():
        # transformers 5 takes the checkpoint's own dtype unless it is told one.
        model, info = transformers.ASTModel.from_pretrained(
            checkpoint.location,
            dtype=torch.float32,
            weights_only=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    # "Unexpected" keys are the classifier of the published checkpoints, which ASTModel hasn't.
    for reason in ("missing_keys", "mismatched_keys", "error_msgs"):
        if problems := sorted(map(_key_name, info.get(reason) or ())):
            raise ModelLoadError(
                f"{checkpoint.location}: {len(problems)} of the model's weights would stay random "
                f"({reason.replace('_', ' ')}: {', '.join(problems[:5])}"
                f"{', ...' if len(problems) > 5 else ''}); this checkpoint is incomplete or was "
                "written for another version of transformers: save or download it again"
            )
    return model.eval().requires_grad_(requires_grad=False)


def _key_name(key: str | tuple[str, ...]) -> str:
    # A mismatched key comes with its two shapes.
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} instead of {tuple(key[2])}"


def feature_implementation() -> str:
    """Which fbank `ASTFeatureExtractor` runs: `"torchaudio"` or `"numpy"`.

    Asks the question that transformers itself asks when it is imported.

    Raises:
        MissingDependencyError: transformers, torch or a working torchaudio is missing.
    """
    import_transformers()
    from transformers.utils.import_utils import is_speech_available

    return "torchaudio" if is_speech_available() else "numpy"


def read_settings(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and preprocessor_config.json, checked against each other.

    Raises:
        ModelLoadError: One is missing or damaged, isn't an AST's, or they don't fit each other.
    """
    folder = Path(checkpoint.location)
    config = _read_json(folder / "config.json")
    preprocessor = _read_json(folder / "preprocessor_config.json")
    if config.get("model_type") != _MODEL_TYPE:
        raise ModelLoadError(
            f"{folder}: config.json says model_type {config.get('model_type')!r}; "
            f"expected {_MODEL_TYPE!r}: give an AST checkpoint"
        )
    extractor_type = preprocessor.get("feature_extractor_type", _EXTRACTOR_TYPE)
    if extractor_type != _EXTRACTOR_TYPE:
        raise ModelLoadError(
            f"{folder}: preprocessor_config.json is for {extractor_type}; expected "
            f"{_EXTRACTOR_TYPE}: take the one that belongs to the model"
        )
    for name, default in (("max_length", 1024), ("num_mel_bins", 128)):
        of_model, of_extractor = config.get(name, default), preprocessor.get(name, default)
        if of_model != of_extractor:
            raise ModelLoadError(
                f"{folder}: {name} is {of_model} in config.json and {of_extractor} in "
                "preprocessor_config.json; take both from the same model"
            )
    return config, preprocessor


def stored_shape(checkpoint: Checkpoint, output: str) -> tuple[int, ...] | None:
    """Shape of one embedding by config.json alone; None if that isn't on this machine.

    Raises:
        ModelLoadError: See `read_settings`.
    """
    if not checkpoint.is_local:
        return None
    config, _ = read_settings(checkpoint)
    sizes = [config.get(name, default) for name, default in _SIZES.items()]
    if not all(type(size) is int and size > 0 for size in sizes):
        return None  # loading the model will say what is wrong
    hidden_size, patch, bin_step, frame_step, num_bins, num_frames = sizes
    if output != "last_hidden_state":
        return (hidden_size,)
    patches = ((num_bins - patch) // bin_step + 1) * ((num_frames - patch) // frame_step + 1)
    return (patches + NUM_SPECIAL_TOKENS, hidden_size)


def _read_json(path: Path) -> dict[str, Any]:
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


def import_transformers() -> Any:
    """transformers, once torch and torchaudio are known to work with it.

    Raises:
        MissingDependencyError: One is missing or can't be imported; the message has the remedy.
    """
    try:
        import torch  # noqa: F401 - transformers only finds out at first use
        import transformers
        from transformers.utils.import_utils import is_speech_available
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"running AST needs torch and transformers ({error}); "
            'install them with: pip install "lmdbcache[audio]"'
        ) from error
    if is_speech_available():
        # transformers looks only whether torchaudio is installed, and imports it much later.
        try:
            import torchaudio.compliance.kaldi  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            raise MissingDependencyError(
                f"torchaudio is installed but can't be imported ({error}). Its wheel fits torch "
                'up to 2.14: pip install "torch>=2.11,<2.15" "torchaudio>=2.11"'
            ) from error
    return transformers


@contextlib.contextmanager
def _load_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ModelLoadError(
            f"{checkpoint.location}: can't be loaded as an AST checkpoint "
            f"({type(error).__name__}: {error}); save or download it again"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
