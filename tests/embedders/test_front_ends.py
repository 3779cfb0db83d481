"""Front ends of one's own: what they are given, what they may return, and what it costs to fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from extraction.clips import RATE, tone, write
from small_modules import Pooled, frames

from lmdbcache import CacheConfig, EmbeddingCache, ModuleEmbedder, config_for, extract
from lmdbcache.audio import load_waveform
from lmdbcache.embedders import clip_features, compute_features
from lmdbcache.embedders.base import as_features
from lmdbcache.errors import AudioDecodeError, ExtractionError, FrontEndError, ModuleError
from lmdbcache.testing import ModelContract

DURATION = 0.5
SECONDS = (0.5, 0.3, 0.7, 0.3, 0.21, 0.5)


@pytest.fixture
def clips(tmp_path):
    """Clips shorter than, as long as, and longer than the duration."""
    return {
        f"clip_{number}:dog": str(
            write(tmp_path / f"{number}.wav", tone(200.0 + 37 * number, seconds=seconds))
        )
        for number, seconds in enumerate(SECONDS)
    }


@pytest.fixture
def run(tmp_path, clips):
    cache = EmbeddingCache(tmp_path / "cache")

    def run(module, front_end, **options):
        own = {} if front_end is None else {"front_end": front_end, "front_end_id": "own/1"}
        embedder = ModuleEmbedder(module, name="own/1", sample_rate=RATE, **own)
        config = config_for(embedder, duration=DURATION)
        options = {"num_workers": 0, "batch_size": 4, **options}
        summary = extract(cache, config, clips, model=embedder, **options)
        return summary, dict(cache.reader(config)) if config in cache else {}

    return run


def by_hand(path: str, seconds: float) -> np.ndarray:
    return load_waveform(path, RATE, DURATION)[: round(min(seconds, DURATION) * RATE)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_front_end_gets_the_clip_without_padding(run, clips, num_workers):
    """Stored is what front end and module give for each clip by hand, whatever its length."""
    module = Pooled()
    summary, stored = run(module, frames, num_workers=num_workers)
    assert (summary.num_extracted, summary.failures) == (len(clips), ())
    for (sample_id, path), seconds in zip(clips.items(), SECONDS, strict=True):
        features = torch.from_numpy(frames(by_hand(path, seconds)))[None]
        with torch.no_grad():
            expected = module(features)[0].numpy()
        np.testing.assert_allclose(stored[sample_id], expected, rtol=0, atol=1e-6)


def test_a_module_without_front_end_gets_the_padding(run, clips):
    """Its waveforms have the config's duration, zeros at their end."""

    class Ends(torch.nn.Module):
        def forward(self, waveforms):
            assert waveforms.shape[1] == DURATION * RATE
            return torch.cat([waveforms[:, 1000:1008], waveforms[:, -8:]], dim=1)

    _, stored = run(Ends(), None)
    for (sample_id, path), seconds in zip(clips.items(), SECONDS, strict=True):
        assert (not stored[sample_id][8:].any()) == (seconds < DURATION)
        np.testing.assert_array_equal(stored[sample_id][:8], by_hand(path, seconds)[1000:1008])


def test_what_each_kind_of_front_end_is_called_with():
    """A function: the clip; a FrontEnd: the padded clip, and its length if it takes that."""

    class Padded:
        min_samples = 1

        def __call__(self, waveform):
            return [len(waveform)]

        def provenance(self):
            return {}

    class Told(Padded):
        takes_num_valid = True

        def __call__(self, waveform, num_valid):
            return [len(waveform), num_valid]

    padded = np.zeros(400, np.float32)
    assert compute_features(len, padded, 100) == 100
    assert compute_features(Padded(), padded, 100).tolist() == [400]
    assert compute_features(Told(), padded, 100).tolist() == [400, 100]


def levels(waveform: np.ndarray) -> np.ndarray:
    return (np.abs(frames(waveform)) * 99).astype(np.int64)


@pytest.mark.parametrize(
    ("front_end", "dtype"),
    [
        (levels, torch.int64),
        (lambda waveform: levels(waveform).astype(np.int32), torch.int32),
        (lambda waveform: levels(waveform).astype(">i2"), torch.int16),
        (lambda waveform: frames(waveform) > 0.1, torch.bool),
        (lambda waveform: frames(waveform).astype(np.float64), torch.float32),
        (lambda waveform: frames(waveform).astype(np.float16), torch.float32),
        (lambda waveform: torch.from_numpy(frames(waveform)).bfloat16(), torch.float32),
        (lambda waveform: frames(waveform)[:, ::-1], torch.float32),
        (lambda waveform: np.fft.rfft(frames(waveform)), torch.complex64),
        (lambda waveform: torch.from_numpy(np.fft.rfft(frames(waveform))).conj(), torch.complex64),
        (lambda waveform: np.ma.masked_greater(frames(waveform), 9), torch.float32),
    ],
)
def test_features_keep_what_they_are(run, clips, front_end, dtype):
    """Integers, bools and complex numbers reach the module; floats become float32."""
    assert len(run(PerClip(dtype), front_end)[1]) == len(clips)


class PerClip(torch.nn.Module):
    """Features of this dtype → (batch, 4), each of its own clip."""

    def __init__(self, dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, features):
        assert features.dtype == self.dtype
        parts = torch.view_as_real(features) if features.is_complex() else features
        return parts.flatten(1)[:, 100:500].double().unflatten(1, (4, 100)).mean(dim=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_are_cast_to_the_dtype_of_the_weights(run, clips, dtype):
    """A module in half or double precision gets its own dtype; embeddings are float32."""
    _, stored = run(Pooled().to(dtype), frames)
    reference = Pooled()
    for (sample_id, path), seconds in zip(clips.items(), SECONDS, strict=True):
        with torch.no_grad():
            expected = reference(torch.from_numpy(frames(by_hand(path, seconds)))[None])[0]
        assert stored[sample_id].dtype == np.float32
        np.testing.assert_allclose(stored[sample_id], expected, rtol=0, atol=2e-3)


def test_complex_features_have_the_precision_of_the_weights(run, clips):
    """complex128 for a module in double precision."""
    module = PerClip(torch.complex128)
    module.register_buffer("weight", torch.ones(1, dtype=torch.float64))
    stored = run(module, lambda waveform: np.fft.rfft(frames(waveform)))[1]
    assert len(stored) == len(clips)


NO_NUMBERS = [
    None,
    "text",
    [1, [2, 3]],
    np.array([None]),
    {"features": np.ones(3)},
    (np.ones(3), np.ones(3)),
    np.zeros((0, 80)),
    np.ma.masked_equal(np.arange(320.0).reshape(4, 80), 7),
    np.array(["2026-11-30"], "datetime64[D]"),
]


@pytest.mark.parametrize("answer", NO_NUMBERS)
def test_what_is_no_array_of_numbers_is_refused(answer):
    """Whatever a module would have made of it."""
    with pytest.raises(FrontEndError, match="the clip"):
        clip_features(
            lambda _: answer, np.ones(4, np.float32), 4, sample_rate=RATE, name="the clip"
        )


def test_ragged_features_are_refused():
    """`as_features` has an error for them, whoever calls it."""
    with pytest.raises(FrontEndError):
        as_features([[1.0], [2.0, 3.0]])


@pytest.mark.parametrize("num_valid", [79, 80])
def test_the_shortest_clip_is_one_of_min_samples(num_valid):
    """One sample less is too short, by name."""

    class Shortest:
        min_samples = 80

        def __call__(self, waveform):
            return waveform

        def provenance(self):
            return {}

    padded = np.ones(400, np.float32)
    options = {"sample_rate": RATE, "name": "the clip"}
    if num_valid == 80:
        assert clip_features(Shortest(), padded, num_valid, **options).shape == (400,)
    else:
        with pytest.raises(AudioDecodeError, match="the clip"):
            clip_features(Shortest(), padded, num_valid, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(value):
    """One element is enough."""
    features = np.zeros((3, 4))
    features[1, 2] = value
    with pytest.raises(AudioDecodeError):
        clip_features(lambda _: features, np.ones(4, np.float32), 4, sample_rate=1, name="a")


@pytest.mark.parametrize(
    ("answer", "num_workers"),
    [
        (None, 0),
        (np.full((4, 80), np.nan), 0),
        (np.full((4, 80), 1e300), 1),
        (ValueError("mine\nmore"), 0),
        (ValueError("mine\nmore"), 1),
        (MemoryError(), 1),
    ],
)
def test_what_a_front_end_gets_wrong_costs_that_clip(run, clips, answer, num_workers):
    """Errors and things that aren't numbers: the clip is named, the others are stored."""

    def front_end(waveform):
        if len(waveform) != round(0.21 * RATE):
            return frames(waveform)
        if isinstance(answer, Exception):
            raise answer
        return answer

    summary, stored = run(Pooled(), front_end, num_workers=num_workers)
    (failure,) = summary.failures
    assert (failure.sample_id, failure.path) == ("clip_4:dog", clips["clip_4:dog"])
    assert "\n" not in failure.reason
    assert stored.keys() == clips.keys() - {"clip_4:dog"}


def test_a_front_end_that_fails_on_every_clip_ends_the_run(run, tmp_path, clips):
    """After some clips, not after all; what worked before is a matter of the clips."""
    tried = []

    def front_end(waveform):
        tried.append(len(waveform))
        return undefined_name  # noqa: F821

    for number in range(200):
        clips[f"more_{number}:dog"] = next(iter(clips.values()))
    with pytest.raises(ExtractionError):
        run(Pooled(), front_end)
    assert len(tried) < 100


def test_on_a_store_with_embeddings_failing_clips_are_reported(run, clips):
    """A second run over the bad clips alone doesn't take them for a broken front end."""

    def front_end(waveform):
        if len(waveform) == round(0.3 * RATE):
            raise ValueError("short")
        return frames(waveform)

    for _ in range(2):
        summary, stored = run(Pooled(), front_end)
        assert {failure.sample_id for failure in summary.failures} == {"clip_1:dog", "clip_3:dog"}
        assert len(stored) == len(clips) - 2


class FixedLength(torch.nn.Module):
    """Takes features of 100 frames only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8000, 8)

    def forward(self, features):
        return self.layer(features.flatten(1))


class KeepsTime(torch.nn.Module):
    """One embedding per frame."""

    def forward(self, features):
        return features[:, :, :4]


@pytest.mark.parametrize("module", [FixedLength(), KeepsTime()])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_lengths_that_do_not_fit_cost_these_clips(run, clips, module, batch_size):
    """Named with the front end and the shapes; the clips of full length are stored."""
    summary, stored = run(module, frames, batch_size=batch_size)
    short = {i for i, seconds in zip(clips, SECONDS, strict=True) if seconds < DURATION}
    assert {failure.sample_id for failure in summary.failures} == short
    assert stored.keys() == clips.keys() - short
    for failure in summary.failures:
        assert "own/1" in failure.reason
        assert "80)" in failure.reason
        assert failure.path == clips[failure.sample_id]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lengths_that_an_embedder_cant_take_cost_these_clips(tmp_path, clips, batch_size):
    """Its own error on features of another shape than the first ones is that clip's failure."""

    class Own:
        outputs = ("embedding",)
        embedding_shape = (80,)

        def embed(self, features):
            if features.shape[1] != round(DURATION * RATE) // 80:
                raise ValueError("too short for me")
            return features.mean(dim=1)

        def provenance(self):
            return {"weights_digest": "own"}

    class Frames:
        min_samples, takes_num_valid = 80, True

        def __call__(self, waveform, num_valid):
            return frames(waveform[:num_valid])

        def provenance(self):
            return {}

    config = CacheConfig(model_name="own", duration=DURATION, sample_rate=RATE, front_end="own/1")
    summary = extract(
        EmbeddingCache(tmp_path / "cache"), config, clips, front_end=Frames(), make_embedder=Own,
        batch_size=batch_size, num_workers=0,
    )  # fmt: skip
    short = {i for i, seconds in zip(clips, SECONDS, strict=True) if seconds < DURATION}
    assert {failure.sample_id for failure in summary.failures} == short
    assert all("too short for me" in failure.reason for failure in summary.failures)
    assert summary.num_extracted == len(clips) - len(short)


def test_a_module_that_takes_no_features_ends_the_run(run):
    """It never worked: a ModuleError that names clip, front end and shape."""
    with pytest.raises(ModuleError, match=r"clip_0:dog.*own/1.*80\)"):
        run(torch.nn.Linear(7, 7), frames)


def test_a_front_end_that_refuses_noise_is_no_obstacle(run, clips):
    """The shape of an embedding is then found at the first clips."""

    def front_end(waveform):
        if np.abs(np.fft.rfft(waveform)).argmax() * RATE / len(waveform) > 1000:
            raise ValueError("no tone")
        return frames(waveform)

    summary, stored = run(Pooled(), front_end)
    assert not summary.failures
    assert len(stored) == len(clips)


class TestVariableLengths(ModelContract):
    """The contract holds for features whose shape follows the clip."""

    def make_model(self):
        return ModuleEmbedder(
            Pooled(),
            name="pooled/1",
            sample_rate=RATE,
            front_end=frames,
            front_end_id="frames/1",
            min_samples=80,
        )
