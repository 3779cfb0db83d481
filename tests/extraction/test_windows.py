"""Recordings are extracted window by window: in full or not at all, with the bits of a loop."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import soundfile
import torch
from extraction.clips import tone, write

from lmdbcache import ModuleEmbedder, config_for, extract
from lmdbcache.audio import load_clip
from lmdbcache.errors import ConfigError
from lmdbcache.extraction import audit
from lmdbcache.storage import first_window, recording_of

WINDOW, HOP, BATCH = 1600, 720, 4
SECONDS = {"long:dog": 2.1037, "exact:dog": 0.415, "short:cat": 0.05, "a:b@c:dog": 1.01}
NUM_WINDOWS = {"long:dog": 46, "exact:dog": 8, "short:cat": 1, "a:b@c:dog": 22}


class Spectrum(torch.nn.Module):
    """A small model whose results depend on every sample, and on the batch in the last bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(WINDOW, 24)

    def forward(self, waveforms):
        return torch.tanh(self.linear(waveforms))


def model():
    return ModuleEmbedder(Spectrum(), name="spectrum", sample_rate=16000)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Of odd lengths, at several rates; not to be changed."""
    folder, found = tmp_path_factory.mktemp("recordings"), {}
    rates = (44100, 16000, 22050, 8000)
    for (name, seconds), rate in zip(SECONDS.items(), rates, strict=True):
        path = folder / f"{len(found)}.wav"
        samples = np.stack([tone(300.0 + 50 * len(found), rate, seconds), tone(99, rate, seconds)])
        found[name] = str(write(path, samples.T, rate))
    return found


@pytest.fixture
def config():
    return config_for(model(), window=WINDOW / 16000, hop=HOP / 16000)


def by_hand(path, config):
    """Start → embedding, by a loop over the decoded whole; padded at the end."""
    clip = load_clip(path, 16000, 9.0)
    whole = clip.waveform[: clip.num_valid]
    windows = [(0, whole[:WINDOW])]
    while windows[-1][0] + WINDOW < len(whole):
        start = windows[-1][0] + HOP
        windows.append((start, whole[start : start + WINDOW]))
    padded = [np.pad(part, (0, WINDOW - len(part))) for _, part in windows]
    embed = model().make_embedder(config).embed
    batches = [padded[first : first + BATCH] for first in range(0, len(padded), BATCH)]
    rows = [embed(torch.from_numpy(np.stack(batch))).numpy() for batch in batches]
    return np.array([start for start, _ in windows]) / 16000, np.concatenate(rows)


def stored_bits(cache, config):
    with cache.reader(config) as reader:
        return {sample_id: embedding.tobytes() for sample_id, embedding in reader.items()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_windows_are_those_of_a_loop_by_hand(cache, config, recordings, num_workers):
    """Starts and embeddings, bit for bit; a second run has nothing to do."""
    options = {"model": model(), "batch_size": BATCH, "num_workers": num_workers}
    progress = []
    summary = extract(cache, config, recordings, progress=lambda *p: progress.append(p), **options)
    assert (summary.num_extracted, summary.num_windows) == (4, sum(NUM_WINDOWS.values()))
    assert not summary.failures
    assert progress[-1] == (4, 4)
    with cache.reader(config) as reader:
        assert sorted(reader.recordings()) == sorted(recordings)
        for name, path in recordings.items():
            found, (starts, embeddings) = reader.windows(name), by_hand(path, config)
            assert len(found.starts) == NUM_WINDOWS[name]
            np.testing.assert_array_equal(found.starts, starts)
            assert found.embeddings.tobytes() == embeddings.tobytes()
    again = extract(cache, config, recordings, **options)
    assert (again.num_cached, again.num_extracted, again.built_model) == (4, 0, False)
    coverage = cache.require(config, recordings)
    assert (coverage.num_asked, coverage.missing) == (4, ())


def test_tails(cache, config, recordings):
    """Dropped or aligned ones are other stores; too short to have a window is a failure."""
    options = {"model": model(), "batch_size": BATCH, "num_workers": 0}
    for tail, numbers in (("drop", (45, 8, None, 21)), ("align", (46, 8, 1, 22))):
        chosen = config.replace(last_window=tail)
        summary = extract(cache, chosen, recordings, **options)
        failed = {failure.sample_id for failure in summary.failures}
        with cache.reader(chosen) as reader:
            for name, number in zip(recordings, numbers, strict=True):
                assert (name in failed) is (number is None)
                if number is not None:
                    found = reader.windows(name)
                    assert len(found.starts) == number
            last = reader.windows("long:dog").starts[-1]
        clip = load_clip(recordings["long:dog"], 16000, 9.0)
        if tail == "align":
            assert round(last * 16000) == clip.num_valid - WINDOW
        assert cache.coverage(chosen, recordings).failed == tuple(sorted(failed))


def _killed(root, config, recordings, num_puts):
    """A process that dies when it has put so many windows, each of which it committed."""
    from lmdbcache import EmbeddingCache, EmbeddingWriter

    put, done = EmbeddingWriter.put, []

    def put_and_die(self, sample_id, embedding):
        if len(done) == num_puts:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(sample_id)
        return put(self, sample_id, embedding)

    EmbeddingWriter.put = put_and_die
    options = {"model": model(), "batch_size": BATCH, "num_workers": 0, "commit_seconds": 0.0}
    extract(EmbeddingCache(root), config, recordings, **options)


@pytest.mark.parametrize("num_puts", [3, 21, 22, 24, 66])
def test_a_killed_run_leaves_no_recording_that_looks_whole(cache, config, recordings, num_puts):
    """The first window comes last; going on gives the bits of an uninterrupted run."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(240)
        try:
            _killed(cache.root, config, recordings, num_puts)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    before = {}
    if config in cache:
        before = stored_bits(cache, config)
        for name in recordings:
            windows = [each for each in before if recording_of(each) == name]
            assert (first_window(name) in windows) <= (len(windows) == NUM_WINDOWS[name])
    counts = []

    class Counting(Spectrum):
        def forward(self, waveforms):
            counts.append(len(waveforms))
            return super().forward(waveforms)

    counting = ModuleEmbedder(Counting(), name="spectrum", sample_rate=16000)
    options = {"batch_size": BATCH, "num_workers": 0}
    extract(cache, config, recordings, model=counting, **options)
    whole = type(cache)(cache.root / "whole")
    extract(whole, config, recordings, model=model(), **options)
    after = stored_bits(cache, config)
    assert after == stored_bits(whole, config)
    assert before.items() <= after.items()
    # What was stored, less the first batch of an unfinished recording, isn't computed again.
    assert sum(counts) <= sum(NUM_WINDOWS.values()) - len(before) + 2 * BATCH + 24


def test_a_recording_that_is_damaged_at_its_end_isnt_cached(cache, config, recordings, tmp_path):
    """It fails as a whole, with its reason, whatever came before; mended, it is completed."""
    path = tmp_path / "cut.flac"
    samples, rate = soundfile.read(recordings["long:dog"])
    soundfile.write(path, samples, rate)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-300:-200] = bytes(100)
    path.write_bytes(damaged)
    clips = {"cut:dog": str(path), "exact:dog": recordings["exact:dog"]}
    options = {"model": model(), "batch_size": BATCH, "num_workers": 1}
    summary = extract(cache, config, clips, **options)
    assert [failure.sample_id for failure in summary.failures] == ["cut:dog"]
    assert summary.num_extracted == 1
    with cache.reader(config) as reader:
        assert list(reader.recordings()) == ["exact:dog"]
        assert reader.missing(clips) == ["cut:dog"]
    path.write_bytes(whole)
    assert extract(cache, config, clips, **options).num_extracted == 1


def test_a_changed_recording_keeps_no_window_of_the_old_one(cache, config, recordings, tmp_path):
    """A shorter file has fewer windows; one that changed before it was finished starts anew."""
    path = tmp_path / "changing.wav"
    options = {"model": model(), "batch_size": BATCH, "num_workers": 0}
    clips = {"rec:dog": str(path)}
    write(path, tone(300, seconds=1.0))
    extract(cache, config, clips, **options)
    write(path, tone(500, seconds=0.5))
    summary = extract(cache, config, clips, **options)
    assert (summary.num_cached, summary.num_suspects) == (1, 1)
    assert extract(cache, config, clips, recompute_changed=True, **options).num_extracted == 1
    _, expected = by_hand(path, config)
    with cache.reader(config) as reader:
        assert reader.windows("rec:dog").embeddings.tobytes() == expected.tobytes()
        assert len(reader) == len(expected)
    with cache.writer(config) as writer:
        writer.remove([first_window("rec:dog")])
    write(path, tone(700, seconds=0.4))
    extract(cache, config, clips, **options)
    _, expected = by_hand(path, config)
    with cache.reader(config) as reader:
        assert reader.windows("rec:dog").embeddings.tobytes() == expected.tobytes()
        assert len(reader) == len(expected)


def test_a_window_that_cant_be_stored_fails_its_recording(cache, config, recordings):
    """Its other windows don't make a recording; the failure names the window."""

    class Failing(Spectrum):
        def forward(self, waveforms):
            found = super().forward(waveforms)
            found[waveforms[:, -1] == 0] = float("nan")
            return found

    failing = ModuleEmbedder(Failing(), name="spectrum", sample_rate=16000)
    summary = extract(cache, config, recordings, model=failing, batch_size=BATCH, num_workers=0)
    assert {failure.sample_id for failure in summary.failures} == set(recordings) - {"exact:dog"}
    with cache.reader(config) as reader:
        assert list(reader.recordings()) == ["exact:dog"]


def test_several_stores_by_one_pass(cache, config, recordings):
    """Each has the bits of a run of its own, also where one had a part of a recording."""
    half = config.replace(dtype="float16")
    options = {"model": model(), "batch_size": BATCH, "num_workers": 0}
    extract(cache, half, {"long:dog": recordings["long:dog"]}, **options)
    with cache.writer(half) as writer:
        writer.remove(["long@00000.450000:dog"])
    first, second = extract(cache, [config, half], recordings, **options)
    assert (first.num_extracted, second.num_extracted) == (4, 4)
    alone = type(cache)(cache.root / "alone")
    for each in (config, half):
        extract(alone, each, recordings, **options)
        assert stored_bits(cache, each) == stored_bits(alone, each)


def test_ids_that_look_like_windows_are_refused(cache, config, recordings):
    """They would be taken for a window of another recording."""
    clips = {"rec@00000.000000:dog": recordings["exact:dog"], "f" * 500 + ":dog": "x.wav"}
    summary = extract(cache, config, clips, model=model(), num_workers=0)
    assert {failure.sample_id for failure in summary.failures} == set(clips)


def test_configs_whose_windows_differ_dont_share_a_pass(cache, config, recordings):
    """Each needs windows of its own."""
    other = config.replace(hop=WINDOW / 16000)
    with pytest.raises(ConfigError, match="^hop: "):
        extract(cache, [config, other], recordings, model=model())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_audit_computes_windows_again(cache, config, recordings, tmp_path, num_workers):
    """Of whole recordings and of some; a wrong window, a damaged and a shorter file are named."""
    path = tmp_path / "other.wav"
    clips = {**recordings, "other:cat": str(path)}
    write(path, tone(400, seconds=1.0))
    options = {"model": model(), "batch_size": BATCH, "num_workers": num_workers}
    extract(cache, config, clips, **options)
    num_windows = sum(NUM_WINDOWS.values()) + 21
    report = audit(cache, config, num_samples=1000, **options)
    assert report.is_sound
    assert [sample.max_abs for sample in report.samples] == [0.0] * num_windows
    some = audit(cache, config, num_samples=9, **options)
    assert some.is_sound
    assert [sample.max_abs for sample in some.samples] == [0.0] * 9
    wrong = ["long@00000.450000:dog", "a:b@c@00000.000000:dog"]
    with cache.reader(config) as reader:
        moved = reader.windows("exact:dog").sample_ids
    with cache.writer(config, on_duplicate="overwrite", without_provenance=True) as writer:
        writer.put_batch([*wrong, *moved], np.ones((10, 24)))  # their sources aren't known now
    write(path, tone(400, seconds=0.5))
    given = {**recordings, "exact:dog": recordings["short:cat"]}
    report = audit(cache, config, num_samples=1000, clips=given, **options)
    assert {sample.sample_id for sample in report.drifted} == {*wrong, moved[0]}
    assert sorted(report.failed) == moved[1:]
    assert {recording_of(sample_id) for sample_id in report.skipped} == {"other:cat"}
    assert len(report.samples) == num_windows - 21 - 7
