"""Write small, randomly initialised checkpoints of each family, for tests and demonstrations.

They have the file layout of the published ones and take milliseconds. Their embeddings mean
nothing.

    python tools/small_models.py KIND FOLDER [--seed 0]

with KIND one of wav2vec2, hubert, wavlm, whisper, clap, …
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "save_small_model"]

_WAVEFORM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 7,
}


def _waveform_model(name: str) -> Callable[..., tuple[Any, Any]]:
    def build(
        *, norm: str = "group", return_attention_mask: bool | None = None, **changes: Any
    ) -> tuple[Any, Any]:
        import transformers

        sizes = dict(_WAVEFORM)
        if name == "Data2VecAudio":  # always layer-normalised
            norm = "layer"
            sizes |= {"conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2}
        else:
            changes |= {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
        config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
        extractor = transformers.Wav2Vec2FeatureExtractor(
            return_attention_mask=norm == "layer"
            if return_attention_mask is None
            else return_attention_mask
        )
        return getattr(transformers, f"{name}Model")(config), extractor

    return build


def _whisper(**changes: Any) -> tuple[Any, Any]:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "vocab_size": 50,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "max_source_positions": 100,  # 2 s instead of 30
    }
    config = WhisperConfig(**{**sizes, **changes})
    return WhisperModel(config), WhisperFeatureExtractor(
        feature_size=config.num_mel_bins, chunk_length=config.max_source_positions // 50
    )


def _clap(*, fusion: bool = False, **changes: Any) -> tuple[Any, Any]:
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    audio = {
        "spec_size": 128,
        "num_mel_bins": 32,
        "window_size": 4,
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "hidden_size": 64,
        "projection_dim": 16,
        "enable_fusion": fusion,
        "aff_block_r": 2,
        "patch_embed_input_channels": 1,
    }
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = ClapConfig(audio_config={**audio, **changes}, text_config=text, projection_dim=16)
    extractor = ClapFeatureExtractor(
        feature_size=config.audio_config.num_mel_bins,
        max_length_s=2,  # instead of 10
        truncation="fusion" if fusion else "rand_trunc",
    )
    return ClapModel(config), extractor


KINDS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "wav2vec2": _waveform_model("Wav2Vec2"),
    "hubert": _waveform_model("Hubert"),
    "wavlm": _waveform_model("WavLM"),
    "data2vec-audio": _waveform_model("Data2VecAudio"),
    "unispeech": _waveform_model("UniSpeech"),
    "unispeech-sat": _waveform_model("UniSpeechSat"),
    "wav2vec2-conformer": _waveform_model("Wav2Vec2Conformer"),
    "whisper": _whisper,
    "clap": _clap,
}


def save_small_model(kind: str, folder: str | Path, *, seed: int = 0, **options: Any) -> Path:
    """Save a small random model and its feature extractor with `save_pretrained`.

    Args:
        kind: One of `KINDS`.
        folder: Where to; made if it doesn't exist.
        seed: The same seed and options give the same weights.
        options: Fields of the model's config; `norm` (`"group"` or `"layer"`) and
            `return_attention_mask` of a waveform model, `fusion` of CLAP.

    Returns:
        The folder.
    """
    import torch
    from transformers.utils import logging

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model, extractor = KINDS[kind](**options)
        for name, parameter in model.named_parameters():
            # The default of 0.02 lets a random model of this size forget its input.
            if parameter.ndim > 1 and "conv" not in name and "norm" not in name:
                parameter.normal_(std=0.2)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small random checkpoint.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(save_small_model(**vars(arguments)))


if __name__ == "__main__":
    main()
