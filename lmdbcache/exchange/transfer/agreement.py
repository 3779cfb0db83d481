"""The config of what is imported: what the file says against what is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lmdbcache.config import DEFAULT_MODEL_NAME, UNSTATED_FRONT_END, CacheConfig
from lmdbcache.embedders import AudioModel
from lmdbcache.errors import ConfigError
from lmdbcache.exchange.transfer.descriptions import Description
from lmdbcache.exchange.transfer.survey import Shape, Survey
from lmdbcache.storage import NUMPY_DTYPES
from lmdbcache.training import HIDDEN, output_of_dimensions

__all__ = ["NEEDED", "agreed_config", "missing_fields"]

# What no default may stand in for: embeddings of another rate are other embeddings.
NEEDED: Final = ("sample_rate", "duration", "model_name")


def missing_fields(description: Description, given: Mapping[str, Any]) -> list[str]:
    """The fields that neither the file nor the caller tells."""
    return [name for name in NEEDED if name not in description.facts and given.get(name) is None]


def agreed_config(
    survey: Survey,
    given: Mapping[str, Any],
    *,
    ignore_metadata: bool = False,
    model: AudioModel | None = None,
) -> tuple[CacheConfig, list[str]]:
    """The config that file and caller agree on, and what was assumed.

    Args:
        survey: What the source holds.
        given: Fields of a config; None counts as not given.
        ignore_metadata: Where they disagree, take the caller's word.
        model: What computed the embeddings, where that is known.

    Raises:
        ConfigError: They disagree, or neither tells, or the model can't have computed these; names
            all fields and values that it concerns.
    """
    agreement = _Agreement(survey, model)
    agreement.take(
        {} if ignore_metadata else survey.source.description.facts,
        {name: value for name, value in given.items() if value is not None},
    )
    agreement.assume()
    agreement.raise_problems()
    config = CacheConfig(**agreement.values)
    if model is not None:
        _check_model(model, config, survey)
    return config, agreement.notes


class _Agreement:
    """Collects fields, and all that is wrong with them, so that it is told at once."""

    def __init__(self, survey: Survey, model: AudioModel | None) -> None:
        self.survey = survey
        self.model = model
        self.file = survey.source.path.name
        self.name: str = DEFAULT_MODEL_NAME
        self.values: dict[str, Any] = {}
        self.notes: list[str] = []
        self.problems: list[str] = []

    def take(self, told: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """Take what the file says and what the caller does."""
        if missing := missing_fields(Description(told), given):
            self.problems.append(
                f"{self.file} doesn't say {', '.join(missing)}: give "
                + " ".join(f"{_option(name)} …" for name in missing)
            )
        self.name = given.get("model_name", told.get("model_name", self.name))
        for name, value in told.items():
            try:
                self.values[name] = _canonical(name, value)
            except ConfigError as error:
                self._note_unusable(name, error, is_given=name in given)
        for name, value in given.items():
            try:
                wanted = _canonical(name, value)
            except ConfigError as error:
                self.problems.append(str(error))
                continue
            # The dtype to store in is a choice, not a fact about the embeddings.
            if name != "dtype" and self.values.get(name, wanted) != wanted:
                self.problems.append(
                    f"{name}: {self.file} says {self.values[name]!r}, {wanted!r} is given. Leave "
                    f"{_option(name)} out, or overrule the file with --ignore-metadata"
                )
            self.values[name] = wanted

    def _note_unusable(self, name: str, error: ConfigError, *, is_given: bool) -> None:
        if is_given:
            # What nobody understands can't disagree.
            self.notes.append(f"{self.file}: {error}; {_option(name)} was taken in its place")
        else:
            self.problems.append(
                f"{self.file}: {error}: give {_option(name)} …, or --ignore-metadata"
            )

    def assume(self) -> None:
        """Fill in what neither says."""
        if "dtype" not in self.values:
            try:
                self.values["dtype"], notes = _dtype_to_store(self.survey)
                self.notes += notes
            except ConfigError as error:
                self.problems.append(str(error))
        if "output" not in self.values:
            self._assume_output()
        if "front_end" not in self.values:
            self._assume_front_end()

    def _assume_output(self) -> None:
        shape = self.survey.shape
        if shape is not None and len(shape) > 1 and shape[0] == 1:
            self.problems.append(
                f"output: can't be guessed from embeddings of shape {shape}, which may be "
                "batches of one. Give --squeeze, which takes off the 1, or --output"
            )
            return
        output = output_of_dimensions(len(shape or (1,)))
        how = "the shape"
        if self.model is not None:
            # HIDDEN has two dimensions, all others one.
            fitting = [one for one in self.model.outputs if (one == HIDDEN) == (output == HIDDEN)]
            output = (fitting or list(self.model.outputs))[0]
            how = "--model and the shape"
        self.values["output"] = output
        self.notes.append(f"output {output!r} is guessed from {how}; if it is wrong, give --output")

    def _assume_front_end(self) -> None:
        if self.model is None:
            front_end = self.values["front_end"] = CacheConfig(model_name=self.name).front_end
            self.notes.append(
                "no front end is stated, and it is recorded as such: no extraction finds these or "
                "adds to them. Give the model or the front end if you know it"
                if front_end == UNSTATED_FRONT_END
                else f"decoding and features are taken to be {front_end}, so that extractions with "
                "an AST model find these and add to them; if they must not meet, give the front "
                "end another name"
            )
            return
        self.values["front_end"] = self.model.front_end_id
        self.notes.append(
            f"decoding and features are taken to be {self.model.front_end_id}, so that extractions "
            "with this model find these and add to them; if they must not, give --front-end "
            "another name"
        )

    def raise_problems(self) -> None:
        """Raise one error that tells all of them, if there are any."""
        if self.problems:
            raise ConfigError("; ".join(self.problems))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _canonical(name: str, value: Any) -> Any:
    """A field in the one form that configs are compared in."""
    return getattr(CacheConfig(**{name: value}), name)


def _check_model(model: AudioModel, config: CacheConfig, survey: Survey) -> None:
    """Whether a model computes embeddings such as these.

    Raises:
        ConfigError: It doesn't.
    """
    model.check(config)
    expected: Shape | None = model.embedding_shape(config)
    found = survey.shape
    if expected is None or found is None:
        return
    if config.front_end != model.front_end_id:
        # Other features may give another number of frames.
        expected = (*(None for _ in expected[:-1]), *expected[-1:])
    fits = len(expected) == len(found) and all(
        None in pair or pair[0] == pair[1] for pair in zip(expected, found, strict=True)
    )
    if not fits:
        raise ConfigError(
            f"--model: {model.identity} gives embeddings of shape {expected} for output "
            f"{config.output!r}, and those of {survey.source.path.name} have {found}. Give the "
            "model that computed them, or --output; --model-name takes any name as it is"
        )


def _dtype_to_store(survey: Survey) -> tuple[str, list[str]]:
    first = {entry.dtype: entry.name for entry in reversed(survey.entries)}
    found = [name for name in survey.dtypes if name is not None]
    if not found:
        return CacheConfig().dtype, []
    if others := sorted(set(found) - set(NUMPY_DTYPES)):
        named = ", ".join(f"{name} ({first[name]})" for name in others)
        raise ConfigError(
            f"dtype: {survey.source.path.name} holds {named}; stores hold "
            f"{', '.join(NUMPY_DTYPES)}. Give --dtype, which rounds them (float32 keeps 7 digits)"
        )
    if len(set(found)) == 1:
        return found[0], []
    return "float32", [f"{' and '.join(sorted(found))} are stored as float32, which is exact"]
