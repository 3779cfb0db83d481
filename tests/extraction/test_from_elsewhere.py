"""Clips in tar shards and behind URLs: the embeddings of local files, and their failures."""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from pathlib import Path

import pytest
import s3fs
from extraction.clips import write_tones
from sharing.places import s3_client, s3_environment
from sharing.server_fixtures import kept, moto  # noqa: F401 - fixtures
from small_modules import Seeded

from lmdbcache import EmbeddingCache, ModuleEmbedder, config_for, extract, open_dataset
from lmdbcache.audio import load_waveform, remote
from lmdbcache.cache import sources
from lmdbcache.datasets import TarShards, stream_clips
from lmdbcache.errors import AudioDecodeError, ConfigError, DatasetError
from lmdbcache.extraction import extract_stream, to_clips


class Net(Seeded):
    def forward(self, waveforms):
        return self.layer(waveforms.unflatten(1, (-1, 80))).mean(dim=1)


@pytest.fixture
def model():
    return ModuleEmbedder(Net(), name="net/1", sample_rate=16000)


@pytest.fixture
def config(model):
    return config_for(model, duration=0.5, namespace="sounds")


@pytest.fixture(scope="session")
def sounds(tmp_path_factory):
    """`dog/video_00000.wav` and so on."""
    folder = tmp_path_factory.mktemp("sounds")
    for path in write_tones(folder / "all", 7).values():
        Path(path).rename(folder / Path(path).name)
    (folder / "dog").mkdir()
    for path in folder.glob("*.wav"):
        path.rename(folder / "dog" / path.name)
    return folder


@pytest.fixture
def bucket(request, monkeypatch):
    """A client and the name of a bucket, which the environment has access to."""
    endpoint = request.getfixturevalue("moto").endpoint
    for variable, value in s3_environment(endpoint).items():
        monkeypatch.setenv(variable, value)
    s3fs.S3FileSystem.clear_instance_cache()  # of another server, which earlier tests had
    client, name = s3_client(endpoint), f"bucket-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return client, name


def test_a_url_is_listed_anew(bucket, sounds):
    """What came since a URL was last listed is in the next listing of the same process."""
    client, name = bucket
    for number, path in enumerate(sorted((sounds / "dog").glob("*.wav"))[:2], 1):
        client.put_object(Bucket=name, Key=f"dog/{path.name}", Body=path.read_bytes())
        assert len(open_dataset(f"s3://{name}").samples) == number


def write_shard(path, members):
    """`members`: name → bytes, or text, or what becomes JSON."""
    with tarfile.open(path, "w") as shard:
        for name, value in members.items():
            content = value if isinstance(value, bytes) else value.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def shards_of(sounds, folder):
    folder.mkdir()
    paths = sorted((sounds / "dog").glob("*.wav"))
    for number in range(2):
        write_shard(
            folder / f"part-{number}.tar",
            {f"dog/{path.name}": path.read_bytes() for path in paths[number::2]},
        )
    return folder


def values(cache, config):
    with cache.reader(config) as reader:
        return {sample_id: value.tobytes() for sample_id, value in reader.items()}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("place", ["tar", "tar in a bucket", "folder in a bucket"])
def test_embeddings_are_those_of_local_files(
    place, is_streamed, sounds, model, config, cache, tmp_path, request, monkeypatch
):
    """From every place, decoded in a worker; what is stored is skipped by the next run."""
    if is_streamed:  # as long recordings are
        monkeypatch.setattr(remote, "_AT_ONCE_BYTES", 5000)
        monkeypatch.setattr(sources, "LARGEST_KEPT_BYTES", 5000)
    here = EmbeddingCache(tmp_path / "here")
    expected = extract(here, config, open_dataset(sounds), model=model, batch_size=4)
    folder = sounds if place.startswith("folder") else shards_of(sounds, tmp_path / "shards")
    where = str(folder)
    if "bucket" in place:
        client, name = request.getfixturevalue("bucket")
        for path in folder.rglob("*.*"):
            key = f"some/place/{path.relative_to(folder)}"
            client.put_object(Bucket=name, Key=key, Body=path.read_bytes())
        where = f"s3://{name}/some/place"
    clips = open_dataset(where)
    assert clips.kind == ("folder" if place.startswith("folder") else "webdataset")
    options = {"model": model, "batch_size": 4, "num_workers": 1}
    first = to_clips(clips.samples[:4])
    assert extract(cache, config, first, **options).num_extracted == 4
    summary = extract(cache, config, clips, **options)
    assert (summary.num_cached, summary.num_extracted) == (4, expected.num_extracted - 4)
    assert values(cache, config).keys() == values(here, config).keys()
    for sample_id, value in values(here, config).items():
        assert values(cache, config)[sample_id] == value


def test_what_cant_be_fetched_is_a_failure(bucket, sounds, model, config, cache, monkeypatch):
    """It is reported and not cached, and the next run tries it again."""
    client, name = bucket
    for path in (sounds / "dog").glob("*.wav"):
        client.put_object(Bucket=name, Key=f"dog/{path.name}", Body=path.read_bytes())
    clips = open_dataset(f"s3://{name}")
    client.delete_object(Bucket=name, Key="dog/video_00003.wav")
    summary = extract(cache, config, clips, model=model, num_workers=0)
    (failure,) = summary.failures
    assert failure.sample_id == "video_00003:dog"
    assert "no such file" in failure.reason
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "")
        patch.setenv("AWS_ACCESS_KEY_ID", "")
        elsewhere = {"a:dog": f"s3://no-{name}/a.wav"}
        assert len(extract(cache, config, elsewhere, model=model, num_workers=0).failures) == 1
    body = (sounds / "dog" / "video_00003.wav").read_bytes()
    client.put_object(Bucket=name, Key="dog/video_00003.wav", Body=body)
    assert extract(cache, config, clips, model=model, num_workers=0).num_extracted == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # soundfile's
@pytest.mark.parametrize("kept_bytes", [9000, 44])
def test_a_connection_that_breaks_isnt_the_end_of_a_clip(sounds, kept_bytes):
    """libsndfile would take the error for it; the reason is the connection's."""

    class Breaking(io.FileIO):
        def read(self, size=-1, /):
            if self.tell() + size > kept_bytes:
                raise ConnectionError("the line is cut")
            return super().read(size)

    class Source:
        def open_binary(self):
            file, size = Breaking(path), path.stat().st_size
            return io.BufferedReader(remote.OpenedPart(file, [(0, size)], "s3://bucket/a.wav"), 512)

    path = sounds / "dog" / "video_00000.wav"
    with pytest.raises(AudioDecodeError, match="the line is cut"):
        load_waveform(Source(), 16000, 10.0)


def test_a_url_of_no_known_kind(model, config, cache):
    with pytest.raises(ConfigError):
        extract(cache, config, {"a:dog": "nonsense://bucket/a.wav"}, model=model)


def test_classes_and_ids_of_a_shard(sounds, tmp_path):
    """From JSON, `.cls`, `.txt` or the folder; what isn't a clip is left out with its reason."""
    wav = (sounds / "dog" / "video_00000.wav").read_bytes()
    (tmp_path / "train").mkdir()
    write_shard(
        tmp_path / "train" / "a-0.tar",
        {
            "./001.wav": wav,
            "./001.json": json.dumps({"class": "dog", "file_id": "first"}),
            "002.cls": "drum",
            "002.wav": wav,
            "rain/003.wav": wav,
            "004.wav": wav,
            "005.m4a": b"",
            "005.cls": "drum",
            "006.txt": "car",
            "006.flac": wav,
            "007.wav": wav,
            "007.json": "{",
            "notes.txt": "no clip",
        },
    )
    (tmp_path / "b.tar.gz").write_bytes(b"")
    found = open_dataset(tmp_path)
    assert found.sample_ids == ["006:car", "first:dog", "002:drum", "003:rain"]
    assert {sample["split"] for sample in found.samples} == {"train"}
    assert sorted(Path(item.name).name for item in found.left_out) == [
        *("004.wav", "005.m4a", "007.wav", "b.tar.gz")
    ]


def test_whole_numbers_are_labels(sounds, tmp_path):
    wav = (sounds / "dog" / "video_00000.wav").read_bytes()
    members = {"1.wav": wav, "1.cls": "7", "2.wav": wav, "2.cls": "10"}
    found = TarShards(write_shard(tmp_path / "x.tar", members))
    assert found.class_labels == {"7": 7, "10": 10}


def test_keys_that_repeat_in_another_shard(sounds, tmp_path):
    wav = (sounds / "dog" / "video_00000.wav").read_bytes()
    for number in range(2):
        write_shard(tmp_path / f"part-{number}.tar", {"dog/1.wav": wav})
    with pytest.raises(DatasetError, match="with_shard"):
        TarShards(tmp_path)
    found = TarShards(tmp_path, with_shard=True)
    assert found.sample_ids == ["part-0/1:dog", "part-1/1:dog"]


@pytest.mark.parametrize("kept_bytes", [700, 16384 + 512])
def test_a_shard_that_was_cut(sounds, tmp_path, kept_bytes):
    """It is refused as a whole: whatever is behind the cut would be missing without a word."""
    path = shards_of(sounds, tmp_path / "shards") / "part-0.tar"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(DatasetError, match="part-0"):
        open_dataset(tmp_path / "shards")


@pytest.fixture
def stream(sounds):
    """A streamed dataset with seven clips, one that isn't audio, and one without a label."""
    tables = pytest.importorskip("huggingface_tables")
    paths = sorted((sounds / "dog").glob("*.wav"))
    rows = [("dog", path.read_bytes(), None) for path in paths]
    rows = [*rows[:3], ("drum", b"no audio", None), *rows[3:], (None, rows[0][1], None)]
    keys = [path.stem for path in paths]
    label = tables.datasets.ClassLabel(names=["drum", "dog"])
    key = [*keys[:3], "broken", *keys[3:], "unknown"]
    return tables.table(rows, label=label, key=key).to_iterable_dataset()


def test_a_streamed_dataset(stream, sounds, model, config, tmp_path, caplog):
    """Broken off and run again it has the bits of one run; the model is made once."""
    columns = {"id_column": "key"}
    options = {"model": model, "batch_size": 2, "chunk_size": 4, "num_workers": 0}
    caches = [EmbeddingCache(tmp_path / name) for name in ("whole", "resumed")]
    seen = []
    summary = extract_stream(
        caches[0],
        config,
        stream_clips(stream, **columns),
        progress=lambda *done: seen.append(done),
        **options,
    )
    assert (summary.num_samples, summary.num_extracted, len(summary.failures)) == (8, 7, 1)
    assert seen[-1] == (8, 8)
    assert "1 rows of the stream have no label" in caplog.text

    def breaking():
        for number, clip in enumerate(stream_clips(stream, **columns)):
            if number == 6:
                raise ConnectionError
            yield clip

    made = []
    make_embedder = model.make_embedder
    model.make_embedder = lambda *arguments: made.append(1) or make_embedder(*arguments)
    with pytest.raises(ConnectionError):
        extract_stream(caches[1], config, breaking(), **options)
    both = [config, config.replace(dtype="float16")]
    found = extract_stream(caches[1], both, stream_clips(stream, **columns), **options)
    assert [one.num_extracted for one in found] == [4, 7]
    assert len(made) == 2
    assert values(caches[1], config) == values(caches[0], config)
    local = EmbeddingCache(tmp_path / "local")
    extract(local, config, open_dataset(sounds), model=model, batch_size=2)
    assert values(local, config).keys() == values(caches[0], config).keys()
    with pytest.raises(ConfigError, match="chunk_size"):
        extract_stream(caches[1], config, [], model=model, chunk_size=3)
