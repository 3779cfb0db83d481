"""How much of a dataset is stored: by class, split and node, with the clips that failed."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Final, NamedTuple

from lmdbcache.config import UNSTATED_FRONT_END, CacheConfig
from lmdbcache.errors import ConfigError
from lmdbcache.storage import EmbeddingReader, Report, class_of

_ALL: Final = "all"
_PARTS: Final = ("train", "val", "test")


class Part(NamedTuple):
    """The samples of one split of one node; a dataset without these has empty names."""

    node: str
    split: str
    sample_ids: tuple[str, ...]


class CoverageRow(NamedTuple):
    """The stored and failed samples of one class in one split of one node."""

    class_name: str
    split: str
    node: str
    num_present: int
    num_asked: int
    num_failed: int


@dataclass(frozen=True)
class Coverage(Report):
    """The part of a dataset, or of a list of samples, that a store holds.

    Args:
        num_asked: Distinct samples asked for.
        missing: The sample ids that aren't stored, in the order asked.
        by_class: Class → (stored, asked).
        failed: Those of the missing whose clips gave no embedding when last tried.
        rows: By class, split and node.
        left_out: How many files or rows of the dataset aren't samples, see `left_out_counts`;
            empty for sample ids without a dataset.
    """

    derived: ClassVar = ("num_present", "fraction")

    num_asked: int
    missing: tuple[str, ...]
    by_class: Mapping[str, tuple[int, int]]
    failed: tuple[str, ...] = ()
    rows: tuple[CoverageRow, ...] = ()
    left_out: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        share = f"({100 * self.fraction:.1f} %)"
        return f"{self.num_present:,} of {self.num_asked:,} samples {share}\n\n{self.table()}"

    @property
    def num_present(self) -> int:
        """Samples that are stored."""
        return self.num_asked - len(self.missing)

    @property
    def fraction(self) -> float:
        """Share that is stored, 0 to 1; 1.0 if nothing was asked."""
        return self.num_present / self.num_asked if self.num_asked else 1.0

    @property
    def by_split(self) -> dict[str, tuple[int, int]]:
        """Split → (stored, asked)."""
        sums: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            stored, asked = sums.get(row.split, (0, 0))
            sums[row.split] = stored + row.num_present, asked + row.num_asked
        return sums

    def is_enough(self, min_coverage: float, *, allow_failed: bool = False) -> bool:
        """Whether enough is stored.

        Args:
            min_coverage: Share that must be, 0 to 1.
            allow_failed: Leave out clips that failed when last tried.

        Raises:
            ConfigError: `min_coverage` is outside [0, 1].
        """
        if not 0 <= min_coverage <= 1:
            raise ConfigError(f"min_coverage: {min_coverage}; it must be 0 to 1, such as 0.95")
        asked = self.num_asked - (len(self.failed) if allow_failed else 0)
        return self.num_present >= math.ceil(min_coverage * asked - 1e-9)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows of a table: by class and, in columns, split and node."""
        columns = list(dict.fromkeys((row.node, row.split) for row in self.rows))
        classes = sorted({row.class_name for row in self.rows})
        headings = ["class", *(_heading(*column) for column in columns)]
        table = []
        for name in (*classes, _ALL):
            line = [name]
            for column in columns:
                rows = [
                    row
                    for row in self.rows
                    if (row.node, row.split) == column and name in (_ALL, row.class_name)
                ]
                line.append(_cell(rows))
            table.append(line)
        return headings, table

    def table(self) -> str:
        """Return the same as text; a cell is `stored/asked`."""
        headings, rows = self.cells()
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        lines = []
        for row in (headings, *rows):
            cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
        return "\n".join(lines)


def coverage_of(
    dataset: Any, reader: EmbeddingReader | None, failed: Collection[str] = ()
) -> Coverage:
    """Return how much of a dataset the reader has; None has nothing.

    Args:
        dataset: Sample ids; a dict of sample id → audio file; a dataset with `samples` (their
            `split` and `node`, where they have one, divide it) and perhaps parts `train`, `val`
            and `test`; or a dict of split → one of these, or of node → split → one of these.
        reader: Of the store.
        failed: Sample ids whose clips are known to give no embedding.

    Raises:
        ConfigError: `dataset` isn't one.
    """
    parts = parts_of(dataset)
    asked = list(dict.fromkeys(chain.from_iterable(part.sample_ids for part in parts)))
    missing = asked if reader is None else reader.missing(asked)
    absent, known_failed = set(missing), set(failed)
    rows = []
    for part in parts:
        sample_ids = dict.fromkeys(part.sample_ids)
        lacking = _by_class(filter(absent.__contains__, sample_ids))
        in_vain = _by_class(i for i in sample_ids if i in absent and i in known_failed)
        rows += [
            CoverageRow(name, part.split, part.node, total - lacking[name], total, in_vain[name])
            for name, total in _by_class(sample_ids).items()
        ]
    if len(parts) == 1:
        by_class = {row.class_name: (row.num_present, row.num_asked) for row in rows}
    else:  # which may have samples in common
        lacking = _by_class(missing)
        totals = _by_class(asked)
        by_class = {name: (total - lacking[name], total) for name, total in totals.items()}
    left_out = getattr(dataset, "left_out", None)
    return Coverage(
        num_asked=len(asked),
        missing=tuple(missing),
        by_class=by_class,
        failed=tuple(sample_id for sample_id in missing if sample_id in known_failed),
        rows=tuple(rows),
        left_out={} if left_out is None else left_out_counts(left_out),
    )


def _by_class(sample_ids: Iterable[str]) -> Counter[str]:
    return Counter(map(class_of, sample_ids))


def shortfall(
    config: CacheConfig, dataset: Any, found: Coverage, min_coverage: float, reason: str
) -> str:
    """Return the message for too little being stored: a table, and how the gap is filled.

    Args:
        config: Of the store.
        dataset: What was asked for.
        found: How much of it is stored.
        min_coverage: Share that must be.
        reason: What is stored of the config, one sentence.
    """
    sentence = (
        f"{found.num_present:,} of {found.num_asked:,} samples are stored "
        f"({100 * found.fraction:.1f} %), {100 * min_coverage:g} % are required: {reason}"
    )
    lines = [sentence, "", found.table()]
    if len(found.failed) < len(found.missing):
        lines += ["", _how_to_fill(config, dataset)]
    if found.failed:
        lines += ["", f"{len(found.failed)} failed when last tried, such as {found.failed[0]!r}:"]
        lines += ["fix or exclude these clips, or pass `allow_failed=True`"]
    return "\n".join(lines)


def _how_to_fill(config: CacheConfig, dataset: Any) -> str:
    datasets = _datasets_in(dataset)
    for name in {getattr(each, "namespace", config.namespace) for each in datasets}:
        if name != config.namespace:
            return (
                f"No extraction fills this: the dataset's namespace is {name!r}, the config's is "
                f"{config.namespace!r}. Ask with config.replace(namespace={name!r}), or open the "
                f"dataset with namespace={config.namespace!r}"
            )
    if config.front_end == UNSTATED_FRONT_END:
        return (
            "No extraction fills this: the config doesn't state the front end. Ask with "
            "config_for(model, ...), or compute the missing embeddings with the code that "
            "computed the others"
        )
    clips = "dataset" if datasets else "clips"
    # A name with a digest stands for a checkpoint folder or an object, which only the caller has.
    model = ", model=model" if "@" in config.model_name else ""
    note = "" if datasets else "\n\nclips: a dict of sample id → audio file"
    return (
        "This computes what is missing:\n\n"
        f"    lmdbcache.extract(cache, config, {clips}{model}){note}"
    )


def _datasets_in(dataset: Any) -> list[Any]:
    """Return the datasets that were given: this one, or those of a dict; not sample ids."""
    if isinstance(dataset, Mapping):
        return [each for value in dataset.values() for each in _datasets_in(value)]
    if not hasattr(dataset, "samples"):
        dataset = getattr(dataset, "dataset", None)  # of a `CachedAudioDataset`
    return [dataset] if hasattr(dataset, "samples") else []


def left_out_counts(left_out: Iterable[Any]) -> dict[str, Any]:
    """Return how much is left out: `count`, and `by_kind`, `by_suffix`, `by_class`.

    Each of the three is a dict of name → number, most frequent first, without what has no name.

    Args:
        left_out: The dataset's `LeftOut` items.
    """
    items = list(left_out)
    parts = {
        "by_kind": Counter(item.kind for item in items),
        "by_suffix": Counter(item.suffix for item in items if item.suffix),
        "by_class": Counter(item.class_name for item in items if item.class_name),
    }
    return {"count": len(items), **{name: dict(part.most_common()) for name, part in parts.items()}}


def parts_of(dataset: Any) -> list[Part]:
    """Return the splits and nodes of a dataset, see `coverage_of`.

    Raises:
        ConfigError: It isn't a dataset.
    """
    if isinstance(dataset, Mapping) and not _is_clips(dataset):
        return _parts_of_mapping(dataset)
    parts = [(name, vars(dataset).get(name)) for name in _PARTS if hasattr(dataset, "__dict__")]
    if parts and all(part is not None for _, part in parts):
        node = _node_of(dataset)
        return [Part(node, name, tuple(part.sample_ids)) for name, part in parts if part]
    if hasattr(dataset, "samples") and hasattr(dataset, "sample_ids"):
        return _parts_by_fields(dataset)
    sample_ids = getattr(dataset, "sample_ids", dataset)
    if isinstance(sample_ids, str) or not isinstance(sample_ids, Iterable):
        raise ConfigError(
            f"{type(dataset).__name__} isn't a dataset: give sample ids, a dataset with `samples`, "
            "or a dict of split → one of these"
        )
    ids = tuple(sample_ids)
    if strange := [one for one in ids if not isinstance(one, str)]:
        raise ConfigError(
            f"{str(strange[0])[:80]} isn't a sample id: give `file_id:class` texts, or the dataset "
            "whose samples these are"
        )
    return [Part("", "", ids)]


def _is_clips(dataset: Mapping[Any, Any]) -> bool:
    """Whether this is sample id → audio file, as an extraction takes it, and not split → ids."""
    for name, value in dataset.items():
        is_file = isinstance(value, (str, os.PathLike)) or hasattr(value, "open_binary")
        return is_file and ":" in str(name)
    return False


def _parts_of_mapping(dataset: Mapping[Any, Any]) -> list[Part]:
    parts = []
    for name, value in dataset.items():
        if isinstance(value, Mapping):
            parts += [
                Part(str(name), part.split, part.sample_ids) for part in _parts_of_mapping(value)
            ]
        else:
            ids = tuple(i for part in parts_of(value) for i in part.sample_ids)
            parts.append(Part("", str(name), ids))
    return parts


def _parts_by_fields(dataset: Any) -> list[Part]:
    split = getattr(dataset, "split", None) or ""
    default = _node_of(dataset), "" if split == _ALL else str(split)
    groups: dict[tuple[str, str], list[str]] = {}
    for sample, sample_id in zip(dataset.samples, dataset.sample_ids, strict=True):
        node, own = sample.get("node"), sample.get("split")
        where = default[0] if node is None else str(node), default[1] if own is None else str(own)
        groups.setdefault(where, []).append(sample_id)
    return [Part(*where, tuple(sample_ids)) for where, sample_ids in groups.items()]


def _node_of(dataset: Any) -> str:
    node = getattr(dataset, "node_split_id", None)
    return "" if node is None else str(node)


def _heading(node: str, split: str) -> str:
    return " ".join(part for part in (node and f"node {node}", split) if part) or "stored"


def _cell(rows: list[CoverageRow]) -> str:
    if not rows:
        return "-"
    failed = sum(row.num_failed for row in rows)
    text = f"{sum(row.num_present for row in rows)}/{sum(row.num_asked for row in rows)}"
    return f"{text}, {failed} failed" if failed else text
