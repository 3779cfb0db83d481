"""The config of what is imported: what the file says against what is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lmdbcache.config import CacheConfig
from lmdbcache.embedding_forms import output_of_dimensions
from lmdbcache.errors import ConfigError
from lmdbcache.storage.values import NUMPY_DTYPES
from lmdbcache.transfer.descriptions import Description
from lmdbcache.transfer.survey import Survey

__all__ = ["NEEDED", "agreed_config", "missing_fields"]

# What no default may stand in for: embeddings of another rate are other embeddings.
NEEDED: Final = ("sample_rate", "duration", "model_name")


def missing_fields(description: Description, given: Mapping[str, Any]) -> list[str]:
    """The fields that neither the file nor the caller tells."""
    return [name for name in NEEDED if name not in description.facts and given.get(name) is None]


def agreed_config(
    survey: Survey, given: Mapping[str, Any], *, ignore_metadata: bool = False
) -> tuple[CacheConfig, list[str]]:
    """The config that file and caller agree on, and what was assumed.

    Args:
        survey: What the source holds.
        given: Fields of a config; None counts as not given.
        ignore_metadata: Where they disagree, take the caller's word.

    Raises:
        ConfigError: They disagree, or neither tells; names the fields and both values.
    """
    file, description = survey.source.path.name, survey.source.description
    told = {} if ignore_metadata else description.facts
    if missing := missing_fields(Description(told), given):
        raise ConfigError(
            f"{file} doesn't say {', '.join(missing)}: give "
            + " ".join(f"--{name.replace('_', '-')} …" for name in missing)
        )
    values: dict[str, Any] = {}
    for name, value in told.items():
        values[name] = _canonical(name, value, f"{file}: ")
    for name, value in given.items():
        if value is None:
            continue
        wanted = _canonical(name, value, "")
        # The dtype to store in is a choice, not a fact about the embeddings.
        if name != "dtype" and values.get(name, wanted) != wanted:
            raise ConfigError(
                f"{name}: {file} says {values[name]!r}, {wanted!r} is given. Leave the option "
                "out, or overrule the file with --ignore-metadata"
            )
        values[name] = wanted
    notes = _assume(values, survey)
    return CacheConfig(**values), notes


def _canonical(name: str, value: Any, where: str) -> Any:
    """A field in the one form that configs are compared in."""
    try:
        return getattr(CacheConfig(**{name: value}), name)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _assume(values: dict[str, Any], survey: Survey) -> list[str]:
    notes = []
    if "dtype" not in values:
        values["dtype"], note = _dtype_to_store(survey)
        notes += note
    if "output" not in values:
        if survey.shape is not None and len(survey.shape) > 1 and survey.shape[0] == 1:
            raise ConfigError(
                f"output: can't be guessed from embeddings of shape {survey.shape}, which may be "
                "batches of one. Give --squeeze, which takes off the 1, or --output"
            )
        values["output"] = output_of_dimensions(len(survey.shape or (1,)))
        notes.append(
            f"output {values['output']!r} is guessed from the shape; if it is wrong, give --output"
        )
    if "front_end" not in values:
        notes.append(
            f"decoding and features are taken to be {CacheConfig.front_end}, so that extractions "
            "find these and add to them; if they must not, give --front-end another name"
        )
    return notes


def _dtype_to_store(survey: Survey) -> tuple[str, list[str]]:
    found = [name for name in survey.dtypes if name is not None]
    if not found:
        return CacheConfig.dtype, []
    if others := sorted(set(found) - set(NUMPY_DTYPES)):
        raise ConfigError(
            f"dtype: {survey.source.path.name} holds {', '.join(others)}; stores hold "
            f"{', '.join(NUMPY_DTYPES)}. Give --dtype, which rounds them (float32 keeps 7 digits)"
        )
    if len(set(found)) == 1:
        return found[0], []
    return "float32", [f"{' and '.join(sorted(found))} are stored as float32, which is exact"]
