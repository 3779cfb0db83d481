"""How much of a dataset is stored: by class, split and node, with the clips that failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lmdbcache.cache.coverage import Coverage
from lmdbcache.errors import ConfigError
from lmdbcache.storage import class_of

__all__ = [
    "CoverageRow",
    "DatasetCoverage",
    "Part",
    "dataset_coverage",
    "left_out_counts",
    "parts_of",
]

_ALL: Final = "all"
_PARTS: Final = ("train", "val", "test")


@dataclass(frozen=True)
class Part:
    """Samples of one split of one node; each of the two is empty where there is none."""

    node: str
    split: str
    sample_ids: tuple[str, ...]


@dataclass(frozen=True)
class CoverageRow:
    """How much of one class in one split of one node is stored; failed clips aren't."""

    class_name: str
    split: str
    node: str
    num_present: int
    num_asked: int
    num_failed: int


@dataclass(frozen=True)
class DatasetCoverage(Coverage):
    """`Coverage` with its parts.

    Args:
        failed: Those of the missing whose clips gave no embedding when last tried.
        rows: By class, split and node.
        left_out: How many files or rows of the dataset aren't samples, see `left_out_counts`;
            empty for sample ids without a dataset.
    """

    failed: tuple[str, ...] = ()
    rows: tuple[CoverageRow, ...] = ()
    left_out: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fraction_of_possible(self) -> float:
        """Share that is stored of what didn't fail, 0 to 1."""
        possible = self.num_asked - len(self.failed)
        return self.num_present / possible if possible else 1.0

    @property
    def by_split(self) -> dict[str, tuple[int, int]]:
        """Split → (stored, asked)."""
        return self._by(lambda row: row.split)

    @property
    def by_node(self) -> dict[str, tuple[int, int]]:
        """Node → (stored, asked)."""
        return self._by(lambda row: row.node)

    def _by(self, name_of: Any) -> dict[str, tuple[int, int]]:
        sums: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            stored, asked = sums.get(name_of(row), (0, 0))
            sums[name_of(row)] = stored + row.num_present, asked + row.num_asked
        return sums

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of a table: by class and, in columns, split and node; with sums."""
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
        """The same as text; a cell is `stored/asked`."""
        headings, rows = self.cells()
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        lines = []
        for row in (headings, *rows):
            cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "num_asked": self.num_asked,
            "num_present": self.num_present,
            "fraction": self.fraction,
            "by_class": {name: list(counts) for name, counts in self.by_class.items()},
            "missing": list(self.missing),
            "failed": list(self.failed),
            "rows": [vars(row) for row in self.rows],
            "left_out": dict(self.left_out),
        }


def dataset_coverage(
    parts: Iterable[Part],
    found: Coverage,
    failed: Iterable[str],
    left_out: Iterable[Any] | None = None,
) -> DatasetCoverage:
    """The coverage of a dataset's parts.

    Args:
        parts: The dataset's.
        found: How much of all of them is stored.
        failed: Sample ids whose clips are known to give no embedding.
        left_out: The dataset's `LeftOut` items; None without a dataset.
    """
    missing, known_failed = set(found.missing), set(failed)
    sums: dict[tuple[str, str, str], list[int]] = {}
    for part in parts:
        for sample_id in dict.fromkeys(part.sample_ids):
            numbers = sums.setdefault((class_of(sample_id), part.split, part.node), [0, 0, 0])
            numbers[1] += 1
            if sample_id not in missing:
                numbers[0] += 1
            elif sample_id in known_failed:
                numbers[2] += 1
    return DatasetCoverage(
        found.num_asked,
        found.missing,
        found.by_class,
        failed=tuple(sample_id for sample_id in found.missing if sample_id in known_failed),
        rows=tuple(CoverageRow(*where, *numbers) for where, numbers in sums.items()),
        left_out={} if left_out is None else left_out_counts(left_out),
    )


def left_out_counts(left_out: Iterable[Any]) -> dict[str, Any]:
    """Return how much is left out: `count`, and `by_kind`, `by_suffix`, `by_class`.

    Each of the three is a dict of name → number, most frequent first, without what has no name.

    Args:
        left_out: `lmdbcache.datasets.listed.LeftOut` items.
    """
    items = list(left_out)
    parts = {
        "by_kind": Counter(item.kind for item in items),
        "by_suffix": Counter(item.suffix for item in items if item.suffix),
        "by_class": Counter(item.class_name for item in items if item.class_name),
    }
    return {"count": len(items), **{name: dict(part.most_common()) for name, part in parts.items()}}


def parts_of(dataset: Any) -> list[Part]:
    """The splits and nodes of a dataset.

    Args:
        dataset: Sample ids; a dataset with `samples` (their `split` and `node`, where they have
            one, divide it) and perhaps parts `train`, `val` and `test`; or a dict of split →
            either, or of node → split → either.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(dataset, Mapping):
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
