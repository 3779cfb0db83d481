"""A Hugging Face `datasets` dataset with an audio column. No torch here.

Clips stay where they are, as bytes in memory-mapped Arrow files or as paths: a sample refers to
its row, and a decoding process reads that row alone. Decoding is ours, not torchcodec's.

A row's file id depends on the row alone, not on its number or on the other rows, so that `select`,
`shuffle`, `filter` and `train_test_split` give each clip the id that it has in the whole dataset.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmdbcache.audio import open_source, shown
from lmdbcache.datasets.base import ListedDataset, own_split_name
from lmdbcache.datasets.namespaces import namespace_of
from lmdbcache.datasets.scanning import (
    PassedOver,
    content_digest,
    leave_out_all,
    visible_entries,
)
from lmdbcache.errors import DatasetError
from lmdbcache.files import expand_user
from lmdbcache.machine import needing

# Names of loaders, which many datasets share.
_LOADERS: Final = ("", "audiofolder", "parquet", "arrow", "csv", "json", "generator", "webdataset")
_ROWS_AT_ONCE: Final = 32
_EXPORTED: Final = "embeddings-"  # a file that `export` has written holds no audio
_LABEL_NAMES: Final = ("label", "labels", "class", "class_name", "category", "target")
_MULTILABEL: Final = "multilabel"


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
        return open_source(value["path"])

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
    layout = "a folder of save_to_disk, or one with parquet files"

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
        columns = _choose_columns(
            next(iter(splits.values())).features, root, audio_column, label_column, id_column
        )
        if namespace is None and name in _LOADERS:
            raise DatasetError("this Hugging Face dataset has no name; give `namespace`")
        labels = _labels_of(splits, columns.label, root)
        super().__init__(
            root,
            namespace_of("hf", namespace, name),
            labels.class_labels,
            namespace_is_derived=namespace is None,
        )
        is_folder = isinstance(source, (str, os.PathLike))
        self.target_names = labels.target_names
        audio = {split: _audio_only(table, columns.audio, root) for split, table in splits.items()}
        if columns.id is None:
            wanted = {
                split: [name is not None for name in part] for split, part in labels.classes.items()
            }
            file_ids = _content_ids(audio, columns.audio, wanted)
        else:
            file_ids = _column_ids(splits, audio, columns.id, root)
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

    @classmethod
    def recognizes(cls, root: Path, decoder: str) -> bool:
        """Return whether it was saved by the library, or holds parquet files or their kin."""
        del decoder
        if _is_saved(root):
            return True
        folders = [root, *(Path(entry.path) for entry in visible_entries(root) if entry.is_folder)]
        names = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
        return any(
            (entry.name.endswith(".parquet") and not entry.name.startswith(_EXPORTED))
            or entry.name in names
            for folder in folders
            for entry in visible_entries(folder)
            if entry.is_file
        )

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
            named = {Path(path).name for path in _paths_of(audio, column)}
            self.left_out.extend(item for item in strays.items if Path(item.name).name not in named)

    def _add_split(self, split: str, table: _Table, file_ids: list[str], labels: _Labels) -> None:
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
        """Leave out a row with the audio and class of an earlier one."""
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
    with needing("a Hugging Face dataset", "huggingface"):
        import datasets
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
            f"{type(source).__name__} isn't a Dataset or DatasetDict with rows; of a streamed "
            "one, `stream_clips` gives the clips one after the other for `extract_stream`"
        )
    if root:
        return root, os.path.basename(os.path.realpath(root)), splits  # noqa: PTH119
    info = next(iter(splits.values())).info
    name = str(info.dataset_name or "")
    return f"huggingface:{name}/{info.config_name or ''}", name, splits


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _loaded(datasets: Any, folder: Path) -> Any:
    if not folder.is_dir():
        raise DatasetError(
            f"{shown(folder)} isn't a folder; a dataset of the Hub is loaded with "
            "datasets.load_dataset and given as an object"
        )
    try:
        if _is_saved(folder):
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder))
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DatasetError(
            f"{shown(folder)} can't be opened as a Hugging Face dataset "
            f"({type(error).__name__}: {reason:.300}); expected is a folder of save_to_disk or one "
            "with parquet files"
        ) from error


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


# ---- columns and labels


@dataclass(frozen=True)
class _Columns:
    """Names of the columns; `id` is None where rows have no id."""

    audio: str
    label: str
    id: str | None


@dataclass(frozen=True)
class _Labels:
    """What a label column says.

    Args:
        class_labels: Class → label.
        classes: Split → the class of each row, None where it has no label.
        target_names: What the places of a target mean; empty with one label in a row.
        targets: Split → each row's target, bool `(len(target_names),)`; None likewise.
    """

    class_labels: dict[str, int]
    classes: dict[str, list[str | None]]
    target_names: tuple[str, ...] = ()
    targets: dict[str, list[NDArray[np.bool_]]] | None = None


def _choose_columns(
    features: Mapping[str, Any],
    root: str,
    audio_column: str | None,
    label_column: str | None,
    id_column: str | None,
) -> _Columns:
    """Return the given columns, or else those of a usual type or name.

    Args:
        features: Column → feature.
        root: The dataset, for messages.
        audio_column: None chooses.
        label_column: None chooses.
        id_column: None if there is none.

    Raises:
        DatasetError: There is no such column, or not exactly one of a usual type or name.
    """
    audio = audio_column or _only(features, root, "audio", ("Audio",), ("audio",))
    label = label_column or _only(features, root, "label", ("ClassLabel",), _LABEL_NAMES)
    for name, column in (("audio", audio), ("label", label), ("id", id_column)):
        known = column in features or (name == "id" and column == f"{audio}.path")
        if column is not None and not known:
            raise DatasetError(
                f"{shown(root)}: {name}_column {column!r} isn't a column; there are "
                f"{', '.join(features)}"
            )
    return _Columns(audio, label, id_column)


def _only(
    features: Mapping[str, Any],
    root: str,
    role: str,
    types: tuple[str, ...],
    names: tuple[str, ...],
) -> str:
    typed = [name for name, feature in features.items() if type(feature).__name__ in types]
    typed = typed or [
        name for name, feature in features.items() if type(_of_list(feature)).__name__ in types
    ]
    named = [name for name in names if name in features]
    found = typed or named
    if len(found) != 1:
        what = f"{', '.join(found)} are possible" if found else "none has a usual type or name"
        raise DatasetError(
            f"{shown(root)}: which column is the {role}? {what}; give `{role}_column`. There are "
            f"{', '.join(features)}"
        )
    return found[0]


def _labels_of(splits: Mapping[str, Any], column: str, root: str) -> _Labels:
    """Return the classes of a label column.

    Raises:
        DatasetError: The column holds something else than names or whole numbers, or lists of
            names, or a `ClassLabel` differs between splits.
    """
    features = [table.features[column] for table in splits.values()]
    values = {
        split: table.with_format(None).select_columns([column])[:][column]
        for split, table in splits.items()
    }
    inner = [_of_list(feature) for feature in features]
    names = [
        getattr(feature if part is None else part, "names", None)
        for feature, part in zip(features, inner, strict=True)
    ]
    if any(each != names[0] for each in names):
        raise DatasetError(f"{shown(root)}: the splits name the classes of {column!r} differently")
    if inner[0] is not None:
        return _several(values, names[0], f"{shown(root)}: column {column!r}", inner[0])
    if names[0]:
        classes = list(names[0])
        return _Labels(
            {name: label for label, name in enumerate(classes)},
            {split: [_named(classes, value) for value in part] for split, part in values.items()},
        )
    known = [value for part in values.values() for value in part if value is not None]
    odd = [value for value in known if type(value) not in (str, int)]
    if odd or len({type(value) for value in known}) > 1:
        raise DatasetError(
            f"{shown(root)}: column {column!r} holds {str((odd or known)[0])!r:.60}; labels are "
            "all text or all whole numbers, or lists of text or of a ClassLabel"
        )
    found = sorted(set(known))
    by_number = bool(found) and type(found[0]) is int
    return _Labels(
        {str(value): value if by_number else place for place, value in enumerate(found)},
        {
            split: [None if value is None else str(value) for value in part]
            for split, part in values.items()
        },
    )


def _of_list(feature: Any) -> Any:
    """What a list's items are, None for what isn't a list."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def _named(classes: list[str], value: int | None) -> str | None:
    """The library writes -1 where there is no label."""
    return None if value is None or not 0 <= value < len(classes) else classes[value]


def _several(
    values: Mapping[str, list[list[Any] | None]], names: list[str] | None, where: str, inner: Any
) -> _Labels:
    """Of a column with a list of labels in each row."""
    rows: dict[str, list[list[str] | None]] = {
        split: [_known(row, names) for row in part] for split, part in values.items()
    }
    found = [name for part in rows.values() for row in part if row is not None for name in row]
    if names is None and any(type(name) is not str for name in found):
        raise DatasetError(
            f"{where} holds lists of {inner!s:.60}; several labels in a row are lists of text or "
            "of a ClassLabel: cast it, or give another label_column"
        )
    places = {name: place for place, name in enumerate(names or sorted(set(found)))}
    return _Labels(
        {_MULTILABEL: 0},
        {
            split: [None if row is None else _MULTILABEL for row in part]
            for split, part in rows.items()
        },
        tuple(places),
        {split: [_multi_hot(row, places) for row in part] for split, part in rows.items()},
    )


def _known(row: list[Any] | None, names: list[str] | None) -> list[Any] | None:
    """The row's labels without those that mean no label; None if nothing else was there."""
    if row is None:
        return None
    given = row if names is None else [_named(names, value) for value in row]
    known = [name for name in given if name is not None]
    return None if given and not known else known


def _multi_hot(row: list[str] | None, places: Mapping[str, int]) -> NDArray[np.bool_]:
    target = np.zeros(len(places), dtype=np.bool_)
    target[[places[name] for name in row or ()]] = True
    return target


# ---- file ids


def _column_ids(
    splits: Mapping[str, Any], audio: Mapping[str, Any], column: str, root: str
) -> dict[str, list[str]]:
    """Return split → the id column's value in each row, as text.

    Args:
        splits: Split → its rows.
        audio: Split → its audio column alone, undecoded.
        column: The id column, or `<audio column>.path`: the names of the files, without suffix.
        root: The dataset, for messages.

    Raises:
        DatasetError: A row has none.
    """
    found = {}
    for split, table in splits.items():
        is_path = column not in table.features
        flat = audio[split].flatten() if is_path else table.with_format(None)
        values = flat.select_columns([column])[:][column]
        if None in values:
            raise DatasetError(
                f"{shown(root)}: column {column!r} is empty in row {values.index(None)}"
            )
        found[split] = [Path(value).stem if is_path else str(value) for value in values]
    return found


def _content_ids(
    audio: Mapping[str, Any], column: str, wanted: Mapping[str, Sequence[bool]]
) -> dict[str, list[str]]:
    """Return split → a digest of each row's audio file, 32 hexadecimal digits.

    All of the audio is read, but none of it decoded. A row whose file can't be read has an id that
    begins with `unreadable-`: its clip fails, so that nothing is stored under it.

    Args:
        audio: Split → its audio column alone, undecoded.
        column: That column's name.
        wanted: Split → whether each row's id is needed; the others' are empty.
    """
    return {split: list(_digests(table, column, wanted[split])) for split, table in audio.items()}


def _paths_of(audio: Mapping[str, Any], column: str) -> Iterator[str]:
    """Yield the path of each row that has one; no audio is read."""
    name = f"{column}.path"
    for table in audio.values():
        yield from filter(None, table.flatten().select_columns([name])[:][name])


def _digests(table: Any, column: str, wanted: Sequence[bool]) -> Iterator[str]:
    rows = 0
    for batch in table.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        structs = batch[column].combine_chunks()
        for value, path in zip(structs.field("bytes"), structs.field("path"), strict=True):
            yield _digest(value, path.as_py(), rows) if wanted[rows] else ""
            rows += 1


def _digest(value: Any, path: str | None, row: int) -> str:
    """The digest of a row's bytes, or of the file that it names."""
    if value.is_valid:
        return xxhash.xxh3_128_hexdigest(value.as_buffer())
    if not path:
        return f"unreadable-row-{row}"
    return content_digest(path) or f"unreadable-{xxhash.xxh3_128_hexdigest(os.fsencode(path))}"
