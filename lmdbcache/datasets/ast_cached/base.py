"""The base of the datasets here: clips of a folder, with their cached embeddings."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch.utils.data import Dataset

from lmdbcache.config import CacheConfig
from lmdbcache.datasets.ast_cached.ast_cache import ASTCache, item_id
from lmdbcache.datasets.ast_cached.items import (
    DeferredAudio,
    LazyDict,
    Partial,
    check_partial,
    vegas_collate_fn,
)
from lmdbcache.datasets.ast_cached.loaded import EmbeddingOverlay
from lmdbcache.datasets.ast_cached.visual import ImageToTensor, load_image, load_video
from lmdbcache.datasets.base import ListedDataset, Sample
from lmdbcache.datasets.batches import Column, FetchedItems, column
from lmdbcache.datasets.narrowing import chosen_classes, first_of_each_class, split_seed
from lmdbcache.datasets.scanning import LeftOut, summary_of
from lmdbcache.datasets.splits import SPLITS, node_split, normalized_ratios, split_by_ratios
from lmdbcache.errors import DatasetError
from lmdbcache.files import expand_user
from lmdbcache.machine import dataset_root_variable
from lmdbcache.training import (
    read_tensor_dict,
    read_text_embeddings,
)

ITEM_KEYS: Final = (
    *("audio_filename", "image_filename", "video_filename", "class_name", "video_id", "file_id"),
    *("sample_idx", "ytid", "start_second", "end_second", "caption"),
)

_LOADED_KEYS = ("audio", "audio_num_valid", "image", "video", "text_emb")

_TRAIN_RATIO: Final = 0.7

# Arguments of earlier versions, and the values that scripts find in the attributes.
WITHOUT_EFFECT: Final[dict[str, Any]] = {
    "enable_cache": False,
    "cache_dir": None,
}

_logger = logging.getLogger(__name__)


class ASTCachedDataset(ASTCache, Dataset[dict[str, Any]]):
    """A labeled dataset in a folder, with its cached embeddings, for a training loop.

    A subclass gives `namespace` and `_open_folder`, or `class_labels` and `_list_clips`.

    With `split=None` the dataset holds all samples, and `.train`, `.val` and `.test` hold its
    splits; what is loaded into it is shared with them. Labels are those of `class_labels` under
    any selection.

    An item is a dict with `label`, names, ids and metadata; `audio` with `load_audio`; `audio_emb`
    where an embedding is cached. In that case `audio` is decoded when it is first read; otherwise
    `audio_num_valid` (int64) says how many of its samples came from the file, unless
    `transform_audio` changed them.

    Args:
        root_dir: Folder of the dataset; None: that of the environment variable
            `LMDBCACHE_<NAMESPACE>_ROOT`, such as `LMDBCACHE_VEGAS_ROOT`.
        selected_classes: Names or labels to use; None or empty: all.
        excluded_classes: Names or labels to leave out.
        split: `"train"`, `"val"`, `"test"`, `"all"`, or None (see above).
        train_ratio: Share of train; ratios are normalized.
        val_ratio: Share of val.
        test_ratio: Share of test.
        stratify: Divide every class by the ratios.
        num_samples_per_class: Use the first samples of each class only. Without effect with
            `samples_per_node`.
        node_split_id: This node, from 0. Nodes are divided first, then train, val and test.
        num_nodes: Divide every class between so many nodes.
        samples_per_node: Or give each node so many samples of every class.
        node_split_seed: Seed of the division between nodes, the same on all of them.
        split_method: `"hash"`, or `"sklearn"`: the parts and nodes of scripts that draw them with
            scikit-learn and NumPy, see `split_samples` and `node_split`. The seed of the splits is
            42, by `"sklearn"` 42 + `node_split_id`.
        audio_sample_rate: Of `audio`, in Hz.
        audio_duration: Clips are cut or zero-padded to this, in seconds.
        load_audio: Whether items have `audio`.
        enable_ast_cache: If false, embeddings are neither loaded nor saved.
        ast_cache_dir: Root of the cache; None: `<root_dir>/ast_cache`.
        embedding_file: `torch.save`d dict of class name → text embedding. A file that isn't there
            is a warning, and items have no `text_emb`.
        audio_embedding_file: `torch.save`d dict of embeddings, see
            `load_audio_embeddings_from_file`.
        splits_to_load: Hold the union of these splits, whatever `split` says.
        split_ratio: Deprecated: share of train and val together.
        use_saved_audio_embeddings: If false, `audio_embedding_file` isn't loaded.
        image_size: Height and width of pictures and frames, in pixels.
        video_fps: Frames per second of `audio_duration`.
        transform_audio: Applied to the waveform (1, num_samples).
        transform_image: Applied to the PIL image instead of resizing and normalizing it.
        transform_video: Applied to the frames (frames, 3, height, width).
        load_image: Whether items have `image`, where there is a file.
        load_video: Whether items have `video`, None where there is no file.
        ast_output: Which output of the model is cached (`"pooler_output"`,
            `"last_hidden_state"`, `"mean"`); None: the one that is saved or stored.
        partial: Of a batch in which only some items have an embedding: `"omit"`, it has no
            `audio_emb`, or `"mask"`, zeros and a mask; see `vegas_collate_fn`.
        parent_ast_cache: `_ast_cache` of another dataset, to share with it.
        parent_audio_embs: `audio_embs` of another dataset, to share with it: an embedding that is
            put into one is found by both.
        auto_load_cache: Load what is stored for the active classes, unless `parent_ast_cache` is
            given. By default nothing is loaded until `load_ast_embeddings_from_cache`.
        ignored: Arguments of earlier versions that have no effect: `enable_cache` and
            `cache_dir`, as listing the files is fast.

    Raises:
        DatasetError: The folder or an argument can't be used.
        ConfigError: An impossible sample rate or duration.
        MissingDependencyError: scikit-learn isn't installed, with `split_method="sklearn"`.
        TypeError: An unknown argument.
    """

    CLASS_LABELS: dict[str, int]
    LABEL_TO_CLASS: dict[int, str]

    samples: list[Sample]
    left_out: list[LeftOut]
    train: ASTCachedDataset
    val: ASTCachedDataset
    test: ASTCachedDataset

    node_id: int | None = None  # seeds the splits, where the samples aren't divided between nodes
    _item_keys: ClassVar[tuple[str, ...]] = ITEM_KEYS
    _without_effect: ClassVar[Mapping[str, Any]] = WITHOUT_EFFECT

    def __init__(  # noqa: PLR0913, PLR0917 - every keyword that scripts pass
        self,
        root_dir: str | Path | None = None,
        selected_classes: str | int | Iterable[str | int] | None = None,
        excluded_classes: str | int | Iterable[str | int] | None = None,
        split: str | None = None,
        train_ratio: float = _TRAIN_RATIO,
        val_ratio: float = 0.1,
        test_ratio: float = 0.2,
        stratify: bool = True,  # noqa: FBT001, FBT002
        num_samples_per_class: int | None = None,
        node_split_id: int | None = None,
        num_nodes: int | None = None,
        samples_per_node: int | None = None,
        node_split_seed: int = 42,
        audio_sample_rate: int = 16000,
        audio_duration: float = 5.0,
        load_audio: bool = True,  # noqa: FBT001, FBT002
        enable_ast_cache: bool = True,  # noqa: FBT001, FBT002
        ast_cache_dir: str | Path | None = None,
        *,
        embedding_file: str | Path | None = None,
        audio_embedding_file: str | Path | None = None,
        splits_to_load: Sequence[str] | None = None,
        split_ratio: float | None = None,
        split_method: str = "hash",
        use_saved_audio_embeddings: bool = True,
        image_size: tuple[int, int] = (224, 224),
        video_fps: int = 25,
        transform_audio: Callable[[torch.Tensor], torch.Tensor] | None = None,
        transform_image: Callable[[Any], Any] | None = None,
        transform_video: Callable[[torch.Tensor], torch.Tensor] | None = None,
        load_image: bool = False,
        load_video: bool = False,
        ast_output: str | None = None,
        partial: Partial = "omit",
        parent_ast_cache: dict[str, Any] | None = None,
        parent_audio_embs: MutableMapping[str, Any] | None = None,
        auto_load_cache: bool = False,
        **ignored: Any,
    ) -> None:
        if unknown := ignored.keys() - self._without_effect.keys():
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(sorted(unknown))}")
        if ignored:
            _logger.warning("without effect: %s", ", ".join(ignored))
        vars(self).update({**self._without_effect, **ignored})
        self.root_dir = str(expand_user(_given_root(root_dir, self.namespace)))
        self.root = str(Path(self.root_dir).absolute())
        self.enable_ast_cache, self.ast_output = enable_ast_cache, ast_output
        check_partial(partial)
        self.partial = partial
        self.ast_cache_dir = str(ast_cache_dir or Path(self.root_dir) / "ast_cache")
        self.split, self.splits_to_load = _checked_splits(split, splits_to_load)
        self.stratify, self.split_ratio = stratify, split_ratio
        self.train_ratio, self.val_ratio, self.test_ratio = _split_ratios(
            train_ratio, val_ratio, test_ratio, split_ratio, split_method
        )
        self.split_method = split_method
        self.num_samples_per_class = num_samples_per_class
        self.node_split_id, self.num_nodes = node_split_id, num_nodes
        self.samples_per_node, self.node_split_seed = samples_per_node, node_split_seed

        audio = CacheConfig(sample_rate=audio_sample_rate, duration=audio_duration)
        self.audio_sample_rate, self.audio_duration = audio.sample_rate, audio.duration
        self.image_size, self.video_fps = image_size, video_fps
        self.load_audio, self.load_image, self.load_video = load_audio, load_image, load_video
        self.transform_audio, self.transform_video = transform_audio, transform_video
        self.transform_image = transform_image or ImageToTensor(image_size)
        self.device = torch.device("cpu")

        self.CLASS_LABELS = dict(self.class_labels)
        self.LABEL_TO_CLASS = {label: name for name, label in self.class_labels.items()}
        self.available_classes = list(self.class_labels)
        self.captions = _read_captions(Path(self.root_dir))
        self._selected_classes = self._resolved(selected_classes)
        self._excluded_classes = self._resolved(excluded_classes)
        self._audio_embs = EmbeddingOverlay() if parent_audio_embs is None else parent_audio_embs
        self._audio_embs_from_file = None
        self._ast_cache = {} if parent_ast_cache is None else parent_ast_cache
        self.embedding_file = embedding_file
        self.text_embs = None if embedding_file is None else self._read_text(embedding_file)
        self.audio_embedding_file = audio_embedding_file
        self.use_saved_audio_embeddings = use_saved_audio_embeddings
        self._reload()
        if self.left_out:
            _logger.warning("%s: %s", self.root_dir, summary_of(self.left_out))
        if split is None:
            self._make_parts()
        if audio_embedding_file is not None and use_saved_audio_embeddings:
            self.load_audio_embeddings_from_file(audio_embedding_file)
        if auto_load_cache and enable_ast_cache and parent_ast_cache is None:
            self.load_ast_embeddings_from_cache(classes=list(self.active_classes))
            self._log_cache_coverage()

    # ---- which clips

    @property
    def selected_classes(self) -> list[str] | None:
        """Names of the classes to use, None for all; setting it reloads the samples."""
        return self._selected_classes

    @selected_classes.setter
    def selected_classes(self, classes: str | int | Iterable[str | int] | None) -> None:
        self._selected_classes = self._resolved(classes)
        self._reload()

    @property
    def excluded_classes(self) -> list[str] | None:
        """Names of the classes to leave out; setting it reloads the samples."""
        return self._excluded_classes

    @excluded_classes.setter
    def excluded_classes(self, classes: str | int | Iterable[str | int] | None) -> None:
        self._excluded_classes = self._resolved(classes)
        self._reload()

    @property
    def sample_ids(self) -> list[str]:
        """`file_id:class` of every sample, in the order of `samples`."""
        return list(map(item_id, self.samples))

    def _resolved(self, classes: str | int | Iterable[str | int] | None) -> list[str] | None:
        return chosen_classes(classes, self.class_labels, self.namespace)

    def load_samples(self) -> list[Sample]:
        """List the files anew and return the samples of this node and split."""
        return self._of_split(self._list_node())

    _load_samples = load_samples

    def _reload(self) -> None:
        self.active_classes = {
            name: label
            for name, label in self.class_labels.items()
            if (not self._selected_classes or name in self._selected_classes)
            and name not in (self._excluded_classes or ())
        }
        self._node_samples = self._list_node()
        for part in (self, *self._parts()):
            part._selected_classes = self._selected_classes  # noqa: SLF001
            part._excluded_classes = self._excluded_classes  # noqa: SLF001
            part.active_classes = self.active_classes
            part.left_out = self.left_out
            part.samples = part._of_split(self._node_samples)  # noqa: SLF001
        _logger.info(
            "%s: %d samples, split %s, classes %s",
            self.namespace,
            len(self.samples),
            self.split,
            ", ".join(self.active_classes),
        )

    @property
    def class_labels(self) -> Mapping[str, int]:
        """Class name → label, of every class that the dataset knows."""
        return self._folder.class_labels

    @functools.cached_property
    def _folder(self) -> ListedDataset:
        """All clips, listed once."""
        return self._open_folder()

    def _open_folder(self) -> ListedDataset:
        """List all clips of the dataset."""
        raise NotImplementedError

    def _list_clips(self) -> ListedDataset:
        """Return the clips of the active classes at least."""
        return self._folder

    def _list_node(self) -> list[Sample]:
        folder = self._list_clips()
        self.left_out = folder.left_out
        active = (clip for clip in folder.samples if clip["class_name"] in self.active_classes)
        samples = [self._described(clip, index) for index, clip in enumerate(active)]
        if self.samples_per_node is None:
            samples = first_of_each_class(samples, self.num_samples_per_class)
        divided = self.num_nodes is not None or self.samples_per_node is not None
        if self.node_split_id is None or not divided:
            return samples
        return node_split(
            samples,
            self.node_split_id,
            self.num_nodes,
            self.samples_per_node,
            self.node_split_seed,
            self.split_method,
        )

    def _described(self, clip: Sample, index: int) -> Sample:
        """A clip as its folder lists it, with all keys of an item."""
        file_id, class_name = clip["file_id"], clip["class_name"]
        image, video = clip.get("image_path"), clip.get("video_path")
        start, captions = clip.get("start_second", 0.0), self.captions
        caption = captions and captions.get(f"{file_id}:{class_name}", captions.get(file_id))
        return {
            "video_id": file_id,
            "audio_filename": os.path.basename(clip["audio_path"]),  # noqa: PTH119
            "image_path": None,
            "image_filename": os.path.basename(image) if image else "",  # noqa: PTH119
            "video_path": None,
            "video_filename": os.path.basename(video) if video else "",  # noqa: PTH119
            "ytid": "",
            "start_second": start,
            "end_second": start + self.audio_duration,
            "audio_emb": None,
            "caption": str(caption or ""),
            **clip,
            "sample_idx": index,
        }

    def _of_split(self, samples: list[Sample]) -> list[Sample]:
        wanted = [self.split] if self.splits_to_load is None else self.splits_to_load
        if "all" in wanted:
            return list(samples)
        return [
            sample
            for split in SPLITS
            if split in wanted
            for sample in self._of_part(samples, split)
        ]

    def _of_part(self, samples: list[Sample], split: str) -> list[Sample]:
        """The samples of train, val or test."""
        return self._drawn(samples, split, (self.train_ratio, self.val_ratio, self.test_ratio))

    def _drawn(
        self, samples: list[Sample], split: str, ratios: tuple[float, float, float]
    ) -> list[Sample]:
        node = self.node_split_id if self.node_id is None else self.node_id
        return split_by_ratios(
            samples,
            split,
            ratios,
            stratify=self.stratify,
            seed=split_seed(self.split_method, node),
            split_method=self.split_method,
        )

    def _train_or_val(self, samples: list[Sample], split: str) -> list[Sample]:
        """Train or val of samples that aren't test, by the ratios of these two."""
        total = self.train_ratio + self.val_ratio
        shares = (self.train_ratio / total, self.val_ratio / total) if total else (1.0, 0.0)
        return self._drawn(samples, split, (*shares, 0.0))

    def _make_parts(self) -> None:
        parts = {}
        for split in SPLITS:
            part = copy.copy(self)
            part.split = split
            if self.splits_to_load is not None:
                listed = split in self.splits_to_load or "all" in self.splits_to_load
                part.splits_to_load = [split] if listed else []
            part.samples = part._of_split(self._node_samples)  # noqa: SLF001
            parts[split] = part
        self.train, self.val, self.test = parts.values()

    def _parts(self) -> list[ASTCachedDataset]:
        return [vars(self)[split] for split in SPLITS if split in vars(self)]

    # ---- items

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item as a dict; see the class.

        Raises:
            AudioDecodeError: The clip gives no usable waveform (at once if no embedding is cached,
                else when `audio` is read).
            DatasetError: A picture or video can't be read.
        """
        sample = self.samples[index]
        embedding = self._embedding_of(sample)
        item = LazyDict(self._loaded(sample, is_hit=embedding is not None))
        if embedding is not None:
            item["audio_emb"] = embedding
        # A fourth of the time of `torch.tensor`, whose aligned memory is slow to be had.
        item["label"] = torch.from_numpy(np.array(sample["class_label"], np.int64))
        for key in self._item_keys:
            item[key] = sample[key]
        return item

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Several items; stored embeddings are fetched in one call.

        Raises:
            AudioDecodeError, DatasetError: See `__getitem__`.
        """
        if type(self).__getitem__ is not ASTCachedDataset.__getitem__:
            return [self[index] for index in indices]  # a subclass makes its own items
        samples = [self.samples[index] for index in indices]
        embeddings, is_hit = self._embeddings_of(samples)
        columns: dict[str, Column] = {}
        if self.load_audio or self.load_image or self.load_video or self.text_embs is not None:
            loaded = [
                self._loaded(sample, is_hit=hit)
                for sample, hit in zip(samples, is_hit, strict=True)
            ]
            columns = {key: column(loaded, key) for key in _LOADED_KEYS}
        everything = [True] * len(samples)
        labels = [sample["class_label"] for sample in samples]
        columns["audio_emb"] = embeddings, is_hit
        columns["label"] = torch.tensor(labels, dtype=torch.long), everything
        for key in self._item_keys:
            columns[key] = [sample[key] for sample in samples], everything
        return FetchedItems(columns=columns, kind=LazyDict)

    def _loaded(self, sample: Sample, *, is_hit: bool) -> dict[str, Any]:
        """What is loaded for an item from files other than the store."""
        loaded: dict[str, Any] = {}
        if self.load_audio:
            waveform = self._deferred_audio(sample["audio_path"])
            if is_hit:
                loaded["audio"] = waveform
            else:
                loaded["audio"], num_valid = waveform.decode()
                if num_valid is not None:
                    loaded["audio_num_valid"] = torch.tensor(num_valid, dtype=torch.long)
        if self.load_image and sample["image_path"] is not None:
            loaded["image"] = self.read_image(sample["image_path"])
        if self.load_video:
            loaded["video"] = self.read_video(sample["video_path"])
        if self.text_embs is not None and sample["class_name"] in self.text_embs:
            loaded["text_emb"] = self.text_embs[sample["class_name"]]
        return loaded

    def load_waveform(self, audio_path: str | Path) -> torch.Tensor:
        """Decode a file to float32 (num_samples,), mono, cut or padded, transformed if asked for.

        Raises:
            AudioDecodeError: The file gives no usable waveform.
        """
        return self._deferred_audio(str(audio_path))()

    def read_image(self, image_path: str | Path) -> Any:
        """Open and transform a picture: float32 (3, height, width) by default."""
        return load_image(str(image_path), self.transform_image)

    def read_video(self, video_path: str | Path | None) -> Any:
        """Decode a video: float32 (frames, 3, height, width); None for None."""
        if video_path is None:
            return None
        num_frames = max(1, int(self.video_fps * self.audio_duration))
        frames = load_video(str(video_path), num_frames, self.image_size)
        return frames if self.transform_video is None else self.transform_video(frames)

    _load_audio, _load_image, _load_video = load_waveform, read_image, read_video

    def _deferred_audio(self, audio_path: str) -> DeferredAudio:
        return DeferredAudio(
            audio_path, self.audio_sample_rate, self.audio_duration, self.transform_audio
        )

    # ---- embeddings from files

    def load_audio_embeddings_from_file(self, embedding_file: str | Path) -> bool:
        """Use the embeddings of a `torch.save`d dict of sample id → tensor (or dict with one).

        Tensors stay on disk until they are read. For large files and for sharing between
        processes import the file into the cache instead.

        Returns:
            False if there is no such file; the log says so.

        Raises:
            DatasetError: The file holds anything but tensors and plain values, or can't be read.
        """
        if not Path(embedding_file).is_file():
            _logger.warning("audio embedding file not found: %s", embedding_file)
            return False
        self.audio_embedding_file = embedding_file
        self.audio_embs_from_file = read_tensor_dict(embedding_file, mmap=True)
        _logger.info("%d audio embeddings from %s", len(self.audio_embs_from_file), embedding_file)
        return True

    def _read_text(self, embedding_file: str | Path) -> dict[str, Any] | None:
        """The text embeddings by class, None without a file."""
        if not Path(embedding_file).exists():
            _logger.warning("text embedding file not found: %s", embedding_file)
            return None
        return read_text_embeddings(embedding_file)

    def get_text_embeddings(self, class_name: str) -> Any:
        """Return the text embedding of a class, or None."""
        return None if self.text_embs is None else self.text_embs.get(self._class_of(class_name))

    # ---- the rest of the interface

    def get_collate_fn(self) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
        """Return the function that makes a batch of items."""
        if self.partial == "omit":
            return vegas_collate_fn
        return functools.partial(vegas_collate_fn, partial=self.partial)

    def clear_cache(self) -> None:
        """Do nothing: no list of samples is kept on disk. For embeddings: `clear_ast_cache`."""

    def to(self, device: str | torch.device) -> ASTCachedDataset:
        """Move the text embeddings and the audio embeddings in memory, also of the splits.

        Waveforms, pictures and stored embeddings are read onto the CPU whenever an item is made.
        """
        text_embs = _moved(self.text_embs, torch.device(device))
        for part in (self, *self._parts()):
            part.device, part.text_embs = torch.device(device), text_embs
        embeddings = self._audio_embs
        in_memory = embeddings.memory if isinstance(embeddings, EmbeddingOverlay) else embeddings
        in_memory.update(_moved(in_memory, self.device))  # in place: the splits have the same
        return self

    # ---- classes

    def get_class_names(self) -> list[str]:
        """Return the names of the active classes."""
        return list(self.active_classes)

    def get_class_labels(self) -> list[int]:
        """Return the labels of the active classes."""
        return list(self.active_classes.values())

    def get_num_classes(self) -> int:
        """Return how many classes are active; a model's output has `get_max_class_label` + 1."""
        return len(self.active_classes)

    def get_max_class_label(self) -> int:
        """Return the largest active label, -1 without any. Labels are never remapped."""
        return max(self.active_classes.values(), default=-1)

    def get_samples_per_class(self) -> dict[str, int]:
        """Return class name → number of samples, of the classes that have any."""
        return dict(Counter(sample["class_name"] for sample in self.samples))

    def get_class_distribution(self) -> dict[str, float]:
        """Return class name → share of the samples, in percent."""
        counts = self.get_samples_per_class()
        return {name: 100 * count / len(self.samples) for name, count in counts.items()}

    def print_split_statistics(self) -> None:
        """Log the number of samples and each class's share."""
        counts, shares = self.get_samples_per_class(), self.get_class_distribution()
        _logger.info(
            "split %s: %d samples, %d classes, stratified: %s",
            self.split,
            len(self.samples),
            len(self.active_classes),
            self.stratify,
        )
        for name in sorted(self.active_classes):
            _logger.info(
                "  %s: %d samples (%.2f %%)", name, counts.get(name, 0), shares.get(name, 0.0)
            )

    def verify_stratification(
        self, other_dataset: ASTCachedDataset, tolerance: float = 0.05
    ) -> bool:
        """Return whether each class has about the same share in both datasets.

        Args:
            other_dataset: To compare with.
            tolerance: Largest difference of a share; 0.05 is five percentage points.
        """
        mine, theirs = self.get_class_distribution(), other_dataset.get_class_distribution()
        names = sorted(mine.keys() | theirs.keys())
        shares = [(name, mine.get(name, 0.0), theirs.get(name, 0.0)) for name in names]
        for name, own, other in shares:
            _logger.info("  %s: %.2f %% and %.2f %%", name, own, other)
        return all(abs(own - other) <= 100 * tolerance for _, own, other in shares)


def _given_root(root_dir: str | Path | None, namespace: str) -> str | Path:
    """The folder of a dataset: as given, else by the environment."""
    variable = dataset_root_variable(namespace)
    root = os.environ.get(variable) if root_dir is None else root_dir
    if root is None or root == "":
        raise DatasetError(f"root_dir: none is given; give `root_dir`, or set {variable}")
    return root


def _moved(value: Any, device: torch.device) -> Any:
    """The value with its tensors on this device; dicts at any depth are copied."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(inside, device) for key, inside in value.items()}
    return value


def _checked_splits(
    split: str | None, splits_to_load: Sequence[str] | None
) -> tuple[str, list[str] | None]:
    """The names of splits; no split means all samples."""
    for name in [split or "all", *(splits_to_load or ())]:
        if name not in (*SPLITS, "all"):
            raise DatasetError(f"split: {name!r}; use 'train', 'val', 'test' or 'all'")
    return split or "all", None if splits_to_load is None else list(splits_to_load)


def _split_ratios(
    train: float, val: float, test: float, split_ratio: float | None, split_method: str
) -> tuple[float, float, float]:
    """The ratios of train, val and test, normalized; `split_ratio` overrides the first and last."""
    if split_ratio is None:
        return normalized_ratios(train, val, test, split_method)
    _logger.warning("split_ratio is deprecated; use train_ratio, val_ratio and test_ratio")
    shares = (split_ratio * (1 - val), split_ratio * val, 1 - split_ratio)
    ratios = normalized_ratios(*shares, split_method)
    if split_method == "hash":
        return ratios
    # As those scripts have it: the sum is above 1, and train's default gives way.
    return (train if train != _TRAIN_RATIO else ratios[0]), val, 1 - split_ratio


def _read_captions(root: Path) -> dict[str, Any]:
    """Return `captions.json` of the root, an empty dict without one.

    Keys are `file_id` or `file_id:class`; the second wins, as file ids repeat between classes.

    Raises:
        DatasetError: The file isn't a JSON object.
    """
    path = root / "captions.json"
    if not path.is_file():
        return {}
    try:
        captions = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(captions, dict):
        raise DatasetError(f"{path}: expected an object of file_id → caption")
    return captions
