"""Two datasets in one root don't meet."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from synthetic_layouts import make_audio_folder, make_esc50

from lmdbcache.datasets import check_namespace, open_dataset
from lmdbcache.datasets.namespaces import derived_namespace
from lmdbcache.errors import ConfigError, DatasetError


@pytest.fixture
def fill(cache, config):
    """Store something of a dataset, as an extraction does; gives the config."""

    def fill(dataset):
        each = config.replace(namespace=dataset.namespace)
        with cache.writer(each, dataset_root=dataset.root) as writer:
            writer.put(dataset.sample_ids[0], np.ones(4))
        return each

    return fill


def test_names_made_from_folders_are_distinct():
    """Each folder's name gives a usable namespace of its own, never a published one."""
    names = [
        "Sounds",
        "my sounds",
        "my-sounds",
        "my_sounds",
        "звук",
        "звон",
        "vegas",
        "",
        "..",
        "ü",
    ]
    names += ["x" * 200, "x" * 201, "\udce9"]
    made = [derived_namespace("folder", name) for name in names]
    assert len(set(made)) == len(names)
    assert made[0] == "folder-sounds"
    assert all(name.startswith("folder-") and len(name) < 128 for name in made)


def test_two_folders_of_one_name_are_not_mixed(tmp_path, cache, config, fill):
    """The second folder is refused with both paths, and accepted under another namespace."""
    one, other = (open_dataset(make_audio_folder(tmp_path / p / "data")) for p in "ab")
    assert one.namespace == other.namespace == "folder-data"
    each = fill(one)
    check_namespace(cache, each, one)
    with pytest.raises(DatasetError, match=r"a/data.*b/data"):
        check_namespace(cache, each, other)
    named = open_dataset(tmp_path / "b" / "data", namespace="other")
    check_namespace(cache, config.replace(namespace="other"), named)
    assert fill(named) != each


def test_a_moved_folder_says_so(tmp_path, cache, fill, caplog, monkeypatch):
    """The same namespace given by hand is taken at its word, with a warning."""
    each = fill(open_dataset(make_audio_folder(tmp_path / "old" / "data")))
    (tmp_path / "new").mkdir()
    moved = shutil.move(tmp_path / "old" / "data", tmp_path / "new" / "data")
    with pytest.raises(DatasetError, match="folder-data"):
        check_namespace(cache, each, open_dataset(moved))
    check_namespace(cache, each, open_dataset(moved, namespace=each.dataset))
    assert str(moved) in caplog.text


def test_the_same_folder_by_another_path(tmp_path, cache, fill, monkeypatch, caplog):
    """A relative path or a link to the folder is the same place."""
    root = make_audio_folder(tmp_path / "data")
    each = fill(open_dataset(root))
    monkeypatch.chdir(tmp_path)
    check_namespace(cache, each, open_dataset("data"))
    (tmp_path / "link").symlink_to(root)
    linked = open_dataset(tmp_path / "link")
    assert linked.namespace == "folder-data"
    check_namespace(cache, each, linked)
    assert caplog.text == ""


def test_published_datasets_may_lie_anywhere(tmp_path, cache, fill, caplog):
    """ESC-50 is ESC-50 on every disk."""
    each = fill(open_dataset(make_esc50(tmp_path / "a")))
    check_namespace(cache, each, open_dataset(make_esc50(tmp_path / "b")))
    assert caplog.text == ""


def test_namespaces_that_cannot_be(tmp_path):
    """A given namespace follows the rules of a config."""
    root = make_audio_folder(tmp_path / "data")
    assert open_dataset(root, namespace="Mine").namespace == "mine"
    with pytest.raises(ConfigError, match="^namespace: "):
        open_dataset(root, namespace="../x")
