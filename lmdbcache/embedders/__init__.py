"""Embedders: from an audio file to an embedding.

Decoding (`load_waveform`), finding a checkpoint (`find_checkpoint`, `model_identity`), the families
of models that transformers implements (`find_model`, `config_for`) and any torch module
(`ModuleEmbedder`). Importing this package loads neither torch nor transformers.
"""

from lmdbcache.embedders.audio import decode, fit, is_digital_silence, load_waveform
from lmdbcache.embedders.audio_spectrogram_transformer import ASTEmbedder, ASTFrontEnd
from lmdbcache.embedders.base import AudioModel, Embedder, FrontEnd
from lmdbcache.embedders.checkpoints import (
    Checkpoint,
    fetch_checkpoint,
    find_checkpoint,
    model_identity,
    weights_digest,
)
from lmdbcache.embedders.module_embedder import ModuleEmbedder
from lmdbcache.embedders.registry import PretrainedModel, config_for, find_model

__all__ = [
    "ASTEmbedder",
    "ASTFrontEnd",
    "AudioModel",
    "Checkpoint",
    "Embedder",
    "FrontEnd",
    "ModuleEmbedder",
    "PretrainedModel",
    "config_for",
    "decode",
    "fetch_checkpoint",
    "find_checkpoint",
    "find_model",
    "fit",
    "is_digital_silence",
    "load_waveform",
    "model_identity",
    "weights_digest",
]
