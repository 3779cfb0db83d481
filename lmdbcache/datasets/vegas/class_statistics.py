"""How many samples of which class a data set holds."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmdbcache.datasets.base import Sample

__all__ = ["ClassStatisticsMixin"]

_logger = logging.getLogger(__name__)


class ClassStatisticsMixin:
    """Classes, their labels and their shares.

    Attributes:
        samples: The samples, each with `class_name`.
        active_classes: Class name → label; labels keep their value under any selection.
        split: Name of the split, for the log.
        stratify: Whether it was divided per class, for the log.
    """

    samples: list[Sample]
    active_classes: dict[str, int]
    split: str
    stratify: bool

    def get_class_names(self) -> list[str]:
        """Names of the active classes."""
        return list(self.active_classes)

    def get_class_labels(self) -> list[int]:
        """Labels of the active classes."""
        return list(self.active_classes.values())

    def get_num_classes(self) -> int:
        """How many classes are active; for a model's output size see `get_max_class_label`."""
        return len(self.active_classes)

    def get_max_class_label(self) -> int:
        """Largest active label, -1 if no class is active. Labels are never remapped."""
        return max(self.active_classes.values(), default=-1)

    def get_samples_per_class(self) -> dict[str, int]:
        """Class name → number of samples, of the classes that have any."""
        return dict(Counter(sample["class_name"] for sample in self.samples))

    def get_class_distribution(self) -> dict[str, float]:
        """Class name → share of the samples, in percent."""
        return {
            name: 100 * count / len(self.samples)
            for name, count in self.get_samples_per_class().items()
        }

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
        self, other_dataset: ClassStatisticsMixin, tolerance: float = 0.05
    ) -> bool:
        """Whether each class has about the same share in both data sets.

        Args:
            other_dataset: To compare with.
            tolerance: Largest difference of a share; 0.05 is five percentage points.
        """
        mine, theirs = self.get_class_distribution(), other_dataset.get_class_distribution()
        similar = True
        for name in sorted(mine.keys() | theirs.keys()):
            difference = abs(mine.get(name, 0.0) - theirs.get(name, 0.0))
            similar = similar and difference <= 100 * tolerance
            _logger.info(
                "  %s: %.2f %% and %.2f %%", name, mine.get(name, 0.0), theirs.get(name, 0.0)
            )
        return similar
