"""The options that make a `CacheConfig`: of what is to be computed, or was elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import click
from click.core import ParameterSource

from lmdbcache.cache import EmbeddingCache, read_store_info
from lmdbcache.cli.command import Option
from lmdbcache.cli.options import Decoder, complete_store, find_folder, stored_config
from lmdbcache.config import DEFAULT_MODEL_NAME, CacheConfig
from lmdbcache.embedders import AudioModel, config_for, described_model
from lmdbcache.errors import ConfigError

StoredConfig = Annotated[
    str | None,
    Option(
        "--config",
        metavar="STORE",
        help="Take all of it from a store that is there: its fingerprint, or the first digits.",
        complete=complete_store,
        show_default=False,
    ),
]


@dataclass(frozen=True)
class _ModelChoice:
    """A model, and how its embeddings are computed."""

    model: Annotated[
        str,
        Option(
            help="Alias (ast), Hub name, or a folder with a checkpoint: AST, wav2vec 2.0, HuBERT, "
            "WavLM, Whisper, CLAP, …"
        ),
    ] = "ast"
    model_name: Annotated[
        str | None,
        Option(
            help="Name of the model in the cache; default: --model, or for a folder its name and "
            "digest.",
            show_default=False,
        ),
    ] = None
    sample_rate: Annotated[
        int | None,
        Option(
            help="Sample rate of the waveform, in Hz; default: the model's own.", show_default=False
        ),
    ] = None
    duration: Annotated[
        float | None,
        Option(
            help="Clips are cut or padded to this, in seconds; default: 5, or --window.",
            show_default=False,
        ),
    ] = None
    window: Annotated[
        float | None,
        Option(
            help="Embed whole recordings, in windows of so many seconds, each stored as "
            "file_id@start:class.",
            show_default=False,
        ),
    ] = None
    hop: Annotated[
        float | None,
        Option(
            help="From the start of one window to the next, in seconds; default: --window.",
            show_default=False,
        ),
    ] = None
    last_window: Annotated[
        str,
        Option(
            help="At the end of a recording: pad the window that reaches it, drop what is less "
            "than a window, or align one more window to the end."
        ),
    ] = "pad"
    compute_dtype: Annotated[
        str,
        Option(
            help="The model computes in float32, bfloat16 or float16. bfloat16 is faster on recent "
            "GPUs and differs by about 1 %; each has a separate store."
        ),
    ] = "float32"

    front_end: Annotated[
        str | None,
        Option(
            help="Name of the front end in the cache; default: the model's own.", show_default=False
        ),
    ] = None

    decoder: Decoder = None

    stored: StoredConfig = None

    def of(
        self, cache: EmbeddingCache, dataset: str, output: str | None, dtype: str
    ) -> CacheConfig:
        """The config of one output of this model for a dataset.

        Raises:
            ConfigError: A value can't identify a cache, or --config has no room for it.
            CacheNotFoundError: --config names no store.
            ModelLoadError: The folder isn't a checkpoint of a model that is supported.
        """
        if self.stored is not None:
            _check_alone(set(vars(self)) - {"model", "stored"})
            config = stored_config(find_folder(cache, self.stored))
            if dataset != config.namespace and _is_given("data_dir", "namespace"):
                raise ConfigError(
                    f"--config {self.stored} is of the dataset {config.namespace!r}, not of "
                    f"{dataset!r}; choose another store, or --namespace"
                )
            return config
        own = {field.name: getattr(self, field.name) for field in fields(_ModelChoice)}
        own |= {"model": self.model or DEFAULT_MODEL_NAME, "namespace": dataset}
        del own["stored"]
        return config_for(**own, output=output, dtype=dtype)

    def model_in(self, cache: EmbeddingCache) -> str:
        """The model to load: --model, else for --config the one that the store was filled from."""
        if self.stored is None or _is_given("model"):
            return self.model
        from lmdbcache.extraction import recorded_model

        info = read_store_info(find_folder(cache, self.stored))
        return recorded_model(info.provenance) or stored_config(info.path).model_name


@dataclass(frozen=True)
class ConfigChoice(_ModelChoice):
    """A model, and how its embeddings are computed and stored."""

    output: Annotated[
        str | None,
        Option(
            help="pooler_output, last_hidden_state, mean (over time), valid_mean (without "
            "padding), layer:6/mean, layers/mean, …; default: pooler_output if the model has it, "
            "else mean.",
            show_default=False,
        ),
    ] = None
    dtype: Annotated[str, Option(help="Stored as float32, float16, bfloat16 or int8.")] = "float32"

    def config(self, cache: EmbeddingCache, dataset: str) -> CacheConfig:
        """The config of this model's embeddings of a dataset; errors as for `of`."""
        return self.of(cache, dataset, self.output, self.dtype)


@dataclass(frozen=True)
class ConfigsChoice(_ModelChoice):
    """A model, and one or more ways to store its embeddings."""

    output: Annotated[
        list[str] | None,
        Option(
            help="pooler_output, last_hidden_state, mean (over time), valid_mean (without "
            "padding), layer:6/mean, layers/mean, …; default: pooler_output if the model has it, "
            "else mean. Several share one pass through the model.",
            show_default=False,
        ),
    ] = None
    dtype: Annotated[
        list[str] | None,
        Option(
            help="Stored as float32, float16, bfloat16 or int8; default: float32. With several, "
            "each output is stored as each of them.",
            show_default=False,
        ),
    ] = None

    def configs(self, cache: EmbeddingCache, dataset: str) -> list[CacheConfig]:
        """The config of each output and dtype, no two alike; errors as for `of`."""
        outputs: Sequence[str | None] = self.output or [None]
        pairs = itertools.product(outputs, self.dtype or ["float32"])
        return list(dict.fromkeys(self.of(cache, dataset, *pair) for pair in pairs))


@dataclass(frozen=True)
class GivenConfig:
    """Fields of a config, each None where the file itself is to say it."""

    model: Annotated[
        str | None,
        Option(
            help="What computed them: alias (ast), Hub name, or a folder with the checkpoint.",
            show_default=False,
        ),
    ] = None
    model_name: Annotated[
        str | None,
        Option(help="Name of the model in the cache, taken as it is.", show_default=False),
    ] = None
    output: Annotated[
        str | None,
        Option(
            help="pooler_output, last_hidden_state, mean (over time), or another name; default: by "
            "the number of dimensions, and --model.",
            show_default=False,
        ),
    ] = None
    sample_rate: Annotated[
        int | None,
        Option(help="Sample rate of the waveform, in Hz.", show_default=False),
    ] = None
    duration: Annotated[
        float | None,
        Option(help="Clips were cut or padded to this, in seconds.", show_default=False),
    ] = None
    window: Annotated[
        float | None,
        Option(
            help="The ids are those of windows, file_id@start:class, of so many seconds.",
            show_default=False,
        ),
    ] = None
    hop: Annotated[
        float | None,
        Option(help="From the start of one window to the next, in seconds.", show_default=False),
    ] = None
    last_window: Annotated[
        str | None,
        Option(help="pad, drop or align: the last window of a recording.", show_default=False),
    ] = None
    dtype: Annotated[
        str | None,
        Option(
            help="Stored as float32, float16, bfloat16 or int8; default: as it is.",
            show_default=False,
        ),
    ] = None
    compute_dtype: Annotated[
        str | None, Option(help="The model computed in this.", show_default=False)
    ] = None
    namespace: Annotated[
        str | None,
        Option(
            help="Name in the config; default: vegas if all classes are those of VEGAS, else none.",
            show_default=False,
        ),
    ] = None
    front_end: Annotated[
        str | None,
        Option(
            help="Name of the decoding and features; default: those of `lmdbcache extract` with "
            "--model.",
            show_default=False,
        ),
    ] = None

    stored: StoredConfig = None

    def described(self) -> AudioModel | None:
        """The model that is given; none of its weights are loaded.

        Raises:
            ModelLoadError: The folder isn't a checkpoint, or the name is unknown.
        """
        return described_model(self.model) if self.model else None

    def fields(self, cache: EmbeddingCache, model: AudioModel | None) -> dict[str, Any]:
        """The fields of a config that are given, by name; the model is what `described` gave.

        Raises:
            ConfigError: --config and another field.
            CacheNotFoundError: --config names no store.
        """
        if self.stored is not None:
            _check_alone(set(vars(self)) - {"model", "stored"})
            stored = stored_config(find_folder(cache, self.stored)).to_dict()
            return {**stored, "namespace": stored.pop("dataset")}
        name = self.model_name or (model.identity if model is not None else None)
        given = {**vars(self), "model": None, "model_name": name}
        return {field: value for field, value in given.items() if value is not None}


def _is_given(*names: str) -> bool:
    """Whether one of these parameters was typed."""
    context = click.get_current_context()
    return any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in names)


def _check_alone(names: set[str]) -> None:
    parameters = click.get_current_context().command.params
    given = [p.opts[0] for p in parameters if p.name in names and _is_given(p.name)]
    if given:
        raise ConfigError(f"--config takes all from the store; leave out {', '.join(given)}")
