"""Mixed batches: hits without decoding, the misses computed once, in one pass, in order."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import soundfile
import torch
from embedders.small_folders import folder_of
from small_ast import save_small_ast
from torch.utils.data import DataLoader
from training.encoders import CountingEncoder
from worker_errors import raises_in_worker

from lmdbcache import (
    CacheConfig,
    CachedAudioDataset,
    CachedEncoder,
    EmbeddingCache,
    VEGASDataset,
    collate_mixed,
    config_for,
    extract,
)
from lmdbcache.audio import load_clip, load_waveform
from lmdbcache.cache import ClipFailure
from lmdbcache.datasets import AudioDataset, cached_audio, source_of
from lmdbcache.embedders import ASTEmbedder, ASTFrontEnd, find_checkpoint
from lmdbcache.errors import AudioDecodeError, ConfigError, SampleNotFoundError
from lmdbcache.training import TensorMapping

OWN = CacheConfig(
    model_name="own", front_end="own/1", output="embedding", duration=0.5, namespace="vegas"
)


@pytest.fixture
def clips(root):
    """18 clips of three classes, as a VEGASDataset that holds no embeddings itself."""
    return VEGASDataset(root, split="all", audio_duration=0.5, enable_ast_cache=False)


@pytest.fixture
def model():
    return CountingEncoder(OWN.num_samples)


@pytest.fixture
def encoder(cache, model):
    with CachedEncoder(cache, OWN, model) as encoder:
        yield encoder


@pytest.fixture
def dataset(clips, cache):
    dataset = CachedAudioDataset(cache, OWN, clips)
    yield dataset
    dataset.close()


def waveforms_of(clips, positions):
    paths = [clips.samples[position]["audio_path"] for position in positions]
    return torch.from_numpy(np.stack([load_waveform(path, 16000, 0.5) for path in paths]))


def store(cache, clips, positions):
    """Embeddings of these clips, each by itself."""
    model = CountingEncoder(OWN.num_samples)
    with cache.writer(OWN) as writer:
        for position in positions:
            writer.put(clips.sample_ids[position], model(waveforms_of(clips, [position]))[0])


def batches_of(dataset, batch_size=8, **options):
    return DataLoader(dataset, batch_size, collate_fn=collate_mixed, **options)


def test_items(clips, cache, dataset, monkeypatch):
    """A hit is its embedding and decodes nothing, a miss is load_waveform's."""
    assert isinstance(clips, AudioDataset)
    store(cache, clips, [2])
    decoded = []
    monkeypatch.setattr(cached_audio, "load_clip", lambda *a: decoded.append(a) or load_clip(*a))
    hit, miss = dataset[2], dataset[-1]
    assert set(hit) == {"sample_id", "label", "embedding"}
    assert len(decoded) == 1
    assert (hit["sample_id"], int(hit["label"])) == (clips.sample_ids[2], 0)
    with cache.reader(OWN) as reader:
        assert torch.equal(hit["embedding"], torch.from_numpy(reader[hit["sample_id"]]))
    assert torch.equal(miss["waveform"], waveforms_of(clips, [17])[0])
    with pytest.raises(IndexError):
        dataset[18]


@pytest.mark.parametrize(("num_workers", "method"), [(0, None), (2, "fork"), (1, "forkserver")])
def test_an_epoch_of_mixed_batches_then_one_of_hits(
    clips, cache, dataset, encoder, model, num_workers, method
):
    """Each miss computed once, a batch's in one pass, bit for bit; then nothing is left to do."""
    cached = [0, 3, 4, 11, 12, 13, 14, 15]
    store(cache, clips, cached)
    loader = batches_of(
        dataset,
        num_workers=num_workers,
        multiprocessing_context=method,
        persistent_workers=num_workers > 0,
    )
    everything = CountingEncoder(OWN.num_samples)(waveforms_of(clips, range(18)))
    found = []
    for number, batch in enumerate(loader):
        positions = list(range(8 * number, min(8 * number + 8, 18)))
        assert batch["sample_ids"] == [clips.sample_ids[position] for position in positions]
        assert batch["mask"].tolist() == [position in cached for position in positions]
        labels = [clips.samples[position]["class_label"] for position in positions]
        assert batch["labels"].tolist() == labels
        assert batch["failures"] == []
        found.append(encoder.complete(batch))
        misses = [position for position in positions if position not in cached]
        if misses:
            direct = CountingEncoder(OWN.num_samples)(waveforms_of(clips, misses))
            assert torch.equal(found[-1][~batch["mask"]], direct)
        hits = batch.get("embeddings", torch.empty(0, 6))
        assert torch.equal(found[-1][batch["mask"]], hits)
    assert model.passes == [5, 3, 2]
    torch.testing.assert_close(torch.cat(found), everything, atol=5e-7, rtol=0)
    encoder.flush()
    again = []
    for batch in loader:
        assert batch["mask"].all()
        assert "waveforms" not in batch
        again.append(encoder.complete(batch))
    assert torch.equal(torch.cat(again), torch.cat(found))
    assert model.passes == [5, 3, 2]
    assert (encoder.num_computed, encoder.num_hits) == (10, 8 + 18)


def test_a_sample_counts_once(clips, cache, dataset, encoder):
    """A hit or a miss an item, in mixed batches and one by one; the same of a VEGASDataset."""
    store(cache, clips, range(0, 18, 3))
    assert all(len(encoder.complete(batch)) for batch in batches_of(dataset))
    assert (cache.statistics(OWN).hits, cache.statistics(OWN).misses) == (6, 12)
    vegas = VEGASDataset(clips.root, split="all", load_audio=False, ast_cache_dir=cache.root)
    with cache.reader(OWN) as reader:
        vegas.audio_embs_from_file = TensorMapping(reader)
        for asked in (dataset, vegas):
            for step in (1, 6, 18):
                before = cache.statistics(OWN)
                for start in range(0, 18, step):
                    asked.__getitems__(list(range(start, start + step)))
                read = cache.statistics(OWN) - before
                assert (read.hits, read.misses) == (6, 12)
        vegas.filter_audio_embeddings_from_file()
        before = cache.statistics(OWN)
        assert sum("audio_emb" in item for item in vegas) == 6
        read = cache.statistics(OWN) - before
        assert (read.hits, read.misses) == (6, 12)


def test_an_epoch_before_the_commit_computes_nothing_twice(dataset, encoder, model):
    """What waits to be committed is decoded again by the data set, but not computed."""
    first = [encoder.complete(batch) for batch in batches_of(dataset)]
    second = [encoder.complete(batch) for batch in batches_of(dataset, shuffle=False)]
    assert model.passes == [8, 8, 2]
    assert torch.equal(torch.cat(first), torch.cat(second))


def test_a_clip_that_cannot_be_decoded(clips, cache, encoder):
    """It raises, or is left out of its batch with its reason; it is never a zero, never cached."""
    path = clips.samples[5]["audio_path"]
    with open(path, "w") as file:
        file.write("no audio")
    store(cache, clips, [0, 6])
    broken = clips.sample_ids[5]
    raising = CachedAudioDataset(cache, OWN, clips)
    for num_workers in (0, 1):
        with raises_in_worker(AudioDecodeError, match="video_00005"):
            list(batches_of(raising, num_workers=num_workers))
    skipping = CachedAudioDataset(cache, OWN, clips, on_decode_error="skip")
    assert set(skipping[5]) == {"sample_id", "label", "failure"}
    batch = next(iter(batches_of(skipping, num_workers=1)))
    (failure,) = batch["failures"]
    assert isinstance(failure, ClipFailure)
    assert (failure.sample_id, failure.path) == (broken, path)
    assert "video_00005.wav" in failure.reason
    assert batch["sample_ids"] == [i for i in clips.sample_ids[:8] if i != broken]
    assert batch["labels"].shape == batch["mask"].shape == (7,)
    found = encoder.complete(batch)
    expected = CountingEncoder(OWN.num_samples)(waveforms_of(clips, [0, 1, 2, 3, 4, 6, 7]))
    torch.testing.assert_close(found, expected, atol=5e-7, rtol=0)
    encoder.flush()
    assert cache.coverage(OWN, clips.sample_ids[:8]).missing == (broken,)
    empty = collate_mixed([skipping[5]])
    assert (empty["sample_ids"], len(empty["labels"]), len(empty["mask"])) == ([], 0, 0)
    assert encoder.complete(empty).shape == (0, 6)
    raising.close()
    skipping.close()
    with pytest.raises(ConfigError, match="^on_decode_error: "):
        CachedAudioDataset(cache, OWN, clips, on_decode_error="zero")


def test_torch_s_default_collate(clips, cache, dataset):
    """Batches of one kind collate; a mixed one says which function to use."""
    misses = next(iter(DataLoader(dataset, 4)))
    assert misses["waveform"].shape == (4, OWN.num_samples)
    store(cache, clips, range(4))
    batches = iter(DataLoader(dataset, 4))
    hits = next(batches)
    assert hits["embedding"].shape == (4, 6)
    assert hits["sample_id"] == clips.sample_ids[:4]
    for start in (2, 3):  # either kind may come first
        with pytest.raises(SampleNotFoundError, match="collate_mixed"):
            torch.utils.data.default_collate([dataset[start], dataset[7 - start]])


def test_features_from_the_workers(clips, cache, tmp_path):
    """With a front end in the data set, workers send features, taken as they are."""
    checkpoint = find_checkpoint(save_small_ast(tmp_path / "ast", max_length=128))
    config = CacheConfig(model_name=checkpoint.identity, duration=0.5, namespace="vegas")
    front_end = ASTFrontEnd(checkpoint, 16000)
    features = [front_end(row) for row in waveforms_of(clips, range(6)).numpy()]
    embedder = ASTEmbedder(checkpoint, device="cpu")
    expected = embedder.embed(torch.from_numpy(np.stack(features)))
    for given in (front_end, None):
        dataset = CachedAudioDataset(cache, config, clips, front_end=given)
        batch = next(iter(batches_of(dataset, 6, num_workers=1)))
        assert ("features" in batch, "waveforms" in batch) == (given is not None, given is None)
        with CachedEncoder(cache, config, embedder, front_end=front_end) as encoder:
            assert torch.equal(encoder.complete(batch), expected)
        cache.clear(config)
        dataset.close()


def test_batches_that_cannot_be_completed(encoder, clips):
    """Waveforms of another length, none at all, or something else: refused with the reason."""
    batch = {"sample_ids": ["a:x"], "mask": torch.tensor([False])}
    with pytest.raises(ConfigError):
        encoder.complete(batch)
    with pytest.raises(ConfigError, match="100 .*8000"):
        encoder.complete({**batch, "waveforms": torch.ones(1, 100)})
    with pytest.raises(ConfigError):
        encoder.complete({"audio": 1, "label": 2})


def test_pickles(dataset, clips, cache):
    """A copy in another process reads the same store."""
    store(cache, clips, [0])
    assert "embedding" in dataset[0]
    copied = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copied[0]["embedding"], dataset[0]["embedding"])
    copied.close()


# ---- what isn't padding


def masked_folder():
    """A model that treats a clip and its padding differently."""
    return folder_of("wav2vec2-masked")


@pytest.mark.parametrize("duration", [0.5, 1.5])
def test_num_valid(clips, cache, duration):
    """Misses say how many of their samples came from the clip; hits have none to tell of."""
    config = OWN.replace(duration=duration)
    dataset = CachedAudioDataset(cache, config, clips, front_end=None)
    expected = min(16000, config.num_samples)
    assert dataset[0]["num_valid"].dtype == torch.int64
    batch = next(iter(batches_of(dataset, 3)))
    assert batch["num_valid"].tolist() == [expected] * 3
    assert next(iter(DataLoader(dataset, 3)))["num_valid"].tolist() == [expected] * 3
    with cache.writer(config) as writer:
        writer.put(clips.sample_ids[1], np.ones(6, np.float32))
    batch = next(iter(batches_of(dataset, 3, num_workers=1)))
    assert len(batch["num_valid"]) == len(batch["waveforms"]) == 2
    assert "num_valid" not in dataset[1]
    dataset.close()


def test_a_clip_too_short_for_the_front_end(clips, cache):
    """With the front end in the data set it is left out, as extraction leaves it out."""
    path = clips.samples[1]["audio_path"]
    soundfile.write(path, np.ones(300, np.float32) / 2, 16000)
    config = config_for(masked_folder(), duration=0.5, namespace="vegas")
    with CachedEncoder(cache, config, masked_folder()) as encoder:
        dataset = CachedAudioDataset(
            cache, config, clips, front_end=encoder.front_end, on_decode_error="skip"
        )
        batch = next(iter(batches_of(dataset, 3, num_workers=1)))
        assert [failure.sample_id for failure in batch["failures"]] == [clips.sample_ids[1]]
        assert "300 samples" in batch["failures"][0].reason
        assert encoder.complete(batch).shape == (2, 32)
        plain = CachedAudioDataset(cache, config, clips)
        encoder.flush()
        with pytest.raises(AudioDecodeError, match=clips.sample_ids[1]):
            encoder.complete(next(iter(batches_of(plain, 3))))
        dataset.close()
        plain.close()


def test_clips_without_a_file(cache, tmp_path):
    """Bytes in a Hugging Face dataset are decoded, in worker processes too."""
    pytest.importorskip("datasets")
    from huggingface_tables import two_splits

    from lmdbcache.datasets.huggingface import HuggingFaceDataset

    clips = HuggingFaceDataset(two_splits(), namespace="sounds")
    config = config_for(masked_folder(), duration=0.5, namespace="sounds")
    expected_cache = EmbeddingCache(tmp_path / "extracted")
    extract(
        expected_cache, config, {name: source_of(sample) for name, sample in pairs(clips)},
        model=masked_folder(), batch_size=1, num_workers=0,
    )  # fmt: skip
    dataset = CachedAudioDataset(cache, config, clips)
    with CachedEncoder(cache, config, masked_folder()) as encoder:
        found = [encoder.complete(batch) for batch in batches_of(dataset, 1, num_workers=2)]
        assert (encoder.num_computed, len(found)) == (12, 12)
    with expected_cache.reader(config) as reader:
        assert np.array_equal(torch.cat(found).numpy(), reader.get_batch(clips.sample_ids))
    assert "embedding" in dataset[0]
    dataset.close()


def test_a_broken_clip_without_a_file(cache):
    """Its failure names the row."""
    pytest.importorskip("datasets")
    from huggingface_tables import encoded, table

    from lmdbcache.datasets.huggingface import HuggingFaceDataset

    rows = [("bell", encoded("bell", 0), "0.wav"), ("wind", b"no audio", "1.wav")]
    clips = HuggingFaceDataset(table(rows), id_column="audio.path", namespace="sounds")
    dataset = CachedAudioDataset(cache, OWN, clips, on_decode_error="skip")
    batch = next(iter(batches_of(dataset)))
    (failure,) = batch["failures"]
    assert (failure.sample_id, failure.path) == ("1:wind", str(source_of(clips.samples[1])))
    assert len(batch["sample_ids"]) == 1


def pairs(clips):
    return zip(clips.sample_ids, clips.samples, strict=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_vegas_batches_tell_what_is_padding(root, cache, tmp_path, num_workers):
    """Clips of 1 s in items of 1.5 s: completed as an extraction stores them."""
    config = config_for(masked_folder(), duration=1.5, namespace="vegas")
    dataset = VEGASDataset(root, split="all", audio_duration=1.5, ast_cache_dir=cache.root)
    asked = dict(list(pairs(dataset))[:3])
    extracted = EmbeddingCache(tmp_path / "extracted")
    extract(
        extracted, config, {name: sample["audio_path"] for name, sample in asked.items()},
        model=masked_folder(), batch_size=3, num_workers=0,
    )  # fmt: skip
    loader = DataLoader(dataset, 3, collate_fn=dataset.get_collate_fn(), num_workers=num_workers)
    batch = next(iter(loader))
    assert batch["audio_num_valid"].tolist() == [16000] * 3
    with CachedEncoder(cache, config, masked_folder()) as encoder:
        num_valid = batch["audio_num_valid"]
        found = encoder(batch["audio"], sample_ids=list(asked), num_valid=num_valid)
    with extracted.reader(config) as reader:
        assert np.array_equal(found.numpy(), reader.get_batch(list(asked)))


def test_a_transformed_waveform_says_nothing_of_padding(root):
    """What transform_audio makes of a clip may have another length."""
    dataset = VEGASDataset(root, split="all", audio_duration=0.5, transform_audio=torch.neg)
    assert "audio_num_valid" not in dataset[0]
