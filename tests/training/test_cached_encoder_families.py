"""CachedEncoder with models known by name: what `extract` would store, to the last bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from embedders.small_folders import folder_of
from torch.utils.data import DataLoader

from lmdbcache import (
    CachedAudioDataset,
    CachedEncoder,
    EmbeddingCache,
    ModuleEmbedder,
    collate_mixed,
    config_for,
    extract,
)
from lmdbcache.audio import load_clip

# One of each front end, with and without mask.
VARIANTS = [
    "ast",
    "wav2vec2-masked",
    "whisper",
    "clap",
    *(
        pytest.param(name, marks=pytest.mark.stress)
        for name in ("wav2vec2", "wavlm-masked", "clap-fused")
    ),
]
NEEDS_NUM_VALID = ["wav2vec2-masked", "whisper", "clap"]
SECONDS = (0.37, 0.71, 0.5, 0.9)


def energies(waveform):
    """Log energy in frames of 10 ms."""
    frames = waveform[: len(waveform) // 160 * 160].reshape(-1, 160)
    return np.log(np.square(frames).mean(axis=1) + 1e-6)


def module_embedder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool1d(25), torch.nn.Linear(25, 16), torch.nn.BatchNorm1d(16)
        )
    return ModuleEmbedder(
        net.requires_grad_(False),
        name="net/1",
        sample_rate=16000,
        front_end=energies,
        front_end_id="log-energy/1",
    )


def known_of(variant, tmp_path):
    """A model, its config of 0.5 s, and clips that are shorter, longer, and just so long."""
    model = module_embedder() if variant == "module" else folder_of(variant)
    config = config_for(model, duration=0.5, namespace="own")
    samples = []
    for number, seconds in enumerate(SECONDS):
        path = tmp_path / f"clip_{number}.wav"
        waveform = np.random.default_rng(number).uniform(-0.5, 0.5, int(seconds * 48000))
        soundfile.write(path, waveform, 48000)
        name = f"clip_{number}"
        samples.append(
            {"file_id": name, "class_name": "x", "class_label": 0, "audio_path": str(path)}
        )
    return SimpleNamespace(model=model, config=config, dataset=SimpleNamespace(samples=samples))


def ids(known):
    return [f"{sample['file_id']}:x" for sample in known.dataset.samples]


def unpadded(known):
    rate, duration = known.config.sample_rate, known.config.duration
    clips = [load_clip(s["audio_path"], rate, duration) for s in known.dataset.samples]
    return [clip.waveform[: clip.num_valid] for clip in clips]


def extracted(known, cache, count=None):
    """What an extraction stores of the first clips."""
    clips = {
        name: sample["audio_path"]
        for name, sample in zip(ids(known)[:count], known.dataset.samples, strict=False)
    }
    extract(
        cache, known.config, clips, model=known.model, batch_size=1, num_workers=0,
        device="cpu",
    )  # fmt: skip
    with cache.reader(known.config) as reader:
        return torch.from_numpy(reader.get_batch(list(clips)))


def completed(known, root, batch_size, **options):
    """Through data set and `complete`, into a store of its own."""
    with CachedEncoder(root, known.config, known.model, device="cpu") as encoder:
        front_end = encoder.front_end if options else None
        dataset = CachedAudioDataset(root, known.config, known.dataset, front_end=front_end)
        loader = DataLoader(dataset, batch_size, collate_fn=collate_mixed)
        found = torch.cat([encoder.complete(batch) for batch in loader])
        dataset.close()
    return found


def asked(known, root, batch_size):
    """Through the encoder itself, with waveforms as they are."""
    waveforms, names = unpadded(known), ids(known)
    with CachedEncoder(root, known.config, known.model, device="cpu") as encoder:
        return torch.cat([
            encoder(waveforms[i : i + batch_size], sample_ids=names[i : i + batch_size])
            for i in range(0, len(names), batch_size)
        ])  # fmt: skip


@pytest.mark.parametrize("variant", [*VARIANTS, "module"])
def test_stores_what_an_extraction_stores(variant, cache, tmp_path):
    """Short clips too: equal bits one by one, close in batches, by whichever way they come."""
    known = known_of(variant, tmp_path)
    expected = extracted(known, cache)
    assert torch.equal(completed(known, tmp_path / "one", 1), expected)
    assert torch.equal(asked(known, tmp_path / "direct", 1), expected)
    assert torch.equal(completed(known, tmp_path / "features", 1, front_end=True), expected)
    scale = expected.abs().max()
    for way in (completed, asked):
        found = way(known, tmp_path / way.__name__, 4)
        torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=0)
    for name in ("one", "direct", "features", "completed", "asked"):
        with EmbeddingCache(tmp_path / name).reader(known.config) as reader:
            stored = torch.from_numpy(reader.get_batch(ids(known)))
        torch.testing.assert_close(stored / scale, expected / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["ast", "wav2vec2-masked", "module"])
def test_continues_what_an_extraction_began(variant, cache, tmp_path):
    """The same provenance, so nothing is refused, in either order."""
    known = known_of(variant, tmp_path)
    before = extracted(known, cache, count=2)
    provenance = cache.info(known.config).provenance
    expected = extracted(known, EmbeddingCache(cache.root.with_name("whole")))
    with CachedEncoder(cache, known.config, known.model, device="cpu") as encoder:
        encoder(unpadded(known)[:3], sample_ids=ids(known)[:3])
        assert (encoder.num_computed, encoder.num_hits) == (1, 2)
    assert cache.info(known.config).provenance == provenance
    found = extracted(known, cache)
    assert torch.equal(found, expected)
    assert torch.equal(found[:2], before)
    fresh = EmbeddingCache(cache.root.with_name("fresh"))
    with CachedEncoder(fresh, known.config, known.model, device="cpu") as encoder:
        encoder(unpadded(known)[:1], sample_ids=ids(known)[:1])
    assert fresh.info(known.config).provenance == provenance


@pytest.mark.parametrize("variant", NEEDS_NUM_VALID)
def test_padding_that_is_told_and_padding_that_is_not(variant, cache, tmp_path):
    """`num_valid` beside padded rows gives the short clip's values; without it zeros are sound."""
    known = known_of(variant, tmp_path)
    expected = extracted(known, cache)
    num_samples = known.config.num_samples
    waveforms = unpadded(known)
    padded = torch.stack(
        [torch.nn.functional.pad(torch.from_numpy(w), (0, num_samples - len(w))) for w in waveforms]
    )
    num_valid = torch.tensor([len(w) for w in waveforms])
    with CachedEncoder(tmp_path / "told", known.config, known.model, device="cpu") as encoder:
        rows = [
            encoder(padded[i : i + 1], sample_ids=[name], num_valid=num_valid[i : i + 1])
            for i, name in enumerate(ids(known))
        ]
    assert torch.equal(torch.cat(rows), expected)
    with CachedEncoder(tmp_path / "untold", known.config, known.model, device="cpu") as encoder:
        whole = encoder(padded[:1], sample_ids=ids(known)[:1])
    full = [{**known.dataset.samples[0], "audio_path": str(tmp_path / "full.wav")}]
    soundfile.write(
        full[0]["audio_path"], padded[0].numpy(), known.config.sample_rate, subtype="FLOAT"
    )
    known.dataset.samples = full
    of_whole = extracted(known, EmbeddingCache(tmp_path / "whole"), count=1)
    assert torch.equal(whole, of_whole)
    if variant != "whisper":  # which fills up with zeros itself
        assert not torch.allclose(whole, expected[:1], atol=1e-3)
