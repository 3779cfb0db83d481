"""Models with trained weights, from packages that bring them, on real recordings.

What comes out of a cache is what the package gives when it is called by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdbcache import EmbeddingCache, ModuleEmbedder, config_for, extract

# Filled by tools/install_test_programs.sh; the project's own packages come first.
PACKAGES = Path(sys.prefix) / "real_weights"
# Wav of 8 bits and ADPCM, ogg and mp3, of 11 kHz; speech of 48 kHz where Debian's alsa-utils is.
RECORDINGS = [
    *(
        PACKAGES / "pygame" / "examples" / "data" / name
        for name in ("boom.wav", "secosmic_lo.wav", "house_lo.ogg", "house_lo.mp3")
    ),
    *sorted(Path("/usr/share/sounds/alsa").glob("*_Right.wav")),
]
FEW = ("boom.wav", "house_lo.mp3")
RATE = 16000

pytestmark = pytest.mark.real_weights


@pytest.fixture(scope="module")
def packages():
    """The packages' modules by name."""
    reason = f"not in {PACKAGES}: tools/install_test_programs.sh puts it there (network)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(PACKAGES)])
        names = ("librosa", "resemblyzer", "torchcrepe")
        yield {
            name: pytest.importorskip(name, reason=reason, exc_type=ImportError) for name in names
        }


@pytest.fixture
def clips():
    """Sample id → path."""
    return {f"{path.name}:sound": str(path) for path in RECORDINGS}


@pytest.fixture
def few_clips(clips):
    """One that is shorter than 1.2 s and one that isn't: a CPU takes long over CREPE."""
    return {f"{name}:sound": clips[f"{name}:sound"] for name in FEW}


@pytest.fixture
def by_hand(packages):
    """A recording as librosa reads it, cut at the duration and not padded."""

    def by_hand(path, duration):
        waveform, _ = packages["librosa"].load(path, sr=RATE)
        return waveform[: round(duration * RATE)]

    return by_hand


@pytest.fixture
def through_a_cache(tmp_path):
    """What a store holds of some recordings."""

    def through_a_cache(embedder, clips, duration, **options):
        cache = EmbeddingCache(tmp_path / "cache")
        config = config_for(embedder, duration=duration, namespace="recordings", **options)
        summary = extract(cache, config, clips, model=embedder, num_workers=0, batch_size=4)
        assert summary.exit_code == 0, summary.to_dict()
        with cache.reader(config, verify="always") as reader:
            found = dict(reader)
        assert found.keys() == clips.keys()
        return found

    return through_a_cache


def assert_close(found, expected):
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


# ---- Resemblyzer: a front end that drops silence, so that no two clips need have one length


class Utterance(torch.nn.Module):
    """Resemblyzer's encoder over the parts of an utterance, as its `embed_utterance` is."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, mels):
        parts = self.encoder(mels.flatten(0, 1)).unflatten(0, mels.shape[:2])
        return torch.nn.functional.normalize(parts.mean(dim=1), dim=1)


def parts_of(waveform):
    """(parts, frames, channels) of what Resemblyzer's own preprocessing leaves of a clip."""
    from resemblyzer import VoiceEncoder, preprocess_wav, wav_to_mel_spectrogram

    waveform = preprocess_wav(waveform)
    pieces, frames = VoiceEncoder.compute_partial_slices(len(waveform), 1.3, 0.75)
    waveform = np.pad(waveform, (0, max(0, pieces[-1].stop - len(waveform))))
    mels = wav_to_mel_spectrogram(waveform)
    return np.array([mels[part] for part in frames])


# All are cut, some are.
@pytest.mark.parametrize("duration", [pytest.param(0.3, marks=pytest.mark.stress), 1.2])
def test_resemblyzer(packages, clips, by_hand, through_a_cache, duration):
    """Its preprocessing gets each clip cut at the duration, and never padded."""
    resemblyzer = packages["resemblyzer"]
    encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
    embedder = ModuleEmbedder(
        Utterance(encoder),
        name="resemblyzer/0.1.4",
        sample_rate=RATE,
        front_end=parts_of,
        front_end_id="resemblyzer/0.1.4",
    )
    expected = {
        name: encoder.embed_utterance(resemblyzer.preprocess_wav(by_hand(path, duration)))
        for name, path in clips.items()
    }
    found = through_a_cache(embedder, clips, duration)
    assert_close(found, expected)
    assert all(np.dot(found[name], expected[name]) > 0.9999 for name in clips)


# ---- CREPE: frames of a waveform, or a waveform of any length


class Crepe(torch.nn.Module):
    """The embedding of each frame of 64 ms; a waveform is cut into frames here."""

    def __init__(self, model, preprocess):
        super().__init__()
        self.model = model
        self.preprocess = preprocess

    def forward(self, batch):
        frames = batch
        if batch.ndim == 2:
            frames = torch.stack([next(self.preprocess(one[None], RATE)) for one in batch])
        found = self.model.embed(frames.flatten(0, 1))
        return found.reshape(*frames.shape[:2], -1)


OUTPUTS = {"frames": lambda found: found, "mean": lambda found: found.mean(dim=1)}


@pytest.fixture
def crepe(packages):
    """A `ModuleEmbedder` of CREPE's small model, with what is asked for."""
    torchcrepe = packages["torchcrepe"]
    torchcrepe.load.model("cpu", "tiny")
    module = Crepe(torchcrepe.infer.model, torchcrepe.preprocess)

    def crepe(**options):
        return ModuleEmbedder(
            module, name="crepe-tiny", sample_rate=RATE, outputs=OUTPUTS, **options
        )

    return crepe


def frames_by_hand(torchcrepe, waveform):
    """(frames, 256) as the package gives them."""
    found = torchcrepe.embed(torch.from_numpy(waveform)[None], RATE, model="tiny")
    return found[0].flatten(1).detach().numpy()


@pytest.mark.parametrize(("duration", "output"), [(1.2, "frames")])
def test_a_waveform_that_is_padded(
    packages, few_clips, by_hand, through_a_cache, crepe, duration, output
):
    """Without a front end a module gets every clip with zeros up to the duration."""
    expected = {}
    for name, path in few_clips.items():
        waveform = by_hand(path, duration)
        waveform = np.pad(waveform, (0, round(duration * RATE) - len(waveform)))
        frames = frames_by_hand(packages["torchcrepe"], waveform)
        expected[name] = frames if output == "frames" else frames.mean(axis=0)
    assert_close(through_a_cache(crepe(), few_clips, duration, output=output), expected)


def crepe_frames(waveform):
    import torchcrepe

    return next(torchcrepe.preprocess(torch.from_numpy(waveform)[None], RATE))


@pytest.mark.parametrize(("duration", "output"), [(0.3, "frames"), (1.2, "mean")])
def test_frames_of_clips_of_any_length(
    packages, few_clips, by_hand, through_a_cache, crepe, duration, output
):
    """With one, it gets as many frames as the clip has; pooled, lengths may differ."""
    embedder = crepe(front_end=crepe_frames, front_end_id="torchcrepe/0.0.24")
    expected = {}
    for name, path in few_clips.items():
        frames = frames_by_hand(packages["torchcrepe"], by_hand(path, duration))
        expected[name] = frames if output == "frames" else frames.mean(axis=0)
    assert_close(through_a_cache(embedder, few_clips, duration, output=output), expected)
