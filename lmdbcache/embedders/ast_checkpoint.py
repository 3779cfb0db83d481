"""Loading an AST checkpoint from a folder, with every check that transformers leaves out.

transformers and torch are imported inside the functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.embedders import pretrained
from lmdbcache.errors import MissingDependencyError, ModelLoadError

if TYPE_CHECKING:
    from lmdbcache.embedders.checkpoints import Checkpoint

__all__ = [
    "MODEL_TYPE",
    "NUM_SPECIAL_TOKENS",
    "feature_implementation",
    "import_transformers",
    "load_feature_extractor",
    "load_model",
    "read_settings",
    "shape_of",
]

MODEL_TYPE: Final = "audio-spectrogram-transformer"
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
    import_transformers()
    return pretrained.load_extractor(checkpoint, "AST", _EXTRACTOR_TYPE)


def load_model(checkpoint: Checkpoint) -> Any:
    """The checkpoint's `ASTModel` with float32 parameters, in eval mode and frozen.

    Raises:
        ModelLoadError: Not an AST's folder, damaged, or some weights of the model aren't in it.
        MissingDependencyError: transformers, torch or a working torchaudio is missing.
    """
    import_transformers()
    read_settings(Path(checkpoint.location))
    return pretrained.load_weights(checkpoint, "AST", "ASTModel")


def feature_implementation() -> str:
    """Which fbank `ASTFeatureExtractor` runs: `"torchaudio"` or `"numpy"`.

    Asks the question that transformers itself asks when it is imported.

    Raises:
        MissingDependencyError: transformers, torch or a working torchaudio is missing.
    """
    import_transformers()
    from transformers.utils.import_utils import is_speech_available

    return "torchaudio" if is_speech_available() else "numpy"


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and preprocessor_config.json, checked against each other.

    Raises:
        ModelLoadError: One is missing or damaged, isn't an AST's, or they don't fit each other.
    """
    config = pretrained.read_json(folder / "config.json")
    preprocessor = pretrained.read_json(folder / "preprocessor_config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise ModelLoadError(
            f"{folder}: config.json says model_type {config.get('model_type')!r}; "
            f"expected {MODEL_TYPE!r}: give an AST checkpoint"
        )
    pretrained.check_extractor_type(folder, preprocessor, _EXTRACTOR_TYPE)
    for name, default in (("max_length", 1024), ("num_mel_bins", 128)):
        of_model, of_extractor = config.get(name, default), preprocessor.get(name, default)
        if of_model != of_extractor:
            raise ModelLoadError(
                f"{folder}: {name} is {of_model} in config.json and {of_extractor} in "
                "preprocessor_config.json; take both from the same model"
            )
    return config, preprocessor


def shape_of(config: dict[str, Any], output: str) -> tuple[int, ...] | None:
    """Shape of one embedding by the content of config.json; None if its sizes are impossible."""
    sizes = [config.get(name, default) for name, default in _SIZES.items()]
    if not all(type(size) is int and size > 0 for size in sizes):
        return None  # loading the model will say what is wrong
    hidden_size, patch, bin_step, frame_step, num_bins, num_frames = sizes
    if output != "last_hidden_state":
        return (hidden_size,)
    patches = ((num_bins - patch) // bin_step + 1) * ((num_frames - patch) // frame_step + 1)
    return (patches + NUM_SPECIAL_TOKENS, hidden_size)


def import_transformers() -> Any:
    """transformers, once torch and torchaudio are known to work with it.

    Raises:
        MissingDependencyError: One is missing or can't be imported; the message has the remedy.
    """
    transformers = pretrained.import_transformers("AST")
    from transformers.utils.import_utils import is_speech_available

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
