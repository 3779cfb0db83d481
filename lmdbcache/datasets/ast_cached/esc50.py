"""ESC-50: 2,000 clips of 50 classes in five folds, with their cached embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmdbcache.datasets.ast_cached.base import ITEM_KEYS, ASTCachedDataset
from lmdbcache.datasets.base import ListedDataset, Sample
from lmdbcache.datasets.esc50 import ESC50Folder
from lmdbcache.errors import DatasetError


class ESC50Dataset(ASTCachedDataset):
    """The ESC-50 clips under a folder, `meta/esc50.csv` and `audio/*.wav`.

    Folds are counted from 0 here, in the arguments, samples and items: the table's fold less 1, so
    0 to 4. Labels are the table's, under any selection.

    Args:
        root_dir: Folder with `meta` and `audio`; None: that of `$LMDBCACHE_ESC50_ROOT`.
        text_embedding_file: See `embedding_file` of the base class.
        node_id: With `split_method="sklearn"` the seed of the splits is 42 + `node_id`. By `"hash"`
            all nodes have the same splits. To divide the clips: `node_split_id`.
        use_folds: Take train, val and test from the folds rather than by ratios.
        train_folds: The folds of train, 0 to 4.
        val_folds: The folds of val; None or empty: val is drawn from the train folds, by
            `val_ratio` to `train_ratio`.
        test_folds: The folds of test.
        options: Further arguments of `ASTCachedDataset`.

    Raises:
        DatasetError: See `ASTCachedDataset`; with `use_folds`, a fold that the dataset doesn't
            have, or one that two parts share.
        ConfigError, TypeError: See `ASTCachedDataset`.
    """

    namespace = ESC50Folder.kind
    _item_keys = (*ITEM_KEYS, "fold")

    def __init__(
        self,
        root_dir: str | Path | None = None,
        *,
        text_embedding_file: str | Path | None = None,
        node_id: int | None = None,
        use_folds: bool = False,
        train_folds: Sequence[int] = (0, 1, 2, 3),
        val_folds: Sequence[int] | None = None,
        test_folds: Sequence[int] = (4,),
        **options: Any,
    ) -> None:
        self.node_id, self.use_folds = node_id, use_folds
        self.train_folds, self.test_folds = list(train_folds or ()), list(test_folds or ())
        self.val_folds = None if val_folds is None else list(val_folds)
        if text_embedding_file is not None:
            options.setdefault("embedding_file", text_embedding_file)
        super().__init__(root_dir, **options)

    def _open_folder(self) -> ListedDataset:
        folder = ESC50Folder(self.root)
        for sample in folder.samples:
            sample["fold"] -= 1
        if self.use_folds:
            self._check_folds({sample["fold"] for sample in folder.samples})
        return folder

    def _check_folds(self, known: set[int]) -> None:
        seen: dict[int, str] = {}
        for name in ("train_folds", "val_folds", "test_folds"):
            for fold in set(getattr(self, name) or ()):
                if fold not in known:
                    there = ", ".join(map(str, sorted(known)))
                    raise DatasetError(
                        f"`{name}`: {fold!r}; the folds of {self.root_dir} are {there} here, the "
                        "table's less 1"
                    )
                if fold in seen:
                    raise DatasetError(
                        f"`{seen[fold]}`, `{name}`: both have fold {fold}; a clip would be in two "
                        "splits"
                    )
                seen[fold] = name

    def _of_part(self, samples: list[Sample], split: str) -> list[Sample]:
        if not self.use_folds:
            return super()._of_part(samples, split)
        folds = self.test_folds if split == "test" else self.train_folds
        if split == "val" and self.val_folds:
            folds = self.val_folds
        chosen = [sample for sample in samples if sample["fold"] in folds]
        if split == "test" or self.val_folds:
            return chosen
        return self._train_or_val(chosen, split)
