"""What extraction and training ask of a data set. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from lmdbcache.storage import join_sample_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lmdbcache.audio import AudioSource

__all__ = ["AudioDataset", "Sample", "sample_id_of", "source_of"]

Sample: TypeAlias = dict[str, Any]


@runtime_checkable
class AudioDataset(Protocol):
    """A list of labelled clips, and the dataset's own list of classes.

    Attributes:
        namespace: Goes to `CacheConfig.namespace`, so that equal sample ids of two data sets can't
            meet in one store.
        class_labels: Class name → label, of every class that the data set knows, whether or not
            it has clips of it. Labels are never remapped by a selection.
        samples: One dict per clip, holding at least `file_id` (str), `class_name` (str),
            `class_label` (int) and `audio_path` (str). Optional are `audio_source` (an
            `AudioSource`; then `audio_path` is only a name for people), `split` (str: the data
            set's own `"train"`, `"val"` or `"test"`), `fold` (int) and `target` (a number or array
            that is trained on in place of `class_label`).

    Two more are optional. `root` (str) is the folder. `command_line_options` is a dict of option →
    value with which the command line opens that folder as this dataset, `{"--dataset": "folder"}`,
    or None where it can't; `EmbeddingCache.require` prints its command by these.
    """

    namespace: str
    class_labels: Mapping[str, int]
    samples: list[Sample]

    @property
    def sample_ids(self) -> list[str]:
        """`file_id:class` of every sample, in the order of `samples`."""
        ...


def sample_id_of(sample: Mapping[str, Any]) -> str:
    """The canonical `file_id:class` of one sample.

    Raises:
        InvalidSampleIdError: The file id or the class can't be part of a sample id.
    """
    return join_sample_id(sample["file_id"], sample["class_name"])


def source_of(sample: Mapping[str, Any]) -> str | AudioSource:
    """Where the clip's bytes are: its `audio_source` if it has one, else its `audio_path`."""
    source: str | AudioSource = sample.get("audio_source") or sample["audio_path"]
    return source
