"""The encoder of Whisper: 30 s of log-mel features in, one vector per 20 ms out.

Every clip is padded to 30 s, and Whisper has no attention mask: all 1500 frames are attended and
stored, and `mean` is over all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lmdbcache.embedders.transformers_family import ModelFamily, load_weights
from lmdbcache.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmdbcache.embedders.checkpoints import Checkpoint
    from lmdbcache.embedders.output_names import OutputName

_STRIDE: Final = 2  # of the encoder's second convolution


class Whisper(ModelFamily):
    """The encoder's outputs; the decoder isn't kept.

    - `mean`, (H,): the mean over all 1500 frames, as in `WhisperForAudioClassification`.
    - `last_hidden_state`, (1500, H): every frame.
    - `valid_mean`, (H,): the mean over the frames of the clip, without those of the padding.
    """

    name = "Whisper"
    model_types = ("whisper",)
    hub_prefixes = ("whisper-", "distil-")
    extractor_type = "WhisperFeatureExtractor"
    model_class = "WhisperModel"
    front_end_id = "soundfile+soxr-hq+mono-mean+zero-pad-30s+whisper-log-mel/1"
    sample_rate = 16000
    outputs = ("mean", "last_hidden_state", "valid_mean")
    num_layers_key = "encoder_layers"
    default_num_layers = 4
    ends_with_norm = True
    implementation = "torch"  # its numpy way is for where torch isn't installed

    def check_settings(self) -> None:
        found, model = self.preprocessor, self.config
        if found.get("dither", 0.0) != 0.0:
            raise ModelLoadError(
                f"{self.folder}: dither is {found['dither']} in preprocessor_config.json: it "
                "adds random numbers, so no two runs agree; set it to 0.0"
            )
        self.require(
            "feature_size",
            found=found.get("feature_size", 80),
            expected=model.get("num_mel_bins", 80),
        )
        self.require(
            "the number of frames (chunk_length * sampling_rate / hop_length)",
            found=self.max_samples() // found.get("hop_length", 160),
            expected=_STRIDE * model.get("max_source_positions", 1500),
        )

    def max_samples(self) -> int:
        return int(self.preprocessor.get("chunk_length", 30) * self.sample_rate)

    def state_shape(self, wanted: OutputName, num_samples: int) -> tuple[int, ...] | None:
        size = self.config.get("d_model", 384)
        return (self.config.get("max_source_positions", 1500), size)

    def load(self, checkpoint: Checkpoint) -> Any:
        # A classifier's checkpoint has no decoder, and needs none.
        return load_weights(checkpoint, self, part="encoder.").encoder

    def feature_shape(self, model: Any, num_samples: int) -> tuple[int, ...]:
        return (model.config.num_mel_bins, _STRIDE * model.config.max_source_positions)

    def blocks(self, model: Any) -> Sequence[Any]:
        blocks: Sequence[Any] = model.layers
        return blocks

    def run(self, model: Any, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": model(features).last_hidden_state}

    def num_valid_steps(self, wanted: OutputName, num_valid: int, num_steps: int) -> int:
        """Count as transformers does: a frame for each hop that begins in the clip, then half."""
        frames = -(-num_valid // int(self.preprocessor.get("hop_length", 160)))
        return -(-frames // _STRIDE)
