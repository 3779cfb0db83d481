"""The text half of CLAP: a text → a vector in the space of the output `audio_embeds`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.embedders.base import AudioModel
from lmdbcache.embedders.families.clap import CLAP
from lmdbcache.embedders.registry import PretrainedModel
from lmdbcache.embedders.transformers_family import load_errors, load_weights
from lmdbcache.errors import ConfigError


def embed_texts(
    model: AudioModel, config: CacheConfig, texts: Sequence[str]
) -> npt.NDArray[np.float32]:
    """Embed texts, on the CPU, as queries for the embeddings of sounds. Compare by cosine.

    Args:
        model: As `ready_model` gives it.
        config: Of the store that is to be searched.
        texts: Such as `"a dog barks"`.

    Returns:
        `(len(texts), projection_dim)`, not normalized.

    Raises:
        ConfigError: Not a CLAP model, or another output than `audio_embeds`.
        ModelLoadError: The checkpoint lacks its tokenizer or the text half's weights.
        MissingDependencyError: transformers or torch is missing.
    """
    if not isinstance(model, PretrainedModel) or model.family is not CLAP:
        raise ConfigError(
            f"text: {config.model_name} has no text half; search a store of a CLAP model"
        )
    if config.output != "audio_embeds":
        raise ConfigError(
            f"text: the store holds {config.output}; texts are compared with the output "
            "`output='audio_embeds'`"
        )
    transformers = CLAP.import_transformers()
    import torch

    checkpoint = model.checkpoint
    # The files of an audio model, as they are downloaded, have no tokenizer among them.
    place = checkpoint.identity if checkpoint.revision else checkpoint.location
    with load_errors(checkpoint, CLAP):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=checkpoint.revision)
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    text_half = load_weights(checkpoint, CLAP, model_class="ClapTextModelWithProjection")
    with torch.inference_mode():
        found = text_half(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    embeddings: npt.NDArray[np.float32] = found.text_embeds.numpy()
    return embeddings
