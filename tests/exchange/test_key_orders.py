"""Which part of a name is the file and which is the class."""

from __future__ import annotations

import numpy as np
import pytest
from exchange.old_caches import FACTS, save_torch, values
from safetensors.numpy import save_file

from lmdbcache.datasets import CLASS_LABELS
from lmdbcache.errors import TransferError

ONE = np.ones(8, "f4")


def _swapped(sample_id):
    return ":".join(reversed(sample_id.split(":")))


@pytest.mark.parametrize(
    "names",
    [
        [f"video_{n:05d}:{c}" for c in CLASS_LABELS for n in range(1, 6)],
        ["video_00001:dog", "video_00001:drum"],
        ["video_00001:siren", "video_00001:horn", "video_00001:dog"],
        ["a:siren", "b:siren", "c:horn"],
    ],
)
def test_file_and_class_are_never_swapped(bring, stored, tmp_path, names):
    """Fewer clips than classes, one clip of several classes: the names of the clips decide."""
    report = bring(save_torch(tmp_path / "old.pt", {name: ONE + n for n, name in enumerate(names)}))
    assert {name: array[0] - 1 for name, array in stored(report).items()} == {
        name: n for n, name in enumerate(names)
    }
    assert not any("class:file_id" in note for note in report.notes)


@pytest.mark.parametrize(
    "names",
    [
        ["dog:video_00001", "drum:video_00002", "drum:video_00003"],
        ["siren:video_00001", "horn:video_00001"],
        ["siren:a.wav", "horn:b.wav"],
    ],
)
def test_the_other_order_is_told_by_names(bring, stored, tmp_path, names):
    """Numbered clips or files stand behind the colon; it is said."""
    report = bring(save_torch(tmp_path / "old.pt", dict.fromkeys(names, ONE)))
    wanted = {_swapped(name.lower()).replace(".wav", "") for name in names}
    assert stored(report).keys() == wanted
    assert any("class:file_id" in note for note in report.notes)


@pytest.mark.parametrize(
    "names",
    [
        ["x:siren", "x:horn"], ["clip:dog", "clip:drum"], ["x__siren", "x__horn"], ["siren:clip1"],
        ["dog:a.wav", "siren:b", "siren:c"],
    ],
)  # fmt: skip
def test_what_may_be_either_is_asked_for(bring, cache, stored, tmp_path, names):
    """Counts alone never swap: the order has to be given, and is then taken."""
    path = save_torch(tmp_path / "old.pt", dict.fromkeys(names, ONE))
    with pytest.raises(TransferError):
        bring(path)
    assert cache.stores() == []
    names = [name.replace("__", ":").replace(".wav", "") for name in names]
    straight = bring(path, {**FACTS, "dataset": "x"}, keys="file_id:class")
    assert stored(straight).keys() >= {n for n in names if "dog:a" not in n}
    assert stored(bring(path, keys="class:file_id")).keys() == {_swapped(n) for n in names}


@pytest.mark.parametrize("kind", ["npz", "safetensors", "pt"])
def test_two_underscores_stand_for_the_colon(came_along, bring, stored, tmp_path, kind):
    """Members named `video_00001__dog` are read like files of that name, in either order."""
    arrays = values()

    def save(name, arrays):
        path = tmp_path / f"{name}.{kind}"
        if kind == "npz":
            np.savez(path, **arrays)
        elif kind == "safetensors":
            save_file(arrays, path)
        else:
            save_torch(path, arrays)
        return path

    came_along(save("old", {k.replace(":", "__"): v for k, v in arrays.items()}), arrays)
    path = save("turned", {_swapped(k).replace(":", "__"): v for k, v in arrays.items()})
    assert bring(path, {**FACTS, "dataset": "b"}).classes == {"dog": 6, "drum": 6}
    path = save("one", {"a__b__dog": ONE, "c": ONE})
    found = stored(bring(path, {**FACTS, "dataset": "c"}, class_name="dog"))
    assert found.keys() == {"a__b:dog", "c:dog"}


def test_the_class_stands_behind_the_last_underscores(bring, stored, tmp_path):
    """A file id may have two underscores itself: `a__b__dog` is the clip `a__b` of class dog."""
    names = ["a__b__dog", "c__d__e__drum"]
    found = stored(bring(save_torch(tmp_path / "old.pt", dict.fromkeys(names, ONE))))
    assert found.keys() == {"a__b:dog", "c__d__e:drum"}


def test_classes_beside_the_names_are_never_swapped(bring, stored, tmp_path):
    """A column of classes is one, whatever order is given for names."""
    path = tmp_path / "old.npz"
    np.savez(path, embeddings=np.ones((2, 8), "f4"), ids=["x__1", "x__1"], labels=["a", "b"])
    assert stored(bring(path)).keys() == {"x__1:a", "x__1:b"}
    report = bring(path, {**FACTS, "dataset": "b"}, keys="class:file_id")
    assert stored(report).keys() == {"x__1:a", "x__1:b"}


def test_a_stated_class_says_the_order_of_its_own_key(bring, stored, tmp_path):
    """One dict may hold both orders; keys without a stated class are read by themselves."""
    stated = {f"dog:video_{n:05d}.wav": {"class_name": "dog", "embeddings": ONE} for n in range(3)}
    plain = {f"video_{n:05d}:dog": ONE + 1 for n in range(10, 12)}
    report = bring(save_torch(tmp_path / "old.pt", stated | plain))
    assert {name: array[0] for name, array in stored(report).items()} == {
        **{f"video_{n:05d}:dog": 1 for n in range(3)},
        **{f"video_{n:05d}:dog": 2 for n in range(10, 12)},
    }
    assert any("class:file_id" in note for note in report.notes)


def test_stated_classes_tell_the_order_of_the_other_keys(bring, stored, tmp_path):
    """`x:dog` alone may be either; beside a clip of the stated class dog it can't."""
    stated = {"dog:a": {"class_name": "dog", "embeddings": ONE}}
    path = save_torch(tmp_path / "old.pt", {**stated, "x:dog": ONE})
    assert stored(bring(path)).keys() == {"a:dog", "x:dog"}
