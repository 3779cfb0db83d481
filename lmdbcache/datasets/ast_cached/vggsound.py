"""VGGSound: ten-second clips of 309 classes, with their cached embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmdbcache.datasets.ast_cached.base import ASTCachedDataset
from lmdbcache.datasets.base import ListedDataset, Sample
from lmdbcache.datasets.vggsound import VGGSoundFolder
from lmdbcache.errors import DatasetError


class VGGSoundDataset(ASTCachedDataset):
    """The VGGSound clips under a folder: a table, and files `<YouTube id>_<start>.wav`.

    Labels are positions in the sorted list of the table's classes, under any selection. A class
    may be given with underscores instead of spaces.

    Args:
        root_dir: Folder with the audio files; None: that of `$LMDBCACHE_VGGSOUND_ROOT`.
        text_embedding_file: See `embedding_file` of the base class.
        table: The table; None takes `vggsound.csv` of the root.
        node_id: With `split_method="sklearn"` the seed of the splits is 42 + `node_id`. By `"hash"`
            all nodes have the same splits. To divide the clips: `node_split_id`.
        use_official_split: Take train and test from the table; val is drawn from train, by
            `val_ratio` to `train_ratio`, unless the table has one. If false, all three are drawn
            by the ratios.
        audio_duration: Clips are cut or zero-padded to this, in seconds.
        options: Further arguments of `ASTCachedDataset`.

    Raises:
        DatasetError: See `ASTCachedDataset`; with `use_official_split`, a table without splits.
        ConfigError, TypeError: See `ASTCachedDataset`.
    """

    namespace = VGGSoundFolder.kind

    def __init__(
        self,
        root_dir: str | Path | None = None,
        *,
        text_embedding_file: str | Path | None = None,
        table: str | Path | None = None,
        node_id: int | None = None,
        use_official_split: bool = True,
        audio_duration: float = 10.0,
        **options: Any,
    ) -> None:
        self.table, self.node_id, self.use_official_split = table, node_id, use_official_split
        if text_embedding_file is not None:
            options.setdefault("embedding_file", text_embedding_file)
        super().__init__(root_dir, audio_duration=audio_duration, **options)

    def _open_folder(self) -> ListedDataset:
        folder = VGGSoundFolder(self.root, table=self.table)
        if self.use_official_split and not all("split" in clip for clip in folder.samples):
            raise DatasetError(
                f"{self.root_dir}: not every row of the table has a split; give "
                "`use_official_split=False` to draw the splits by ratios"
            )
        return folder

    def _resolved(self, classes: str | int | Iterable[str | int] | None) -> list[str] | None:
        if isinstance(classes, (str, int)):
            classes = [classes]
        if classes is not None:
            classes = [self._spelled(each) if isinstance(each, str) else each for each in classes]
        return super()._resolved(classes)

    def _read_text(self, embedding_file: str | Path) -> dict[str, Any] | None:
        embeddings = super()._read_text(embedding_file)
        return embeddings and {self._spelled(name): each for name, each in embeddings.items()}

    def _class_of(self, name: str) -> str:
        return super()._class_of(self._spelled(name))

    def _spelled(self, name: str) -> str:
        """A class as the table writes it."""
        spaced = name.replace("_", " ").strip().lower()
        return spaced if spaced in self.class_labels else name

    def _of_part(self, samples: list[Sample], split: str) -> list[Sample]:
        if not self.use_official_split:
            return super()._of_part(samples, split)
        if split == "test" or any(clip["split"] == "val" for clip in self._folder.samples):
            return [sample for sample in samples if sample["split"] == split]
        train = [sample for sample in samples if sample["split"] == "train"]
        return self._train_or_val(train, split)
