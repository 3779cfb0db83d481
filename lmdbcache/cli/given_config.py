"""The options that describe embeddings from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from lmdbcache.embedders import AudioModel, described_model

__all__ = ["GivenConfig"]

Text = str | None


@dataclass(frozen=True)
class GivenConfig:
    """Fields of a config, each None where the file itself is to say it."""

    model: Annotated[
        Text,
        typer.Option(
            help="What computed them: alias (ast), Hub name, or a folder with the checkpoint.",
            show_default=False,
        ),
    ] = None
    model_name: Annotated[
        Text,
        typer.Option(help="Name of the model in the cache, taken as it is.", show_default=False),
    ] = None
    output: Annotated[
        Text,
        typer.Option(
            help="pooler_output, last_hidden_state, or mean (over time); default: by the number "
            "of dimensions, and --model.",
            show_default=False,
        ),
    ] = None
    sample_rate: Annotated[
        int | None,
        typer.Option(help="Sample rate of the waveform, in Hz.", show_default=False),
    ] = None
    duration: Annotated[
        float | None,
        typer.Option(help="Clips were cut or padded to this, in seconds.", show_default=False),
    ] = None
    dtype: Annotated[
        Text,
        typer.Option(
            help="Stored as float32, float16 or bfloat16; default: as it is.", show_default=False
        ),
    ] = None
    compute_dtype: Annotated[
        Text, typer.Option(help="The model computed in this.", show_default=False)
    ] = None
    namespace: Annotated[
        Text,
        typer.Option(
            help="Name in the config; default: vegas if all classes are those of VEGAS, else none.",
            show_default=False,
        ),
    ] = None
    front_end: Annotated[
        Text,
        typer.Option(
            help="Name of the decoding and features; default: those of `lmdbcache extract` with "
            "--model.",
            show_default=False,
        ),
    ] = None

    def described(self) -> AudioModel | None:
        """The model that is given; none of its weights are loaded.

        Raises:
            ModelLoadError: The folder isn't a checkpoint, or the name is unknown.
        """
        return described_model(self.model) if self.model else None

    def fields(self, model: AudioModel | None) -> dict[str, Any]:
        """The fields of a config that are given, by name; the model is what `described` gave."""
        values = {
            "model_name": self.model_name or (model.identity if model is not None else None),
            "output": self.output,
            "sample_rate": self.sample_rate,
            "duration": self.duration,
            "dtype": self.dtype,
            "compute_dtype": self.compute_dtype,
            "namespace": self.namespace,
            "front_end": self.front_end,
        }
        return {field: value for field, value in values.items() if value is not None}
