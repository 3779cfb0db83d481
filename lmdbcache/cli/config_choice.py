"""The options that make a `CacheConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from lmdbcache.cli.options import Decoder
from lmdbcache.config import DEFAULT_MODEL_NAME, CacheConfig
from lmdbcache.embedders import config_for

__all__ = ["ConfigChoice"]


@dataclass(frozen=True)
class ConfigChoice:
    """A model, and how its embeddings are computed and stored."""

    model: Annotated[
        str,
        typer.Option(
            help="Alias (ast), Hub name, or a folder with a checkpoint: AST, wav2vec 2.0, HuBERT, "
            "WavLM, Whisper, CLAP, …"
        ),
    ] = "ast"
    model_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the model in the cache; default: --model, or for a folder its name and "
            "digest.",
            show_default=False,
        ),
    ] = None
    output: Annotated[
        str | None,
        typer.Option(
            help="pooler_output, last_hidden_state, or mean (over time); default: pooler_output if "
            "the model has it, else mean.",
            show_default=False,
        ),
    ] = None
    sample_rate: Annotated[
        int | None,
        typer.Option(
            help="Sample rate of the waveform, in Hz; default: the model's own.", show_default=False
        ),
    ] = None
    duration: Annotated[
        float, typer.Option(help="Clips are cut or padded to this, in seconds.")
    ] = 5.0
    dtype: Annotated[str, typer.Option(help="Stored as float32, float16 or bfloat16.")] = "float32"
    compute_dtype: Annotated[
        str,
        typer.Option(
            help="The model computes in float32, bfloat16 or float16. bfloat16 is faster on recent "
            "GPUs and differs by about 1 %; each has a separate store."
        ),
    ] = "float32"

    front_end: Annotated[
        str | None,
        typer.Option(
            help="Name of the front end in the cache; default: the model's own.", show_default=False
        ),
    ] = None

    decoder: Decoder = None

    def config(self, dataset: str) -> CacheConfig:
        """The config of this model's embeddings of a dataset.

        Raises:
            ConfigError: A value can't identify a cache.
            ModelLoadError: The folder isn't a checkpoint of a model that is supported.
        """
        return config_for(
            self.model or DEFAULT_MODEL_NAME,
            output=self.output,
            duration=self.duration,
            namespace=dataset,
            sample_rate=self.sample_rate,
            dtype=self.dtype,
            compute_dtype=self.compute_dtype,
            model_name=self.model_name,
            front_end=self.front_end,
            decoder=self.decoder,
        )
