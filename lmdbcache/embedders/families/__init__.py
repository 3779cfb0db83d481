"""The kinds of models that lmdbcache runs by itself: one module each, and this table.

To add a family, write a module with a subclass of `ModelFamily` and add it here.
"""

from __future__ import annotations

from typing import Final

from lmdbcache.embedders.families.audio_spectrogram_transformer import AST
from lmdbcache.embedders.families.clap import CLAP
from lmdbcache.embedders.families.wav2vec2 import Wav2Vec2
from lmdbcache.embedders.families.whisper import Whisper
from lmdbcache.embedders.transformers_family import ModelFamily

FAMILIES: Final[tuple[type[ModelFamily], ...]] = (AST, Wav2Vec2, Whisper, CLAP)
