"""Any dataset by its folder: which layout is it? No torch here."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path
from typing import Any, Final

from lmdbcache.audio import shown
from lmdbcache.datasets.audio_folder import AudioFolder
from lmdbcache.datasets.base import AudioDataset, ListedDataset
from lmdbcache.datasets.esc50 import ESC50Folder
from lmdbcache.datasets.huggingface import HuggingFaceDataset
from lmdbcache.datasets.scanning import entries_of
from lmdbcache.datasets.tar_shards import TarShards
from lmdbcache.datasets.vegas import VEGASFolder, check_spelling
from lmdbcache.datasets.vggsound import VGGSoundFolder
from lmdbcache.errors import DatasetError
from lmdbcache.files import expand_user, is_url

# A new layout goes here. The folder layout is taken where no other is recognized.
ADAPTERS: Final[dict[str, type[ListedDataset]]] = {
    adapter.kind: adapter
    for adapter in (
        VEGASFolder,
        ESC50Folder,
        VGGSoundFolder,
        HuggingFaceDataset,
        TarShards,
        AudioFolder,
    )
}

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
    """Open a dataset, all of it; `Narrowing` takes a part.

    The layout is in the dataset's `kind` and in the log.

    Args:
        source: A folder, a tar shard, the URL of a folder or shard that fsspec knows
            (`s3://bucket/sounds`), a Hugging Face `Dataset` or `DatasetDict`, or an `AudioDataset`,
            which is given back.
        kind: `"auto"`, or a layout: `"vegas"`, `"esc50"`, `"vggsound"`, `"folder"`,
            `"huggingface"`, `"webdataset"`. At a URL there are `"folder"` and `"webdataset"`.
        table: VGGSound's table, where it isn't in the folder.
        audio_column: Of a Hugging Face dataset.
        label_column: Of a Hugging Face dataset.
        id_column: Of a Hugging Face dataset.
        namespace: Instead of the layout's own, see `lmdbcache.datasets.namespaces`.
        decoder: What decodes the clips, as for `config_for`; files that it doesn't read are left
            out.

    Raises:
        DatasetError: No layout or several are recognized, an option doesn't belong to it, or
            there are no usable clips.
        MissingDependencyError: A Hugging Face dataset without the package `datasets`.
    """
    if kind not in ("auto", *ADAPTERS):
        raise DatasetError(f"dataset: {kind!r}; use auto, {', '.join(ADAPTERS)}")
    options = {
        "table": table,
        "audio_column": audio_column,
        "label_column": label_column,
        "id_column": id_column,
    }
    given = {name: value for name, value in options.items() if value}
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, AudioDataset) and not given and namespace is None:
            return source
        if kind not in ("auto", HuggingFaceDataset.kind):
            raise DatasetError(f"dataset: {kind!r} is opened from a folder, not {source!r:.60}")
        kind = HuggingFaceDataset.kind
    elif kind == "auto":
        kind = _recognized(source, given, decoder)
    adapter = ADAPTERS[kind]
    if foreign := sorted(given.keys() - _options_of(adapter)):
        raise DatasetError(f"{', '.join(foreign)}: not an option of {kind}")
    if "decoder" in _options_of(adapter):  # rows of a table don't say in which format they are
        given["decoder"] = decoder
    dataset: Any = adapter
    dataset = dataset(source, namespace=namespace, **given)
    name = shown(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
    _logger.info("%s taken as %s: %s", name, kind, dataset)
    opened: AudioDataset = dataset
    return opened


def _options_of(adapter: type[ListedDataset]) -> set[str]:
    return set(inspect.signature(adapter).parameters)


def _recognized(folder: str | os.PathLike[str], given: dict[str, Any], decoder: str) -> str:
    """The one layout that a folder has, among those with the given options.

    Raises:
        DatasetError: None or several; the message names the layouts.
    """
    place = os.fspath(folder)
    if place.endswith(".tar"):
        return TarShards.kind
    if is_url(place):
        entries_of(place)  # raises where it can't be listed
        return TarShards.kind if TarShards.recognizes(place, decoder) else AudioFolder.kind
    root = expand_user(folder)
    expected = "Layouts are " + "; ".join(f"{kind}: {a.layout}" for kind, a in ADAPTERS.items())
    if not root.is_dir():
        reason = f"isn't a folder. {expected}" if root.exists() else "isn't there"
        raise DatasetError(f"{shown(root)} {reason}")
    with_options = [k for k, adapter in ADAPTERS.items() if given.keys() <= _options_of(adapter)]
    if given and len(with_options) == 1:
        return with_options[0]
    last = (AudioFolder.kind, TarShards.kind)  # a tar may be what the folder was unpacked from
    found = [k for k, a in ADAPTERS.items() if k not in last and a.recognizes(root, decoder)]
    if len(found) > 1:
        raise DatasetError(
            f"{shown(root)} can be {' or '.join(found)}; say which (`kind`). {expected}"
        )
    if found:
        return found[0]
    entries_of(root)  # raises where it can't be listed
    check_spelling(root)
    for kind in last:
        if ADAPTERS[kind].recognizes(root, decoder):
            return kind
    num_clips = AudioFolder.num_stray(root, decoder)
    reason = "no dataset recognized"
    if num_clips:
        reason = (
            f"{num_clips} audio files lie in it, and no folder of a class. Take the folder above "
            f"it, of which {shown(root.resolve().name)} is a class (`classes`)"
        )
    raise DatasetError(f"{shown(root)}: {reason}. {expected}")
