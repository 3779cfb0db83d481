"""Audio encoders of transformers: the interface of a family of models, and how one is run.

A family is a kind of model with one feature extractor and one way of being run. Every check that
transformers omits when it loads a checkpoint is made here. transformers and torch are imported at
first use: that takes seconds, which a run with nothing to compute shouldn't pay.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lmdbcache.embedders.base import check_num_samples, check_waveform, library_versions
from lmdbcache.embedders.checkpoint_files import read_json
from lmdbcache.embedders.checkpoints import Checkpoint, fetch_checkpoint
from lmdbcache.embedders.devices import check_compute_dtype, move_to_device, precision
from lmdbcache.embedders.forward_pass import ForwardPass, captured_layers, mean_of_valid
from lmdbcache.embedders.output_names import LAST_HIDDEN_STATE, OutputName, parse_output
from lmdbcache.errors import ConfigError, ModelLoadError
from lmdbcache.files import few
from lmdbcache.machine import needing

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


class ModelFamily(ABC):
    """One kind of model: what identifies its embeddings, and how they are computed.

    An instance is one checkpoint of it: its config.json and preprocessor_config.json.

    Args:
        folder: Where they lie.
        config: The model's settings.
        preprocessor: The feature extractor's settings.
        sample_rate: Of the waveforms that the model was trained with, in Hz.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    """Values of `model_type` in config.json."""
    hub_prefixes: ClassVar[tuple[str, ...]]
    """How the names of its models on the Hub begin, for where config.json isn't available."""
    extractor_type: ClassVar[str]
    """Class of the feature extractor in transformers."""
    features_name: ClassVar[str] = "input_features"
    """Name of the features in what the extractor returns."""
    model_class: ClassVar[str]
    """Class of the model in transformers."""
    front_end_id: ClassVar[str]
    """The value for `CacheConfig.front_end`."""
    sample_rate: int
    """The default of preprocessor_config.json's sampling_rate, in Hz."""
    outputs: ClassVar[tuple[str, ...]]
    """The default one first; those of layers aren't listed."""
    num_layers_key: ClassVar[str] = "num_hidden_layers"
    """Name of the number of blocks in config.json."""
    default_num_layers: ClassVar[int] = 12
    has_equal_layers: ClassVar[bool] = True
    """Whether all layers have one shape, so that they can be stacked."""
    ends_with_norm: ClassVar[bool] = False
    """Whether the last layer is the last hidden state, after the norm that follows the blocks."""
    width_axis: ClassVar[int] = -1
    """Where the width is in the shape of a clip's hidden states."""
    takes_num_valid: ClassVar[bool] = True
    """Whether the extractor gets the clip without the zeros that fill it up to the duration."""
    implementation: ClassVar[str] = "numpy"
    """What the extractor computes with."""

    def __init__(
        self, folder: Path, config: dict[str, Any], preprocessor: dict[str, Any], sample_rate: int
    ) -> None:
        self.folder, self.config, self.preprocessor = folder, config, preprocessor
        self.sample_rate = sample_rate

    @classmethod
    def read(cls, folder: Path) -> ModelFamily:
        """Read a checkpoint's settings, checked against each other.

        Raises:
            ModelLoadError: They don't fit this family or each other.
        """
        config = read_json(folder / "config.json")
        preprocessor = read_json(folder / "preprocessor_config.json")
        kind = config.get("model_type")
        if kind not in cls.model_types:
            raise ModelLoadError(
                f"{folder}: config.json says model_type {kind!r}; {cls.name} is "
                f"{', '.join(cls.model_types)}"
            )
        extractor = preprocessor.get("feature_extractor_type", cls.extractor_type)
        if extractor != cls.extractor_type:
            raise ModelLoadError(
                f"{folder}: preprocessor_config.json is for {extractor}; expected "
                f"{cls.extractor_type}: take both files from the same model"
            )
        rate = preprocessor.get("sampling_rate", cls.sample_rate)
        if type(rate) is not int or rate < 1:
            raise ModelLoadError(
                f"{folder}: sampling_rate is {rate!r} in preprocessor_config.json; expected a "
                "whole number of Hz"
            )
        family = cls(folder, config, preprocessor, rate)
        try:
            family.max_samples()
            family.num_layers()
            family.check_settings()
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ModelLoadError(
                f"{folder}: config.json or preprocessor_config.json has a value that can't be used "
                f"({type(error).__name__}: {error}); save or download the checkpoint again"
            ) from error
        return family

    @property
    def model_type(self) -> str:
        """Transformers' name of the kind of model."""
        return str(self.config.get("model_type"))

    def require(self, name: str, *, found: Any, expected: Any) -> None:
        """Refuse settings that don't fit each other.

        Raises:
            ModelLoadError: `found` in preprocessor_config.json isn't what the model expects.
        """
        if found != expected:
            raise ModelLoadError(
                f"{self.folder}: {name} is {found!r} in preprocessor_config.json, but the model of "
                f"config.json takes {expected!r}; take both from the same model"
            )

    @abstractmethod
    def check_settings(self) -> None:
        """Check that the two files fit each other.

        Raises:
            ModelLoadError: They don't.
        """

    def min_samples(self) -> int:
        """Return the length of the shortest clip that gives features, in samples."""
        return 1

    def max_samples(self) -> int | None:
        """Return the length of the longest clip that the model takes; None: no limit."""
        return None

    def num_layers(self) -> int:
        """Return the number of blocks; the layers are numbered from 0, their first input.

        Raises:
            TypeError: config.json has no whole number there.
        """
        number = self.config.get(self.num_layers_key, self.default_num_layers)
        if type(number) is not int:
            raise TypeError(f"{self.num_layers_key} is {number!r}")
        return number

    @classmethod
    def check_output(cls, output: str, last: int | None) -> None:
        """Check that the model has this output.

        Args:
            output: Its name.
            last: The checkpoint's last layer; None where it isn't known: any may be there.

        Raises:
            ConfigError: It hasn't; the message has those that it has.
        """
        if output in cls.outputs:
            return
        wanted = parse_output(output)
        can_be = wanted.is_of_layers and (cls.has_equal_layers or not wanted.is_stack)
        if can_be and (last is None or (wanted.layer or 0) <= last):
            return
        forms = ["layer:N", "layer:N/mean", "layer:N/valid_mean"]
        if cls.has_equal_layers:
            forms += ["layers", "layers/mean", "layers/valid_mean"]
        raise ConfigError(
            f"output: {output!r}; {cls.name} gives {', '.join(cls.outputs)}, and of its layers "
            f"{', '.join(forms)} (N from 0{'' if last is None else f' to {last}'})"
        )

    def embedding_shape(self, output: str, num_samples: int) -> tuple[int, ...] | None:
        """Return the shape of one embedding; None if the settings don't say."""
        wanted = parse_output(output)
        shape = self.state_shape(wanted, num_samples)
        if shape is None:
            return None
        if wanted.pooling:
            shape = (shape[self.width_axis],)
        return (self.num_layers() + 1, *shape) if wanted.is_stack else shape

    @abstractmethod
    def state_shape(self, wanted: OutputName, num_samples: int) -> tuple[int, ...] | None:
        """Return the shape of one clip's result or layer before pooling; None if it isn't said."""

    @classmethod
    def import_transformers(cls) -> Any:
        """Import transformers, once the packages that it needs are known to work.

        Raises:
            MissingDependencyError: One is missing or can't be imported; the message has the remedy.
        """
        with needing(f"running {cls.name}", "audio"):
            import torch  # noqa: F401 - transformers only finds out at first use
            import transformers
        return transformers

    @classmethod
    def extractor_provenance(cls) -> dict[str, str]:
        """Return the implementation in use (key `feature_extractor`), and library versions."""
        return {
            "feature_extractor": f"{cls.extractor_type} ({cls.implementation})",
            **library_versions("transformers", "soundfile", "soxr"),
        }

    def features(
        self, extract: Callable[..., Any], clip: NDArray[np.float32], num_samples: int
    ) -> NDArray[np.float32]:
        """Compute the features of a clip that fills `num_samples` with its padding.

        Args:
            extract: The checkpoint's feature extractor, for arrays at its sample rate.
            clip: `(num_valid,)`, or `(num_samples,)` without `takes_num_valid`.
            num_samples: That length.
        """
        features: NDArray[np.float32] = extract(clip)[self.features_name][0]
        return features

    def load(self, checkpoint: Checkpoint) -> Any:
        """Load the model, frozen."""
        return load_weights(checkpoint, self)

    @abstractmethod
    def feature_shape(self, model: Any, num_samples: int) -> tuple[int, ...]:
        """Return the shape of one clip's features."""

    def forward(self, model: Any, features: torch.Tensor, outputs: Collection[str]) -> ForwardPass:
        """Run the model once on a batch; no further than to the last layer that is asked for.

        Args:
            model: As `load` gives it.
            features: `(batch, *feature_shape)`, on its device.
            outputs: Those that `pick` will be asked for.
        """
        wanted = [parse_output(output) for output in outputs]
        last = self.num_layers()
        numbers = {number for one in wanted for number in one.layers(last)}
        is_named = self.ends_with_norm and last in numbers
        ends = not is_named and all(one.is_of_layers for one in wanted)
        hooked = numbers - {last} if is_named else numbers
        named: dict[str, torch.Tensor] = {}
        with captured_layers(self.blocks(model), hooked, ends=ends) as layers:
            named = self.run(model, features)
        if is_named:
            layers[last] = named[LAST_HIDDEN_STATE]
        return ForwardPass(named, layers, self.told_valid(features))

    def told_valid(self, features: torch.Tensor) -> list[int] | None:
        """Return how many samples of each clip aren't padding, where its features say so."""
        return None

    def blocks(self, model: Any) -> Sequence[Any]:
        """Return the modules that the layers are the inputs of."""
        blocks: Sequence[Any] = model.encoder.layers
        return blocks

    @abstractmethod
    def run(self, model: Any, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Call the model on a batch, and return its results by name."""

    def pick(self, found: ForwardPass, output: str, num_valid: Sequence[int]) -> torch.Tensor:
        """Return an output of a forward pass, `(batch, *embedding_shape)`.

        Args:
            found: By `forward`, which was asked for it.
            output: Its name.
            num_valid: How many samples of each clip aren't padding.
        """
        import torch

        wanted = parse_output(output)
        if not wanted.is_of_layers:
            return self._pooled(found, found.named[wanted.state], wanted, num_valid)
        picked = [
            self._pooled(found, found.layers[number], wanted, num_valid)
            for number in wanted.layers(self.num_layers())
        ]
        return torch.stack(picked, dim=1) if wanted.is_stack else picked[0]

    def _pooled(
        self, found: ForwardPass, state: torch.Tensor, wanted: OutputName, num_valid: Sequence[int]
    ) -> torch.Tensor:
        if not wanted.pooling:
            return state
        frames, num_steps = self.frames(state, wanted)
        # The mean of a model that is told of the padding leaves it out.
        if wanted.pooling == "mean" and found.num_valid is None:
            return frames.float().mean(dim=1)
        counts = [
            self.num_valid_steps(wanted, count, num_steps) for count in found.num_valid or num_valid
        ]
        return mean_of_valid(frames, num_steps, counts)

    def frames(self, state: torch.Tensor, wanted: OutputName) -> tuple[torch.Tensor, int]:
        """Return what a mean is taken of, `(batch, bands * steps, width)`, and `steps`."""
        return state, state.shape[1]

    @abstractmethod
    def num_valid_steps(self, wanted: OutputName, num_valid: int, num_steps: int) -> int:
        """Return how many of a clip's steps of time its own sound fills.

        Args:
            wanted: Says which state.
            num_valid: How many samples of the clip aren't padding.
            num_steps: Steps in all; more and fewer than one may be returned, and count as these.
        """


class TransformersFrontEnd:
    """A checkpoint's own feature extractor, one clip at a time.

    Pickles as checkpoint and sample rate only; each process builds its own extractor at first use.
    It sets no thread count: in a DataLoader worker torch runs it on one thread.

    Args:
        family: The kind of model.
        checkpoint: As `find_checkpoint` gives it; downloaded at first use if it isn't local.
        sample_rate: Sample rate of the waveforms to come, in Hz.

    Raises:
        ConfigError: `sample_rate` isn't the one that the checkpoint was trained with (for a
            checkpoint that isn't on this machine yet: at first use).
        ModelLoadError: The checkpoint's settings are missing or don't fit.
    """

    def __init__(self, family: type[ModelFamily], checkpoint: Checkpoint, sample_rate: int) -> None:
        self.family = family
        self.checkpoint = checkpoint
        self.sample_rate = sample_rate
        self._known: ModelFamily | None = None
        self._extract: Callable[..., Any] | None = None
        if checkpoint.is_local:
            self._read()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "_extract": None}

    @property
    def identity(self) -> str:
        """Name of the decoding and feature rules."""
        return self.family.front_end_id

    @property
    def takes_num_valid(self) -> bool:
        """Whether the features depend on how much of the waveform is the clip."""
        return self.family.takes_num_valid

    @property
    def min_samples(self) -> int:
        """The shortest clip that gives features, in samples."""
        return (self._known or self._read()).min_samples()

    def __call__(
        self, waveform: NDArray[np.float32], num_valid: int | None = None
    ) -> NDArray[np.float32]:
        """Compute the features of one clip, equal to calling the extractor itself.

        Args:
            waveform: float32 array (num_samples,), mono.
            num_valid: How many samples of it are the clip; the rest is padding. None: all.

        Returns:
            float32 array; the shape depends on the model and `num_samples` only.

        Raises:
            ConfigError: The waveform isn't one-dimensional float32 or is too short.
            ModelLoadError: The extractor can't be loaded.
            MissingDependencyError: A package that the extractor needs is missing.
        """
        check_waveform(waveform)
        clip = waveform[:num_valid]
        check_num_samples(len(clip), self.min_samples, self.sample_rate)
        known = self._known or self._read()
        if self._extract is None:
            self._extract = self._load_extractor()
        import torch

        # A copy: some extractors work on what they are given.
        clip = np.array(clip, dtype=np.float32)
        with torch.inference_mode():
            features = known.features(self._extract, clip, len(waveform))
        return np.ascontiguousarray(features, dtype=np.float32)

    def provenance(self) -> dict[str, str]:
        """Return the implementation in use (key `feature_extractor`), and library versions."""
        self.family.import_transformers()
        return self.family.extractor_provenance()

    def _load_extractor(self) -> Callable[..., Any]:
        transformers = self.family.import_transformers()
        with load_errors(self.checkpoint, self.family), _quiet():
            extractor = getattr(transformers, self.family.extractor_type).from_pretrained(
                self.checkpoint.location, local_files_only=True
            )
        return functools.partial(extractor, sampling_rate=self.sample_rate, return_tensors="np")

    def _read(self) -> ModelFamily:
        self.checkpoint = fetch_checkpoint(self.checkpoint)
        known = self.family.read(Path(self.checkpoint.location))
        if known.sample_rate != self.sample_rate:
            raise ConfigError(
                f"sample_rate: {self.sample_rate} Hz, but {self.checkpoint.identity} was trained "
                f"at {known.sample_rate} Hz; use `sample_rate={known.sample_rate}` (clips are "
                "resampled to it)"
            )
        self._known = known
        return known


class TransformersEmbedder:
    """A frozen model of transformers, with float32 parameters whatever the checkpoint holds.

    With a lower `compute_dtype` torch's autocast decides which operations run in it; with float32 a
    GPU's TF32 is switched off while the model runs, so that machines agree to about 1e-6.

    Args:
        family: The kind of model.
        checkpoint: As `find_checkpoint` gives it; downloaded now if it isn't local.
        output: One of `outputs`; None takes the first one.
        device: Where the model runs; None means a CUDA GPU if there is one, else the CPU.
        compute_dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        num_samples: Length of the waveforms that the front end was given, in samples, for families
            whose features have it, and for `valid_mean`.

    Raises:
        ConfigError: An unknown output, device or compute dtype.
        ModelLoadError: Another kind of checkpoint, damaged, incomplete, or not to be had.
        MissingDependencyError: A package that the model needs is missing.
    """

    def __init__(
        self,
        family: type[ModelFamily],
        checkpoint: Checkpoint,
        output: str | None = None,
        device: str | torch.device | None = None,
        compute_dtype: str = "float32",
        *,
        num_samples: int = 0,
    ) -> None:
        self.output = output or family.outputs[0]
        family.check_output(self.output, None)
        check_compute_dtype(compute_dtype)
        family.import_transformers()
        self.num_samples = num_samples
        self.compute_dtype = compute_dtype
        self.checkpoint = fetch_checkpoint(checkpoint)
        self.family = family.read(Path(self.checkpoint.location))
        family.check_output(self.output, self.family.num_layers())
        self._model = self.family.load(self.checkpoint)
        # What config.json leaves out is known now.
        self.family.config = self._model.config.to_dict()
        self.device = move_to_device(self._model, device)

    @property
    def takes_num_valid(self) -> bool:
        """Whether the embeddings depend on how much of each waveform is the clip."""
        return parse_output(self.output).pooling == "valid_mean"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names that `output` can take; those of layers aren't listed."""
        return self.family.outputs

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """Shape of one embedding."""
        shape = self.family.embedding_shape(self.output, self.num_samples)
        if shape is None:
            raise ModelLoadError(
                f"{self.family.folder}: config.json has sizes that {self.family.name} can't have"
            )
        return shape

    def embed(self, features: torch.Tensor, num_valid: Sequence[int] | None = None) -> torch.Tensor:
        """Embed a batch.

        Args:
            features: float32 tensor (batch, ...) of the family's front end, on any device.
            num_valid: How many samples of each clip came from its file and aren't padding, for
                `valid_mean`; None: all.

        Returns:
            float32 tensor (batch, *embedding_shape) on the CPU.

        Raises:
            ConfigError: The features haven't the shape that the model takes.
        """
        return self.embed_outputs(features, [self.output], num_valid)[self.output]

    def embed_outputs(
        self,
        features: torch.Tensor,
        outputs: Collection[str],
        num_valid: Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return several outputs of one forward pass, each as `embed` returns it.

        Args:
            features: As for `embed`.
            outputs: Any of the model's.
            num_valid: As for `embed`.

        Raises:
            ConfigError: See `embed`.
        """
        import torch

        expected = self.family.feature_shape(self._model, self.num_samples)
        if tuple(features.shape[1:]) != expected:
            raise ConfigError(
                f"features: shape {tuple(features.shape)}, but {self.checkpoint.identity} takes "
                f"(batch, {', '.join(map(str, expected))}); use its own front end"
            )
        picked: dict[str, torch.Tensor] = {}
        with torch.no_grad(), precision(self.device, self.compute_dtype):
            found = self.family.forward(
                self._model, features.to(self.device, torch.float32), outputs
            )
            counts = [self.num_samples] * len(features) if num_valid is None else num_valid
            for output in outputs:  # one by one to the CPU: a GPU's memory may hold no two
                one = self.family.pick(found, output, counts)
                picked[output] = one.to("cpu", torch.float32)
        return picked

    def provenance(self) -> dict[str, str]:
        """Return weights, revision, library versions, device type and compute dtype."""
        return {
            **self.checkpoint.provenance(),
            **library_versions("torch", "transformers"),
            "device": self.device.type,
            "compute_dtype": self.compute_dtype,
        }


def load_weights(
    checkpoint: Checkpoint,
    family: ModelFamily | type[ModelFamily],
    *,
    model_class: str | None = None,
    part: str = "",
    unused: Collection[str] = (),
    **options: Any,
) -> Any:
    """Load a model of transformers with float32 parameters, in eval mode and frozen.

    Args:
        checkpoint: One whose files are on this machine.
        family: The kind of model.
        model_class: Its class in transformers; None takes the family's.
        part: Only weights whose names begin so must be there: the rest isn't run.
        unused: Weights that inference never touches, and that some checkpoints lack.
        options: For `from_pretrained`.

    Raises:
        ModelLoadError: Damaged, or some weights of the model aren't in it.
        MissingDependencyError: transformers or torch is missing.
    """
    transformers = family.import_transformers()
    import torch

    with load_errors(checkpoint, family), _quiet():
        # transformers 5 takes the checkpoint's own dtype unless it is given one.
        model, info = getattr(transformers, model_class or family.model_class).from_pretrained(
            checkpoint.location,
            dtype=torch.float32,
            weights_only=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **options,
        )
    # "Unexpected" keys are heads and decoders, which this class hasn't.
    for reason in ("missing_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(map(_key_name, info.get(reason) or ()))
        is_error = reason == "error_msgs"
        problems = [k for k in keys if is_error or (k.startswith(part) and k not in unused)]
        if problems:
            raise ModelLoadError(
                f"{checkpoint.location}: {len(problems)} of the model's weights would stay random "
                f"({reason.replace('_', ' ')}: {few(problems, 5)}); this checkpoint is incomplete "
                "or was written for another version of transformers: save or download it again"
            )
    return model.eval().requires_grad_(requires_grad=False)


def _key_name(key: str | tuple[str, ...]) -> str:
    # A mismatched key comes with its two shapes.
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} instead of {tuple(key[2])}"


@contextlib.contextmanager
def load_errors(checkpoint: Checkpoint, family: ModelFamily | type[ModelFamily]) -> Iterator[None]:
    """Turn any exception inside into a `ModelLoadError` that names the checkpoint."""
    try:
        yield
    except Exception as error:
        raise ModelLoadError(
            f"{checkpoint.location}: loading it as a checkpoint of {family.name} failed "
            f"({type(error).__name__}: {error}); save or download it again"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load report off the terminal; we check them instead."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
