"""Import of what `torch.save` has written."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from exchange.old_caches import FACTS, save_seed, save_torch, values

from lmdbcache.errors import ConfigError, TransferError
from lmdbcache.storage import NUMPY_DTYPES


def test_the_form_with_metadata(came_along, tmp_path):
    """The config comes from the file, and nothing has to be given."""
    arrays = values()
    report = came_along(save_seed(tmp_path / "old.pt", arrays), arrays, None)
    assert (report.config.sample_rate, report.config.duration) == (16000, 5.0)
    assert report.config.model_name.startswith("MIT/")
    assert report.config.output == "pooler_output"
    assert any("pooler_output" in note for note in report.notes)


@pytest.mark.parametrize(
    "form",
    [
        lambda a: {k: torch.tensor(v) for k, v in a.items()},
        lambda a: OrderedDict((k, torch.tensor(v, requires_grad=True)) for k, v in a.items()),
        lambda a: {"embeddings": dict(a)},
        lambda a: {"embeddings": a, "created": "today", "version": 3, "labels_of": {"x": [1]}},
        lambda a: {k: {"class_name": k.split(":")[1], "embeddings": v} for k, v in a.items()},
        lambda a: {k.split(":")[0]: {"class_name": k.split(":")[1], "embedding": v}
                   for k, v in a.items()},
        lambda a: {":".join(reversed(k.split(":"))) + ".wav": torch.tensor(v)
                   for k, v in a.items()},
        lambda a: {":".join(reversed(k.split(":"))): v for k, v in a.items()},
        lambda a: {f"data/{k.split(':')[0]}.wav:{k.split(':')[1].upper()}": v
                   for k, v in a.items()},
        lambda a: {c: {k.split(":")[0]: v for k, v in a.items() if k.endswith(c)}
                   for c in ("dog", "drum")},
        lambda a: {"embeddings": torch.tensor(np.stack(list(a.values()))), "keys": list(a)},
        lambda a: {"features": np.stack(list(a.values())),
                   "file_ids": [k.split(":")[0] for k in a],
                   "labels": [k.split(":")[1] for k in a]},
        lambda a: {"embeddings": [torch.tensor(v) for v in a.values()], "names": list(a)},
        lambda a: {"embeddings": a, "metadata": {"sr": np.float64(16000), "duration": 5,
                                                 "model": "ast"}},
    ],
)  # fmt: skip
def test_forms_of_dicts(came_along, tmp_path, form):
    """Tensors, arrays, dicts around them, either order of names, one array with names."""
    arrays = values()
    came_along(save_torch(tmp_path / "old.pt", form(arrays)), arrays)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_are_kept(came_along, tmp_path, dtype):
    """Half precision is stored as such, bit for bit."""
    arrays = {name: array.astype(NUMPY_DTYPES[dtype]) for name, array in values().items()}
    tensors = {
        name: torch.tensor(array.astype("f4")).to(getattr(torch, dtype))
        for name, array in arrays.items()
    }
    report = came_along(save_torch(tmp_path / "old.pt", tensors), arrays)
    assert report.config.dtype == dtype


def test_cuda_tensors_come_to_the_cpu(came_along, tmp_path, monkeypatch):
    """A file written on a GPU is read on a machine without one."""
    arrays = values()
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    path = save_seed(tmp_path / "old.pt", arrays)
    monkeypatch.undo()
    came_along(path, arrays, None)


def test_a_file_of_torch_before_1_6(came_along, tmp_path):
    """The older format, which can't be mapped, is read all the same."""
    arrays = values()
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    came_along(tmp_path / "old.pt", arrays)


def test_float64_needs_a_word(bring, tmp_path, stored):
    """What would be rounded isn't, until a dtype is given."""
    arrays = {name: array.astype("f8") / 3 for name, array in values().items()}
    path = save_torch(tmp_path / "old.pt", arrays)
    with pytest.raises(ConfigError, match="float64"):
        bring(path)
    report = bring(path, {**FACTS, "dtype": "float32"})
    for name, array in stored(report).items():
        np.testing.assert_array_equal(array, arrays[name].astype("f4"), strict=True)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("where", ["value", "metadata", "key"])
def test_a_hostile_pickle_is_never_run(bring, cache, tmp_path, where):
    """Code in a file is an error that names the file; it isn't executed and nothing is stored."""
    trap = Hostile(tmp_path / "sprung")
    content = {
        "value": {"a:dog": trap},
        "metadata": {"embeddings": values(), "metadata": {"x": trap}},
        "key": {"embeddings": values(), trap: 1},
    }[where]
    path = save_torch(tmp_path / "old.pt", content)
    with pytest.raises(TransferError, match=r"old\.pt: .*posix\.mkdir|old\.pt: .*nt\.mkdir") as e:
        bring(path)
    assert "weights_only` to `False`" not in str(e.value)
    assert not (tmp_path / "sprung").exists()
    assert cache.stores() == []


def test_object_arrays_are_refused(bring, tmp_path):
    """An array of Python objects isn't rebuilt."""
    path = save_torch(tmp_path / "old.pt", {"a:dog": np.array([1, "x"], object)})
    with pytest.raises(TransferError, match="ObjectDType"):
        bring(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "holds no embeddings"),
        ({"embeddings": {}, "metadata": FACTS}, "holds no embeddings"),
        ([1, 2], "expected a dict"),
        ({"embeddings": 3}, "is of type int"),
        ({"embeddings": torch.ones(3, 8)}, "without a list of their names"),
        ({"embeddings": torch.ones(3, 8), "keys": ["a:dog"]}, "3 embeddings and 1 names"),
        ({"embeddings": torch.tensor(1.0), "keys": ["a:dog"]}, "single number"),
    ],
)
def test_files_with_nothing_to_import(bring, tmp_path, content, reason):
    """Empty and unfit files are errors that say what is expected."""
    with pytest.raises(TransferError, match=reason):
        bring(save_torch(tmp_path / "old.pt", content))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda _: b"junk", lambda _: b""])
def test_damaged_files(bring, tmp_path, damage):
    """A cut, foreign or empty file is one error with its name."""
    path = save_seed(tmp_path / "old.pt")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TransferError, match=r"old\.pt"):
        bring(path)


def test_what_cannot_be_stored_is_listed(bring, stored, tmp_path):
    """NaN, other shapes, other types and unusable names are left out by name; the rest comes."""
    good = values()
    bad = {
        "nan:dog": torch.full((8,), float("nan")),
        "long:dog": torch.ones(9),
        "text:dog": "hello there",
        "list:dog": [1.0, 2.0],
        "complex:dog": torch.ones(8, dtype=torch.complex64),
        "no class": torch.ones(8),
        ":dog": torch.ones(8),
        "x" * 600 + ":dog": torch.ones(8),
        ("a", "dog"): torch.ones(8),
    }
    report = bring(
        save_torch(tmp_path / "old.pt", {"embeddings": {**good, **bad}}),
        {**FACTS, "dtype": "float32"},
    )
    reasons = {refusal.where: refusal.reason for refusal in report.refused}
    assert set(reasons) == {str(key) for key in bad}
    assert "NaN" in reasons["nan:dog"]
    assert "shape (9,), where (8) is expected" in reasons["long:dog"]
    assert "real numbers" in reasons["complex:dog"]
    assert report.exit_code == 1
    assert stored(report).keys() == good.keys()


def test_names_that_mean_one_sample(bring, stored, tmp_path):
    """Twice the same is imported once; of two values for one sample none is taken."""
    one, two = np.ones(8, "f4"), np.zeros(8, "f4")
    arrays = {"a:dog": one, "a:Dog": one, "b:dog": one, "b:DOG": two, "c:dog": two}
    report = bring(save_torch(tmp_path / "old.pt", arrays))
    assert (report.num_new, report.num_same, report.exit_code) == (2, 1, 1)
    (conflict,) = report.conflicts
    assert (conflict.stored.writer, conflict.given.writer) == ("b:dog", "b:DOG")
    assert conflict.kept == "neither"
    assert stored(report).keys() == {"a:dog", "c:dog"}


def test_colons_in_a_file_id(came_along, tmp_path):
    """The class is what stands behind the last colon."""
    arrays = {"ytid:12:30:dog": np.ones(8, "f4"), "::dog": np.zeros(8, "f4")}
    came_along(save_torch(tmp_path / "old.pt", arrays), arrays)


def test_order_of_names_can_be_given(bring, stored, tmp_path):
    """What is told isn't guessed."""
    path = save_torch(tmp_path / "old.pt", {"dog:a": np.ones(8, "f4")})
    assert stored(bring(path, keys="class:file_id")).keys() == {"a:dog"}
    with pytest.raises(TransferError, match="keys: 'x'"):
        bring(path, keys="x")


def test_batches_of_one(bring, stored, tmp_path):
    """A leading 1 isn't taken for hidden states: it is asked about."""
    path = save_seed(tmp_path / "old.pt", values(shape=(1, 8)))
    with pytest.raises(ConfigError, match="squeeze"):
        bring(path)
    assert stored(bring(path, squeeze=True))["video_00000:drum"].shape == (8,)


def test_a_missing_package(bring, tmp_path, monkeypatch):
    """Without torch the error names the extra to install."""
    path = save_seed(tmp_path / "old.pt")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ImportError, match=r"lmdbcache\[formats\]"):
        bring(Path(path))
