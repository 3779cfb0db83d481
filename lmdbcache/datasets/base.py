"""What extraction and training ask of a dataset, and the base of the adapters. No torch here.

To add a layout: a module with a subclass of `ListedDataset`, and its name in
`lmdbcache.datasets.opening.ADAPTERS`.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol, TypeAlias, runtime_checkable

from lmdbcache.audio import AudioSource, shown
from lmdbcache.datasets.scanning import LeftOut, PassedOver, summary_of
from lmdbcache.errors import DatasetError, InvalidSampleIdError
from lmdbcache.files import expand_user, is_url
from lmdbcache.storage import canonical_class, join_sample_id

Sample: TypeAlias = dict[str, Any]


@runtime_checkable
class AudioDataset(Protocol):
    """A list of labeled clips, and the dataset's own list of classes.

    Attributes:
        namespace: Goes to `CacheConfig.namespace`, so that equal sample ids of two datasets can't
            meet in one store.
        class_labels: Class name → label, of every class that the dataset knows, whether or not
            it has clips of it. Labels are never remapped by a selection.
        samples: One dict per clip, holding at least `file_id` (str), `class_name` (str),
            `class_label` (int) and `audio_path` (str). Optional are `audio_source` (an
            `AudioSource`; then `audio_path` is only a name for people), `split` (str: the
            dataset's own `"train"`, `"val"` or `"test"`), `fold` (int) and `target` (a number or
            array that is trained on in place of `class_label`).

    Two more are optional. `root` (str) is the folder, and `left_out` lists what isn't a sample
    though it looks like one (`LeftOut`).
    """

    namespace: str
    class_labels: Mapping[str, int]
    samples: list[Sample]

    @property
    def sample_ids(self) -> list[str]:
        """`file_id:class` of every sample, in the order of `samples`."""
        ...


def sample_id_of(sample: Mapping[str, Any]) -> str:
    """Return the canonical `file_id:class` of one sample.

    Raises:
        InvalidSampleIdError: The file id or the class can't be part of a sample id.
    """
    return join_sample_id(sample["file_id"], sample["class_name"])


def source_of(sample: Mapping[str, Any]) -> str | AudioSource:
    """Return where the clip's bytes are: its `audio_source` if it has one, else `audio_path`."""
    source: str | AudioSource = sample.get("audio_source") or sample["audio_path"]
    return source


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
        kind: The layout's name, for `open_dataset`.
        layout: The layout in a few words, for messages.
        samples: See `AudioDataset`.

    Raises:
        DatasetError: Two classes have one name in a sample id.
    """

    kind: ClassVar[str] = "listed"
    layout: ClassVar[str] = ""

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
        self._names = _canonical_names(class_labels, root)
        self.class_labels: Mapping[str, int] = {
            self._names[name]: label for name, label in class_labels.items()
        }
        self._paths: dict[str, str] = {}

    @property
    def sample_ids(self) -> list[str]:
        """`file_id:class` of every sample, in the order of `samples`."""
        return [sample_id_of(sample) for sample in self.samples]

    @classmethod
    def recognizes(cls, root: Path, decoder: str) -> bool:
        """Return whether a folder has this layout, by a quick look.

        Args:
            root: The folder.
            decoder: What decodes the clips.
        """
        del root, decoder
        return False

    def add(self, file_id: str, class_name: str, audio_path: str, **fields: Any) -> None:
        """Add a clip, or leave it out if its name can't be a sample id.

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
        """Record something that isn't a sample; see `PassedOver`."""
        self.passed_over(name, reason, kind=kind, class_name=class_name)

    def finish(self) -> None:
        """Sort the samples by class and file id.

        Raises:
            DatasetError: There are no samples.
        """
        self._paths = {}
        if not self.samples:
            why = "".join(f"; {item.name}: {item.reason}" for item in self.left_out[:3])
            raise DatasetError(f"{self.root}: {self.kind}: no clips found{why}")
        self.samples.sort(key=lambda sample: (sample["class_name"], sample["file_id"]))

    def __len__(self) -> int:
        return len(self.samples)

    def __str__(self) -> str:
        classes = len({sample["class_name"] for sample in self.samples})
        text = f"{self.kind}: {len(self.samples)} clips of {classes} classes in {self.root}"
        if self.left_out:
            text += f"; {summary_of(self.left_out)}"
        return text

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


def own_split_name(name: str) -> str:
    """Return `train`, `val` or `test` for the usual names of these, else the name itself."""
    return _SPLIT_NAMES.get(name.strip().lower(), name.strip())


def checked_folder(root: str | Path, expected: str) -> str:
    """Return the folder's absolute path, `~` expanded; a URL as it is.

    Raises:
        DatasetError: It isn't a folder.
    """
    if is_url(os.fspath(root)):
        return os.fspath(root).rstrip("/")
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
