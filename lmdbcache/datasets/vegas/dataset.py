"""VEGAS: clips of ten classes, with their cached embeddings, for a training loop."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.data import Dataset

from lmdbcache.config import CacheConfig
from lmdbcache.datasets.base import sample_id_of
from lmdbcache.datasets.listed import summary_of
from lmdbcache.datasets.vegas.cache_methods import ASTCacheMixin
from lmdbcache.datasets.vegas.class_statistics import ClassStatisticsMixin
from lmdbcache.datasets.vegas.collate import create_vegas_dataloader, vegas_collate_fn
from lmdbcache.datasets.vegas.deferred import DeferredAudio, LazyDict
from lmdbcache.datasets.vegas.layout import (
    CLASS_LABELS,
    LABEL_TO_CLASS,
    NO_SAMPLE_ID,
    read_captions,
    resolve_classes,
)
from lmdbcache.datasets.vegas.selection import SelectionMixin, checked_splits, split_ratios
from lmdbcache.datasets.vegas.visual import ImageToTensor, load_image, load_video
from lmdbcache.files import expand_user
from lmdbcache.training import plain_tensor, read_tensor_dict, read_text_embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lmdbcache.datasets.base import Sample

__all__ = ["VEGASDataset", "create_vegas_dataloader", "vegas_collate_fn"]

_ITEM_KEYS = (
    *("audio_filename", "image_filename", "video_filename", "class_name", "video_id", "file_id"),
    *("sample_idx", "ytid", "start_second", "end_second", "caption"),
)

_logger = logging.getLogger(__name__)
_vegas_collate_fn = vegas_collate_fn  # the name by which older scripts import it


class VEGASDataset(SelectionMixin, ASTCacheMixin, ClassStatisticsMixin, Dataset[dict[str, Any]]):
    """The VEGAS clips under a folder, `<root_dir>/<class>/audios/video_00001.wav`.

    A sample needs its audio file only. Labels are those of `CLASS_LABELS` under any selection.
    With `split=None` the data set holds all samples, and `.train`, `.val` and `.test` hold its
    splits; what is loaded into it is shared with them.

    An item is a dict with `label`, names, ids and metadata; `audio` with `load_audio`; `audio_emb`
    where an embedding is cached. In that case `audio` is decoded when it is first read; in the
    other `audio_num_valid` (int64) says how many samples of it the file gave, unless
    `transform_audio` changed them.

    Args:
        root_dir: Folder that holds one folder per class.
        selected_classes: Names or labels to use; None or empty: all.
        excluded_classes: Names or labels to leave out.
        split: `"train"`, `"val"`, `"test"`, `"all"`, or None (see above).
        train_ratio: Share of train; ratios are normalised.
        val_ratio: Share of val.
        test_ratio: Share of test.
        stratify: Divide every class by the ratios.
        num_samples_per_class: Use the first samples of each class only. Without effect beside
            `samples_per_node`.
        node_split_id: This node, from 0. Nodes are divided first, then train, val and test.
        num_nodes: Divide every class between so many nodes.
        samples_per_node: Or give each node so many samples of every class.
        node_split_seed: Seed of the division between nodes, the same on all of them.
        audio_sample_rate: Of `audio`, in Hz.
        audio_duration: Clips are cut or zero-padded to this, in seconds.
        load_audio: Whether items have `audio`.
        enable_ast_cache: If false, embeddings are neither loaded nor saved.
        ast_cache_dir: Root of the cache; None: `<root_dir>/ast_cache`.
        embedding_file: `torch.save`d dict of class name → text embedding.
        audio_embedding_file: `torch.save`d dict of embeddings, see
            `load_audio_embeddings_from_file`.
        splits_to_load: Hold the union of these splits, whatever `split` says.
        split_ratio: Deprecated: share of train and val together.
        use_folds: No effect, as are the folds: VEGAS has none.
        train_folds: No effect.
        val_folds: No effect.
        test_folds: No effect.
        use_saved_audio_embeddings: If false, `audio_embedding_file` isn't loaded.
        enable_cache: No effect: listing the files is fast, and nothing is pickled.
        cache_dir: No effect.
        image_size: Height and width of pictures and frames, in pixels.
        video_fps: Frames per second of `audio_duration`.
        transform_audio: Applied to the waveform (1, num_samples).
        transform_image: Applied to the PIL image instead of resizing and normalising it.
        transform_video: Applied to the frames (frames, 3, height, width).
        load_image: Whether items have `image`, where there is a file.
        load_video: Whether items have `video`, None where there is no file.
        ast_output: Which output of the model is cached (`"pooler_output"`,
            `"last_hidden_state"`, `"mean"`); None: decided by what is saved or stored.

    Raises:
        DatasetError: The folder or an argument can't be used.
        ConfigError: A sample rate or duration that can't be.
    """

    CLASS_LABELS: ClassVar[dict[str, int]] = CLASS_LABELS
    LABEL_TO_CLASS: ClassVar[dict[int, str]] = LABEL_TO_CLASS

    train: VEGASDataset
    val: VEGASDataset
    test: VEGASDataset

    def __init__(  # noqa: PLR0913, PLR0917 - every keyword that scripts pass
        self,
        root_dir: str | Path,
        selected_classes: str | int | Iterable[str | int] | None = None,
        excluded_classes: str | int | Iterable[str | int] | None = None,
        split: str | None = None,
        train_ratio: float = 0.7,
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
        use_folds: bool = False,
        train_folds: Sequence[int] | None = None,
        val_folds: Sequence[int] | None = None,
        test_folds: Sequence[int] | None = None,
        use_saved_audio_embeddings: bool = True,
        enable_cache: bool = False,
        cache_dir: str | Path | None = None,
        image_size: tuple[int, int] = (224, 224),
        video_fps: int = 25,
        transform_audio: Callable[[torch.Tensor], torch.Tensor] | None = None,
        transform_image: Callable[[Any], Any] | None = None,
        transform_video: Callable[[torch.Tensor], torch.Tensor] | None = None,
        load_image: bool = False,
        load_video: bool = False,
        ast_output: str | None = None,
    ) -> None:
        self.root_dir = str(expand_user(root_dir))
        self.root = str(Path(self.root_dir).absolute())
        self.enable_ast_cache, self.ast_output = enable_ast_cache, ast_output
        self.ast_cache_dir = str(ast_cache_dir or Path(self.root_dir) / "ast_cache")
        self.split, self.splits_to_load = checked_splits(split, splits_to_load)
        self.stratify, self.split_ratio = stratify, split_ratio
        self.train_ratio, self.val_ratio, self.test_ratio = split_ratios(
            train_ratio, val_ratio, test_ratio, split_ratio
        )
        self.num_samples_per_class = num_samples_per_class
        self.node_split_id, self.num_nodes = node_split_id, num_nodes
        self.samples_per_node, self.node_split_seed = samples_per_node, node_split_seed
        self.use_folds, self.train_folds = use_folds, train_folds
        self.val_folds, self.test_folds = val_folds, test_folds
        self.enable_cache, self.cache_dir = enable_cache, cache_dir
        if use_folds:
            _logger.warning("use_folds has no effect: VEGAS has no folds; the ratios are used")

        audio = CacheConfig(sample_rate=audio_sample_rate, duration=audio_duration)
        self.audio_sample_rate, self.audio_duration = audio.sample_rate, audio.duration
        self.image_size, self.video_fps = image_size, video_fps
        self.load_audio, self.load_image, self.load_video = load_audio, load_image, load_video
        self.transform_audio, self.transform_video = transform_audio, transform_video
        self.transform_image = transform_image or ImageToTensor(image_size)
        self.device = torch.device("cpu")

        self.available_classes = list(CLASS_LABELS)
        self.captions = read_captions(Path(self.root_dir))
        self._selected_classes = resolve_classes(selected_classes)
        self._excluded_classes = resolve_classes(excluded_classes)
        self._audio_embs, self._audio_embs_from_file = {}, None
        self.embedding_file = embedding_file
        self.text_embs = None if embedding_file is None else read_text_embeddings(embedding_file)
        self.audio_embedding_file = audio_embedding_file
        self.use_saved_audio_embeddings = use_saved_audio_embeddings
        self._reload()
        if passed_over := [item for item in self.left_out if item.kind != NO_SAMPLE_ID]:
            _logger.warning("%s: %s", self.root_dir, summary_of(passed_over))
        if split is None:
            self._make_parts()
        if audio_embedding_file is not None and use_saved_audio_embeddings:
            self.load_audio_embeddings_from_file(audio_embedding_file)

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
        item = LazyDict()
        embedding = self._embedding_of(sample)
        if self.load_audio:
            waveform = self._deferred_audio(sample["audio_path"])
            if embedding is None:
                item["audio"], num_valid = waveform.decode()
                if num_valid is not None:
                    item["audio_num_valid"] = torch.tensor(num_valid, dtype=torch.long)
            else:
                item["audio"] = waveform
        if self.load_image and sample["image_path"] is not None:
            item["image"] = self.read_image(sample["image_path"])
        if self.load_video:
            item["video"] = self.read_video(sample["video_path"])
        if self.text_embs is not None and sample["class_name"] in self.text_embs:
            item["text_emb"] = self.text_embs[sample["class_name"]]
        if embedding is not None:
            item["audio_emb"] = embedding
        item["label"] = torch.tensor(sample["class_label"], dtype=torch.long)
        item.update((key, sample[key]) for key in _ITEM_KEYS)
        return item

    def load_waveform(self, audio_path: str | Path) -> torch.Tensor:
        """Decode a file as float32 (num_samples,), mono, cut or padded, transformed if asked for.

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

    def _embedding_of(self, sample: Sample) -> torch.Tensor | None:
        sample_id = sample_id_of(sample)
        for embeddings in (self._audio_embs, self._audio_embs_from_file):
            if embeddings is not None:
                try:
                    return plain_tensor(embeddings[sample_id])
                except KeyError:
                    continue
        return None

    # ---- embeddings from files

    def load_audio_embeddings_from_file(self, embedding_file: str | Path) -> bool:
        """Take embeddings from a `torch.save`d dict of sample id → tensor (or dict with one).

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

    def get_text_embeddings(self, class_name: str) -> Any:
        """Text embedding of a class, or None."""
        return None if self.text_embs is None else self.text_embs.get(class_name.lower())

    # ---- the rest of the interface

    def get_collate_fn(self) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
        """The function that makes a batch of items."""
        return vegas_collate_fn

    def clear_cache(self) -> None:
        """Does nothing: no list of samples is kept on disk. For embeddings: `clear_ast_cache`."""

    def to(self, device: str | torch.device) -> VEGASDataset:
        """Note the device that a training loop uses; items stay on the CPU."""
        self.device = torch.device(device)
        for part in self._parts():
            part.to(self.device)
        return self
