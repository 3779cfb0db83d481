"""Tar files of webdataset, ours and others', Lance datasets, and what is wrong with them."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile

import numpy as np
import pytest
from exchange.old_caches import FACTS, values

from lmdbcache import EmbeddingCache, export_embeddings, import_embeddings
from lmdbcache.errors import TransferError


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def save_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_others_tars(came_along, tmp_path):
    """Keys with folders and extensions; class and sample id from the JSON beside, or the key."""
    arrays = values(4)
    members = {}
    for n, (name, array) in enumerate(arrays.items()):
        file_id, _, class_name = name.partition(":")
        key, facts = [
            (f"audios/{file_id}__{class_name}", None),
            (f"{class_name}/{file_id}", {"label": class_name}),
            (f"{n:06d}", {"sample_id": name}),
            (f"{file_id}:{class_name}", {"class": 3}),
        ][n % 4]
        members[f"{key}.flac"] = b"sound"
        if facts is not None:
            members[f"{key}.json"] = json.dumps(facts).encode()
        members[f"{key}.embedding.npy"] = npy(array)
    expected = {}
    for n, (name, array) in enumerate(arrays.items()):
        file_id, _, class_name = name.partition(":")
        known = [f"audios/{name}", f"{class_name}/{name}", name, name][n % 4]
        expected[known] = array
    came_along(save_tar(tmp_path / "x.tar", members), expected)


def test_several_tars_in_a_folder(came_along, tmp_path):
    """All of them, in the order of their names; GNU's form, too."""
    arrays = values(6)
    (tmp_path / "tars").mkdir()
    for n, (name, array) in enumerate(arrays.items()):
        form = tarfile.GNU_FORMAT if n % 2 else tarfile.USTAR_FORMAT
        save_tar(tmp_path / "tars" / f"{n}.tar", {f"{name}.npy": npy(array)}, format=form)
    assert came_along(tmp_path / "tars", arrays).kind == "webdataset"


def test_what_is_no_embedding_is_refused(bring, tmp_path):
    """Pickles are never read; what can't be used is named, and the rest comes along."""
    members = {
        "a:dog.pyd": b"pickle",
        "b:dog.npy": npy(np.array([{}], object)),
        "c:dog.npy": b"\x93NUMPY\x09\x00junk",
        "d:dog.npy": npy(np.ones(8, "f4"))[:100],
        "e:dog.npy": npy(np.ones(8, "f4")),
        "f:dog.json": b"{",
        "f:dog.npy": npy(np.ones(8, "f4")),
        "noclass.npy": npy(np.ones(8, "f4")),
        ".hidden": b"",
        "README": b"",
    }
    report = bring(save_tar(tmp_path / "x.tar", members))
    assert report.num_new == 1
    refused = {one.where: one.reason for one in report.refused}
    assert sorted(refused) == [
        *("a:dog", "b:dog.npy", "c:dog.npy", "d:dog.npy", "f:dog.npy", "noclass"),
    ]
    assert "no .npy, but pyd" in refused["a:dog"]


@pytest.mark.parametrize("kind", ["webdataset", "lance"])
def test_a_flipped_bit_is_noticed(filled, config, embeddings, tmp_path, kind):
    """The sample whose value or name isn't what was exported is left out, and no other."""
    damaged = "video_00003:dog"
    out = tmp_path / "out"
    export_embeddings(filled, config, out, format=kind)
    files = [file for file in out.rglob("*") if file.is_file()]
    (file,) = [one for one in files if embeddings[damaged].tobytes() in one.read_bytes()]
    whole = file.read_bytes()
    content = bytearray(whole)
    content[whole.index(embeddings[damaged].tobytes()) + 7] ^= 4
    file.write_bytes(content)
    report = import_embeddings(tmp_path / "back", None, out)
    assert (report.num_new, [one.where for one in report.refused]) == (19, [damaged])
    assert "checksum" in report.refused[0].reason
    reader = EmbeddingCache(tmp_path / "back").reader(config)
    assert {name: reader[name].tobytes() for name in reader} == {
        name: array.tobytes() for name, array in embeddings.items() if name != damaged
    }
    reader.close()


@pytest.mark.parametrize("where", [0, 3, 20])
def test_a_damaged_header_is_not_the_end(filled, config, tmp_path, where):
    """What stands behind a header that can't be read isn't passed over in silence."""
    export_embeddings(filled, config, tmp_path / "x.tar", format="webdataset")
    content = bytearray((tmp_path / "x.tar").read_bytes())
    place = content.index(b"video_%05d" % where) if where < 20 else content.rindex(b"video_00019")
    content[place] ^= 1
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(TransferError, match=r"x\.tar"):
        import_embeddings(tmp_path / "back", None, tmp_path / "x.tar")
    assert not (tmp_path / "back").exists()


def test_damaged_lance_datasets(filled, config, tmp_path):
    """A file that is cut, gone or overwritten is an error of ours; no wrong value comes along."""
    export_embeddings(filled, config, tmp_path / "x.lance", format="lance")
    for file in sorted((tmp_path / "x.lance").rglob("*")):
        if file.parent.name not in ("data", "_versions") or file.suffix == ".json":
            continue
        whole = file.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"\xff" * len(whole), None):
            file.unlink() if content is None else file.write_bytes(content)
            # An older version of the dataset may stand in; it lacks the index only.
            with contextlib.suppress(TransferError):
                report = import_embeddings(tmp_path / "back", FACTS, tmp_path / "x.lance")
                assert report.num_new + report.num_same + len(report.refused) == 20
                assert not report.conflicts
            file.write_bytes(whole)


def test_folders_of_two_configs(cache, config, tmp_path):
    """Shards that don't belong together are refused."""
    (tmp_path / "out").mkdir()
    for n, other in enumerate((config, config.replace(duration=1.0))):
        with cache.writer(other) as writer:
            writer.put("a:dog", np.ones(4))
        export_embeddings(cache, other, tmp_path / "out" / f"{n}.tar", format="webdataset")
    with pytest.raises(TransferError):
        import_embeddings(tmp_path / "back", None, tmp_path / "out")
