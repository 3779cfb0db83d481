"""Import of folders of .npy files, with and without manifests."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from exchange.old_caches import FACTS, save_folder, save_manifests, values

from lmdbcache.errors import TransferError
from lmdbcache.storage import NUMPY_DTYPES


@pytest.mark.parametrize("variant", ["pair", "wrapped", "named", "files", "listed"])
def test_manifest_variants(came_along, tmp_path, variant):
    """[chunk, offset], a dict of both, the file's name, in entries, with a list of chunks."""
    arrays = values(20)
    came_along(save_manifests(tmp_path / "old", arrays, variant=variant), arrays)


def test_hidden_states(came_along, tmp_path):
    """Embeddings of two dimensions are taken for hidden states."""
    arrays = values(shape=(3, 8))
    report = came_along(save_manifests(tmp_path / "old", arrays), arrays)
    assert report.config.output == "last_hidden_state"


def test_facts_in_a_file_beside(came_along, tmp_path):
    """metadata.json in the folder says the config."""
    arrays = values()
    save_manifests(tmp_path / "old", arrays)
    (tmp_path / "old" / "metadata.json").write_text(json.dumps(FACTS))
    came_along(tmp_path / "old", arrays, None)


def test_names_in_a_manifest(bring, stored, tmp_path):
    """The class may stand in the name, in either place, or not; a file id may hold colons."""
    folder = tmp_path / "old" / "Dog"
    folder.mkdir(parents=True)
    np.save(folder / "embeddings_000.npy", np.arange(24, dtype="f4").reshape(6, 4))
    names = ["a", "b:dog", "dog:c", "x:1:2", "audios/d.wav", "e__dog"]
    (folder / "manifest.json").write_text(json.dumps({n: [0, i] for i, n in enumerate(names)}))
    found = stored(bring(tmp_path / "old"))
    assert {k: v[0] / 4 for k, v in found.items()} == {
        "a:dog": 0, "b:dog": 1, "c:dog": 2, "x:1:2:dog": 3, "d:dog": 4, "e:dog": 5,
    }  # fmt: skip


def test_the_folder_of_one_class(bring, stored, tmp_path):
    """A class's own folder is imported with its class given."""
    save_manifests(tmp_path / "old", values())
    report = bring(tmp_path / "old" / "dog")
    assert (report.num_new, len(report.refused)) == (0, 6)
    found = stored(bring(tmp_path / "old" / "dog", class_name="dog"))
    assert found.keys() == {name for name in values() if name.endswith(":dog")}


def test_damage_in_a_manifest_folder(bring, stored, tmp_path):
    """What a manifest leads to and isn't there is named; the other embeddings come."""
    arrays = values(40)
    root = save_manifests(tmp_path / "old", arrays)
    secret = tmp_path / "secret.npy"
    np.save(secret, np.ones((4, 8), "f4"))
    dog = root / "dog"
    cut = (dog / "embeddings_001.npy").read_bytes()
    (dog / "embeddings_001.npy").write_bytes(cut[:-5])
    (dog / "embeddings_002.npy").unlink()
    np.save(dog / "embeddings_003.npy", np.array([1, "x"], object), allow_pickle=True)
    (dog / "embeddings_004.npy").write_bytes(b"")
    manifest = json.loads((dog / "manifest.json").read_text())
    manifest |= {
        "outside": ["../../secret.npy", 0],
        "absolute": [str(secret), 0],
        "beyond": [0, 4],
        "negative": [0, -1],
        "wrong": "x",
        "yes": [True, 0],
        "half": [0, 1.5],
        "none": None,
    }
    (dog / "manifest.json").write_text(json.dumps(manifest))
    report = bring(root)
    reasons = {refusal.where: refusal.reason for refusal in report.refused}
    assert len(reasons) == 16 + 8
    assert reasons.keys() >= {f"dog/{name}" for name in manifest if "video" not in name}
    assert len(stored(report)) == 24
    assert report.exit_code == 1


@pytest.mark.parametrize("content", ["{", "[1]", "", '"x"', "\xff", "[" * 100_000])
def test_a_broken_manifest_hides_no_other_class(bring, tmp_path, content):
    """The class is named, and the other one is imported."""
    root = save_manifests(tmp_path / "old", values())
    (root / "dog" / "manifest.json").write_text(content, "latin-1")
    report = bring(root)
    assert [refusal.where for refusal in report.refused] == ["dog/manifest.json"]
    assert report.num_new == 6


def test_bfloat16_as_numpy_writes_it(came_along, tmp_path):
    """numpy's V2 of a bfloat16 array is bfloat16 again."""
    arrays = {name: a.astype(NUMPY_DTYPES["bfloat16"]) for name, a in values().items()}
    came_along(save_manifests(tmp_path / "old", arrays), arrays)


@pytest.mark.parametrize(
    "form", ["{cls}/{id}.npy", "{id}:{cls}.npy", "{id}__{cls}.npy", "{cls}/{id}__{cls}.npy"]
)
def test_a_file_for_each_embedding(came_along, tmp_path, form):
    """The class is the folder's name, or stands in the file's."""
    arrays = values()
    came_along(save_folder(tmp_path / "old", arrays, form), arrays)


def test_a_flat_folder_of_one_class(came_along, tmp_path):
    """Names without a class need it to be given."""
    arrays = {name: array for name, array in values().items() if name.endswith("dog")}
    came_along(save_folder(tmp_path / "old", arrays, "{id}.npy"), arrays, class_name="dog")


def test_a_torch_file_for_each_embedding(came_along, tmp_path):
    """<class>/<file_id>.pt with a tensor in it."""
    arrays = values()
    for name, array in arrays.items():
        file_id, class_name = name.split(":")
        (tmp_path / "old" / class_name).mkdir(parents=True, exist_ok=True)
        torch.save(torch.tensor(array), tmp_path / "old" / class_name / f"{file_id}.pt")
    came_along(tmp_path / "old", arrays)


def test_other_orders_of_bytes_and_dimensions(came_along, tmp_path):
    """Big-endian and Fortran-ordered files hold the same values."""
    arrays = values(shape=(3, 4))
    odd = {n: np.asfortranarray(a).astype(">f4", order="F") for n, a in arrays.items()}
    came_along(save_folder(tmp_path / "old", odd), arrays, {**FACTS, "dtype": "float32"})


def test_damage_in_a_folder(bring, stored, tmp_path):
    """Cut, empty, foreign and pickled files, and chunks without a manifest, are named."""
    root = save_folder(tmp_path / "old", values())
    dog = root / "dog"
    files = sorted(dog.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].write_bytes(b"")
    files[2].write_bytes(b"junk")
    np.save(files[3], np.array({"a": 1}, object), allow_pickle=True)
    np.save(dog / "embeddings_000.npy", np.ones((3, 8)))
    (dog / "deep").mkdir()
    np.save(dog / "deep" / "x.npy", np.ones(8))
    report = bring(root)
    assert {one.where for one in report.refused} == {
        *(f"dog/{file.name}" for file in files[:4]), "dog/embeddings_000.npy",
    }  # fmt: skip
    assert any("deep/x.npy" in note for note in report.notes)
    assert len(stored(report)) == 8


def test_folders_that_hold_none(bring, tmp_path):
    """A missing or empty folder, and one with .pt files, are errors that say what to do."""
    with pytest.raises(TransferError, match="nowhere"):
        bring(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TransferError, match="empty"):
        bring(tmp_path / "empty")
    (tmp_path / "empty" / "ast_cache.pt").write_bytes(b"x")
    with pytest.raises(TransferError, match="ast_cache.pt"):
        bring(tmp_path / "empty")
    (tmp_path / "one.npy").write_bytes(b"x")
    (tmp_path / "one.txt").write_bytes(b"x")
    for name in ("one.npy", "one.txt"):
        with pytest.raises(TransferError, match=name):
            bring(tmp_path / name)
