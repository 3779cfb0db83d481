"""The kind of model that a checkpoint is, and the config that its embeddings have.

Neither torch nor transformers is imported: config.json says what a checkpoint is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdbcache.audio import by_soundfile, with_decoder
from lmdbcache.config import DEFAULT_MODEL_NAME, UNSTATED_FRONT_END, CacheConfig
from lmdbcache.embedders.base import AudioModel, Embedder, FrontEnd
from lmdbcache.embedders.checkpoint_files import read_json
from lmdbcache.embedders.checkpoints import (
    Checkpoint,
    fetch_checkpoint,
    find_checkpoint,
    identify,
    settings_folder,
)
from lmdbcache.embedders.families import FAMILIES
from lmdbcache.embedders.transformers_family import (
    ModelFamily,
    TransformersEmbedder,
    TransformersFrontEnd,
)
from lmdbcache.errors import ConfigError, MissingDependencyError, ModelLoadError


@dataclass(frozen=True)
class PretrainedModel:
    """An `AudioModel` that transformers implements; nothing of it is loaded.

    Args:
        checkpoint: Where its files are.
        family: Which kind of model it is.
        known: The same with its JSON files; None if they aren't on this machine, and the family is
            known from the model's name on the Hub.
    """

    checkpoint: Checkpoint
    family: type[ModelFamily]
    known: ModelFamily | None

    @property
    def identity(self) -> str:
        """The value for `CacheConfig.model_name`."""
        return self.checkpoint.identity

    @property
    def front_end_id(self) -> str:
        """The value for `CacheConfig.front_end`."""
        return self.family.front_end_id

    @property
    def sample_rate(self) -> int:
        """Of the waveforms that it was trained with, in Hz."""
        return (self.known or self.family).sample_rate

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names that `output` can take, the default one first; layers aren't listed."""
        return self.family.outputs

    def check(self, config: CacheConfig) -> None:
        """Check that this model can fill a store of this config.

        Raises:
            ConfigError: It has no such output, takes no clip of this duration, or the config's
                front end is that of another kind of model.
        """
        last = None if self.known is None else self.known.num_layers()
        self.family.check_output(config.output, last)
        others = {family.front_end_id: family.name for family in FAMILIES}
        if config.front_end == UNSTATED_FRONT_END:
            raise ConfigError(
                f"front_end: not stated in the config, and {self.identity} has the front end "
                f"{self.front_end_id!r}; config_for(model, model_name={config.model_name!r}) makes "
                "the right config"
            )
        front_end = by_soundfile(config.front_end)
        # Another name, given by the user, is left alone.
        if front_end in others and front_end != self.front_end_id:
            raise ConfigError(
                f"front_end: {config.front_end!r} is that of {others[front_end]}, and "
                f"{self.identity} is a {self.family.name} model with the front end "
                f"{self.front_end_id!r}; config_for(model) makes the right config"
            )
        limit = self.known.max_samples() if self.known else None
        # Another sample rate is the front end's to refuse.
        is_own_rate = config.sample_rate == self.sample_rate
        if limit is not None and is_own_rate and config.num_samples > limit:
            raise ConfigError(
                f"duration: {config.duration} s is more than {self.identity} takes; use a duration "
                f"of {limit / self.sample_rate:g} s or less"
            )

    def embedding_shape(self, config: CacheConfig) -> tuple[int, ...] | None:
        """Return the shape of one embedding; None if no config.json here says it."""
        if self.known is None:
            return None
        try:
            return self.known.embedding_shape(config.output, config.num_samples)
        except (TypeError, ValueError, ZeroDivisionError):
            return None  # loading the model will say what is wrong with its sizes

    def make_front_end(self, config: CacheConfig) -> FrontEnd:
        """Make the front end for clips of this config.

        Raises:
            ConfigError: The sample rate isn't the model's.
        """
        return TransformersFrontEnd(self.family, self.checkpoint, config.sample_rate)

    def make_embedder(self, config: CacheConfig, device: str | None = None) -> Embedder:
        """Load the model.

        Raises:
            ConfigError: An unknown device.
            ModelLoadError: The checkpoint is damaged or incomplete.
            MissingDependencyError: transformers or torch is missing.
        """
        return TransformersEmbedder(
            self.family,
            self.checkpoint,
            config.output,
            device,
            config.compute_dtype,
            num_samples=config.num_samples,
        )


def find_model(model: str | os.PathLike[str] | AudioModel) -> AudioModel:
    """Return the model that a name or a folder means; no weights are loaded.

    A Hub model that isn't on this machine is recognised by its name if that begins like those of
    its kind (`openai/whisper-…`); otherwise its two JSON files are downloaded.

    Args:
        model: Alias, Hub name, checkpoint folder; or an `AudioModel`, which comes back as it is.

    Raises:
        ModelLoadError: A kind of model that isn't supported, or its settings can't be had.
        ConfigError: A name that can't be a model's.
        MissingDependencyError: A Hub name, and huggingface_hub isn't installed.
    """
    if not isinstance(model, (str, os.PathLike)):
        return _checked(model)
    checkpoint = find_checkpoint(model)
    return _on_this_machine(checkpoint) or _downloaded(checkpoint)


def known_model(model: str | os.PathLike[str] | AudioModel) -> AudioModel | None:
    """Return the same without ever asking the network; None if it would have to be asked.

    Raises:
        ModelLoadError, ConfigError, MissingDependencyError: See `find_model`.
    """
    if not isinstance(model, (str, os.PathLike)):
        return _checked(model)
    return _on_this_machine(find_checkpoint(model))


def ready_model(model: str | os.PathLike[str] | AudioModel, config: CacheConfig) -> AudioModel:
    """Return the same with its files on this machine, downloaded from the Hub if need be.

    Args:
        model: As for `find_model`.
        config: What is to be stored; checked before anything large is downloaded.

    Raises:
        ConfigError: The model can't fill a store of this config.
        ModelLoadError: See `find_model` and `fetch_checkpoint`.
    """
    found = find_model(model)
    found.check(config)
    if isinstance(found, PretrainedModel) and not found.checkpoint.is_local:
        checkpoint = fetch_checkpoint(found.checkpoint)
        found = _by_files(checkpoint, Path(checkpoint.location))
        found.check(config)
    return found


def config_for(  # noqa: PLR0913
    model: str | os.PathLike[str] | AudioModel = DEFAULT_MODEL_NAME,
    *,
    output: str | None = None,
    duration: float | None = None,
    namespace: str = "",
    sample_rate: int | None = None,
    dtype: str = "float32",
    compute_dtype: str = "float32",
    model_name: str | None = None,
    front_end: str | None = None,
    decoder: str | None = None,
    window: float | None = None,
    hop: float | None = None,
    last_window: str = "pad",
    dataset: str | None = None,
) -> CacheConfig:
    """Return the config under which a model's embeddings are stored; no weights are loaded.

    Args:
        model: Alias, Hub name, checkpoint folder, or an `AudioModel` such as `ModuleEmbedder`.
        output: None takes the model's first one: `pooler_output` if it has that, else `mean`.
        duration: Length that each clip is cut or padded to, in seconds; None takes `window`, or
            5.0 without one.
        namespace: Name of the dataset, see `CacheConfig`.
        sample_rate: In Hz; None takes the one that the model was trained with.
        dtype: Stored dtype.
        compute_dtype: dtype the model computes in.
        model_name: Name of the model in the cache; None takes its identity.
        front_end: Name of the decoding and feature rules; None takes the model's.
        decoder: `"soundfile"`, or `"ffmpeg"` for files that libsndfile doesn't read (m4a, mp4,
            webm, …): all clips of the store are decoded by it, and the front end's name begins
            with it. None takes the front end's, which is soundfile unless it says otherwise.
        window: Embed recordings in windows of this length, in seconds, see `CacheConfig`.
        hop: From one window to the next, in seconds; None takes `window`.
        last_window: `"pad"`, `"drop"` or `"align"`, see `CacheConfig`.
        dataset: Same as `namespace`.

    Raises:
        ConfigError: A value can't identify a cache.
        ModelLoadError: See `find_model`.
    """
    described = described_model(model)
    front_end = front_end or described.front_end_id
    return CacheConfig(
        sample_rate=described.sample_rate if sample_rate is None else sample_rate,
        duration=duration,
        model_name=model_name or described.identity,
        output=output or described.outputs[0],
        dtype=dtype,
        namespace=namespace if dataset is None else dataset,
        front_end=front_end if decoder is None else with_decoder(front_end, decoder),
        compute_dtype=compute_dtype,
        window=window,
        hop=hop,
        last_window=last_window,
    )


def described_model(model: str | os.PathLike[str] | AudioModel) -> AudioModel:
    """Return the model for its identity only: the weights of a Hub model aren't read.

    Args:
        model: As for `find_model`.

    Raises:
        ModelLoadError, ConfigError, MissingDependencyError: See `find_model`.
    """
    if not isinstance(model, (str, os.PathLike)):
        return _checked(model)
    checkpoint = identify(model)
    family = _family_by_name(checkpoint.identity)
    if checkpoint.identity == DEFAULT_MODEL_NAME and family is not None:
        return PretrainedModel(checkpoint, family, None)
    try:
        return _on_this_machine(checkpoint) or _downloaded(checkpoint)
    except MissingDependencyError:
        # Where nothing but the cache itself is installed, a name has to do.
        if family is None:
            raise
        return PretrainedModel(checkpoint, family, None)


def _on_this_machine(checkpoint: Checkpoint) -> PretrainedModel | None:
    folder = settings_folder(checkpoint)
    if folder is not None:
        return _by_files(checkpoint, folder)
    family = _family_by_name(checkpoint.identity)
    return None if family is None else PretrainedModel(checkpoint, family, None)


def _downloaded(checkpoint: Checkpoint) -> PretrainedModel:
    folder = settings_folder(checkpoint, download=True)
    return _by_files(checkpoint, folder or Path(checkpoint.location))


def _by_files(checkpoint: Checkpoint, folder: Path) -> PretrainedModel:
    model_type = read_json(folder / "config.json").get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return PretrainedModel(checkpoint, family, family.read(folder))
    known = "; ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise ModelLoadError(
        f"{folder}: config.json says model_type {model_type!r}, which isn't among those that "
        f"lmdbcache runs by itself: {known}. Any torch.nn.Module can be run from Python with "
        "lmdbcache.ModuleEmbedder"
    )


def _family_by_name(name: str) -> type[ModelFamily] | None:
    last = name.rsplit("/", 1)[-1].lower()
    for family in FAMILIES:
        if last.startswith(family.hub_prefixes):
            return family
    return None


def _checked(model: Any) -> AudioModel:
    if not isinstance(model, AudioModel):
        raise ConfigError(
            f"model: a {type(model).__name__}; give a Hub name, a checkpoint folder, or a "
            "lmdbcache.ModuleEmbedder around a torch.nn.Module"
        )
    return model
