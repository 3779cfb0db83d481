"""The audio half of CLAP: 10 s of log-mel features in, one vector out.

A shorter clip is repeated, then filled up with zeros, as preprocessor_config.json says. A longer
one is refused: its extractor would take a random part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lmdbcache.embedders.transformers_family import ForwardPass, ModelFamily, Settings

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

__all__ = ["CLAP"]


class _CLAPFamily(ModelFamily):
    """The audio half's outputs; the text half isn't loaded.

    - `pooler_output`, (H,): the mean over time and frequency.
    - `audio_embeds`, (P,): the same in the space shared with texts, not normalised.
    - `last_hidden_state`, (H, F, T): the feature map, as transformers gives it.

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
        return int(settings.preprocessor.get("max_length_s", 10) * settings.sample_rate)

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

    def feature_shape(
        self,
        model: Any,
        settings: Settings,
        num_samples: int,  # noqa: ARG002
    ) -> tuple[int, ...]:
        return (
            4 if model.config.enable_fusion else 1,
            self.max_samples(settings) // settings.preprocessor.get("hop_length", 480) + 1,
            model.config.num_mel_bins,
        )

    def forward(
        self,
        model: Any,
        features: torch.Tensor,
        settings: Settings,  # noqa: ARG002
        outputs: Collection[str],
    ) -> ForwardPass:
        import torch

        fuses = model.config.enable_fusion
        is_longer = torch.full((len(features), 1), fuses, device=features.device)
        result = model.audio_model(features, is_longer=is_longer)
        named = {
            "pooler_output": result.pooler_output,
            "last_hidden_state": result.last_hidden_state,
        }
        if "audio_embeds" in outputs:
            named["audio_embeds"] = model.audio_projection(result.pooler_output)
        return ForwardPass(named)


CLAP: Final = _CLAPFamily()


def _audio_config(settings: Settings) -> dict[str, Any]:
    if settings.model_type != "clap":
        return settings.config
    return settings.config.get("audio_config") or {}
