"""wav2vec 2.0, HuBERT, WavLM and their relatives: waveform in, one vector per 20 ms out.

Models whose convolutions are layer-normalised take an attention mask: a clip shorter than the
duration is normalised by itself, and its padding isn't attended. Those with group normalisation
were trained without a mask, and see the zeros like any other sample.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmdbcache.embedders.transformers_family import ModelFamily, load_weights
from lmdbcache.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy.typing import NDArray

    from lmdbcache.embedders.checkpoints import Checkpoint
    from lmdbcache.embedders.output_names import OutputName

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


class Wav2Vec2(ModelFamily):
    """The outputs of wav2vec 2.0, HuBERT, WavLM, data2vec, UniSpeech and Conformer.

    - `mean`, (H,): the mean over time, of the clip's own frames if the model takes a mask.
    - `last_hidden_state`, (T, H): every frame, those of the padding included.
    - `valid_mean`, (H,): the mean over the clip's own frames, whether or not it takes a mask.

    For a model with a mask one number follows the features, which are the waveform, normalised if
    the extractor's settings say so: how many frames of it are the clip.
    """

    name = "wav2vec 2.0"
    model_types = tuple(_MODEL_CLASSES)
    hub_prefixes = ("wav2vec2-", "hubert-", "wavlm-", "data2vec-audio-", "unispeech-")
    extractor_type = "Wav2Vec2FeatureExtractor"
    model_class = "Wav2Vec2Model"  # that of each model type is in the table
    front_end_id = "soundfile+soxr-hq+mono-mean+zero-pad-or-mask+wav2vec2-waveform/1"
    sample_rate = 16000
    outputs = ("mean", "last_hidden_state", "valid_mean")

    def check_settings(self) -> None:
        kernels, strides = self._convolutions
        sizes = (*kernels, *strides)
        if len(kernels) != len(strides) or not all(type(n) is int and n > 0 for n in sizes):
            raise ModelLoadError(
                f"{self.folder}: config.json has conv_kernel {kernels} and conv_stride "
                f"{strides}; expected as many positive whole numbers in each"
            )

    def state_shape(self, wanted: OutputName, num_samples: int) -> tuple[int, ...] | None:
        size = self.config.get("hidden_size", 768)
        frames = self._num_frames(num_samples)
        if wanted.is_of_layers:  # an adapter comes after them
            return (frames, size)
        if self.config.get("add_adapter"):
            size = self.config.get("output_hidden_size") or size
        return (self._num_output_frames(frames), size)

    def min_samples(self) -> int:
        """Return what gives one frame: 400 samples at 16 kHz as published."""
        return self._samples_of(1)

    def features(
        self, extract: Callable[..., Any], clip: NDArray[np.float32], num_samples: int
    ) -> NDArray[np.float32]:
        has_mask = self._takes_mask
        values: NDArray[np.float32] = extract(
            clip,
            padding="max_length",
            max_length=num_samples,
            truncation=True,
            return_attention_mask=has_mask,
        ).input_values[0]
        if has_mask:
            # As frames: a float32 counts them exactly for days.
            values = np.append(values, np.float32(self._num_frames(len(clip))))
        return values

    def load(self, checkpoint: Checkpoint) -> Any:
        # With a padded clip in the batch torch may choose another fused attention: the same clip
        # would then differ in the last bit with its neighbours.
        options = {"attn_implementation": "eager"} if self._takes_mask else {}
        return load_weights(
            checkpoint,
            self,
            model_class=_MODEL_CLASSES[self.model_type],
            unused=_UNUSED,
            **options,
        )

    def feature_shape(self, model: Any, num_samples: int) -> tuple[int, ...]:
        return (num_samples + self._takes_mask,)

    def told_valid(self, features: torch.Tensor) -> list[int] | None:
        if not self._takes_mask:
            return None
        return [self._samples_of(int(count)) for count in features[:, -1].tolist()]

    def run(self, model: Any, features: torch.Tensor) -> dict[str, torch.Tensor]:
        lengths = self.told_valid(features)
        if lengths is None:
            return {"last_hidden_state": model(features).last_hidden_state}
        values = features[:, :-1]
        with warnings.catch_warnings():
            # WavLM's masks are of two dtypes, which torch reminds its authors of.
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            result = model(values, attention_mask=_mask(values, lengths))
        return {"last_hidden_state": result.last_hidden_state}

    def num_valid_steps(self, wanted: OutputName, num_valid: int, num_steps: int) -> int:
        """Count the frames whose windows lie within the clip."""
        frames = self._num_frames(num_valid)
        return frames if wanted.is_of_layers else self._num_output_frames(frames)

    @property
    def _takes_mask(self) -> bool:
        """Whether the model was trained with an attention mask.

        Only layer-normalised ones were; preprocessor_config.json may say that such a model wasn't.
        """
        default = "layer" if self.model_type == "data2vec-audio" else "group"
        is_layer = self.config.get("feat_extract_norm", default) == "layer"
        return is_layer and bool(self.preprocessor.get("return_attention_mask", True))

    @property
    def _convolutions(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        config = self.config
        kernels = tuple(config.get("conv_kernel", _KERNELS))
        return kernels, tuple(config.get("conv_stride", _STRIDES))

    def _num_frames(self, num_samples: int) -> int:
        """Return how many frames the convolutions make of a waveform; 0 if it is too short."""
        frames = num_samples
        for kernel, stride in zip(*self._convolutions, strict=True):
            if frames < kernel:
                return 0
            frames = (frames - kernel) // stride + 1
        return frames

    def _samples_of(self, frames: int) -> int:
        """Return the length of the shortest waveform that gives so many frames, in samples."""
        samples = frames
        for kernel, stride in reversed(list(zip(*self._convolutions, strict=True))):
            samples = (samples - 1) * stride + kernel
        return samples

    def _num_output_frames(self, frames: int) -> int:
        """Return how many frames the model gives: fewer where an adapter follows."""
        if self.config.get("add_adapter"):
            for _ in range(self.config.get("num_adapter_layers", 3)):
                frames = (frames - 1) // self.config.get("adapter_stride", 2) + 1
        return frames


def _mask(like: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """int64 (batch, like.shape[1]): 1 for the first `lengths[i]` of row i."""
    import torch

    positions = torch.arange(like.shape[1], device=like.device)
    return (positions < torch.tensor(lengths, device=like.device).unsqueeze(1)).long()
