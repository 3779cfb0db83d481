"""What other libraries read of an export, from a folder and from a bucket."""

from __future__ import annotations

import os
import urllib.parse
import uuid

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, strategies as st
from sharing.places import s3_client, s3_environment
from sharing.server_fixtures import kept, moto  # noqa: F401 - fixtures

from lmdbcache import CacheConfig, EmbeddingCache, export_embeddings
from lmdbcache.exchange.formats.webdataset import key_of_sample_id, sample_id_of_key

ODD = [
    "a/b.c.wav:x",
    "../up:x",
    'it\'s "é" 50%2E:日本',
    "a:b:x",
    "__meta__:x",
    "/root:x",
    " :x",
    "é.:x",
]
# webdataset leaves its files to the garbage collector; Lance warns of forks once it is imported.
leaves_files_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
forks_beside_lance = pytest.mark.filterwarnings("ignore:lance is not fork-safe")
FORMS = [
    *(("float32", (6,), False), ("float16", (6,), False), ("bfloat16", (6,), False)),
    *(("float16", (3, 4), False), ("float32", (3, 4), True), ("bfloat16", (3, 4), True)),
]


@pytest.fixture
def bucket(moto, monkeypatch):  # noqa: F811 - the fixture
    """The URL of an empty bucket; the environment says where it is."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3_client(moto.endpoint).create_bucket(Bucket=name)
    for variable, value in {**s3_environment(moto.endpoint), "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(variable, value)
    return f"s3://{name}/an/export"


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    """Where an export goes: a folder of this machine, or a bucket."""
    if request.param == "folder":
        return str(tmp_path / "export")
    return request.getfixturevalue("bucket")


def filled_store(cache, dtype="float32", shape=(6,), ragged=False, n=24):
    """A config, and what is stored under it: odd names, and others."""
    config = CacheConfig(dtype=dtype)
    generator = np.random.default_rng(0)
    names = [*ODD, *(f"v{i:03d}:{'dog' if i % 2 else 'drum'}" for i in range(n - len(ODD)))]
    with cache.writer(config, ragged=ragged) as writer:
        for name in names:
            first = int(generator.integers(1, 5)) if ragged else shape[0]
            writer.put(name, generator.normal(size=(first, *shape[1:])))
    with cache.reader(config) as reader:
        return config, {name: reader[name].copy() for name in reader}


def assert_same(found, stored):
    """Every sample once, with every bit; what was bfloat16 comes as float32."""
    assert found.keys() == stored.keys()
    for name, array in stored.items():
        wide = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        np.testing.assert_array_equal(
            np.asarray(found[name]).reshape(wide.shape).view("u1"), wide.view("u1"), strict=True
        )


@pytest.mark.parametrize(("dtype", "shape", "ragged"), FORMS)
def test_hugging_face_datasets_stream_parquet(cache, tmp_path, dtype, shape, ragged):
    """The features are told by the file; rows have every bit, in the format of their dtype."""
    datasets = pytest.importorskip("datasets")
    config, stored = filled_store(cache, dtype, shape, ragged)
    export_embeddings(cache, config, tmp_path / "x", format="parquet", num_shards=4)
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "x" / "*.parquet"), split="train", streaming=True
    )
    value = datasets.Value("float16" if dtype == "float16" else "float32")
    kind = datasets.LargeList(value) if ragged else datasets.List(value, int(np.prod(shape)))
    assert rows.features["embedding"] == kind
    assert rows.num_shards == 4
    # numpy's format makes float32 of everything, Arrow's doesn't.
    found = {row["sample_id"]: row["embedding"] for row in rows.with_format("numpy")}
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert_same({k: array.astype(value.dtype) for k, array in found.items()}, stored)
    tables = list(rows.with_format("arrow").iter(batch_size=10))
    assert_same({k: v for table in tables for k, v in _by_id(table).items()}, stored)


@forks_beside_lance
def test_hugging_face_datasets_stream_from_a_bucket(cache, bucket):
    """Workers and ranks each read their shards over S3, and miss nothing."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("s3fs")
    from datasets.distributed import split_dataset_by_node

    config, stored = filled_store(cache)
    export_embeddings(cache, config, bucket, format="parquet", num_shards=4, shuffle=0)
    rows = datasets.load_dataset(
        "parquet", data_files=f"{bucket}/*.parquet", split="train", streaming=True
    ).with_format("torch")
    loader = torch.utils.data.DataLoader(rows, batch_size=5, num_workers=2)
    found = {}
    for batch in loader:
        found |= zip(batch["sample_id"], batch["embedding"].numpy(), strict=True)
    assert_same(found, stored)
    shares = [
        [row["sample_id"] for row in split_dataset_by_node(rows, rank, 2)] for rank in range(2)
    ]
    assert [len(share) for share in shares] == [12, 12]
    assert {*shares[0], *shares[1]} == stored.keys()


def test_lance_reads_rows_and_samples(cache, place):
    """By row and by sample id, whatever the id, and in the order that was asked for by row."""
    lance = pytest.importorskip("lance")
    config, stored = filled_store(cache)
    export_embeddings(cache, config, place, format="lance", shuffle=3)
    dataset = lance.dataset(place)
    ids = dataset.to_table(columns=["sample_id"])["sample_id"].to_pylist()
    assert sorted(ids) == sorted(stored)
    assert ids != sorted(ids)
    rows = [7, 0, 23, 7]
    table = dataset.take(rows, columns=["sample_id", "class", "embedding"])
    assert table["sample_id"].to_pylist() == [ids[row] for row in rows]
    assert table["class"].to_pylist() == [ids[row].rpartition(":")[2] for row in rows]
    assert_same(_by_id(table), {ids[row]: stored[ids[row]] for row in rows})
    for name in stored:
        quoted = name.replace("'", "''")
        plan = {"columns": ["sample_id", "embedding"], "filter": f"sample_id = '{quoted}'"}
        assert_same(_by_id(dataset.to_table(**plan)), {name: stored[name]})
    assert "ScalarIndexQuery" in dataset.scanner(**plan).explain_plan()


def test_options_in_place_of_variables(cache, bucket, moto, monkeypatch):  # noqa: F811
    """What docs/streaming.md says that each library takes, with nothing in the environment."""
    datasets, lance = pytest.importorskip("datasets"), pytest.importorskip("lance")
    config, stored = filled_store(cache)
    export_embeddings(cache, config, f"{bucket}/parquet", format="parquet")
    export_embeddings(cache, config, f"{bucket}/lance", format="lance")
    for variable in (*s3_environment(moto.endpoint), "AWS_ALLOW_HTTP"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    options = {"key": "k", "secret": "s", "endpoint_url": moto.endpoint}
    rows = datasets.load_dataset(
        "parquet", data_files=f"{bucket}/parquet/*.parquet", split="train", streaming=True,
        storage_options=options,
    )  # fmt: skip
    assert_same({row["sample_id"]: row["embedding"] for row in rows.with_format("numpy")}, stored)
    options = {
        "aws_access_key_id": "k", "aws_secret_access_key": "s", "aws_endpoint": moto.endpoint,
        "aws_region": "us-east-1", "allow_http": "true",
    }  # fmt: skip
    assert_same(
        _by_id(lance.dataset(f"{bucket}/lance", storage_options=options).to_table()), stored
    )


@pytest.mark.parametrize(("dtype", "shape", "ragged"), FORMS)
def test_lance_has_every_bit(cache, tmp_path, dtype, shape, ragged):
    """All dtypes, hidden states and different lengths, in several files."""
    lance = pytest.importorskip("lance")
    config, stored = filled_store(cache, dtype, shape, ragged)
    done = export_embeddings(cache, config, tmp_path / "x", format="lance", num_shards=3)
    assert done.num_files == 3
    assert_same(_by_id(lance.dataset(str(tmp_path / "x")).to_table()), stored)


def _by_id(table):
    """Sample id → flat array of a table."""
    lists = [row.values.to_numpy() for row in table["embedding"]]
    return dict(zip(table["sample_id"].to_pylist(), lists, strict=True))


@leaves_files_open
@pytest.mark.parametrize(("dtype", "shape", "ragged"), FORMS)
def test_webdataset_has_every_bit(cache, tmp_path, dtype, shape, ragged):
    """Keys, JSON and arrays in their shape."""
    webdataset = pytest.importorskip("webdataset")
    config, stored = filled_store(cache, dtype, shape, ragged)
    export_embeddings(cache, config, tmp_path / "x.tar", format="webdataset")
    found = {}
    samples = webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False).decode()
    for sample in samples:
        facts = sample["json"]
        assert urllib.parse.unquote(sample["__key__"]) == facts["sample_id"]
        assert f"{facts['file_id']}:{facts['class']}" == facts["sample_id"]
        assert sample["npy"].shape == stored[facts["sample_id"]].shape
        found[facts["sample_id"]] = sample["npy"]
    assert_same(found, stored)


@leaves_files_open
@forks_beside_lance
@pytest.mark.parametrize(
    "place", ["folder", pytest.param("bucket", marks=pytest.mark.stress)], indirect=True
)
def test_webdataset_in_a_data_loader(cache, place, monkeypatch):
    """Two ranks with two workers each: every sample once, and ranks of the same size."""
    webdataset = pytest.importorskip("webdataset")
    fsspec = pytest.importorskip("fsspec")
    from webdataset.gopen import gopen_schemes

    monkeypatch.setitem(gopen_schemes, "s3", lambda url, *_, **__: fsspec.open(url, "rb").open())
    config, stored = filled_store(cache)
    export_embeddings(cache, config, place, format="webdataset", num_shards=4, shuffle=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found, sizes = {}, []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        samples = webdataset.WebDataset(
            f"{place}/embeddings-{{00001..00004}}.tar",
            shardshuffle=False,
            nodesplitter=webdataset.split_by_node,
        )
        samples = samples.decode().to_tuple("json", "npy").batched(4)
        loader = webdataset.WebLoader(samples, batch_size=None, num_workers=2)
        mine = [(f["sample_id"], array) for facts, arrays in loader
                for f, array in zip(facts, arrays.numpy(), strict=True)]  # fmt: skip
        sizes.append(len(mine))
        found |= mine
    assert sizes == [12, 12]
    assert_same(found, stored)


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
)
def test_keys_read_back(one, other):
    """A key has neither dots nor slashes, gives its sample id back, and is nobody else's."""
    key = key_of_sample_id(one)
    assert not set("./ ") & set(key)
    assert key.isascii()
    assert sample_id_of_key(key) == one
    assert (key_of_sample_id(other) == key) == (one == other)


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "lance", "safetensors"])
def test_the_order_and_the_number_of_shards(cache, tmp_path, kind):
    """Shards of the same size; a seed gives one order, and every time the same."""
    config, stored = filled_store(cache)
    for out in ("a", "b"):
        done = export_embeddings(
            cache, config, tmp_path / out, format=kind, num_shards=5, shuffle=8
        )
        assert (done.num_files, done.num_embeddings) == (5, len(stored))
    if kind in ("parquet", "webdataset"):  # the others have names in random order
        first, second = (
            {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in "ab"
        )
        assert len(first) == 5
        assert first == second
    assert EmbeddingCache(tmp_path / "cache").reader(config).keys() == stored.keys()


@pytest.mark.parametrize("seed", [0, 1])
def test_every_seed_shuffles(cache, tmp_path, seed):
    """Seed 0 is one, too; without a seed samples are in the order of their ids."""
    config, stored = filled_store(cache)
    orders = []
    for name, shuffle in (("plain", None), ("shuffled", seed)):
        out = tmp_path / f"{name}.parquet"
        export_embeddings(cache, config, out, format="parquet", shuffle=shuffle)
        orders.append(pyarrow.parquet.read_table(out)["sample_id"].to_pylist())
    assert orders[0] == sorted(stored)
    assert orders[1] != orders[0]
    assert sorted(orders[1]) == sorted(stored)


def test_a_tar_is_the_same_every_time(cache, tmp_path):
    """No clock and no user is in it."""
    config, _ = filled_store(cache)
    export_embeddings(cache, config, tmp_path / "a.tar", format="webdataset")
    os.utime(tmp_path / "a.tar", (1, 1))
    export_embeddings(cache, config, tmp_path / "b.tar", format="webdataset")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
