"""How well the nearest embeddings of other files name a sample's class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lmdbcache.storage import recording_of, split_sample_id

_NUM_FOLDS: Final = 5  # also the fewest files of a class that takes part
_NUM_VOTING: Final = 5
_MAX_CLASSIFIED: Final = 10_000  # of a fair sample: a second on two cores


class ClassAccuracy(NamedTuple):
    """The samples of one class among their nearest neighbors.

    Args:
        name: The class.
        num_samples: Its samples that took part.
        accuracy: Share of them that their neighbors give this class, 0 to 1.
        chance: The class's share of all samples: what a guess by frequency reaches.
        mistaken_for: The class that the others are given most often; None if there are none.
        of_recordings: Share of the class's recordings whose windows are given this class most
            often; None without windows.
    """

    name: str
    num_samples: int
    accuracy: float
    chance: float
    mistaken_for: str | None
    of_recordings: float | None = None


class Separability(NamedTuple):
    """Accuracy of a vote of the five nearest neighbors, by cosine, in five folds of files.

    Args:
        accuracy: Mean over the classes, 0 to 1.
        chance: 1 / number of classes.
        classes: One by one, the least accurate first; those of fewer than five files aren't in.
        num_left_out: How many these are.
    """

    accuracy: float
    chance: float
    classes: list[ClassAccuracy]
    num_left_out: int


def separability_of(
    sample_ids: Sequence[str], classes: npt.NDArray[Any], units: npt.NDArray[np.float32]
) -> Separability | None:
    """Classify each sample by its neighbors among the files of other folds.

    Windows of a recording, and clips of one file id, are in the same fold.

    Args:
        sample_ids: In an order whose beginning is a fair sample.
        classes: `(n,)`, of each.
        units: `(n, hidden_size)`, of length 1.

    Returns:
        None of fewer than two classes with five files or more.
    """
    from sklearn.metrics import confusion_matrix
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    most = min(_MAX_CLASSIFIED, len(units))
    sample_ids, classes = sample_ids[:most], classes[:most]
    files = np.array([split_sample_id(recording_of(name))[0] for name in sample_ids], object)
    num_files = Counter(name for name, _ in set(zip(classes, files, strict=True)))
    kept = np.array([num_files[name] >= _NUM_FOLDS for name in classes], bool)
    if len(set(classes[kept])) < 2:
        return None
    # Numbers: scikit-learn sorts by class, and takes no array of objects.
    names, expected = np.unique(classes[kept].astype(str), return_inverse=True)
    predicted = cross_val_predict(
        KNeighborsClassifier(_NUM_VOTING, algorithm="brute"),  # of unit vectors: by cosine
        units[:most][kept],
        expected,
        groups=np.unique(files[kept].astype(str), return_inverse=True)[1],
        cv=StratifiedGroupKFold(_NUM_FOLDS, shuffle=True, random_state=0),
    )
    by_recording = _right_of_recordings(np.array(sample_ids, object)[kept], expected, predicted)
    rows = []
    for number, counts in enumerate(confusion_matrix(expected, predicted)):
        right, total = int(counts[number]), int(counts.sum())
        counts[number] = 0
        mistaken = str(names[counts.argmax()]) if counts.any() else None
        chance = total / len(expected)
        row = ClassAccuracy(str(names[number]), total, right / total, chance, mistaken)
        rows.append(row._replace(of_recordings=by_recording.get(number)))
    rows.sort(key=lambda row: (row.accuracy, row.name))
    mean = sum(row.accuracy for row in rows) / len(rows)
    return Separability(mean, 1 / len(rows), rows, len(num_files) - len(rows))


def layers_apart(
    sample_ids: Sequence[str], classes: npt.NDArray[Any], layers: npt.NDArray[np.float32]
) -> list[Separability]:
    """Classify by each layer alone.

    Args:
        sample_ids: See `separability_of`.
        classes: See `separability_of`.
        layers: `(n, layers, hidden_size)`.

    Returns:
        Of each layer, from the first; empty of fewer than two classes with five files or more.
    """
    found = []
    for number in range(layers.shape[1]):
        lengths = np.linalg.norm(layers[:, number], axis=1, keepdims=True)
        units = (layers[:, number] / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        found.append(separability_of(sample_ids, classes, units))
    return [one for one in found if one is not None]


def _right_of_recordings(
    sample_ids: npt.NDArray[Any], expected: npt.NDArray[Any], predicted: npt.NDArray[Any]
) -> dict[int, float]:
    """Return class → share of its recordings whose windows vote for it; empty without windows."""
    names, of_each = np.unique(
        np.array(list(map(recording_of, sample_ids)), str), return_inverse=True
    )
    if len(names) == len(sample_ids):
        return {}
    votes = np.zeros((len(names), int(expected.max()) + 1), np.int64)
    np.add.at(votes, (of_each, predicted), 1)
    own = np.zeros(len(names), np.int64)
    own[of_each] = expected
    is_right = votes.argmax(axis=1) == own
    return {number: float(is_right[own == number].mean()) for number in np.unique(own).tolist()}
