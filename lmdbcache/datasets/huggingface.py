"""A Hugging Face `datasets` dataset with an audio column. No torch here.

Clips stay where they are, as bytes in memory-mapped Arrow files or as paths: a sample refers to
its row, and a decoding process reads that row alone. Decoding is ours, not torchcodec's.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from lmdbcache.audio import shown
from lmdbcache.datasets.huggingface_columns import Labels, choose_columns, labels_of
from lmdbcache.datasets.huggingface_ids import column_ids, content_ids, opened_file, paths_of
from lmdbcache.datasets.listed import ListedDataset, own_split_name
from lmdbcache.datasets.namespaces import chosen_namespace, derived_namespace
from lmdbcache.datasets.scanning import PassedOver, leave_out_all
from lmdbcache.errors import DatasetError, MissingDependencyError
from lmdbcache.files import expand_user

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HuggingFaceDataset", "RowSource"]

# Names of loaders, which many datasets share.
_LOADERS: Final = ("", "audiofolder", "parquet", "arrow", "csv", "json", "generator", "webdataset")


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
        return opened_file(value["path"])

    def __str__(self) -> str:
        return self.name


class HuggingFaceDataset(ListedDataset):
    """The clips of a `Dataset`, a `DatasetDict`, or a folder that holds one.

    A folder is one of `save_to_disk`, or one with parquet files, which the library first turns
    into Arrow files in its own cache.

    The class is the label column's (`ClassLabel`, text, or whole numbers); rows without a label
    are left out. Labels of a `ClassLabel` are its own, those of text are positions in the sorted
    list of all texts, over all splits.

    A column with several labels in each row (a list of `ClassLabel` or of text) gives every sample
    the class `multilabel` and a `target`: a bool array with one place for each of `target_names`.

    A file id is the id column's value; without one a digest of the row's audio file, which is the
    same after `select`, `shuffle`, `filter` and in every process. Of two rows with the same audio
    and class the second is left out. For digests all audio is read when the dataset is opened.

    Args:
        source: `Dataset`, `DatasetDict`, or a folder.
        audio_column: None takes the only column of type `Audio`, else the one called `audio`.
        label_column: None takes the only `ClassLabel`, else one called `label`, `class`, ….
        id_column: See above. `"<audio column>.path"` takes the names of the rows' files, without
            suffix, if no two of a class share one.
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
        labels = labels_of(splits, columns.label, root)
        super().__init__(
            root,
            chosen_namespace(namespace, self.kind) if namespace else derived_namespace("hf", name),
            labels.class_labels,
            namespace_is_derived=namespace is None,
        )
        is_folder = isinstance(source, (str, os.PathLike))
        if is_folder:
            self.can_be_opened_with(
                audio_column=audio_column, label_column=label_column, id_column=id_column
            )
        self.target_names = labels.target_names
        audio = {split: _audio_only(table, columns.audio, root) for split, table in splits.items()}
        if columns.id is None:
            wanted = {
                split: [name is not None for name in part] for split, part in labels.classes.items()
            }
            file_ids = content_ids(audio, columns.audio, wanted, root)
        else:
            file_ids = column_ids(splits, audio, columns.id, root)
        self._first_rows: dict[tuple[str, str], tuple[str, Any]] | None = (
            {} if columns.id is None else None
        )
        for split, table in splits.items():
            source = _Table(
                audio[split],
                columns.audio,
                f"{table._fingerprint}:{split}",  # noqa: SLF001 - no public name
            )
            self._add_split(split, source, file_ids[split], labels)
        self._first_rows = None
        if is_folder:
            self._leave_out_strays(audio, columns.audio)
        self.finish()

    @property
    def targets(self) -> dict[str, Any]:
        """Sample id → target, where the label column has several labels in each row; else empty.

        For the `labels` of `make_dataloader` and `EmbeddingDataset`.
        """
        return {
            sample_id: sample["target"]
            for sample_id, sample in zip(self.sample_ids, self.samples, strict=True)
            if "target" in sample
        }

    def _leave_out_strays(self, audio: dict[str, Any], column: str) -> None:
        """Note the audio files in the folder that have no row's file name."""
        strays = PassedOver()
        leave_out_all(self.root, strays, "no row of the dataset has its name")
        if strays.items:
            named = {Path(path).name for path in paths_of(audio, column)}
            self.left_out.extend(item for item in strays.items if Path(item.name).name not in named)

    def _add_split(self, split: str, table: _Table, file_ids: list[str], labels: Labels) -> None:
        place = f"{shown(self.root)}, split {split}" if split else shown(self.root)
        for row, (file_id, class_name) in enumerate(
            zip(file_ids, labels.classes[split], strict=True)
        ):
            name = f"{place}, row {row}"
            if class_name is None:
                self.leave_out(name, "no label")
                continue
            more: dict[str, Any] = {"split": own_split_name(split)} if split else {}
            target = None
            if labels.targets is not None:
                target = more["target"] = labels.targets[split][row]
            if not self._is_repeated(file_id, class_name, name, target):
                self.add(
                    file_id, class_name, name, audio_source=RowSource(table, row, name), **more
                )

    def _is_repeated(self, file_id: str, class_name: str, name: str, target: Any) -> bool:
        """Leave a row out whose audio and class are those of one before it."""
        if self._first_rows is None:
            return False
        first, other = self._first_rows.setdefault((file_id, class_name), (name, target))
        if first == name:
            return False
        differs = target is not None and (target != other).any()
        self.leave_out(
            name,
            f"the same audio as {first}" + (", with other labels" if differs else ""),
            kind="the same audio as another row" + (", with other labels" if differs else ""),
        )
        return True


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
        root = os.path.abspath(expand_user(source))  # noqa: PTH100
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
    in_pipe = sys.stderr is None or not sys.stderr.isatty()
    quiet = in_pipe and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _audio_only(table: Any, column: str, root: str) -> Any:
    """The audio column alone, to be read undecoded."""
    import datasets

    alone = table.with_format(None).select_columns([column])
    try:
        return alone.cast_column(column, datasets.Audio(decode=False))
    except Exception as error:  # of pyarrow or of the library, by the column's type
        raise DatasetError(
            f"{shown(root)}: column {column!r} holds {table.features[column]!s:.80}; audio is read "
            "from encoded files, so it has to hold their bytes or paths (the feature `Audio`), "
            "not arrays of samples"
        ) from error
