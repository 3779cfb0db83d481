"""The encoder of Whisper: 30 s of log-mel features in, one vector per 20 ms out.

Every clip is padded to 30 s, and Whisper has no attention mask: all 1500 frames are attended, and
all of them are stored and averaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lmdbcache.embedders.pretrained import load_weights
from lmdbcache.embedders.transformers_family import (
    ModelFamily,
    Settings,
    TransformersEmbedder,
    TransformersFrontEnd,
)
from lmdbcache.errors import ModelLoadError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lmdbcache.config import CacheConfig
    from lmdbcache.embedders.checkpoints import Checkpoint

__all__ = ["WHISPER", "WhisperEmbedder", "WhisperFrontEnd"]

_STRIDE: Final = 2  # of the encoder's second convolution


class _WhisperFamily(ModelFamily):
    name = "Whisper"
    model_types = ("whisper",)
    hub_prefixes = ("whisper-", "distil-")
    extractor_type = "WhisperFeatureExtractor"
    front_end_id = "soundfile+soxr-hq+mono-mean+zero-pad-30s+whisper-log-mel/1"
    sample_rate = 16000
    outputs = ("mean", "last_hidden_state")

    def check_settings(self, settings: Settings) -> None:
        found, model = settings.preprocessor, settings.config
        if found.get("dither", 0.0) != 0.0:
            raise ModelLoadError(
                f"{settings.folder}: dither is {found['dither']} in preprocessor_config.json: it "
                "adds random numbers, so no two runs agree; set it to 0.0"
            )
        settings.require(
            "feature_size",
            found=found.get("feature_size", 80),
            expected=model.get("num_mel_bins", 80),
        )
        settings.require(
            "the number of frames (chunk_length * sampling_rate / hop_length)",
            found=self.max_samples(settings) // found.get("hop_length", 160),
            expected=_STRIDE * model.get("max_source_positions", 1500),
        )

    def max_samples(self, settings: Settings) -> int:
        found = settings.preprocessor
        return int(found.get("chunk_length", 30) * found.get("sampling_rate", self.sample_rate))

    def embedding_shape(
        self,
        settings: Settings,
        output: str,
        num_samples: int,  # noqa: ARG002 - always 30 s
    ) -> tuple[int, ...] | None:
        size = settings.config.get("d_model", 384)
        frames = settings.config.get("max_source_positions", 1500)
        return (size,) if output == "mean" else (frames, size)

    def make_front_end(self, checkpoint: Checkpoint, config: CacheConfig) -> WhisperFrontEnd:
        return WhisperFrontEnd(checkpoint, config.sample_rate)

    def make_embedder(
        self, checkpoint: Checkpoint, config: CacheConfig, device: str | None
    ) -> WhisperEmbedder:
        return WhisperEmbedder(
            checkpoint, config.num_samples, config.output, device, config.compute_dtype
        )


WHISPER: Final = _WhisperFamily()


class WhisperFrontEnd(TransformersFrontEnd):
    """Log-mel features by transformers' `WhisperFeatureExtractor`."""

    family = WHISPER
    implementation = "torch"  # its numpy way is for where torch isn't installed

    def _features(
        self,
        extractor: Any,
        clip: NDArray[np.float32],
        num_samples: int,  # noqa: ARG002 - always 30 s
    ) -> NDArray[np.float32]:
        features: NDArray[np.float32] = extractor(
            clip, sampling_rate=self.sample_rate, return_tensors="np"
        ).input_features[0]
        return features


class WhisperEmbedder(TransformersEmbedder):
    """Embeddings of a frozen Whisper encoder; the decoder isn't kept.

    - `mean`, (H,): the mean over all 1500 frames, as in `WhisperForAudioClassification`.
    - `last_hidden_state`, (1500, H): every frame.
    """

    family = WHISPER

    def _load(self) -> Any:
        # A classifier's checkpoint has no decoder, and needs none.
        model = load_weights(self.checkpoint, self.family.name, "WhisperModel", part="encoder.")
        return model.encoder

    def _feature_shape(self) -> tuple[int, ...]:
        config = self._model.config
        return (config.num_mel_bins, _STRIDE * config.max_source_positions)

    def _embed(self, features: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self._model(features).last_hidden_state
        return hidden.float().mean(dim=1) if self.output == "mean" else hidden
