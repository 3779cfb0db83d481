"""Any dataset by its folder: which layout is it? No torch here."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.audio import shown
from lmdbcache.datasets.audio_folder import AudioFolderDataset, looks_like_classes
from lmdbcache.datasets.base import AudioDataset
from lmdbcache.datasets.esc50 import ESC50Dataset
from lmdbcache.datasets.huggingface import HuggingFaceDataset
from lmdbcache.datasets.listed import summary_of
from lmdbcache.datasets.scanning import entries_of, visible_entries
from lmdbcache.datasets.vegas.layout import CLASS_LABELS, has_class, meant_class
from lmdbcache.datasets.vegas.selection import VEGASSelection
from lmdbcache.datasets.vggsound import VGGSoundDataset, find_table
from lmdbcache.errors import DatasetError
from lmdbcache.files import expand_user

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KINDS", "open_dataset", "recognise"]

_LAYOUTS: Final = {
    "vegas": "<class>/audios/video_00001.wav",
    "esc50": "meta/esc50.csv and audio/*.wav",
    "vggsound": "vggsound.csv and <YouTube id>_<start, six digits>.wav",
    "huggingface": "a folder of save_to_disk, or one with parquet files",
    "folder": "<class>/*.wav (or flac, ogg, opus, mp3, aiff, …)",
}
KINDS: Final = ("auto", *_LAYOUTS)

_logger = logging.getLogger(__name__)


def open_dataset(
    source: Any,
    kind: str = "auto",
    *,
    table: str | Path | None = None,
    audio_column: str | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
    namespace: str | None = None,
    decoder: str = "soundfile",
) -> AudioDataset:
    """Open a dataset, all of it; `lmdbcache.datasets.narrowing.Narrowing` takes a part.

    Which layout was taken is in the dataset's `kind` and in the log.

    Args:
        source: A folder, a Hugging Face `Dataset` or `DatasetDict`, or an `AudioDataset`, which
            is given back.
        kind: `"auto"`, or a layout: `"vegas"`, `"esc50"`, `"vggsound"`, `"folder"`,
            `"huggingface"`.
        table: VGGSound's table, where it isn't in the folder.
        audio_column: Of a Hugging Face dataset.
        label_column: Of a Hugging Face dataset.
        id_column: Of a Hugging Face dataset.
        namespace: Instead of the layout's own, see `lmdbcache.datasets.namespaces`.
        decoder: What the clips are to be decoded by, as for `config_for`; files that it doesn't
            read are left out.

    Raises:
        DatasetError: No layout or several are recognised, an option doesn't belong to it, or
            there are no usable clips.
        MissingDependencyError: A Hugging Face dataset without the package `datasets`.
    """
    if kind not in KINDS:
        raise DatasetError(f"dataset: {kind!r}; use {', '.join(KINDS)}")
    columns = {
        "audio_column": audio_column,
        "label_column": label_column,
        "id_column": id_column,
    }
    given = {name: value for name, value in {**columns, "table": table}.items() if value}
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, AudioDataset) and not given and namespace is None:
            return source
        if kind not in ("auto", "huggingface"):
            raise DatasetError(f"dataset: {kind!r} is opened from a folder, not {source!r:.60}")
        kind = "huggingface"
    elif kind == "auto":
        kind = recognise(
            source,
            has_table=table is not None,
            has_columns=bool(given.keys() - {"table"}),
            decoder=decoder,
        )
    own = {"vggsound": {"table"}, "huggingface": set(columns)}.get(kind, set())
    if foreign := sorted(given.keys() - own):
        raise DatasetError(f"{', '.join(foreign)}: not an option of {kind}")
    if kind != "huggingface":  # whose rows say nothing of their format
        given["decoder"] = decoder
    dataset = _OPENERS[kind](source, namespace=namespace, **given)
    _logger.info("%s taken as %s: %s", _name(source), kind, dataset)
    return dataset


def recognise(
    folder: str | os.PathLike[str],
    *,
    has_table: bool = False,
    has_columns: bool = False,
    decoder: str = "soundfile",
) -> str:
    """The one layout that a folder has.

    Args:
        folder: To look at.
        has_table: Whether VGGSound's table was given.
        has_columns: Whether columns of a Hugging Face dataset were given.
        decoder: What the clips are to be decoded by.

    Raises:
        DatasetError: None or several; the message names the layouts.
    """
    root = expand_user(folder)
    if not root.is_dir():
        raise DatasetError(f"{shown(root)} isn't a folder. {_expected()}")
    found = [kind for kind, test in _SIGNS.items() if test(root)]
    if has_table:
        found = [*found, "vggsound"] if "vggsound" not in found else found
    if has_columns and "huggingface" not in found:
        found.append("huggingface")
    if len(found) > 1:
        raise DatasetError(
            f"{shown(root)} can be {' or '.join(found)}; say which (--dataset). {_expected()}"
        )
    if found:
        return found[0]
    entries_of(root)  # raises where it can't be listed
    _check_spelling(root)
    if looks_like_classes(root, decoder):
        return "folder"
    raise DatasetError(f"{shown(root)}: no dataset recognised. {_expected()}")


def _check_spelling(root: Path) -> None:
    """Refuse a folder of VEGAS all of whose class folders have other names than in VEGAS."""
    meant = {
        entry.name: meant_class(entry.name)
        for entry in visible_entries(root)
        if entry.is_folder and has_class(root, entry.name)
    }
    renamed = [f"{shown(name)!a} to {known!r}" for name, known in meant.items() if known]
    if renamed:
        raise DatasetError(
            f"{shown(root)} looks like VEGAS with other names of classes: rename "
            f"{', '.join(renamed)}. If it is another dataset, open it with kind 'folder'"
        )


def _is_vegas(root: Path) -> bool:
    return any(has_class(root, name) for name in CLASS_LABELS)


def _is_esc50(root: Path) -> bool:
    return (root / "meta" / "esc50.csv").is_file()


def _is_vggsound(root: Path) -> bool:
    return find_table(root) is not None


def _is_huggingface(root: Path) -> bool:
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return True
    folders = [root, *(Path(entry.path) for entry in visible_entries(root) if entry.is_folder)]
    names = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
    return any(
        entry.name.endswith(".parquet") or entry.name in names
        for folder in folders
        for entry in visible_entries(folder)
        if entry.is_file
    )


_SIGNS: Final[dict[str, Callable[[Path], bool]]] = {
    "vegas": _is_vegas,
    "esc50": _is_esc50,
    "vggsound": _is_vggsound,
    "huggingface": _is_huggingface,
}


def _open_vegas(root: str | Path, *, namespace: str | None, decoder: str) -> VEGASSelection:
    folder = expand_user(root)
    present = [name for name in CLASS_LABELS if has_class(folder, name)]
    # A class that isn't there is reported by the narrowing, if it is asked for.
    dataset = VEGASSelection(
        root, selected_classes=present or None, namespace=namespace, decoder=decoder
    )
    if not dataset.samples and dataset.left_out:
        raise DatasetError(
            f"{shown(dataset.root)}: vegas: no clips found; {summary_of(dataset.left_out)}"
        )
    return dataset


_OPENERS: Final[dict[str, Callable[..., AudioDataset]]] = {
    "vegas": _open_vegas,
    "esc50": ESC50Dataset,
    "vggsound": VGGSoundDataset,
    "folder": AudioFolderDataset,
    "huggingface": HuggingFaceDataset,
}


def _expected() -> str:
    return "Layouts are " + "; ".join(f"{kind}: {layout}" for kind, layout in _LAYOUTS.items())


def _name(source: Any) -> str:
    return shown(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
