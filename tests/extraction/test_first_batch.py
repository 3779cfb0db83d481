"""Models whose embeddings don't belong to their clips: refused at the first batch, or named."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from extraction.clips import RATE, tone, write, write_tones
from small_modules import Seeded

from lmdbcache import ModuleEmbedder, config_for, extract
from lmdbcache.errors import ExtractionError, InvalidEmbeddingError
from lmdbcache.extraction.decoding import FeatureBatch


class Net(Seeded):
    """Waveforms → (batch, 8), pooled over frames."""

    def forward(self, waveforms):
        return self.layer(waveforms.unflatten(1, (-1, 80))).square().mean(dim=1)


class Dropout(Net):
    def forward(self, waveforms):
        return torch.nn.functional.dropout(super().forward(waveforms), 0.3, training=True)


class Noise(Net):
    def forward(self, waveforms):
        return super().forward(waveforms + 0.05 * torch.randn_like(waveforms))


class BatchStatistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, waveforms):
        return self.norm(super().forward(waveforms))


class BatchStatisticsOverTime(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(80, track_running_stats=False)

    def forward(self, waveforms):
        frames = self.norm(waveforms.unflatten(1, (-1, 80)).transpose(1, 2))
        return self.layer(frames.transpose(1, 2)).square().mean(dim=1)


class Attention(Net):
    """Attends over the batch, as with a forgotten `batch_first`."""

    def forward(self, waveforms):
        hidden = super().forward(waveforms)
        return torch.softmax(hidden @ hidden.T, dim=1) @ hidden


class SlightMixing(Net):
    """A hundredth of each embedding is the batch's."""

    def forward(self, waveforms):
        hidden = super().forward(waveforms)
        return hidden + 0.01 * hidden.mean(dim=0)


class BatchAsTime(Net):
    """A recurrent layer that takes the batch for its time: `batch_first` is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = torch.nn.LSTM(8, 8)

    def forward(self, waveforms):
        hidden = self.layer(waveforms.unflatten(1, (-1, 80)))
        return self.recurrent(hidden)[0].mean(dim=1)


class WideDropout(Dropout):
    """So many numbers that a clip is embedded again twice only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(80, 96)


class WideMixing(SlightMixing):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(80, 96)


class Constant(Net):
    def forward(self, waveforms):
        return torch.ones(len(waveforms), 8)


class PartlyConstant(Net):
    def forward(self, waveforms):
        return torch.cat([torch.ones(len(waveforms), 7), super().forward(waveforms)[:, :1]], dim=1)


class Quantized(Net):
    """Activations in 8 bits, by the range of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(self.layer), {torch.nn.Linear}, dtype=torch.qint8
        )


@pytest.fixture
def run(cache):
    def run(module, clips, **options):
        embedder = ModuleEmbedder(module, name=type(module).__name__, sample_rate=RATE)
        config = config_for(embedder, duration=0.5)
        options = {"num_workers": 0, "batch_size": 4, **options}
        return extract(cache, config, clips, model=embedder, **options)

    return run


MIXING = [BatchStatistics, BatchStatisticsOverTime, Attention, SlightMixing, BatchAsTime]


@pytest.mark.parametrize("module", [Dropout, WideDropout, WideMixing, Noise, Constant, *MIXING])
def test_what_answers_differently_is_refused(run, cache, clips, module):
    """Random, mixing the clips of a batch, or deaf: our error, and nothing is stored."""
    with pytest.raises(InvalidEmbeddingError, match=module.__name__):
        run(module(), clips)
    assert cache.stores() == []


@pytest.mark.parametrize("module", [Dropout, Noise, Constant])
def test_one_clip_a_batch_hides_nothing(run, cache, clips, module):
    """What the second batch brings to light leaves nothing of the first."""
    with pytest.raises(InvalidEmbeddingError):
        run(module(), clips, batch_size=1)
    assert cache.stores() == []


def test_copies_of_one_clip_at_the_beginning_hide_nothing(run, cache, clips, tmp_path):
    """Equal embeddings of equal sounds say nothing yet; the next sound tells."""
    first = next(iter(clips.values()))
    with pytest.raises(InvalidEmbeddingError, match="Constant"):
        run(Constant(), {"a:x": first, "b:x": first, **clips}, batch_size=2)
    assert cache.stores() == []


@pytest.mark.parametrize("module", [BatchStatisticsOverTime, Attention])
def test_a_first_unit_of_one_clip_hides_nothing(run, cache, clips, tmp_path, module):
    """Mixing shows as soon as a forward pass has several clips."""
    for name in "abc":  # of the first unit of four
        (tmp_path / name).write_text("no audio")
    broken = {f"{name}:x": str(tmp_path / name) for name in "abc"}
    with pytest.raises(InvalidEmbeddingError, match=module.__name__):
        run(module(), {**broken, **clips})
    assert cache.stores() == []


class DropoutOfSound(Dropout):
    """Gives zeros for silence: dropout doesn't show in them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.bias = None


class DropoutOfLoudness(DropoutOfSound):
    """Gives NaN for silence."""

    def forward(self, waveforms):
        return super().forward(waveforms / waveforms.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("module", [DropoutOfSound, DropoutOfLoudness])
@pytest.mark.parametrize(("name", "batch_size"), [("zz", 8), ("00", 1)])
def test_silence_hides_nothing(run, cache, tmp_path, module, name, batch_size):
    """Be it the last clip of the first batch, or the first batch."""
    clips = write_tones(tmp_path, 4)
    clips[f"{name}:x"] = write(tmp_path / "silent.wav", np.zeros(8000, np.float32))
    with pytest.raises(InvalidEmbeddingError, match=module.__name__):
        run(module(), clips, batch_size=batch_size)
    assert cache.stores() == []


@pytest.mark.parametrize("module", [Net, PartlyConstant, Quantized])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_rounding_is_no_difference(run, clips, module, batch_size):
    """Another batch size moves last bits, in 8 bits more; one equal number isn't all of them."""
    summary = run(module(), clips, batch_size=batch_size)
    assert (summary.num_extracted, summary.equal) == (len(clips), ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision_is_no_difference(run, clips, dtype):
    """Nor are half-precision weights."""
    assert run(Net().to(dtype), clips).num_extracted == len(clips)


def test_it_costs_one_clip_a_run(run, clips):
    """A few forward passes of one clip, however many batches."""
    sizes = []

    class Counting(Net):
        def forward(self, waveforms):
            sizes.append(len(waveforms))
            return super().forward(waveforms)

    run(Counting(), clips, batch_size=2)
    assert sizes == [1, 2, *[2] * 4, 2, 2, 2, 2]  # the first for the embedding's shape


def test_silent_clips_and_copies_may_have_equal_embeddings(run, tmp_path):
    """Only different sounds are expected to differ."""
    silence, sound = np.zeros(8000, np.float32), tone(300)
    written = {"a": silence, "b": silence, "c": silence, "d": sound, "e": sound, "f": 1e-6 * sound}
    clips = {f"{i}:x": write(tmp_path / f"{i}.wav", one) for i, one in written.items()}
    summary = run(Net(), clips)
    assert (summary.num_extracted, summary.equal) == (6, ())


class Gate(Net):
    """All clips that are quieter than this sound alike to it."""

    def __init__(self, level) -> None:
        super().__init__()
        self.level = level

    def forward(self, waveforms):
        loud = waveforms.abs().amax(dim=1, keepdim=True) > self.level
        return super().forward(waveforms) * loud


@pytest.mark.parametrize(("amplitude", "is_named"), [(5e-5, False), (5e-4, True)])
def test_clips_below_80_db_count_as_silence(run, tmp_path, amplitude, is_named):
    """A model may well take them for silence; digital silence counts in no case."""
    quiet = {n: np.float32(amplitude / 0.4) * tone(900 + 50 * n) for n in range(2)}
    clips = {
        f"zz_{n}:x": write(tmp_path / f"{n}.wav", one, subtype="FLOAT") for n, one in quiet.items()
    }
    clips["zz_silent:x"] = write(tmp_path / "silent.wav", np.zeros(8000, np.float32))
    summary = run(Gate(1e-2), {**write_tones(tmp_path, 4), **clips})
    assert summary.num_extracted == 7
    assert summary.equal == ((("zz_0:x", "zz_1:x"),) if is_named else ())


def test_a_silent_clip_and_one_that_can_be_heard_are_no_pair(run, tmp_path):
    """Two clips that can be heard are needed."""
    clips = write_tones(tmp_path, 4)
    clips["zz_0:x"] = write(tmp_path / "silent.wav", np.zeros(8000, np.float32))
    clips["zz_1:x"] = write(tmp_path / "quiet.wav", 0.1 * tone(900))
    assert run(Gate(0.2), clips).equal == ()


def test_features_of_several_dtypes_are_stacked_apart():
    """Large integers of one clip aren't rounded to another's floats."""
    odd = torch.tensor([2**24 + 1, 1])
    features = [torch.ones(2), odd, torch.zeros(2)]
    batch = FeatureBatch(sample_ids=["a:x", "b:x", "c:x"], features=features)
    for one in (batch, pickle.loads(pickle.dumps(batch))):
        groups = {group.dtype: (places, group.tolist()) for places, group in one.groups()}
        assert groups == {
            torch.float32: ([0, 2], [[1.0, 1.0], [0.0, 0.0]]),
            torch.int64: ([1], [[2**24 + 1, 1]]),
        }


@pytest.mark.parametrize("wrong", [slice(0, 1), slice(0, 0)])
def test_another_number_of_embeddings_than_clips_ends_the_run(run, cache, clips, wrong):
    """An embedder of one's own that loses some: no embedding is given to another's clip."""

    class Losing:
        outputs = ("embedding",)
        embedding_shape = (4,)

        def embed(self, features):
            return features[wrong, :4]

        def provenance(self):
            return {"weights_digest": "losing"}

    with pytest.raises(ExtractionError):
        run(Net(), clips, make_embedder=Losing)
    assert cache.stores() == []


def test_equal_embeddings_of_different_clips_are_named(run, tmp_path):
    """Counted, in words and in JSON; they are stored all the same."""
    clips = write_tones(tmp_path, 4)
    for number in range(3):
        quiet = write(tmp_path / f"quiet_{number}.wav", 0.1 * tone(900 + 50 * number))
        clips[f"zz_{number}:dog"] = str(quiet)
    summary = run(Gate(0.2), clips)
    assert summary.num_extracted == 7
    assert summary.equal == (("zz_0:dog", "zz_1:dog", "zz_2:dog"),)
    assert summary.num_equal == json.loads(json.dumps(summary.to_dict()))["num_equal"] == 3
    assert "zz_0:dog" in str(summary)
    assert summary.exit_code == 0
