"""What the processes of a Ray run do, by themselves: errors as values, units that wait."""

from __future__ import annotations

import pickle
import shutil
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from extraction.ray_driver import frames, frames_config

from lmdbcache import EmbeddingCache
from lmdbcache.cache import source_of
from lmdbcache.embedders import weights_digest
from lmdbcache.errors import (
    ConfigError,
    DatasetError,
    ExtractionError,
    IntegrityError,
    MissingDependencyError,
    ModelLoadError,
    StorageError,
)
from lmdbcache.extraction import extract, extract_on_ray, ray_workers
from lmdbcache.extraction.feature_batch import Clip
from lmdbcache.extraction.ray_ledger import Ledger
from lmdbcache.extraction.ray_pipeline import _given_up
from lmdbcache.extraction.ray_workers import DecodeUnits, EmbedUnits, Job
from lmdbcache.extraction.staged_units import StagedUnit, StagingPlace


class Asked:
    """A ledger in this process."""

    def __init__(self) -> None:
        ledger = Ledger(4)
        self.begin = SimpleNamespace(remote=ledger.begin)
        self.may_stage = SimpleNamespace(remote=ledger.may_stage)


@pytest.fixture
def job(monkeypatch):
    """A job of this process's own."""
    monkeypatch.setattr(ray_workers, "_answer_of", lambda answer: answer)
    monkeypatch.setattr(ray_workers, "_front_ends", {})

    def job(model, config, digest=None, **options):
        return Job("123abc", config, model, digest, "cpu", 1, Asked(), 2, **options)

    return job


def answer_of(job, clips):
    """A unit decoded and embedded."""
    unit = [Clip(sample_id, path) for sample_id, path in clips.items()]
    rows = {"unit": [7], "clips": [pickle.dumps(unit)]}
    rows = EmbedUnits(job)(DecodeUnits(job)(rows))
    assert rows["unit"] == [7]
    return pickle.loads(rows["answer"][0])


class Spoilt(torch.nn.Module):
    """Fails, or gives NaN, at the first real clip."""

    def __init__(self, accident):
        super().__init__()
        self.accident = accident
        self.first = None

    def forward(self, waveforms):
        if not 0.4 < float(waveforms.max()) < 0.5:
            return waveforms[:, :4].clone()
        if isinstance(self.accident, Exception):
            raise self.accident
        spoilt = waveforms[:, :4].clone()
        self.first = waveforms[0].clone() if self.first is None else self.first
        spoilt[(waveforms == self.first).all(dim=1)] = self.accident
        return spoilt


def spoilt(accident):
    from lmdbcache import ModuleEmbedder

    return ModuleEmbedder(Spoilt(accident), name="frames/1", sample_rate=16000)


@pytest.mark.parametrize(
    ("accident", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nMore lines"), "smaller batch_size"),
        (ZeroDivisionError("mine\nmore"), "ZeroDivisionError: mine"),
        (ModelLoadError("weights: damaged"), "weights: damaged"),
    ],
)
def test_errors_are_values(job, clips, accident, reason):
    """What goes wrong on a node comes back as one line of ours that names the node."""
    answer = answer_of(job(spoilt(accident), frames_config("vegas")), clips)
    assert isinstance(answer.error, ExtractionError)
    assert reason in str(answer.error)
    assert str(answer.error).startswith(f"on node {socket.gethostname()}: ")
    assert "\n" not in str(answer.error)
    assert bool(answer.trace) == isinstance(accident, ZeroDivisionError)


def test_embedding_that_is_not_finite(job, clips):
    """NaN fails the clip that it is of; the others come back."""
    answer = answer_of(job(spoilt(float("nan")), frames_config("vegas")), clips)
    (failure,) = answer.batch.failures
    assert failure.sample_id == next(iter(clips))
    assert answer.batch.sample_ids == list(clips)[1:]
    assert answer.embeddings.shape == (len(clips) - 1, 4)


def test_other_weights_on_a_node(job, config, clips, ast_folder, tmp_path):
    """A node whose checkpoint isn't that of the run is refused by name."""
    folder = shutil.copytree(ast_folder, tmp_path / ast_folder.name)
    answer = answer_of(job(str(folder), config, "0123456789abcdef"), clips)
    assert isinstance(answer.error, ModelLoadError)
    assert "0123456789abcdef" in str(answer.error)
    shutil.rmtree(folder)
    answer = answer_of(job(str(folder), config, weights_digest(ast_folder)), clips)
    assert isinstance(answer.error, ModelLoadError)
    assert str(folder) in str(answer.error)


def test_place_that_is_not_shared(job, clips, tmp_path):
    """A staging folder of the node's own is noticed before anything is put there."""
    config = frames_config("vegas")
    place = StagingPlace(tmp_path / "staging", config)
    answer = answer_of(job(frames(), config, staging=place), clips)
    assert isinstance(answer.error, StorageError)
    assert "--staging" in str(answer.error)
    with place.marked("123abc"):
        answer = answer_of(job(frames(), config, staging=place), clips)
        assert answer.error is None
        unit = place.get(*answer.staged)
    assert unit.sample_ids == tuple(clips)
    assert unit.sources == {name: source_of(path) for name, path in clips.items()}
    assert list(place.names()) == [answer.staged[0]]


def test_unit_begun_too_often(job, clips):
    """What has ended its process again and again is given up."""
    given = job(frames(), frames_config("vegas"))
    for number in range(3):
        answer = answer_of(given, clips)
        assert (answer.error is None) == (number < 2)
    assert "ended its process 2 times" in str(answer.error)


def test_ledger_lets_a_few_wait():
    """So many units may wait, each once, until they are finished."""
    ledger = Ledger(2)
    assert [ledger.may_stage(unit) for unit in (1, 1, 2, 3, 2)] == [True, True, True, False, True]
    ledger.finish(1)
    assert ledger.may_stage(3)


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)


def test_leftovers_are_stored_first(cache, clips, tmp_path, without_ray):
    """What a killed run has left is stored with its sources, and not computed; Ray isn't asked."""
    config = frames_config("vegas")
    expected = EmbeddingCache(tmp_path / "expected")
    extract(expected, config, clips, model=frames(), num_workers=0)
    with expected.reader(config) as reader:
        rows = dict(reader)
        provenance = expected.info(config).provenance
    place = StagingPlace(tmp_path / "staging", config)
    names = list(clips)
    for unit in (names[:4], names[2:]):
        sources = {name: source_of(clips[name]) for name in unit}
        values = np.stack([rows[name] for name in unit])
        place.put(StagedUnit(tuple(unit), values, sources, (), provenance))
    summary = extract_on_ray(cache, config, clips, model=frames(), staging=tmp_path / "staging")
    assert summary.num_extracted == len(clips)
    assert place.names() == {}
    with cache.reader(config) as reader:
        assert all(np.array_equal(reader[name], rows[name]) for name in names)
    from lmdbcache.cache import num_suspects

    assert num_suspects(cache.path(config), clips) == 0


def test_damaged_leftovers(cache, clips, tmp_path, without_ray):
    """A damaged file isn't stored: its clips are to be computed."""
    config = frames_config("vegas")
    place = StagingPlace(tmp_path / "staging", config)
    values = np.ones((len(clips), 20, 50), np.float32)
    name, size = place.put(StagedUnit(tuple(clips), values))
    (path,) = (tmp_path / "staging").rglob(name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="damaged"):
        place.get(name, size)
    with pytest.raises(MissingDependencyError, match=r"lmdbcache\[ray\]"):
        extract_on_ray(cache, config, clips, model=frames(), staging=tmp_path / "staging")
    assert config not in cache


def test_nothing_to_do_needs_no_ray(cache, clips, without_ray):
    """A run that finds everything cached doesn't start Ray."""
    config = frames_config("vegas")
    extract(cache, config, clips, model=frames(), num_workers=0)
    assert extract_on_ray(cache, config, clips, model=frames()).num_cached == len(clips)


def test_files_that_are_not_on_a_node(cache, clips):
    """A file that is here and not on a node ends the run; one that is nowhere is a failed clip."""
    from lmdbcache.extraction.on_ray import _RayRun
    from lmdbcache.extraction.ray_workers import UnitAnswer

    run = _RayRun(cache, frames_config("vegas"))
    run.take({**clips, "gone:dog": "/nowhere/gone.wav"}.items(), 8)
    run._check_files(UnitAnswer(absent=["gone:dog"]))
    with pytest.raises(DatasetError, match="on every node"):
        run._check_files(UnitAnswer(absent=[next(iter(clips))]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_actors": 0}, "num_actors"),
        ({"batch_size": 0}, "batch_size"),
        ({"device": "cuda:1"}, "GPU of its own"),
        ({"address": "ray://head:10001"}, "ray job submit"),
        ({"staging": "nothing://here"}, "nothing"),
    ],
)
def test_options_that_are_refused(cache, clips, options, reason):
    """Before anything is started."""
    with pytest.raises(ConfigError, match=reason):
        extract_on_ray(cache, frames_config("vegas"), clips, model=frames(), **options)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "[::1]:99999"])
def test_no_cluster_there(cache, clips, address):
    """An address where nobody answers is one line, and quickly."""
    with pytest.raises(ExtractionError, match="no Ray cluster at") as caught:
        extract_on_ray(cache, frames_config("vegas"), clips, model=frames(), address=address)
    assert "\n" not in str(caught.value)


def test_what_ray_says_is_one_line():
    """Ray's tracebacks end as one line, and a node without lmdbcache gets its own."""
    text = "ray::map() (pid=1)\nTraceback (most recent call last):\n  File x\nValueError: no such"
    error = _given_up(RuntimeError(text))
    assert "ValueError: no such" in str(error)
    assert "\n" not in str(error)
    text = text.replace("ValueError: no such", "ModuleNotFoundError: No module named 'lmdbcache'")
    assert isinstance(_given_up(RuntimeError(text)), MissingDependencyError)
