"""Splits and nodes as scikit-learn and NumPy's `RandomState` draw them. No torch here.

For scripts that drew theirs so: the same seed gives the same members. One generator goes through
all classes, in the order of their labels: a clip or a class more moves many others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from lmdbcache.datasets.base import Sample
from lmdbcache.errors import DatasetError
from lmdbcache.machine import needing

NODE_RANK: Final = "node_rank"

# A smaller ratio means that there is no such split.
_SMALLEST: Final = 1e-6


def shuffled_classes(samples: Sequence[Sample], seed: int) -> list[list[int]]:
    """Return indices into `samples`: each class in the order of its file ids, then shuffled.

    Args:
        samples: Dicts with `file_id`, `class_name` and `class_label`.
        seed: 0 to 2**32 - 1; one `numpy.random.RandomState` shuffles one class after another.
    """
    groups: dict[str, list[int]] = {}
    for index in sorted(range(len(samples)), key=lambda i: _class_and_file(samples[i])):
        groups.setdefault(samples[index]["class_name"], []).append(index)
    generator = np.random.RandomState(seed)
    for group in groups.values():
        generator.shuffle(group)
    return list(groups.values())


def sklearn_split(
    samples: Sequence[Sample],
    split: str,
    ratios: tuple[float, float, float],
    *,
    stratify: bool,
    seed: int,
) -> set[int]:
    """Return indices of the samples of one split; see `split_samples`.

    Args:
        samples: Dicts with `file_id`, `class_name` and `class_label`.
        split: `"train"`, `"val"` or `"test"`.
        ratios: Of train, val and test. They needn't sum to 1.
        stratify: Draw with `sklearn.model_selection.train_test_split`: test against the rest, then
            val against train. Otherwise shuffle each class and round its shares down.
        seed: 0 to 2**32 - 1.

    Raises:
        DatasetError: scikit-learn can't divide the samples.
        MissingDependencyError: scikit-learn isn't installed, with `stratify`.
    """
    train, val, test = (min(ratio, 1.0) if ratio >= _SMALLEST else 0.0 for ratio in ratios)
    if not stratify:
        found: list[int] = []
        for group in shuffled_classes(samples, seed):
            first, second = int(len(group) * train), int(len(group) * val)
            parts = {
                "train": group[:first],
                "val": group[first : first + second],
                "test": group[first + second :] if test else [],
            }
            found += parts[split]
        return set(found)
    # The samples of a node are drawn from in the order of their shuffle.
    rest = sorted(
        range(len(samples)),
        key=lambda i: (
            _class_and_file(samples[i])[:2],
            samples[i].get(NODE_RANK, 0),
            samples[i]["file_id"],
        ),
    )
    held_out: list[int] = []
    if test and rest:
        rest, held_out = _divided(samples, rest, "test_ratio", test, seed)
    if split == "test":
        return set(held_out)
    if not (val and rest):
        return set(rest if split == "train" else [])
    share = min(max(val / (train + val), _SMALLEST), 1 - _SMALLEST)
    kept, validation = _divided(samples, rest, "val_ratio", share, seed)
    return set(kept if split == "train" else validation)


def _class_and_file(sample: Sample) -> tuple[int, str, str]:
    return sample.get("class_label", 0), sample["class_name"], sample["file_id"]


def _divided(
    samples: Sequence[Sample], order: list[int], name: str, share: float, seed: int
) -> tuple[list[int], list[int]]:
    with needing('split_method: "sklearn"', "sklearn"):
        from sklearn.model_selection import train_test_split
    classes = [_class_and_file(samples[index])[:2] for index in order]
    codes = {each: code for code, each in enumerate(sorted(set(classes)))}
    try:
        kept, drawn = train_test_split(
            order,
            test_size=share,
            stratify=[codes[each] for each in classes],
            random_state=seed,
        )
    except ValueError as error:
        (_, smallest), size = min(Counter(classes).items(), key=lambda item: item[1])
        raise DatasetError(
            f"{name}: scikit-learn can't draw {share:.3g} of {len(order)} samples of {len(codes)} "
            f"classes, the smallest {smallest!r} with {size}: each class needs 2 samples, and each "
            "part as many samples as there are classes. Change the ratios, exclude small classes, "
            'or give `stratify=False` or `split_method="hash"`'
        ) from error
    return kept, drawn
