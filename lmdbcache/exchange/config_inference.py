"""The config of what is imported: what the file says against what is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lmdbcache.config import (
    COMPUTE_DTYPES,
    UNSTATED_FRONT_END,
    CacheConfig,
    canonical_value,
)
from lmdbcache.embedders import AudioModel
from lmdbcache.errors import ConfigError
from lmdbcache.exchange.formats.base import Description, Source
from lmdbcache.files import few
from lmdbcache.training import HIDDEN, output_of_dimensions

Shape = tuple[int | None, ...]

# What no default may stand in for: embeddings of another rate are other embeddings.
_NEEDED: Final = ("sample_rate", "duration", "model_name")


def missing_fields(description: Description, given: Mapping[str, Any]) -> list[str]:
    """Return the needed fields that neither the file nor the caller states."""
    known = {*description.facts, *(name for name, value in given.items() if value is not None)}
    if "window" in known:
        known.add("duration")
    return [name for name in _NEEDED if name not in known]


def infer_config(
    source: Source,
    shape: Shape | None,
    given: Mapping[str, Any],
    *,
    ignore_metadata: bool = False,
    model: AudioModel | None = None,
) -> tuple[CacheConfig, list[str]]:
    """Return the config that file and caller agree on, and what was assumed.

    Args:
        source: Where the embeddings come from.
        shape: Most of them have it; None if it isn't known before reading.
        given: Fields of a config; None counts as not given.
        ignore_metadata: Where they disagree, take the caller's word.
        model: What computed the embeddings, where that is known.

    Raises:
        ConfigError: They disagree, or neither states it, or the model can't have computed these;
            names all fields and values that it concerns.
    """
    inference = _Inference(source, shape, model)
    inference.take(
        {} if ignore_metadata else source.description.facts,
        {name: value for name, value in given.items() if value is not None},
    )
    inference.assume()
    if inference.problems:
        raise ConfigError("; ".join(inference.problems))
    config = CacheConfig(**inference.values)
    if model is not None:
        _check_model(model, config, source, shape)
    return config, inference.notes


class _Inference:
    """Collects fields, and all that is wrong with them, so that one error reports everything."""

    def __init__(self, source: Source, shape: Shape | None, model: AudioModel | None) -> None:
        self._source, self._shape, self._model = source, shape, model
        self._file = source.path.name
        self._model_name = CacheConfig().model_name
        self.values: dict[str, Any] = {}
        self.notes: list[str] = []
        self.problems: list[str] = []

    def take(self, stated: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """Take what the file states and what the caller gives."""
        if missing := missing_fields(Description(stated), given):
            arguments = ", ".join(f"`{name}`" for name in missing)
            self.problems.append(f"{self._file} doesn't say {', '.join(missing)}: give {arguments}")
        self._model_name = given.get("model_name", stated.get("model_name", self._model_name))
        for name, value in stated.items():
            try:
                self.values[name] = canonical_value(name, value)
            except ConfigError as error:
                if name in given:
                    # An unreadable value can't contradict the given one.
                    text = f"{self._file}: {error}; `{name}` was taken in its place"
                    self.notes.append(text)
                else:
                    self.problems.append(
                        f"{self._file}: {error}: give `{name}`, or `ignore_metadata=True`"
                    )
        for name, value in given.items():
            try:
                wanted = canonical_value(name, value)
            except ConfigError as error:
                self.problems.append(str(error))
                continue
            # The dtype to store in is a choice, not a fact about the embeddings.
            if name != "dtype" and self.values.get(name, wanted) != wanted:
                self.problems.append(
                    f"{name}: {self._file} says {self.values[name]!r}, {wanted!r} is given. Leave "
                    f"`{name}` out, or overrule the file with `ignore_metadata=True`"
                )
            self.values[name] = wanted

    def assume(self) -> None:
        """Fill in what neither says."""
        if "dtype" not in self.values:
            self._assume_dtype()
        if "output" not in self.values:
            self._assume_output()
        if "front_end" not in self.values:
            self._assume_front_end()

    def _assume_dtype(self) -> None:
        found = sorted({name for name in self._source.dtypes if name is not None})
        if others := set(found) - set(COMPUTE_DTYPES):
            entries = reversed(self._source.entries.values())
            first = {entry.dtype: entry.name for entry in entries}
            named = few([f"{name} ({first[name]})" for name in sorted(others)])
            self.problems.append(
                f"dtype: {self._file} holds {named}; stores hold {', '.join(COMPUTE_DTYPES)}. Give "
                "`dtype`, which rounds them (float32 keeps 7 digits)"
            )
        elif len(found) > 1:
            self.values["dtype"] = "float32"
            self.notes.append(f"{' and '.join(found)} are stored as float32, which is exact")
        else:
            self.values["dtype"] = found[0] if found else CacheConfig().dtype

    def _assume_output(self) -> None:
        shape = self._shape
        if shape is not None and len(shape) > 1 and shape[0] == 1:
            self.problems.append(
                f"output: can't be guessed from embeddings of shape {shape}, which may be "
                "batches of one. Give `squeeze=True`, which takes off the 1, or `output`"
            )
            return
        output, how = output_of_dimensions(len(shape or (1,))), "the shape"
        if self._model is not None:
            # HIDDEN has two dimensions, all others one.
            fitting = [one for one in self._model.outputs if (one == HIDDEN) == (output == HIDDEN)]
            output, how = (fitting or list(self._model.outputs))[0], "the model and the shape"
        self.values["output"] = output
        self.notes.append(f"output {output!r} is guessed from {how}; if it is wrong, give `output`")

    def _assume_front_end(self) -> None:
        if self._model is not None:
            front_end, model = self._model.front_end_id, "this model"
        else:
            front_end, model = CacheConfig(model_name=self._model_name).front_end, "an AST model"
        self.values["front_end"] = front_end
        self.notes.append(
            "no front end is stated, and it is recorded as such: no extraction finds these or "
            "adds to them. Give the model or the front end if you know it"
            if front_end == UNSTATED_FRONT_END
            else f"decoding and features are taken to be {front_end}, so that extractions with "
            f"{model} find these and add to them; if they must not meet, give `front_end` "
            "another name"
        )


def _check_model(
    model: AudioModel, config: CacheConfig, source: Source, found: Shape | None
) -> None:
    """Refuse a model that doesn't compute embeddings such as these.

    Raises:
        ConfigError: It doesn't.
    """
    model.check(config)
    expected: Shape | None = model.embedding_shape(config)
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
            f"`model`: {model.identity} gives embeddings of shape {expected} for output "
            f"{config.output!r}, and those of {source.path.name} have {found}. Give the "
            "model that computed them, or `output`; `model_name` takes any name as it is"
        )
