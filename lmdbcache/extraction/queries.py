"""Queries for a search: a clip or a text, embedded by the model that filled a store."""

from __future__ import annotations

import os
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.embedders import AudioModel, embed_texts, ready_model
from lmdbcache.errors import AudioDecodeError, ProvenanceMismatchError
from lmdbcache.extraction.auditing import computed_of, recorded_model
from lmdbcache.storage import EmbeddingReader

_QUERY: Final = "query:clip"
_Model = str | os.PathLike[str] | AudioModel | None


def embed_clip(
    reader: EmbeddingReader,
    clip: str | os.PathLike[str],
    *,
    model: _Model = None,
    device: str | None = None,
) -> npt.NDArray[np.float32]:
    """Embed an audio file as an extraction for this store does. Stores nothing.

    Args:
        reader: Of the store.
        clip: The file; cut or padded to the config's duration.
        model: Hub name, checkpoint folder or `AudioModel`; None takes the one that filled the
            store.
        device: Where the model runs; None takes a CUDA GPU if there is one.

    Returns:
        `embedding_shape` of the store.

    Raises:
        AudioDecodeError: The file gives no embedding.
        ModelLoadError: The model can't be loaded.
        ProvenanceMismatchError: It has other weights than the one that filled the store.
    """
    config = reader.config.replace(window=None)
    found = _model_of(reader, model)
    embedder = found.make_embedder(config, device)
    _check_weights(reader, embedder.provenance())
    computed, failed = computed_of(
        config,
        {_QUERY: os.fspath(clip)},
        found.make_front_end(config),
        embedder,
        batch_size=1,
        num_workers=0,
    )
    if failed:
        raise AudioDecodeError(failed[_QUERY])
    return computed[0][1]


def embed_text(
    reader: EmbeddingReader, text: str, *, model: _Model = None
) -> npt.NDArray[np.float32]:
    """Embed a text by the text half of the model that filled a store: CLAP, `audio_embeds`.

    Args:
        reader: Of the store.
        text: Such as `"a dog barks"`.
        model: See `embed_clip`.

    Returns:
        `embedding_shape` of the store; to be compared by cosine.

    Raises:
        ConfigError: The model has no text half, or the store holds another output.
        ModelLoadError: The model or its tokenizer can't be loaded.
        ProvenanceMismatchError: See `embed_clip`.
    """
    found: Any = _model_of(reader, model)
    embedding: npt.NDArray[np.float32] = embed_texts(found, reader.config, [text])[0]
    _check_weights(reader, found.checkpoint.provenance())
    return embedding


def _model_of(reader: EmbeddingReader, model: _Model) -> AudioModel:
    config, provenance = reader.config, reader.metadata.provenance
    return ready_model(model or recorded_model(provenance) or config.model_name, config)


def _check_weights(reader: EmbeddingReader, now: dict[str, str]) -> None:
    stored = reader.metadata.provenance.get("weights_digest")
    found = now.get("weights_digest")
    if stored and found and stored != found:
        raise ProvenanceMismatchError(
            f"{reader.path} was filled with weights {stored}, and the model here has {found}: "
            "their embeddings can't be compared. Give the checkpoint that filled it: `model`"
        )
