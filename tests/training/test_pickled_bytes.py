"""Readers and what is made of them pickle to the same bytes in every process, used or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lmdbcache import CacheConfig, EmbeddingCache

CONFIG = CacheConfig()
STATES = CacheConfig(output="last_hidden_state")
PROGRAM = """
import hashlib, json, pickle, sys
import numpy as np
from training.test_pickled_bytes import digests, mapped
print(json.dumps([digests(sys.argv[1], is_used=sys.argv[2] == "used"), mapped(*sys.argv[1:])]))
"""


def sources(root, is_used):
    """One of each kind, by name; made and used in as many ways as there are."""
    from lmdbcache import EmbeddingDataset, HiddenStateView, TensorMapping

    cache = EmbeddingCache(root)
    reader = cache.reader(CacheConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))))
    # An id that is there twice: the same object, or an equal one.
    again = json.loads('"c1:dog"') if is_used else "c1:dog"
    twice = ["c1:dog", "c0:cat", again]
    view = HiddenStateView(cache.reader(STATES), "cls")
    found = {
        "reader": reader,
        "verifying reader": cache.reader(CONFIG, verify="first_read"),
        "selection": reader.select(twice),
        "tensors of classes": TensorMapping(reader, ["dog", "cat", "cow", "horse", "frog"]),
        "dataset": EmbeddingDataset(reader, twice, labels=[0, 1, 0]),
        "dataset of floats": EmbeddingDataset(reader, twice, labels=np.eye(3, dtype=np.float32)),
        "view": view,
        "selection of a view": view.select(twice),
    }
    if is_used:
        reader["c0:cat"], reader.get_batch(twice), reader.refresh(), reader.get("c9:cow")
        found["selection"].get_batch([0, 1])
        len(found["tensors of classes"]), found["dataset"][0], found["dataset"].is_ragged
        found["selection of a view"].get_batch([0])
    return found


def digests(root, *, is_used):
    import hashlib
    import pickle

    from datasets.fingerprint import Hasher

    return {
        name: [hashlib.sha256(pickle.dumps(source)).hexdigest(), Hasher.hash(source)]
        for name, source in sources(root, is_used).items()
    }


def mapped(root, used, folder):
    """Where datasets keeps what a function made of the embeddings: its name is the fingerprint."""
    import datasets

    reader = sources(root, used == "used")["reader"]
    table = datasets.load_from_disk(folder)
    table = table.map(lambda row: {"total": float(reader[row["id"]].sum())})
    assert table["total"][:] == [0.0, 8.0]
    (file,) = table.cache_files
    return file["filename"]


@pytest.fixture
def root(tmp_path):
    cache = EmbeddingCache(tmp_path / "cache")
    for config, shape in ((CONFIG, (8,)), (STATES, (1214, 8))):
        with cache.writer(config) as writer:
            for number in range(6):
                name = f"c{number}:{'dog' if number % 2 else 'cat'}"
                writer.put(name, np.full(shape, number, np.float32))
    return cache.root


def test_what_reads_a_store_pickles_to_the_same_bytes(root, tmp_path):
    """For pickle and for datasets: `map` finds what another process cached."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"id": ["c0:cat", "c1:dog"]}).save_to_disk(tmp_path / "table")
    answers = []
    for seed, used in (("1", "new"), ("2", "used")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "tests"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, root, used, tmp_path / "table"],
            env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    assert answers[0] == answers[1]


def test_other_stores_and_other_samples_pickle_to_other_bytes(root):
    """Each differs from each other, and comes back as it was."""
    import pickle

    found = sources(root, is_used=False)
    assert len({pickle.dumps(source) for source in found.values()}) == len(found)
    for name in ("dataset", "dataset of floats"):
        copy = pickle.loads(pickle.dumps(found[name]))
        for mine, theirs in zip(found[name], copy, strict=True):
            assert np.array_equal(mine[0], theirs[0])
            assert np.array_equal(mine[1], theirs[1])
        assert copy.labels.dtype == found[name].labels.dtype
    tensors = pickle.loads(pickle.dumps(found["tensors of classes"]))
    assert sorted(tensors) == sorted(found["tensors of classes"])
