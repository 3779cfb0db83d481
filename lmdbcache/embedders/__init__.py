"""Embedders: from an audio file to an embedding.

Decoding (`load_waveform`), finding a checkpoint (`find_checkpoint`, `model_identity`) and the Audio
Spectrogram Transformer. Importing this package loads neither torch nor transformers.
"""

from lmdbcache.embedders.audio import decode, fit, is_digital_silence, load_waveform
from lmdbcache.embedders.audio_spectrogram_transformer import ASTEmbedder, ASTFrontEnd
from lmdbcache.embedders.base import Embedder, FrontEnd
from lmdbcache.embedders.checkpoints import (
    Checkpoint,
    fetch_checkpoint,
    find_checkpoint,
    model_identity,
    weights_digest,
)

__all__ = [
    "ASTEmbedder",
    "ASTFrontEnd",
    "Checkpoint",
    "Embedder",
    "FrontEnd",
    "decode",
    "fetch_checkpoint",
    "find_checkpoint",
    "fit",
    "is_digital_silence",
    "load_waveform",
    "model_identity",
    "weights_digest",
]
