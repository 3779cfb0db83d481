"""The audio half of CLAP: 10 s of log-mel features in, one vector out.

A shorter clip is repeated, then filled up with zeros, as preprocessor_config.json says. A longer
one is refused: its extractor would take a random part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmdbcache.embedders.forward_pass import ForwardPass
from lmdbcache.embedders.output_names import OutputName, parse_output
from lmdbcache.embedders.transformers_family import ModelFamily

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch


class CLAP(ModelFamily):
    """The audio half's outputs; the text half isn't loaded.

    - `pooler_output`, (H,): the mean over time and frequency.
    - `audio_embeds`, (P,): the same in the space shared with texts, not normalised.
    - `last_hidden_state`, (H, F, T): the feature map, as transformers gives it.
    - `valid_mean`, (H,): its mean over the steps of time that the repeated clip fills.

    A model with feature fusion fuses for every clip, as its extractor asks for when it is called
    with one clip; called with several short ones, it picks one of them at random.
    """

    name = "CLAP"
    model_types = ("clap", "clap_audio_model")
    hub_prefixes = ("clap-", "larger_clap_")
    extractor_type = "ClapFeatureExtractor"
    model_class = "ClapAudioModelWithProjection"
    front_end_id = "soundfile+soxr-hq+mono-mean+clap-repeat-pad+clap-log-mel/1"
    sample_rate = 48000
    outputs = ("pooler_output", "audio_embeds", "last_hidden_state", "valid_mean")
    has_equal_layers = False
    width_axis = 0

    def check_settings(self) -> None:
        found, model = self.preprocessor, self._audio_config
        self.require(
            "feature_size",
            found=found.get("feature_size", 64),
            expected=model.get("num_mel_bins", 64),
        )
        self.require(
            "truncation == 'fusion'",
            found=found.get("truncation", "fusion") == "fusion",
            expected=bool(model.get("enable_fusion", False)),
        )

    def max_samples(self) -> int:
        return int(self.preprocessor.get("max_length_s", 10) * self.sample_rate)

    def num_layers(self) -> int:
        """Return the number of stages."""
        return len(self._audio_config.get("depths", (2, 2, 6, 2)))

    def state_shape(self, wanted: OutputName, num_samples: int) -> tuple[int, ...] | None:
        config = self._audio_config
        if wanted.state == "audio_embeds":
            # The whole model's setting wins over that of its audio half.
            return (self.config.get("projection_dim", config.get("projection_dim", 512)),)
        # Each stage but the last one halves rows and columns, and doubles the width.
        halvings = self.num_layers() - 1
        if wanted.layer is not None:
            halvings = min(halvings, wanted.layer)
        channels = config.get("patch_embeds_hidden_size", 96) * 2**halvings
        if wanted.state == "pooler_output":
            return (channels,)
        ratio = self._num_parts
        if ratio < 1:
            return None
        height = ratio * (config.get("spec_size", 256) // ratio)
        stride = config.get("patch_stride", (4, 4))
        strides = (stride, stride) if isinstance(stride, int) else tuple(stride)
        rows, columns = (height // 2**halvings // step for step in strides)
        if wanted.is_of_layers:
            return (channels, rows, columns)
        bins = rows // ratio
        return (channels, bins, rows // bins * columns) if bins else None

    def feature_shape(self, model: Any, num_samples: int) -> tuple[int, ...]:
        return (
            4 if model.config.enable_fusion else 1,
            self.max_samples() // self.preprocessor.get("hop_length", 480) + 1,
            model.config.num_mel_bins,
        )

    def forward(self, model: Any, features: torch.Tensor, outputs: Collection[str]) -> ForwardPass:
        import torch

        fuses = model.config.enable_fusion
        is_longer = torch.full((len(features), 1), fuses, device=features.device)
        has_layers = any(parse_output(output).is_of_layers for output in outputs)
        result = model.audio_model(
            features, is_longer=is_longer, output_hidden_states=has_layers, return_dict=True
        )
        named = {name: result[name] for name in ("pooler_output", "last_hidden_state")}
        if "audio_embeds" in outputs:
            named["audio_embeds"] = model.audio_projection(result.pooler_output)
        return ForwardPass(named, dict(enumerate(result.hidden_states or ())))

    def run(self, model: Any, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.forward(model, features, ()).named

    def frames(self, state: torch.Tensor, wanted: OutputName) -> tuple[torch.Tensor, int]:
        """Return a feature map with its parts of time side by side, band after band."""
        if wanted.is_of_layers:  # the parts still lie one below the other
            parts = self._num_parts
            batch, channels, rows, columns = state.shape
            split = state.reshape(batch, channels, parts, rows // parts, columns)
            state = split.transpose(2, 3).reshape(batch, channels, rows // parts, parts * columns)
        return state.flatten(2).transpose(1, 2), state.shape[-1]

    def num_valid_steps(self, wanted: OutputName, num_valid: int, num_steps: int) -> int:
        """Count the steps that begin in the clip, which is repeated as its settings say."""
        length = self.max_samples()
        padding = self.preprocessor.get("padding", "repeatpad")
        if padding == "repeat":
            return num_steps
        filled = num_valid * (length // num_valid) if padding == "repeatpad" else num_valid
        return -(-num_steps * filled // length)

    @property
    def _audio_config(self) -> dict[str, Any]:
        is_whole = self.model_type == "clap"
        return (self.config.get("audio_config") or {}) if is_whole else self.config

    @property
    def _num_parts(self) -> int:
        """Into how many parts the spectrogram is cut, one below the other, to be a square."""
        config = self._audio_config
        return int(config.get("spec_size", 256) // config.get("num_mel_bins", 64))
