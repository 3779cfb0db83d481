"""A Hugging Face `datasets` dataset with an audio column. No torch here.

Clips stay where they are, as bytes in memory-mapped Arrow files or as paths: a sample refers to
its row, and a decoding process reads that row alone. Decoding is ours, not torchcodec's.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from lmdbcache.datasets.huggingface_columns import Columns, choose_columns, labels_of
from lmdbcache.datasets.listed import ListedDataset, own_split_name
from lmdbcache.datasets.namespaces import chosen_namespace, derived_namespace
from lmdbcache.embedders.audio_source import shown
from lmdbcache.errors import DatasetError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["HuggingFaceDataset", "RowSource"]

# Names of loaders, which many datasets share.
_LOADERS: Final = ("", "audiofolder", "parquet", "arrow", "csv", "json", "generator", "webdataset")


_logger = logging.getLogger(__name__)


class _Table:
    """The audio column of one split."""

    def __init__(self, table: Any, column: str, fingerprint: str) -> None:
        self.table, self.column, self.fingerprint = table, column, fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Table) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


@dataclass(frozen=True)
class RowSource:
    """The clip of one row; pickled it is a reference to the table's files.

    Args:
        table: The split's audio column.
        row: From 0.
        name: What to call it.
    """

    table: _Table
    row: int
    name: str

    def open_binary(self) -> BinaryIO:
        """The row's bytes, or the file that it names.

        Raises:
            OSError: It has neither, or the file can't be read.
        """
        value = self.table.table[self.row][self.table.column] or {}
        if value.get("bytes") is not None:
            return io.BytesIO(value["bytes"])
        if not value.get("path"):
            raise OSError("the row has neither bytes nor a path")
        return Path(value["path"]).open("rb")

    def __str__(self) -> str:
        return self.name


class HuggingFaceDataset(ListedDataset):
    """The clips of a `Dataset`, a `DatasetDict`, or a folder that holds one.

    A folder is one of `save_to_disk`, or one with parquet files, which the library first turns
    into Arrow files in its own cache.

    The class is the label column's (`ClassLabel`, text, or whole numbers); rows without a label
    are left out. Labels of a `ClassLabel` are its own, those of text are positions in the sorted
    list of all texts, over all splits. A file id is the id column's value; without one the name
    of the row's file, if every row of the dataset has one and no two of a class share it, else
    `<split>-<row>`. Rows that are known by their number must keep it: a dataset that was
    shuffled or filtered is refused.

    Args:
        source: `Dataset`, `DatasetDict`, or a folder.
        audio_column: None takes the only column of type `Audio`, else the one called `audio`.
        label_column: None takes the only `ClassLabel`, else one called `label`, `class`, ….
        id_column: See above.
        namespace: None makes one from the folder's name, or from the dataset's.

    Raises:
        DatasetError: No such dataset or column, or two rows with one sample id.
        MissingDependencyError: The package `datasets` isn't installed.
    """

    kind = "huggingface"

    def __init__(
        self,
        source: Any,
        *,
        audio_column: str | None = None,
        label_column: str | None = None,
        id_column: str | None = None,
        namespace: str | None = None,
    ) -> None:
        root, name, splits = _opened(source)
        columns = choose_columns(
            next(iter(splits.values())).features, root, audio_column, label_column, id_column
        )
        if namespace is None and name in _LOADERS:
            raise DatasetError(
                "this Hugging Face dataset has no name of its own; give one with namespace="
            )
        class_labels, row_classes = labels_of(splits, columns.label, root)
        super().__init__(
            root,
            chosen_namespace(namespace, self.kind) if namespace else derived_namespace("hf", name),
            class_labels,
            namespace_is_derived=namespace is None,
        )
        if isinstance(source, (str, os.PathLike)):
            self.can_be_opened_with(
                audio_column=audio_column, label_column=label_column, id_column=id_column
            )
        file_ids = _file_ids(splits, columns, row_classes, root)
        for split, table in splits.items():
            self._add_split(split, table, columns, file_ids[split], row_classes[split])
        self.finish()

    def _add_split(
        self,
        split: str,
        table: Any,
        columns: Columns,
        file_ids: list[str],
        classes: list[str | None],
    ) -> None:
        audio = _Table(
            _audio_only(table, columns.audio),
            columns.audio,
            f"{table._fingerprint}:{split}",  # noqa: SLF001 - no public name
        )
        more = {"split": own_split_name(split)} if split else {}
        place = f"{shown(self.root)}, split {split}" if split else shown(self.root)
        for row, (file_id, class_name) in enumerate(zip(file_ids, classes, strict=True)):
            name = f"{place}, row {row}"
            if class_name is None:
                self.leave_out(name, "no label")
                continue
            source = RowSource(audio, row, name)
            self.add(file_id, class_name, name, audio_source=source, **more)


def _opened(source: Any) -> tuple[str, str, dict[str, Any]]:
    """(root, name, split → `Dataset`); a dataset without splits has one without a name."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"Hugging Face datasets need the package datasets ({error}): "
            'pip install "lmdbcache[huggingface]"'
        ) from error
    root = ""
    if isinstance(source, (str, os.PathLike)):
        root = os.path.abspath(os.path.expanduser(os.fspath(source)))  # noqa: PTH100, PTH111
        source = _loaded(datasets, Path(root))
    if isinstance(source, datasets.Dataset):
        splits = {str(source.split or ""): source}
    elif isinstance(source, datasets.DatasetDict) and source:
        splits = {str(name): part for name, part in source.items()}
    else:
        raise DatasetError(
            f"{type(source).__name__} isn't a Dataset or DatasetDict with rows; a streamed one "
            "can't be used: load it without streaming=True"
        )
    if root:
        return root, os.path.basename(os.path.realpath(root)), splits  # noqa: PTH119
    info = next(iter(splits.values())).info
    name = str(info.dataset_name or "")
    return f"huggingface:{name}/{info.config_name or ''}", name, splits


def _loaded(datasets: Any, folder: Path) -> Any:
    if not folder.is_dir():
        raise DatasetError(
            f"{shown(folder)} isn't a folder; a dataset of the Hub is loaded with "
            "datasets.load_dataset and given as an object"
        )
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    try:
        with _no_bars_in_a_pipe(datasets):
            if saved:
                return datasets.load_from_disk(str(folder))
            return datasets.load_dataset(str(folder))
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DatasetError(
            f"{shown(folder)} can't be opened as a Hugging Face dataset "
            f"({type(error).__name__}: {reason:.300}); expected is a folder of save_to_disk or one "
            "with parquet files"
        ) from error


@contextlib.contextmanager
def _no_bars_in_a_pipe(datasets: Any) -> Iterator[None]:
    quiet = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _audio_only(table: Any, column: str) -> Any:
    """The audio column alone, to be read undecoded."""
    import datasets

    return (
        table.with_format(None)
        .select_columns([column])
        .cast_column(column, datasets.Audio(decode=False))
    )


def _file_ids(
    splits: Mapping[str, Any],
    columns: Columns,
    classes: Mapping[str, list[str | None]],
    root: str,
) -> dict[str, list[str]]:
    """Split → the file id of each row."""
    if columns.id is not None:
        found = {}
        for split, table in splits.items():
            values = table.with_format(None).select_columns([columns.id])[:][columns.id]
            if None in values:
                raise DatasetError(
                    f"{shown(root)}: column {columns.id!r} is empty in row {values.index(None)}"
                )
            found[split] = [str(value) for value in values]
        return found
    names = {split: _file_names(table, columns.audio) for split, table in splits.items()}
    used = Counter(
        (name, class_name)
        for split in splits
        for name, class_name in zip(names[split], classes[split], strict=True)
    )
    if all(all(part) for part in names.values()) and max(used.values(), default=0) <= 1:
        return names
    _logger.warning(
        "%s: rows have no names of their own and are known by their number; give id_column "
        "(--id-column) if the dataset may change",
        shown(root),
    )
    return {split: _row_numbers(split, table, root) for split, table in splits.items()}


def _file_names(table: Any, column: str) -> list[str]:
    """The stem of each row's path, empty where it has none; no audio is read."""
    name = f"{column}.path"
    paths = _audio_only(table, column).flatten().select_columns([name])[:][name]
    return [Path(path).stem if path else "" for path in paths]


def _row_numbers(split: str, table: Any, root: str) -> list[str]:
    known = (table.info.splits or {}).get(split)
    whole = known is None or known.num_examples == len(table)
    if not whole or table._indices is not None:  # noqa: SLF001 - no public name
        raise DatasetError(
            f"{shown(root)}: rows were selected, shuffled or filtered, so their numbers don't "
            "name them; give id_column (--id-column)"
        )
    before = f"{split}-" if split else ""
    return [f"{before}{row:08d}" for row in range(len(table))]
