"""Import of manifests that list their chunks, whole and damaged."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
import torch
from exchange.old_caches import FACTS, save_manifests, values

from lmdbcache.errors import TransferError

# Dogs have odd numbers, four in a chunk: 1 3 5 7 | 9 11 13 15 | 17 19.
ARRAYS = values(20)
DOGS = [name for name in ARRAYS if name.endswith(":dog")]


@pytest.fixture
def dog(tmp_path):
    """The folder of a class, beside another one."""
    return save_manifests(tmp_path / "old", ARRAYS, variant="listed") / "dog"


def edited(folder, edit):
    """Change what a manifest says."""
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, np.ones((4, 8), "f4"))
    return buffer.getvalue()


def where(report):
    return {refusal.where for refusal in report.refused}


def of(numbers):
    return {f"video_{n:05d}:dog" for n in numbers}


@pytest.fixture
def all_but(bring, stored, dog):
    """Import, and compare: these samples are refused by name, all others are there."""

    def all_but(missing, refused=None):
        report = bring(dog.parent)
        names = {f"dog/{sample_id.removesuffix(':dog')}" for sample_id in missing}
        assert where(report) == (names if refused is None else {refused})
        assert report.exit_code == 1
        found = stored(report)
        assert found.keys() == ARRAYS.keys() - missing
        for sample_id, array in found.items():
            np.testing.assert_array_equal(array, ARRAYS[sample_id], strict=True)
        return report

    return all_but


def test_chunks_are_numbered_by_the_list(came_along, dog):
    """Neither the order nor the numbers of the files' names count."""
    names = ["c.npy", "embeddings_000.npy", "embeddings_007.npy"]
    for number, name in ((2, names[2]), (1, "x"), (0, names[0])):
        (dog / f"embeddings_{number:03d}.npy").rename(dog / name)
    (dog / "x").rename(dog / names[1])
    edited(dog, lambda m: [c.update(file=n) for c, n in zip(m["chunks"], names, strict=True)])
    came_along(dog.parent, ARRAYS)


def test_a_missing_chunk_moves_no_other(all_but, dog):
    """The chunks behind it keep their numbers."""
    (dog / "embeddings_000.npy").unlink()
    all_but(of([1, 3, 5, 7]))


@pytest.mark.parametrize("rows", [0, 3, 5])
def test_a_chunk_of_another_length(all_but, dog, rows):
    """None of its rows is taken: another process may have written them, in another order."""
    other = np.ones((rows, 8), "f4")
    np.save(dog / "embeddings_001.npy", other)
    all_but(of([9, 11, 13, 15]))


def test_a_chunk_of_another_shape(all_but, dog):
    """As many rows, and other ones."""
    np.save(dog / "embeddings_001.npy", np.ones((4, 9), "f4"))
    all_but(of([9, 11, 13, 15]))


def test_counts_that_disagree(all_but, dog):
    """The list says two lengths of one chunk."""
    edited(dog, lambda m: m["chunks"][1].update(num_samples=5))
    all_but(of([9, 11, 13, 15]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: file.write_bytes(file.read_bytes() * 2),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(npz()),
        lambda file: np.save(file, np.array([1, "x"], object), allow_pickle=True),
    ],
)
def test_a_damaged_chunk(all_but, dog, damage):
    """Cut, too long, empty, of another kind, pickled."""
    damage(dog / "embeddings_001.npy")
    all_but(of([9, 11, 13, 15]))


@pytest.mark.parametrize(
    "place", [[0, 4], [0, -1], [2, 2], [3, 0], [-1, 0], [True, 0], [0, 1.0], [0], None, "x"]
)
def test_a_place_that_is_not_there(all_but, dog, place):
    """One embedding is refused, the others of its chunk come."""
    edited(dog, lambda m: m["file_id_to_index"].update(video_00003=place))
    report = all_but(of([3]))
    assert any("names 9 of the 10 embeddings" in note for note in report.notes)


def test_two_file_ids_of_one_row(all_but, dog):
    """One of them is wrong, and nothing says which."""
    edited(dog, lambda m: m["file_id_to_index"].update(video_00003=[1, 1]))
    all_but(of([3, 11]))


def test_a_class_without_a_manifest(all_but, dog):
    """The class is named."""
    (dog / "manifest.json").unlink()
    report = all_but(set(DOGS), "dog")
    assert "manifest.json" in report.refused[0].reason


def test_a_chunk_that_the_manifest_does_not_know(all_but, dog):
    """The process that wrote it was killed before it wrote the manifest."""
    np.save(dog / "embeddings_003.npy", np.ones((4, 8), "f4"))
    all_but(set(), "dog/embeddings_003.npy")


def test_a_manifest_that_names_no_row_of_a_chunk(all_but, dog):
    """Its rows are listed and counted, and have no names."""
    edited(dog, lambda m: [m["file_id_to_index"].pop(f"video_000{n}") for n in (17, 19)])
    report = all_but(of([17, 19]), "dog/embeddings_002.npy")
    assert any("total_samples 10, and names 8" in note for note in report.notes)


@pytest.mark.parametrize("name", ["../secret.npy", "{absolute}", "..\\secret.npy", "a/../../s.npy"])
def test_a_manifest_that_leads_out_of_its_folder(all_but, dog, name):
    """It is refused as a whole, even for a chunk that no embedding lies in."""
    secret = dog.parent / "secret.npy"
    np.save(secret, np.ones((4, 8), "f4"))
    name = name.format(absolute=secret)
    edited(dog, lambda m: m["chunks"].append({"file": name, "num_samples": 4, "shape": [4, 8]}))
    all_but(set(DOGS), "dog/manifest.json")


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(file_id_to_index=[1]),
        lambda m: m.update(chunks={"0": "embeddings_000.npy"}),
        lambda m: m.update(chunks=None),
        lambda m: m["chunks"].append(None),
        lambda m: m["chunks"].append({"num_samples": 4}),
        lambda m: m["chunks"].append(m["chunks"][0]),
        lambda m: m.update(class_name="drum"),
    ],
)
def test_a_manifest_that_contradicts_itself(all_but, dog, edit):
    """The class is named, and the other one is imported."""
    edited(dog, edit)
    all_but(set(DOGS), "dog/manifest.json")


def test_the_class_in_other_letters(came_along, dog):
    """The folder and the manifest may write it in upper or lower case."""
    edited(dog, lambda m: m.update(class_name="DOG"))
    came_along(dog.parent, ARRAYS)


def test_the_folder_of_one_class(bring, came_along, dog):
    """Its manifest says the class; another one that is given is refused."""
    dogs = {name: ARRAYS[name] for name in DOGS}
    came_along(dog, dogs)
    came_along(dog, dogs, {**FACTS, "duration": 1}, class_name="dog")
    assert where(bring(dog, class_name="cat")) == {"dog/manifest.json"}


def test_without_a_list_the_files_names_count(came_along, dog):
    """As in manifests that are file ids alone."""
    edited(dog, lambda m: m.pop("chunks"))
    came_along(dog.parent, ARRAYS)


def test_several_shapes_in_a_class(bring, came_along, tmp_path):
    """Each embedding has that of its chunk, whatever `embedding_shape` says."""
    short, long = values(8, (2, 8)), values(24, (3, 8))
    arrays = {**long, **short}
    by_length = sorted(arrays, key=lambda name: len(arrays[name]))
    root = save_manifests(
        tmp_path / "old", {name: arrays[name] for name in by_length}, variant="listed"
    )
    report = bring(root, dry_run=True)
    assert (report.num_new, report.embedding_shape) == (16, (3, 8))
    assert {refusal.sample_id for refusal in report.refused} == short.keys()
    came_along(root, arrays, ragged=True)


def test_two_outputs_in_a_class(bring, stored, tmp_path):
    """The fewer are refused; the output that is given imports them into their own store."""
    pooled, hidden = values(8), {f"long_{n}:dog": np.full((3, 8), n, "f4") for n in range(8)}
    root = save_manifests(tmp_path / "old", {**pooled, **hidden}, variant="listed")
    for output, arrays in (("pooler_output", pooled), ("last_hidden_state", hidden)):
        report = bring(root, {**FACTS, "output": output})
        found = stored(report)
        assert found.keys() == arrays.keys()
        for sample_id, array in found.items():
            np.testing.assert_array_equal(array, arrays[sample_id], strict=True)
        assert {refusal.sample_id for refusal in report.refused} == (
            {**pooled, **hidden}.keys() - arrays.keys()
        )
        assert all("`output`" in refusal.reason for refusal in report.refused)


def test_chunks_of_torch(came_along, dog):
    """A chunk may be a tensor."""
    names = sorted(file.name for file in dog.glob("*.npy"))
    for name in names:
        torch.save(torch.tensor(np.load(dog / name)), dog / name.replace(".npy", ".pt"))
        (dog / name).unlink()
    edited(dog, lambda m: [c.update(file=c["file"].replace(".npy", ".pt")) for c in m["chunks"]])
    came_along(dog.parent, ARRAYS)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("content", ["code", {"a": 1}, 3])
def test_a_chunk_of_torch_that_is_no_tensor(all_but, dog, tmp_path, content):
    """Code in it is never run."""
    content = Hostile(tmp_path / "sprung") if content == "code" else content
    (dog / "embeddings_001.npy").unlink()
    torch.save(content, dog / "embeddings_001.pt")
    edited(dog, lambda m: m["chunks"][1].update(file="embeddings_001.pt"))
    all_but(of([9, 11, 13, 15]))
    assert not (tmp_path / "sprung").exists()


def test_files_beside_the_classes(came_along, dog):
    """They are named: an older cache lies in the same folder."""
    (dog.parent / "ast_embeddings_1a2b.pt").write_bytes(b"x")
    report = came_along(dog.parent, ARRAYS)
    assert any("ast_embeddings_1a2b.pt" in note for note in report.notes)


def test_the_folder_above(bring, dog):
    """The error names the folder to give."""
    with pytest.raises(TransferError, match=f"{dog.parent} has"):
        bring(dog.parent.parent)


@pytest.mark.parametrize("output", ["mean", "pooler_output", "last_hidden_state"])
def test_the_output_chooses_among_shapes(bring, stored, tmp_path, output):
    """Hidden states have two dimensions, every other output one, wherever the output is stated."""
    old = tmp_path / "old" / "dog"
    old.mkdir(parents=True)
    for number in range(3):
        np.save(old / f"hidden_{number}.npy", np.ones((4, 8), np.float32))
    np.save(old / "pooled.npy", np.ones(8, np.float32))
    report = bring(old.parent, {**FACTS, "output": output})
    wanted = {4, 8} if output == "last_hidden_state" else {8}
    assert {size for array in stored(report).values() for size in array.shape} == wanted
