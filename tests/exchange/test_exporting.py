"""Export, and the way back."""

from __future__ import annotations

import errno
import os
import sys
import uuid
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch
from exchange.old_caches import FACTS
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from small_disks import fill, small_disk
from storage.damage import data_file, flip_value

from lmdbcache import CacheConfig, EmbeddingCache, export_embeddings, import_embeddings
from lmdbcache.errors import (
    CacheError,
    CacheFullError,
    CacheNotFoundError,
    ConfigError,
    IntegrityError,
    SampleNotFoundError,
    TransferError,
)
from lmdbcache.exchange import exporting
from lmdbcache.storage import NUMPY_DTYPES

OUTS = [
    *(("pt", "x.pt"), ("npz", "x.npz"), ("parquet", "x.parquet"), ("parquet", "shards")),
    *(("safetensors", "x.safetensors"), ("safetensors", "shards")),
    *(("webdataset", "x.tar"), ("webdataset", "shards"), ("lance", "x.lance")),
]


def contents(cache, config):
    with cache.reader(config) as reader:
        return {name: reader[name] for name in reader}, reader.embedding_shape


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("kind", "out"), OUTS)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_there_and_back(cache, tmp_path, kind, out, dtype, ragged):
    """Every bit, name, shape, the config and the provenance survive; no folder of this machine."""
    config = CacheConfig(dtype=dtype, model_name="m/Ü", namespace="d", front_end="x/1")
    generator = np.random.default_rng(1)
    provenance = {"weights_digest": "abc", "note": "é"}
    of_here = {"checkpoint": "/home/me/ast"}
    with cache.writer(config, ragged=ragged, provenance={**provenance, **of_here}) as writer:
        for n in range(23):
            shape = (int(generator.integers(1, 4)) if ragged else 2, 3)
            writer.put(f"a:{n}/é:{'dog' if n % 2 else 'drum'}", generator.normal(size=shape))
    done = export_embeddings(cache, config, tmp_path / out, format=kind, shard_bytes=100)
    assert done.num_embeddings == 23
    shards = {"shards": tmp_path / out, "x.lance": tmp_path / out / "data"}.get(out)
    assert done.num_files == (len(left_in(shards)) if shards else 1)
    assert (done.num_files > 1) == (shards is not None)
    back = EmbeddingCache(tmp_path / "back")
    report = import_embeddings(back, None, tmp_path / out)
    assert (report.config, report.notes, report.num_new) == (config, [], 23)
    (here, shape), (there, other_shape) = contents(cache, config), contents(back, config)
    assert shape == other_shape
    assert here.keys() == there.keys()
    for name in here:
        np.testing.assert_array_equal(here[name].view("u1"), there[name].view("u1"))
    assert back.info(config).provenance.items() >= provenance.items()
    assert not back.info(config).provenance.keys() & of_here
    # Into the store itself, too: it is known that the weights are the same.
    assert import_embeddings(cache, None, tmp_path / out).num_same == 23
    assert left_in(tmp_path) == sorted(["back", "cache", out])


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(OUTS),
    dtype=st.sampled_from(sorted(NUMPY_DTYPES)),
    ragged=st.booleans(),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    names=st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
        min_size=1, max_size=8, unique=True,
    ),
    seed=st.integers(0, 1000),
    shard_bytes=st.integers(1, 200),
)  # fmt: skip
def test_there_and_back_with_anything(
    tmp_path, kind, dtype, ragged, shape, names, seed, shard_bytes
):
    """Any names, shapes, dtypes and shard sizes."""
    assume(dtype != "int8" or not ragged or len(shape) > 1)  # int8 has no rows of several lengths
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    config, cache = CacheConfig(dtype=dtype), EmbeddingCache(folder / "cache")
    generator = np.random.default_rng(seed)
    with cache.writer(config, ragged=ragged) as writer:
        for name in names:
            first = int(generator.integers(1, 4)) if ragged else shape[0]
            writer.put(f"{name[:60]}:x", generator.normal(size=(first, *shape[1:])))
    form, out = kind
    export_embeddings(cache, config, folder / out, format=form, shard_bytes=shard_bytes)
    report = import_embeddings(folder / "back", None, folder / out)
    assert report.exit_code == 0
    here, there = contents(cache, config), contents(EmbeddingCache(folder / "back"), config)
    assert here[1] == there[1]
    assert {n: a.tobytes() for n, a in here[0].items()} == {
        n: a.tobytes() for n, a in there[0].items()
    }


def test_the_torch_file_is_what_scripts_load(filled, config, embeddings, tmp_path):
    """`torch.load` gives the dict of tensors with its metadata, each tensor by itself."""
    export_embeddings(filled, config, tmp_path / "x.pt", format="pt")
    content = torch.load(tmp_path / "x.pt")
    assert content["metadata"]["sample_rate"] == 16000
    assert content["metadata"]["num_embeddings"] == 20
    for name, array in embeddings.items():
        assert content["embeddings"][name].numpy().tobytes() == array.tobytes()
        assert content["embeddings"][name].untyped_storage().nbytes() == array.nbytes


def test_parquet_is_read_by_others(filled, config, embeddings, tmp_path):
    """pyarrow and Hugging Face datasets see plain columns."""
    export_embeddings(filled, config, tmp_path / "shards", format="parquet", shard_bytes=256)
    files = sorted(map(str, (tmp_path / "shards").iterdir()))
    table = pyarrow.parquet.read_table(tmp_path / "shards")
    assert table.column_names == ["sample_id", "file_id", "class", "embedding"]
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    assert table["class"].to_pylist() == [name.split(":")[1] for name in sorted(embeddings)]
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hf")
    ).with_format("numpy")
    assert len(rows) == 20
    for row in rows:
        np.testing.assert_array_equal(row["embedding"], embeddings[row["sample_id"]])
        assert f"{row['file_id']}:{row['class']}" == row["sample_id"]


def test_safetensors_and_npz_are_read_by_others(filled, config, embeddings, tmp_path):
    """One array of all embeddings, with the names beside it."""
    export_embeddings(filled, config, tmp_path / "x.safetensors", format="safetensors")
    export_embeddings(filled, config, tmp_path / "x.npz", format="npz")
    expected = np.stack([embeddings[name] for name in sorted(embeddings)])
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")["embeddings"]
    np.testing.assert_array_equal(found, expected, strict=True)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["embeddings"], expected, strict=True)
        assert archive["sample_ids"].tolist() == sorted(embeddings)


def test_a_part_of_a_store(filled, config, tmp_path):
    """By class, by sample ids, or both; what isn't there is an error that says what is."""
    out = tmp_path / "x.npz"
    ids = ["video_00001:dog", "video_00000:DRUM", "video_00001:dog"]
    for choice, number in (
        ({"classes": ["Dog"]}, 10),
        ({"sample_ids": ids}, 2),
        ({"sample_ids": ids, "classes": ["dog"]}, 1),
    ):
        done = export_embeddings(filled, config, out, format="npz", overwrite=True, **choice)
        assert done.num_embeddings == number
    before = out.read_bytes()
    for choice, error, words in (
        ({"classes": ["cat"]}, ConfigError, "cat"),
        ({"sample_ids": ["a:dog"]}, SampleNotFoundError, "a:dog"),
        ({"sample_ids": []}, TransferError, ""),
    ):
        with pytest.raises(error, match=words):
            export_embeddings(filled, config, out, format="npz", overwrite=True, **choice)
    assert out.read_bytes() == before


def test_a_sample_that_is_asked_for_twice(filled, config, tmp_path):
    """It is exported once, in whichever spelling."""
    ids = ["video_00001:dog", "video_00001:DOG", "video_00002:drum"]
    done = export_embeddings(filled, config, tmp_path / "x.npz", format="npz", sample_ids=ids)
    assert done.num_embeddings == 2
    assert import_embeddings(tmp_path / "back", None, tmp_path / "x.npz").num_new == 2


@pytest.mark.parametrize(("kind", "out"), OUTS)
def test_nothing_is_replaced_unasked(filled, config, tmp_path, kind, out):
    """An earlier export stays until overwrite is given; then the new one is there as a whole."""
    export_embeddings(filled, config, tmp_path / out, format=kind, shard_bytes=64)
    with pytest.raises(TransferError, match=out):
        export_embeddings(filled, config, tmp_path / out, format=kind)
    export_embeddings(filled, config, tmp_path / out, format=kind, classes=["dog"], overwrite=True)
    assert import_embeddings(tmp_path / "back", None, tmp_path / out).num_new == 10
    assert left_in(tmp_path) == sorted(["back", "cache", out])


def test_an_export_that_cannot_take_its_place(filled, config, tmp_path, monkeypatch):
    """The folder that it was to replace is back under its name."""
    out, rename = tmp_path / "shards", Path.rename
    export_embeddings(filled, config, out, format="parquet", num_shards=2)

    def fail(self, target):
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((OSError, CacheError)):
        export_embeddings(filled, config, out, format="parquet", num_shards=2, overwrite=True)
    monkeypatch.undo()
    assert import_embeddings(tmp_path / "back", None, out).num_new == 20
    assert left_in(tmp_path) == ["back", "cache", "shards"]


def test_other_files_are_never_replaced(filled, config, tmp_path):
    """A folder with something else in it is left alone, asked or not."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("kept")
    for kind in ("parquet", "npz"):
        with pytest.raises(TransferError, match="thesis.tex"):
            export_embeddings(filled, config, tmp_path / "out", format=kind, overwrite=True)
    assert left_in(tmp_path / "out") == ["thesis.tex"]
    with pytest.raises(TransferError, match="nowhere"):
        export_embeddings(filled, config, tmp_path / "nowhere" / "x.npz", format="npz")
    with pytest.raises(TransferError, match="csv"):
        export_embeddings(filled, config, tmp_path / "x", format="csv")
    with pytest.raises(CacheNotFoundError):
        export_embeddings(filled, config.replace(duration=1), tmp_path / "x", format="npz")


@pytest.mark.parametrize(("kind", "out"), OUTS)
def test_a_damaged_value_is_not_exported(filled, config, embeddings, tmp_path, kind, out):
    """A flipped bit ends the export with the sample's name, and no file is left."""
    flip_value(data_file(filled, config), embeddings["video_00003:dog"])
    with pytest.raises(IntegrityError, match="video_00003:dog"):
        export_embeddings(filled, config, tmp_path / out, format=kind)
    assert left_in(tmp_path) == ["cache"]


@pytest.mark.parametrize(("kind", "out"), OUTS)
def test_a_full_disk(cache, config, tmp_path, monkeypatch, kind, out):
    """Told before where it can be, else at once; nothing is left behind."""
    with cache.writer(config) as writer:
        writer.put_batch([f"v{n}:dog" for n in range(8)], np.ones((8, 1 << 18), np.float32))
    with small_disk(tmp_path / "disk", 40) as disk:
        fill(disk, 20 << 20)
        with pytest.raises(CacheFullError):
            export_embeddings(cache, config, disk / out, format=kind)
        monkeypatch.setattr(exporting, "check_room", lambda *_: None)
        fill(disk, 2 << 20)
        with pytest.raises(CacheFullError):
            export_embeddings(cache, config, disk / out, format=kind, shard_bytes=1 << 20)
        assert left_in(disk) == ["ballast"]


def test_interrupted(filled, config, tmp_path):
    """Ctrl-C leaves neither half a file nor a temporary one."""

    def progress(*_):
        raise KeyboardInterrupt

    for kind, out in OUTS:
        with pytest.raises(KeyboardInterrupt):
            export_embeddings(filled, config, tmp_path / out, format=kind, progress=progress)
    assert left_in(tmp_path) == ["cache"]


def test_more_than_fits_into_memory(filled, config, tmp_path, monkeypatch):
    """What is put together in memory is refused with the formats that aren't."""
    monkeypatch.setattr(exporting, "memory_limit", lambda: 1000)
    for kind, out in (("pt", "x.pt"), ("safetensors", "x.safetensors")):
        with pytest.raises(TransferError):
            export_embeddings(filled, config, tmp_path / out, format=kind)
    for kind, out in OUTS:
        if out not in ("x.pt", "x.safetensors"):
            export_embeddings(filled, config, tmp_path / f"{kind}-{out}", format=kind)


@pytest.mark.parametrize(
    ("module", "kind", "extra"),
    [
        *(("torch", "pt", "formats"), ("pyarrow", "parquet", "formats")),
        *(("safetensors", "safetensors", "formats"), ("webdataset", "webdataset", "formats")),
        *(("lance", "lance", "lance"), ("pyarrow", "lance", "lance")),
    ],
)
def test_missing_packages(filled, config, tmp_path, monkeypatch, module, kind, extra):
    """The extra to install is named; .npz needs none."""
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"lmdbcache\[{extra}\]"):
        export_embeddings(filled, config, tmp_path / "x", format=kind)
    assert left_in(tmp_path) == ["cache"]
    export_embeddings(filled, config, tmp_path / "x.npz", format="npz")


@pytest.mark.parametrize("out", ["x.npz", "x.parquet", "x.safetensors", "x.pt", "x.tar"])
def test_damaged_exports(filled, config, tmp_path, out):
    """A cut file is an error with its name, and nothing is stored."""
    kind = {"tar": "webdataset"}.get(out.split(".")[1], out.split(".")[1])
    export_embeddings(filled, config, tmp_path / out, format=kind)
    # The end of a tar is zeros.
    whole = (tmp_path / out).read_bytes().rstrip(b"\0")
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / out).write_bytes(whole[:length])
        with pytest.raises(TransferError, match=out):
            import_embeddings(tmp_path / "back", None, tmp_path / out)
    assert not (tmp_path / "back").exists()


def test_flipped_bits_in_an_export(filled, config, embeddings, tmp_path):
    """What has checksums of its own, .npz and Parquet, is compared with them."""
    for out in ("x.npz", "x.parquet"):
        export_embeddings(filled, config, tmp_path / out, format=out.split(".")[1])
        flip_value(tmp_path / out, embeddings["video_00003:dog"])
    with pytest.raises(TransferError):
        import_embeddings(tmp_path / "back", None, tmp_path / "x.npz")
    report = import_embeddings(tmp_path / "back", None, tmp_path / "x.parquet")
    assert (report.num_new, len(report.refused)) == (0, 20)


def test_others_files_of_these_formats(tmp_path):
    """Names as tensors, as arrays, as columns of other names."""
    arrays = {f"v{n}:dog": np.full(4, n, "f4") for n in range(5)}
    stacked = np.stack(list(arrays.values()))
    facts = {"sample_rate": "16000", "duration": "5.0", "model_name": "ast"}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", facts)
    np.savez(tmp_path / "b.npz", sample_rate=16000, duration=5.0, model_name="ast", **arrays)
    np.savez_compressed(tmp_path / "c.npz", embeddings=stacked, names=list(arrays))
    table = pyarrow.table(
        {"filename": [f"v{n}.wav" for n in range(5)], "label": ["Dog"] * 5, "emb2": [1] * 5,
         "embeddings": stacked.tolist()},
        pyarrow.schema([("filename", "string"), ("label", "string"), ("emb2", "int64"),
                        ("embeddings", pyarrow.list_(pyarrow.float32()))]),
    )  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    for name in ("a.safetensors", "b.npz", "c.npz", "d.parquet"):
        given = None if name[0] in "ab" else facts | {"sample_rate": 16000, "duration": 5}
        report = import_embeddings(tmp_path / f"{name}.cache", given, tmp_path / name)
        assert report.exit_code == 0, report.refused
        found, _ = contents(EmbeddingCache(tmp_path / f"{name}.cache"), report.config)
        assert {n: a.tolist() for n, a in found.items()} == {
            n: a.tolist() for n, a in arrays.items()
        }


@pytest.mark.parametrize("lengths", [[-1, 4], [0, 3], [1, 1], [1, 3]])
def test_lengths_that_make_no_embeddings(tmp_path, lengths):
    """Below 1, or not the rows that there are: nothing of the file is imported."""
    np.savez(
        tmp_path / "x.npz", embeddings=np.ones((3, 8), "f4"), lengths=lengths, ids=["a:x", "b:x"]
    )
    with pytest.raises(TransferError, match="x.npz"):
        import_embeddings(tmp_path / "cache", FACTS, tmp_path / "x.npz")


def test_columns_that_are_not_there(tmp_path):
    """A table of something else is an error with its columns."""
    pyarrow.parquet.write_table(pyarrow.table({"x": [1], "y": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(TransferError, match="x, y"):
        import_embeddings(tmp_path / "cache", None, tmp_path / "x.parquet")
    assert os.listdir(tmp_path) == ["x.parquet"]
