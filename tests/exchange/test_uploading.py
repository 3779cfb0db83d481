"""Exports that go to a URL."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lmdbcache import export_embeddings, import_embeddings
from lmdbcache.errors import CacheFullError, RemoteError, TransferError
from lmdbcache.exchange import Remote, exporting

KINDS = ["parquet", "webdataset", "safetensors", "lance"]


@pytest.fixture
def url():
    return f"memory://{uuid.uuid4().hex}/an/export"


@pytest.fixture(autouse=True)
def _leaves_no_temporary_file(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def there(url):
    """Name → content of what is below a URL."""
    system, folder = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return {name.removeprefix(f"{folder}/"): system.cat_file(name) for name in system.find(folder)}


def brought_back(url, folder):
    fsspec.filesystem("memory").get(f"{url}/", f"{folder}/", recursive=True)
    return import_embeddings(folder.with_name(f"{folder.name}.cache"), None, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(filled, config, tmp_path, url, kind):
    """The files are those of a folder; copied from there they are imported bit for bit."""
    done = export_embeddings(filled, config, url, format=kind, num_shards=3)
    assert (done.path, done.num_files, done.num_embeddings) == (url, 3, 20)
    assert done.num_bytes == sum(map(len, there(url).values()))
    if kind in ("parquet", "webdataset"):
        export_embeddings(filled, config, tmp_path / "x", format=kind, num_shards=3)
        assert there(url) == {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    report = brought_back(url, tmp_path / "copy")
    assert (report.num_new, report.exit_code) == (20, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_replaced_unasked(filled, config, tmp_path, url, kind):
    """What is there stays until overwrite is given; then nothing of it is left."""
    export_embeddings(filled, config, url, format=kind, num_shards=4)
    before = there(url)
    with pytest.raises(TransferError):
        export_embeddings(filled, config, url, format=kind)
    assert there(url) == before
    export_embeddings(filled, config, url, format=kind, classes=["dog"], overwrite=True)
    assert brought_back(url, tmp_path / "copy").num_new == 10
    assert len(there(url)) < len(before)


def test_other_files_are_never_replaced(filled, config, url):
    """A bucket with something else in it is left alone, asked or not."""
    fsspec.filesystem("memory").pipe_file(f"{url}/thesis.tex", b"kept")
    for kind in KINDS:
        with pytest.raises(TransferError, match=r"thesis\.tex"):
            export_embeddings(filled, config, url, format=kind, overwrite=True)
    assert there(url) == {"thesis.tex": b"kept"}


def test_one_file_has_no_place_in_a_bucket(filled, config, url):
    """Formats and names of single files are refused with what to do."""
    for kind in ("pt", "npz"):
        with pytest.raises(TransferError):
            export_embeddings(filled, config, url, format=kind)
    with pytest.raises(TransferError):
        export_embeddings(filled, config, f"{url}.tar", format="webdataset")
    assert there(url) == {}


def test_a_password_is_not_told(filled, config, url):
    """Neither by errors nor by the report, which may go to a log."""
    name = url.removeprefix("memory://")
    done = export_embeddings(filled, config, f"memory://me:pass@{name}", format="parquet")
    assert done.path == f"memory://me@{name}"
    for kind in ("parquet", "npz"):
        with pytest.raises(TransferError) as caught:
            export_embeddings(filled, config, f"memory://me:pass@{name}", format=kind)
        assert "pass@" not in str(caught.value)


def test_a_place_that_refuses(filled, config, url, monkeypatch):
    """An upload that fails ends the export; shards that were done stay."""
    write = Remote.write

    def refuse(self, path, data):
        if "00003" in path:
            raise RemoteError(f"{self.url}/{path}: refused")
        write(self, path, data)

    monkeypatch.setattr(Remote, "write", refuse)
    with pytest.raises(RemoteError, match=r"embeddings-00003\.parquet: refused"):
        export_embeddings(filled, config, url, format="parquet", num_shards=5)
    assert sorted(there(url)) == ["embeddings-00001.parquet", "embeddings-00002.parquet"]
    monkeypatch.undo()
    export_embeddings(filled, config, url, format="parquet", num_shards=5, overwrite=True)
    assert len(there(url)) == 5


def test_room_for_one_shard(cache, config, url, monkeypatch):
    """The disk of this machine has to hold one shard at a time, of Lance all; told before."""
    with cache.writer(config) as writer:
        writer.put_batch([f"v{n}:dog" for n in range(8)], np.ones((8, 1 << 18), np.float32))
    asked = []

    def too_small(folder, num_bytes, purpose):
        asked.append(num_bytes)
        raise CacheFullError(f"{folder}: {purpose} needs {num_bytes}")

    monkeypatch.setattr(exporting, "check_room", too_small)
    monkeypatch.setattr(exporting, "RESERVE_BYTES", 0)
    for kind, options in (
        ("parquet", {"num_shards": 8}),
        ("parquet", {"shard_bytes": 1 << 20}),
        ("parquet", {}),
        ("lance", {"num_shards": 8}),
    ):
        with pytest.raises(CacheFullError):
            export_embeddings(cache, config, url, format=kind, **options)
    assert asked == [1 << 20, 2 << 20, 8 << 20, 8 << 20]
    assert there(url) == {}


def test_shards_go_one_by_one(filled, config, url, monkeypatch):
    """A shard is gone from this machine when the next one is made."""
    write, seen = Remote.write, []

    def look(self, path, data):
        seen.append(sum(1 for one in Path(tempfile.gettempdir()).rglob("*") if one.is_file()))
        write(self, path, data)

    monkeypatch.setattr(Remote, "write", look)
    export_embeddings(filled, config, url, format="parquet", shard_bytes=64)
    assert seen == [1] * 10
