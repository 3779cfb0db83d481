"""wav2vec 2.0, HuBERT, WavLM and their relatives: waveform in, one vector per 20 ms out.

Models whose convolutions are layer-normalised take an attention mask: a clip shorter than the
duration is normalised by itself, and its padding isn't attended. Those with group normalisation
were trained without a mask, and see the zeros like any other sample.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmdbcache.embedders.pretrained import load_weights
from lmdbcache.embedders.transformers_family import (
    ModelFamily,
    Settings,
    TransformersEmbedder,
    TransformersFrontEnd,
)
from lmdbcache.errors import ModelLoadError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from lmdbcache.config import CacheConfig
    from lmdbcache.embedders.checkpoints import Checkpoint

__all__ = ["WAV2VEC2", "Wav2Vec2Embedder", "Wav2Vec2FrontEnd"]

_MODEL_CLASSES: Final = {
    "data2vec-audio": "Data2VecAudioModel",
    "hubert": "HubertModel",
    "unispeech": "UniSpeechModel",
    "unispeech-sat": "UniSpeechSatModel",
    "wav2vec2": "Wav2Vec2Model",
    "wav2vec2-conformer": "Wav2Vec2ConformerModel",
    "wavlm": "WavLMModel",
}
_KERNELS: Final = (10, 3, 3, 3, 3, 2, 2)
_STRIDES: Final = (5, 2, 2, 2, 2, 2, 2)
# Replaces masked frames in training; published checkpoints without it are complete.
_UNUSED: Final = ("masked_spec_embed",)


class _Wav2Vec2Family(ModelFamily):
    name = "wav2vec 2.0"
    model_types = tuple(_MODEL_CLASSES)
    hub_prefixes = ("wav2vec2-", "hubert-", "wavlm-", "data2vec-audio-", "unispeech-")
    extractor_type = "Wav2Vec2FeatureExtractor"
    front_end_id = "soundfile+soxr-hq+mono-mean+zero-pad-or-mask+wav2vec2-waveform/1"
    sample_rate = 16000
    outputs = ("mean", "last_hidden_state")

    def check_settings(self, settings: Settings) -> None:
        kernels, strides = _convolutions(settings)
        sizes = (*kernels, *strides)
        if len(kernels) != len(strides) or not all(type(n) is int and n > 0 for n in sizes):
            raise ModelLoadError(
                f"{settings.folder}: config.json has conv_kernel {kernels} and conv_stride "
                f"{strides}; expected as many positive whole numbers in each"
            )

    def embedding_shape(
        self, settings: Settings, output: str, num_samples: int
    ) -> tuple[int, ...] | None:
        size = settings.config.get("hidden_size", 768)
        if settings.config.get("add_adapter"):
            size = settings.config.get("output_hidden_size") or size
        frames = num_output_frames(settings, num_frames(settings, num_samples))
        return (size,) if output == "mean" else (frames, size)

    def make_front_end(self, checkpoint: Checkpoint, config: CacheConfig) -> Wav2Vec2FrontEnd:
        return Wav2Vec2FrontEnd(checkpoint, config.sample_rate)

    def make_embedder(
        self, checkpoint: Checkpoint, config: CacheConfig, device: str | None
    ) -> Wav2Vec2Embedder:
        return Wav2Vec2Embedder(
            checkpoint, config.num_samples, config.output, device, config.compute_dtype
        )


WAV2VEC2: Final = _Wav2Vec2Family()


def takes_mask(settings: Settings) -> bool:
    """Whether the model was trained with an attention mask.

    Only layer-normalised ones were; preprocessor_config.json may say that such a model wasn't.
    """
    default = "layer" if settings.model_type == "data2vec-audio" else "group"
    is_layer = settings.config.get("feat_extract_norm", default) == "layer"
    return is_layer and bool(settings.preprocessor.get("return_attention_mask", True))


def num_frames(settings: Settings, num_samples: int) -> int:
    """Frames that the convolutions make of a waveform; 0 if it is too short."""
    frames = num_samples
    for kernel, stride in zip(*_convolutions(settings), strict=True):
        if frames < kernel:
            return 0
        frames = (frames - kernel) // stride + 1
    return frames


def min_samples(settings: Settings, frames: int) -> int:
    """The shortest waveform that gives so many frames, in samples."""
    samples = frames
    for kernel, stride in reversed(list(zip(*_convolutions(settings), strict=True))):
        samples = (samples - 1) * stride + kernel
    return samples


def num_output_frames(settings: Settings, frames: int) -> int:
    """Frames that the model gives: fewer where an adapter follows."""
    config = settings.config
    if config.get("add_adapter"):
        for _ in range(config.get("num_adapter_layers", 3)):
            frames = (frames - 1) // config.get("adapter_stride", 2) + 1
    return frames


def _convolutions(settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    config = settings.config
    return tuple(config.get("conv_kernel", _KERNELS)), tuple(config.get("conv_stride", _STRIDES))


class Wav2Vec2FrontEnd(TransformersFrontEnd):
    """The waveform, normalised by transformers' `Wav2Vec2FeatureExtractor` if it is told to.

    For a model with an attention mask one number follows the waveform: how many frames of it are
    the clip.
    """

    family = WAV2VEC2

    @property
    def min_samples(self) -> int:
        """What gives one frame: 400 samples at 16 kHz as published."""
        return min_samples(self.settings, 1)

    def _features(
        self, extractor: Any, clip: NDArray[np.float32], num_samples: int
    ) -> NDArray[np.float32]:
        has_mask = takes_mask(self.settings)
        values: NDArray[np.float32] = extractor(
            clip,
            sampling_rate=self.sample_rate,
            padding="max_length",
            max_length=num_samples,
            truncation=True,
            return_attention_mask=has_mask,
            return_tensors="np",
        ).input_values[0]
        if has_mask:
            # As frames: a float32 counts them exactly for days.
            values = np.append(values, np.float32(num_frames(self.settings, len(clip))))
        return values


class Wav2Vec2Embedder(TransformersEmbedder):
    """Embeddings of a frozen wav2vec 2.0, HuBERT, WavLM, data2vec, UniSpeech or Conformer.

    - `mean`, (H,): the mean over time, of the clip's own frames if the model takes a mask.
    - `last_hidden_state`, (T, H): every frame, those of the padding included.
    """

    family = WAV2VEC2

    def _load(self) -> Any:
        model_class = _MODEL_CLASSES[self.settings.model_type]
        # With a padded clip in the batch torch may choose another fused attention: the same clip
        # would then differ in the last bit with its neighbours.
        options = {"attn_implementation": "eager"} if takes_mask(self.settings) else {}
        return load_weights(
            self.checkpoint, self.family.name, model_class, unused=_UNUSED, **options
        )

    def _feature_shape(self) -> tuple[int, ...]:
        return (self.num_samples + takes_mask(self._full_settings),)

    def _embed(self, features: torch.Tensor) -> torch.Tensor:
        if not takes_mask(self._full_settings):
            hidden: torch.Tensor = self._model(features).last_hidden_state
            return hidden.float().mean(dim=1) if self.output == "mean" else hidden
        counts = [int(count) for count in features[:, -1].tolist()]
        values = features[:, :-1]
        lengths = [min_samples(self._full_settings, count) for count in counts]
        mask = _mask(values, lengths)
        with warnings.catch_warnings():
            # WavLM's masks are of two dtypes, which torch reminds its authors of.
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            hidden = self._model(values, attention_mask=mask).last_hidden_state
        if self.output == "last_hidden_state":
            return hidden
        of_clip = _mask(
            hidden, [num_output_frames(self._full_settings, count) for count in counts]
        ).unsqueeze(-1)
        kept = hidden.float().where(of_clip.bool(), 0.0)
        return kept.sum(dim=1) / of_clip.sum(dim=1)


def _mask(like: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """int64 (batch, like.shape[1]): 1 for the first `lengths[i]` of row i."""
    import torch

    positions = torch.arange(like.shape[1], device=like.device)
    return (positions < torch.tensor(lengths, device=like.device).unsqueeze(1)).long()
