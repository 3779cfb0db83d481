"""The Audio Spectrogram Transformer (AST), as transformers implements it.

transformers and torch are imported at first use: that takes seconds, which a run with nothing to
compute shouldn't pay. This module stays free of both at import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmdbcache.config import DEFAULT_FRONT_END
from lmdbcache.embedders.ast_checkpoint import (
    MODEL_TYPE,
    NUM_SPECIAL_TOKENS,
    feature_implementation,
    import_transformers,
    load_feature_extractor,
    load_model,
    read_settings,
    shape_of,
)
from lmdbcache.embedders.base import check_num_samples, check_waveform
from lmdbcache.embedders.checkpoints import fetch_checkpoint
from lmdbcache.embedders.devices import check_compute_dtype, move_to_device
from lmdbcache.embedders.pretrained import check_sample_rate, library_versions
from lmdbcache.embedders.transformers_family import (
    ModelFamily,
    Settings,
    TransformersEmbedder,
    check_output,
)

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from lmdbcache.config import CacheConfig
    from lmdbcache.embedders.checkpoints import Checkpoint

__all__ = ["AST", "ASTEmbedder", "ASTFrontEnd"]

_WINDOW_MILLISECONDS: Final = 25.0
_HOP_MILLISECONDS: Final = 10


class ASTFrontEnd:
    """Normalised log-mel features by transformers' `ASTFeatureExtractor`.

    Pickles as checkpoint and sample rate only; each process builds its own extractor at first
    use. It sets no thread count: in a DataLoader worker torch runs it on one thread.

    Args:
        checkpoint: As `find_checkpoint` gives it; downloaded at first use if it isn't local.
        sample_rate: Sample rate of the waveforms to come, in Hz.

    Raises:
        ConfigError: `sample_rate` isn't the one that the checkpoint was trained with (for a
            checkpoint that isn't on this machine yet: at first use).
        ModelLoadError: preprocessor_config.json is missing or isn't an AST's.
    """

    def __init__(self, checkpoint: Checkpoint, sample_rate: int) -> None:
        self.checkpoint = checkpoint
        self.sample_rate = sample_rate
        self._extractor: Any = None
        if checkpoint.is_local:
            self._check_sample_rate()

    @property
    def min_samples(self) -> int:
        """One analysis window of 25 ms, in samples: 400 at 16 kHz."""
        return int(self.sample_rate * _WINDOW_MILLISECONDS / 1000)

    def __call__(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute the features of one clip, bit-equal to calling the extractor itself.

        Args:
            waveform: float32 array (num_samples,), mono, with at least `min_samples` samples.

        Returns:
            float32 array (num_frames, num_mel_bins), 1024 x 128 for the published checkpoints:
            frames of a shorter clip are padded, of a longer one cut.

        Raises:
            ConfigError: The waveform isn't one-dimensional float32 or is shorter than one window.
            ModelLoadError: The extractor can't be loaded.
            MissingDependencyError: transformers, torch or a working torchaudio is missing.
        """
        check_waveform(waveform)
        check_num_samples(len(waveform), self.min_samples, self.sample_rate)
        if self._extractor is None:
            self._extractor = self._build()
        writeable = np.require(waveform, requirements=["C", "W"])
        import torch

        with torch.inference_mode():
            features = self._extractor(
                writeable, sampling_rate=self.sample_rate, return_tensors="np"
            ).input_values[0]
        return np.asarray(features, dtype=np.float32)

    def provenance(self) -> dict[str, str]:
        """Which fbank is in use (key `feature_extractor`), and the versions it depends on.

        transformers takes torchaudio's kaldi fbank where torchaudio is installed and its own in
        numpy otherwise; the two differ by up to 8e-3.
        """
        return {
            "feature_extractor": feature_implementation(),
            **library_versions("transformers", "torchaudio", "soundfile", "soxr"),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_extractor": None}

    def _build(self) -> Any:
        self.checkpoint = fetch_checkpoint(self.checkpoint)
        self._check_sample_rate()
        return load_feature_extractor(self.checkpoint)

    def _check_sample_rate(self) -> None:
        _, preprocessor = read_settings(Path(self.checkpoint.location))
        trained = preprocessor.get("sampling_rate", 16000)
        check_sample_rate(self.checkpoint, self.sample_rate, trained)


class _ASTFamily(ModelFamily):
    name = "AST"
    model_types = (MODEL_TYPE,)
    hub_prefixes = ("ast-",)
    extractor_type = "ASTFeatureExtractor"
    front_end_id = DEFAULT_FRONT_END
    sample_rate = 16000
    outputs = ("pooler_output", "last_hidden_state", "mean")

    def check_settings(self, settings: Settings) -> None:
        read_settings(settings.folder)

    def max_samples(self, settings: Settings) -> int:
        """`max_length` frames of 10 ms: its extractor drops the frames beyond them."""
        found = settings.preprocessor
        rate = int(found.get("sampling_rate", self.sample_rate))
        return int(found.get("max_length", 1024)) * rate * _HOP_MILLISECONDS // 1000

    def embedding_shape(
        self,
        settings: Settings,
        output: str,
        num_samples: int,  # noqa: ARG002 - frames are padded or cut to one number
    ) -> tuple[int, ...] | None:
        return shape_of(settings.config, output)

    def make_front_end(self, checkpoint: Checkpoint, config: CacheConfig) -> ASTFrontEnd:
        return ASTFrontEnd(checkpoint, config.sample_rate)

    def make_embedder(
        self, checkpoint: Checkpoint, config: CacheConfig, device: str | None
    ) -> ASTEmbedder:
        return ASTEmbedder(checkpoint, config.output, device, config.compute_dtype)


AST: Final = _ASTFamily()


class ASTEmbedder(TransformersEmbedder):
    """Embeddings of a frozen `transformers.ASTModel`.

    The outputs, for a model with hidden_size H and T tokens (768 and 1214 as published):

    - `pooler_output`, (H,): the mean of the CLS and the distillation token, after the last norm.
    - `last_hidden_state`, (T, H): every token, CLS and distillation first.
    - `mean`, (H,): the mean over all tokens except CLS and distillation. Tokens of padded frames
      count like any other.

    Parameters are float32 whatever the checkpoint holds. With a lower `compute_dtype` torch's
    autocast decides which operations run in it; with float32 a GPU's TF32 is switched off while
    the model runs, so that machines agree to about 1e-6.

    Args:
        checkpoint: As `find_checkpoint` gives it; downloaded now if it isn't local.
        output: One of `outputs`.
        device: Where the model runs; None means a CUDA GPU if there is one, else the CPU.
        compute_dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        ConfigError: An unknown output, device or compute dtype.
        ModelLoadError: Not an AST checkpoint, damaged, incomplete, or not to be had.
        MissingDependencyError: transformers, torch or a working torchaudio is missing.
    """

    family = AST
    outputs = AST.outputs  # known without an instance

    def __init__(
        self,
        checkpoint: Checkpoint,
        output: str = "pooler_output",
        device: str | torch.device | None = None,
        compute_dtype: str = "float32",
    ) -> None:
        check_output("AST", self.outputs, output)
        check_compute_dtype(compute_dtype)
        import_transformers()
        self.output = output
        self.compute_dtype = compute_dtype
        self.checkpoint = fetch_checkpoint(checkpoint)
        self._model = self._load()
        self.device = move_to_device(self._model, device)

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """`(hidden_size,)`, or `(num_tokens, hidden_size)` for `last_hidden_state`."""
        num_tokens, hidden_size = self._model.embeddings.position_embeddings.shape[1:]
        return (num_tokens, hidden_size) if self.output == "last_hidden_state" else (hidden_size,)

    def _load(self) -> Any:
        return load_model(self.checkpoint)

    def _feature_shape(self) -> tuple[int, ...]:
        config = self._model.config
        return (config.max_length, config.num_mel_bins)

    def _embed(self, features: torch.Tensor) -> torch.Tensor:
        result = self._model(features)
        hidden: torch.Tensor = result.last_hidden_state
        if self.output == "mean":
            return hidden[:, NUM_SPECIAL_TOKENS:].float().mean(dim=1)
        pooled: torch.Tensor = result.pooler_output
        return pooled if self.output == "pooler_output" else hidden
