"""What the adapters have in common: a dataset that lists its clips once. No torch here."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.audio import shown
from lmdbcache.cache import left_out_counts
from lmdbcache.datasets.base import Sample, sample_id_of
from lmdbcache.datasets.reopening import reopening_options
from lmdbcache.datasets.scanning import LeftOut, PassedOver
from lmdbcache.errors import DatasetError, InvalidSampleIdError
from lmdbcache.files import expand_user
from lmdbcache.storage import canonical_class

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = [
    "LeftOut",
    "ListedDataset",
    "checked_folder",
    "left_out_counts",
    "own_split_name",
    "summary_of",
]

_SPLIT_NAMES: Final = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


class ListedDataset:
    """A dataset whose clips are listed when it is opened; the base of the adapters here.

    An adapter calls `add` for each clip and `finish` at the end.

    Args:
        root: Where the clips come from, for people and for the store's metadata.
        namespace: See `AudioDataset`.
        class_labels: Class name → label, of every class that the dataset knows.
        namespace_is_derived: Whether the namespace is made from the folder's name, which another
            folder may share.

    Attributes:
        kind: What `open_dataset` calls this layout.
        samples: See `AudioDataset`.
        command_line_options: See `AudioDataset`; None until `can_be_opened_with` is called.

    Raises:
        DatasetError: Two classes have one name in a sample id.
    """

    kind = "listed"

    def __init__(
        self,
        root: str,
        namespace: str,
        class_labels: Mapping[str, int],
        *,
        namespace_is_derived: bool = False,
        passed_over: PassedOver | None = None,
    ) -> None:
        self.root = root
        self.namespace = namespace
        self.namespace_is_derived = namespace_is_derived
        self.samples: list[Sample] = []
        self.passed_over = PassedOver() if passed_over is None else passed_over
        self.command_line_options: dict[str, str] | None = None
        self._names = _canonical_names(class_labels, root)
        self.class_labels: Mapping[str, int] = {
            self._names[name]: label for name, label in class_labels.items()
        }
        self._paths: dict[str, str] = {}

    @property
    def sample_ids(self) -> list[str]:
        """`file_id:class` of every sample, in the order of `samples`."""
        return [sample_id_of(sample) for sample in self.samples]

    def can_be_opened_with(self, **options: str | Path | None) -> None:
        """Note that the command line opens the root as this dataset.

        Args:
            options: Its options besides `--dataset` and `--namespace`, such as `id_column`.
        """
        own = self.namespace_is_derived or self.namespace == self.kind
        self.command_line_options = reopening_options(
            self.kind, None if own else self.namespace, self.passed_over.decoder, **options
        )

    def add(self, file_id: str, class_name: str, audio_path: str, **fields: Any) -> None:
        """Take a clip in; one whose name can't be a sample id is left out.

        Args:
            file_id: The clip's name in the dataset.
            class_name: One of `class_labels`, in any case.
            audio_path: Its file, or what to call its `audio_source`.
            fields: More fields of the sample: `split`, `fold`, `audio_source`, ….

        Raises:
            DatasetError: Another clip has the same sample id.
        """
        name = self._names.get(class_name) or canonical_class(class_name)
        sample = {
            "file_id": unicodedata.normalize("NFC", file_id),
            "class_name": name,
            "class_label": self.class_labels[name],
            "audio_path": audio_path,
            **fields,
        }
        try:
            sample_id = sample_id_of(sample)
        except InvalidSampleIdError as error:
            self.leave_out(audio_path, str(error), kind="no sample id", class_name=name)
            return
        if sample_id in self._paths:
            raise DatasetError(
                f"{shown(self._paths[sample_id])} and {shown(audio_path)} have the same sample id "
                f"{sample_id!r}; rename or remove one of them"
            )
        self._paths[sample_id] = audio_path
        self.samples.append(sample)

    @property
    def left_out(self) -> list[LeftOut]:
        """What isn't a sample though it looks like one, such as a listed file that is missing."""
        return self.passed_over.items

    def leave_out(self, name: str, reason: str, *, kind: str = "", class_name: str = "") -> None:
        """Note something that isn't a sample; see `PassedOver`."""
        self.passed_over(name, reason, kind=kind, class_name=class_name)

    def finish(self) -> None:
        """Sort the samples by class and file id; without any the dataset is refused.

        Raises:
            DatasetError: There are no samples.
        """
        self._paths = {}
        if not self.samples:
            why = "".join(f"; {item.name}: {item.reason}" for item in self.left_out[:3])
            raise DatasetError(f"{self.root}: {self.kind}: no clips found{why}")
        self.samples.sort(key=lambda sample: (sample["class_name"], sample["file_id"]))

    def __str__(self) -> str:
        classes = len({sample["class_name"] for sample in self.samples})
        text = f"{self.kind}: {len(self.samples)} clips of {classes} classes in {self.root}"
        if self.left_out:
            text += f"; {summary_of(self.left_out)}"
        return text

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


def own_split_name(name: str) -> str:
    """`train`, `val` or `test` for the usual names of these, else the name itself."""
    return _SPLIT_NAMES.get(name.strip().lower(), name.strip())


def checked_folder(root: str | Path, expected: str) -> str:
    """The folder's absolute path, `~` expanded.

    Raises:
        DatasetError: It isn't a folder.
    """
    folder = os.path.abspath(expand_user(root))  # noqa: PTH100
    if not os.path.isdir(folder):  # noqa: PTH112
        raise DatasetError(f"{shown(folder)} isn't a folder; expected is {expected}")
    return folder


def _canonical_names(classes: Iterable[str], root: str) -> dict[str, str]:
    """Class as the dataset writes it → as it stands in a sample id."""
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    for given in classes:
        name = canonical_class(given)
        if name in first:
            raise DatasetError(
                f"{shown(root)}: the classes {first[name]!a} and {given!a} have one name in a "
                f"sample id, {name!a}; rename one of them"
            )
        first[name] = given
        names[given] = name
    return names


def summary_of(left_out: list[LeftOut]) -> str:
    """Return `3 left out: no label, such as …; 1 left out: …`, most frequent first."""
    first = {item.kind: item for item in reversed(left_out)}
    kinds = Counter(item.kind for item in left_out).most_common()
    told = [f"{count} left out: {kind}{_example(first[kind])}" for kind, count in kinds[:3]]
    rest = sum(count for _, count in kinds[3:])
    return "; ".join([*told, *([f"{rest} more left out"] if rest else [])])


def _example(item: LeftOut) -> str:
    return f", such as {item.name}" + (f" ({item.reason})" if item.reason != item.kind else "")
