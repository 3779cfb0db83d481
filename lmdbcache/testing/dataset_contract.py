"""The contract of a dataset adapter, as tests to be inherited.

from lmdbcache.testing import DatasetContract

class TestMyDataset(DatasetContract):
    def make(self, tmp_path):
        write_a_few_clips(tmp_path / "data")
        return MyDataset(tmp_path / "data")
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lmdbcache.audio import AudioSource, load_waveform
from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.datasets import (
    PUBLISHED,
    AudioDataset,
    Narrowing,
    Sample,
    overlap_audit,
    sample_id_of,
    source_of,
    split_names,
)
from lmdbcache.extraction import to_clips
from lmdbcache.storage import canonical_class, canonical_sample_id

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_RATE = 16000
_SECONDS = 0.1
_MOST_CLIPS = 20  # decoded by a test


class DatasetContract:
    """Inherit, name the class `Test…`, and write `make`.

    `make` may be asked for the same dataset several times; two to twenty short clips of two
    classes or more are enough.

    Attributes:
        published_name: The kind that owns this namespace; only adapters of this package have one.
    """

    published_name: str | None = None

    def make(self, tmp_path: Path) -> AudioDataset:
        """A dataset over a few real clips.

        Args:
            tmp_path: An empty folder; the same one when asked again.
        """
        raise NotImplementedError("write make(self, tmp_path) in the class that inherits")

    @pytest.fixture
    def dataset(self, tmp_path: Path) -> AudioDataset:
        """The dataset, opened once for each test."""
        return self.make(tmp_path)

    # ---- its form

    def test_it_has_the_adapters_interface(self, dataset: AudioDataset) -> None:
        """It has `namespace`, `class_labels`, `samples` and `sample_ids`, and some samples."""
        assert isinstance(dataset, AudioDataset)
        assert isinstance(dataset.samples, list)
        assert dataset.samples, "make() gave a dataset without samples"

    def test_its_namespace_is_one_and_its_own(self, dataset: AudioDataset) -> None:
        """The namespace can stand in a config as it is, and isn't a published dataset's."""
        assert dataset.namespace
        assert CacheConfig(namespace=dataset.namespace).namespace == dataset.namespace
        assert dataset.namespace not in PUBLISHED or dataset.namespace == self.published_name

    def test_every_sample_has_its_fields(self, dataset: AudioDataset) -> None:
        """Each sample is a dict with the fields of the interface, of the right types."""
        for sample in dataset.samples:
            assert isinstance(sample["file_id"], str)
            assert isinstance(sample["class_name"], str)
            assert type(sample["class_label"]) is int
            assert isinstance(sample["audio_path"], str)
            assert isinstance(source_of(sample), (str, AudioSource))
            assert isinstance(sample.get("split", ""), str)
            assert type(sample.get("fold", 0)) is int

    def test_splits_and_folds_are_given_to_all_or_none(self, dataset: AudioDataset) -> None:
        """Either every sample has a `split`, or none has; the same for `fold`."""
        for field in ("split", "fold"):
            assert len({field in sample for sample in dataset.samples}) == 1

    # ---- its sample ids

    def test_sample_ids_are_canonical_and_distinct(self, dataset: AudioDataset) -> None:
        """The ids are those of the samples, in their order, in stored form, each once."""
        ids = dataset.sample_ids
        assert ids == [sample_id_of(sample) for sample in dataset.samples]
        assert ids == [canonical_sample_id(sample_id) for sample_id in ids]
        assert len(set(ids)) == len(ids)

    def test_opened_again_it_is_the_same(self, dataset: AudioDataset, tmp_path: Path) -> None:
        """A second opening gives the same ids, classes and labels in the same order."""
        again = self.make(tmp_path)
        assert again.sample_ids == dataset.sample_ids
        assert dict(again.class_labels) == dict(dataset.class_labels)
        assert again.namespace == dataset.namespace
        assert list(map(_plain, again.samples)) == list(map(_plain, dataset.samples))

    # ---- its classes

    def test_labels_are_those_of_the_classes(self, dataset: AudioDataset) -> None:
        """Each class has a distinct label, each sample that of its class."""
        labels = dataset.class_labels
        assert len(set(labels.values())) == len(labels)
        for name in labels:
            assert name == canonical_class(name), "class names are in NFC and lower case"
        for sample in dataset.samples:
            assert sample["class_label"] == labels[sample["class_name"]]

    def test_narrowing_keeps_labels(self, dataset: AudioDataset) -> None:
        """One class alone keeps its label, and the rest is the dataset without it."""
        name = dataset.samples[-1]["class_name"]
        only = Narrowing(classes=[name]).of(dataset)
        rest = [s for s in dataset.samples if s["class_name"] != name]
        assert only == [s for s in dataset.samples if s["class_name"] == name]
        if rest:
            assert Narrowing(exclude=[name]).of(dataset) == rest
        assert Narrowing(classes=[dataset.class_labels[name]]).of(dataset) == only

    def test_splits_are_disjoint_and_cover(self, dataset: AudioDataset) -> None:
        """Its splits share no clip and are the dataset together."""
        names = split_names(dataset.samples)
        parts = {name: Narrowing(split=name).of(dataset) for name in names}
        assert overlap_audit(parts).is_disjoint
        if names:
            assert sum(map(len, parts.values())) == len(dataset.samples)

    def test_nodes_are_disjoint_and_cover(self, dataset: AudioDataset) -> None:
        """Divided between nodes, evenly or not, each clip is with one node."""
        for rule in ({}, {"node_shares": [0.5, 0.25, 0.25]}, {"dirichlet": 0.5}):
            chosen: dict[str, Any] = {"num_nodes": 3, **rule}
            nodes = [Narrowing(node_split_id=k, **chosen).of(dataset) for k in range(3)]
            assert overlap_audit(nodes).is_disjoint
            assert sum(map(len, nodes)) == len(dataset.samples)
            assert Narrowing(**chosen).nodes_of(dataset) == nodes

    # ---- its clips

    def test_clips_decode_to_waveforms(self, dataset: AudioDataset) -> None:
        """Each clip gives a finite waveform of the asked length."""
        for sample in dataset.samples[:_MOST_CLIPS]:
            waveform = _decoded(sample)
            assert waveform.shape == (round(_RATE * _SECONDS),)
            assert np.isfinite(waveform).all()

    def test_clips_travel_to_other_processes(self, dataset: AudioDataset) -> None:
        """A source survives pickle, compares equal to itself, and decodes to the same bits."""
        samples = dataset.samples[:_MOST_CLIPS]
        sources = [source_of(sample) for sample in samples]
        copies = pickle.loads(pickle.dumps(sources))
        for source, copy, sample in zip(sources, copies, samples, strict=True):
            assert copy == source
            assert str(copy) == str(source)
            again = load_waveform(copy, _RATE, _SECONDS)
            assert again.tobytes() == _decoded(sample).tobytes()

    def test_an_extraction_stores_all_and_a_second_finds_all(
        self, dataset: AudioDataset, tmp_path: Path
    ) -> None:
        """Every clip is stored under its id, with what it sounds like, and found again."""
        pytest.importorskip("torch")
        from lmdbcache.extraction import extract

        cache = EmbeddingCache(tmp_path / "contract-cache")
        config = CacheConfig(
            sample_rate=_RATE,
            duration=_SECONDS,
            model_name="contract",
            output="spectrum",
            namespace=dataset.namespace,
        )
        clips = to_clips(dataset.samples)
        runs = [
            extract(
                cache, config, clips, front_end=_FrontEnd(), make_embedder=_Embedder,
                batch_size=4, num_workers=workers,
            )
            for workers in (2, 0)
        ]  # fmt: skip
        assert [str(failure) for failure in runs[0].failures] == []
        assert [run.num_extracted for run in runs] == [len(clips), 0]
        with cache.reader(config) as reader:
            assert set(reader) == set(dataset.sample_ids)
            for sample in dataset.samples[:_MOST_CLIPS]:
                expected = _FrontEnd()(_decoded(sample))
                np.testing.assert_array_equal(reader[sample_id_of(sample)], expected)


def _plain(sample: Sample) -> dict[str, Any]:
    """The sample without its source, which need only compare equal within one opening."""
    return {
        name: np.asarray(value).tolist() if name == "target" else value
        for name, value in sample.items()
        if name != "audio_source"
    }


def _decoded(sample: Sample) -> NDArray[np.float32]:
    return load_waveform(source_of(sample), _RATE, _SECONDS)


class _FrontEnd:
    """The first numbers of the spectrum: enough to distinguish clips."""

    min_samples = 1

    def __call__(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.abs(np.fft.rfft(waveform))[:64].astype(np.float32)

    def provenance(self) -> dict[str, str]:
        return {"feature_extractor": "contract"}


class _Embedder:
    """The features as they are."""

    outputs = ("spectrum",)
    embedding_shape = (64,)

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def provenance(self) -> dict[str, str]:
        return {"weights_digest": "contract"}
