"""One small checkpoint of each kind, written when it is first asked for."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from small_ast import save_small_ast
from small_models import save_small_model

# Name of a variant → kind and options.
VARIANTS = {
    "wav2vec2": ("wav2vec2", {}),
    "wav2vec2-masked": ("wav2vec2", {"norm": "layer"}),
    "wav2vec2-unmasked": ("wav2vec2", {"norm": "layer", "return_attention_mask": False}),
    "wav2vec2-adapter": ("wav2vec2", {"norm": "layer", "add_adapter": True}),
    "hubert": ("hubert", {}),
    "hubert-masked": ("hubert", {"norm": "layer"}),
    "wavlm": ("wavlm", {}),
    "wavlm-masked": ("wavlm", {"norm": "layer"}),
    "data2vec-audio": ("data2vec-audio", {}),
    "unispeech": ("unispeech", {}),
    "unispeech-sat": ("unispeech-sat", {}),
    "wav2vec2-conformer": ("wav2vec2-conformer", {"norm": "layer"}),
    "whisper": ("whisper", {}),
    "clap": ("clap", {}),
    "clap-fused": ("clap", {"fusion": True}),
}


@cache
def _base() -> Path:
    base = Path(tempfile.mkdtemp(prefix="small-models-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    return base


@cache
def folder_of(variant: str) -> Path:
    """A checkpoint's folder; not to be changed."""
    folder = _base() / variant
    if variant == "ast":
        return save_small_ast(folder, max_length=128)
    kind, options = VARIANTS[variant]
    return save_small_model(kind, folder, **options)
