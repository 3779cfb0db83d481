"""The audio half of CLAP: 10 s of log-mel features in, one vector out.

A shorter clip is repeated, then filled up with zeros, as preprocessor_config.json says. A longer
one is refused: its extractor would take a random part.
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

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lmdbcache.config import CacheConfig
    from lmdbcache.embedders.checkpoints import Checkpoint

__all__ = ["CLAP", "CLAPEmbedder", "CLAPFrontEnd"]


class _CLAPFamily(ModelFamily):
    name = "CLAP"
    model_types = ("clap", "clap_audio_model")
    hub_prefixes = ("clap-", "larger_clap_")
    extractor_type = "ClapFeatureExtractor"
    front_end_id = "soundfile+soxr-hq+mono-mean+clap-repeat-pad+clap-log-mel/1"
    sample_rate = 48000
    outputs = ("pooler_output", "audio_embeds", "last_hidden_state")

    def check_settings(self, settings: Settings) -> None:
        found, model = settings.preprocessor, _audio_config(settings)
        settings.require(
            "feature_size",
            found=found.get("feature_size", 64),
            expected=model.get("num_mel_bins", 64),
        )
        settings.require(
            "truncation == 'fusion'",
            found=found.get("truncation", "fusion") == "fusion",
            expected=bool(model.get("enable_fusion", False)),
        )

    def max_samples(self, settings: Settings) -> int:
        found = settings.preprocessor
        return int(found.get("max_length_s", 10) * found.get("sampling_rate", self.sample_rate))

    def embedding_shape(
        self,
        settings: Settings,
        output: str,
        num_samples: int,  # noqa: ARG002 - always 10 s
    ) -> tuple[int, ...] | None:
        config = _audio_config(settings)
        num_stages = len(config.get("depths", (2, 2, 6, 2)))
        channels = config.get("patch_embeds_hidden_size", 96) * 2 ** (num_stages - 1)
        if output == "pooler_output":
            return (channels,)
        if output == "audio_embeds":
            # The whole model's setting wins over that of its audio half.
            return (settings.config.get("projection_dim", config.get("projection_dim", 512)),)
        ratio = config.get("spec_size", 256) // config.get("num_mel_bins", 64)
        if ratio < 1:
            return None
        height = ratio * (config.get("spec_size", 256) // ratio)
        stride = config.get("patch_stride", (4, 4))
        strides = (stride, stride) if isinstance(stride, int) else tuple(stride)
        rows, columns = (height // 2 ** (num_stages - 1) // step for step in strides)
        bins = rows // ratio
        return (channels, bins, rows // bins * columns) if bins else None

    def make_front_end(self, checkpoint: Checkpoint, config: CacheConfig) -> CLAPFrontEnd:
        return CLAPFrontEnd(checkpoint, config.sample_rate)

    def make_embedder(
        self, checkpoint: Checkpoint, config: CacheConfig, device: str | None
    ) -> CLAPEmbedder:
        return CLAPEmbedder(
            checkpoint, config.num_samples, config.output, device, config.compute_dtype
        )


CLAP: Final = _CLAPFamily()


def _audio_config(settings: Settings) -> dict[str, Any]:
    if settings.model_type != "clap":
        return settings.config
    return settings.config.get("audio_config") or {}


class CLAPFrontEnd(TransformersFrontEnd):
    """Log-mel features by transformers' `ClapFeatureExtractor`, padded by its own rule."""

    family = CLAP

    def _features(
        self,
        extractor: Any,
        clip: NDArray[np.float32],
        num_samples: int,  # noqa: ARG002 - always 10 s
    ) -> NDArray[np.float32]:
        features: NDArray[np.float32] = extractor(
            clip, sampling_rate=self.sample_rate, return_tensors="np"
        ).input_features[0]
        return features


class CLAPEmbedder(TransformersEmbedder):
    """Embeddings of a frozen CLAP's audio half; the text half isn't loaded.

    - `pooler_output`, (H,): the mean over time and frequency.
    - `audio_embeds`, (P,): the same in the space shared with texts, not normalised.
    - `last_hidden_state`, (H, F, T): the feature map, as transformers gives it.

    A model with feature fusion fuses for every clip, as its extractor asks for when it is called
    with one clip; called with several short ones, it picks one of them at random.
    """

    family = CLAP

    def _load(self) -> Any:
        return load_weights(self.checkpoint, self.family.name, "ClapAudioModelWithProjection")

    def _feature_shape(self) -> tuple[int, ...]:
        found = self.settings.preprocessor
        frames = self.family.max_samples(self.settings) or 0
        return (
            4 if self._model.config.enable_fusion else 1,
            frames // found.get("hop_length", 480) + 1,
            self._model.config.num_mel_bins,
        )

    def _embed(self, features: torch.Tensor) -> torch.Tensor:
        import torch

        is_longer = torch.full(
            (len(features), 1), self._model.config.enable_fusion, device=features.device
        )
        result = self._model.audio_model(features, is_longer=is_longer)
        if self.output == "last_hidden_state":
            embeddings: torch.Tensor = result.last_hidden_state
        elif self.output == "audio_embeds":
            embeddings = self._model.audio_projection(result.pooler_output)
        else:
            embeddings = result.pooler_output
        return embeddings
