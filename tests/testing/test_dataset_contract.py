"""The contract for adapters: it passes in the documented example, and notices what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents.pages import DOCS, ROOT, blocks
from synthetic_layouts import make_audio_folder

from lmdbcache.datasets.audio_folder import AudioFolder
from lmdbcache.errors import AudioDecodeError
from lmdbcache.testing import DatasetContract

SUITE = DatasetContract()


def test_the_documented_adapter_keeps_it(tmp_path):
    """docs/writing_adapters.md, as it stands, is an adapter and a test that pytest runs."""
    (_, adapter), (_, tests) = blocks(DOCS / "writing_adapters.md", "python")
    (tmp_path / "test_mine.py").write_text(f"{adapter}\n{tests}", "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 passed" in done.stdout


@pytest.fixture
def dataset(tmp_path):
    return AudioFolder(make_audio_folder(tmp_path / "x", classes=["bell", "wind"]))


def a_vegas_namespace(dataset):
    dataset.namespace = "vegas"


def capitals_in_the_namespace(dataset):
    dataset.namespace = "Mine"


def no_samples(dataset):
    dataset.samples = []


def a_sample_without_a_path(dataset):
    del dataset.samples[0]["audio_path"]


def a_text_label(dataset):
    dataset.samples[0]["class_label"] = "0"


def the_wrong_label(dataset):
    dataset.samples[0]["class_label"] = 1


def one_label_for_two_classes(dataset):
    dataset.class_labels = {"bell": 0, "wind": 0}


def capitals_in_a_class(dataset):
    dataset.class_labels = {"Bell": 0, "wind": 1}


def the_same_id_twice(dataset):
    dataset.samples[1]["file_id"] = dataset.samples[0]["file_id"]


def a_split_for_some(dataset):
    dataset.samples[0]["split"] = "train"


def a_file_that_is_no_audio(dataset):
    Path(dataset.samples[0]["audio_path"]).write_text("no audio")


def a_source_that_stays_here(dataset):
    class Local:
        def open_binary(self):
            return Path(__file__).open("rb")

    dataset.samples[0]["audio_source"] = Local()


CHECKS = {
    a_vegas_namespace: "test_its_namespace_is_one_and_its_own",
    capitals_in_the_namespace: "test_its_namespace_is_one_and_its_own",
    no_samples: "test_it_has_the_adapters_interface",
    a_sample_without_a_path: "test_every_sample_has_its_fields",
    a_text_label: "test_every_sample_has_its_fields",
    the_wrong_label: "test_labels_are_those_of_the_classes",
    one_label_for_two_classes: "test_labels_are_those_of_the_classes",
    capitals_in_a_class: "test_labels_are_those_of_the_classes",
    the_same_id_twice: "test_sample_ids_are_canonical_and_distinct",
    a_split_for_some: "test_splits_and_folds_are_given_to_all_or_none",
    a_file_that_is_no_audio: "test_clips_decode_to_waveforms",
    a_source_that_stays_here: "test_clips_travel_to_other_processes",
}


@pytest.mark.parametrize("spoil", CHECKS, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_is_noticed(dataset, spoil):
    """Each fault fails the test that is about it, which passes without the fault."""
    check = getattr(SUITE, CHECKS[spoil])
    check(dataset)
    spoil(dataset)
    with pytest.raises((AssertionError, KeyError, AttributeError, AudioDecodeError)):
        check(dataset)


def test_an_order_that_changes_is_noticed(dataset, tmp_path):
    """Two openings with different ids are a fault."""

    class Changing(DatasetContract):
        def make(self, tmp_path):
            again = AudioFolder(tmp_path / "x")
            again.samples.reverse()
            return again

    with pytest.raises(AssertionError):
        Changing().test_opened_again_it_is_the_same(dataset, tmp_path)


def test_make_has_to_be_written(tmp_path):
    """The bare class says what is missing."""
    with pytest.raises(NotImplementedError, match="write make"):
        SUITE.make(tmp_path)
