"""What an extraction would take: bytes for every output and dtype, the time by a trial, limits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from extraction.clips import write_tones

from lmdbcache import CacheConfig
from lmdbcache.cache import SOURCES_NAME
from lmdbcache.config import DTYPES
from lmdbcache.embedders import ASTEmbedder
from lmdbcache.extraction import estimate, plan_extraction

POOLED, HIDDEN = (768,), (1214, 768)
GIB = 1 << 30


@pytest.fixture
def plan(cache, config, ast_folder):
    def plan(clips, config=config, **options):
        options = {"model": ast_folder, "num_workers": 0, **options}
        return plan_extraction(cache, config, clips, **options)

    return plan


def test_every_output_and_dtype(plan, clips, cache, config):
    """A trial also gives the bytes of each choice; nothing is stored."""
    config = config.replace(dtype="float16")
    found = plan(clips, config, trial_seconds=0.1)
    choices = {(choice.output, choice.dtype): choice for choice in found.choices}
    assert list(choices) == [(output, dtype) for output in ASTEmbedder.outputs for dtype in DTYPES]
    large = choices["last_hidden_state", "float32"].bytes_for_all
    assert large > choices["last_hidden_state", "float16"].bytes_for_all
    assert large > 10 * choices["mean", "float32"].bytes_for_all
    assert choices["pooler_output", "float16"].bytes_for_all == found.bytes_for_all
    assert not cache.root.exists()


@pytest.mark.parametrize(
    ("output", "dtype"),
    [
        ("pooler_output", "float32"),
        ("mean", "bfloat16"),
        ("last_hidden_state", "float32"),
        ("last_hidden_state", "float16"),
    ],
)
def test_bytes_are_those_that_the_extraction_takes(
    plan, run, cache, config, dtype, output, tmp_path
):
    """What a real run then has in data.mdb is what was planned, but for a few pages."""
    config = config.replace(dtype=dtype, output=output)
    clips = write_tones(tmp_path / "data", 24)
    planned = plan(clips, config)
    run(clips, config)
    used = next(cache.path(config).glob("gen-*/data.mdb")).stat().st_size
    # Each commit of a slow machine replaces a few pages.
    assert used <= planned.bytes_for_all + (64 << 10)
    assert planned.bytes_for_all <= 1.5 * used + (16 << 10)
    assert (cache.path(config) / SOURCES_NAME).stat().st_size <= 256 * len(clips) + (16 << 10)
    again = plan(clips, config)
    assert (again.num_missing, again.bytes_needed) == (0, 0)
    assert again.bytes_for_all == planned.bytes_for_all


def test_a_trial_of_few_clips_ends_with_them(plan, clips, config):
    """Each is embedded once after the first batch, however much time there is."""
    found = plan(clips, config, trial_seconds=1e9, batch_size=2)
    assert len(clips) <= found.trial.num_clips < len(clips) + 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_trial(plan, clips, bad_clips, num_workers):
    """Real clips, broken ones among them or not, give a rate and the time."""
    found = plan({**clips, **bad_clips}, num_workers=num_workers, trial_seconds=0.2)
    trial = found.trial
    assert found.no_trial == ""
    assert trial.clips_per_second > 0
    assert 0 < trial.model_share <= 1
    assert (trial.device, trial.num_workers) == ("cpu", num_workers)
    assert found.seconds == pytest.approx(
        trial.start_seconds + (len(clips) + len(bad_clips)) / trial.clips_per_second
    )
    assert plan(clips).seconds is None


def test_without_the_model(plan, clips, tmp_path, monkeypatch):
    """Where the model isn't on this machine nothing is tried and nothing is downloaded."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = plan(clips, CacheConfig(model_name="nobody/nothing"), model=None, trial_seconds=0.1)
    assert found.trial is None
    assert found.no_trial
    assert found.seconds is None
    assert (found.bytes_for_all, found.limits) == (None, ())
    assert all(choice.bytes_for_all is None for choice in found.choices)


def test_without_the_model_a_store_knows_its_bytes(plan, clips, cache, tmp_path, monkeypatch):
    """By the embeddings that it has."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = CacheConfig(model_name="nobody/nothing")
    with cache.writer(config) as writer:
        writer.put("other:dog", np.ones(64))
    found = plan(clips, config, model=None, trial_seconds=0.1)
    assert found.no_trial
    assert found.bytes_for_all
    assert found.num_missing == len(clips)


def test_without_torch(clips, cache, ast_folder):
    """The bytes are known, and what to install for the time."""
    code = (
        "import sys; sys.modules['torch'] = None\n"  # as if it weren't installed
        "from lmdbcache import CacheConfig, EmbeddingCache\n"
        "from lmdbcache.extraction import plan_extraction\n"
        "root, model, *clips = sys.argv[1:]\n"
        "found = plan_extraction(EmbeddingCache(root), CacheConfig(duration=1.0),\n"
        "                        {c + ':x': c for c in clips}, model=model, trial_seconds=0.1)\n"
        "assert found.bytes_for_all and found.seconds is None\n"
        "print(found.no_trial)\n"
    )
    arguments = [sys.executable, "-c", code, str(cache.root), str(ast_folder), *clips.values()]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lmdbcache[audio]" in done.stdout


def test_clips_that_all_fail(plan, bad_clips):
    """The bytes are known nevertheless."""
    found = plan(bad_clips, trial_seconds=0.1)
    assert found.trial is None
    assert found.no_trial
    assert found.bytes_for_all
    assert plan({}, trial_seconds=0.1).no_trial


def plan_of(num_samples, shape, memory, room, monkeypatch, cache, config, trial=None):
    """The limits of a plan for so many embeddings, on a machine of this size."""
    monkeypatch.setattr(estimate, "memory_limit", lambda: memory)
    size = num_samples * estimate.value_bytes(shape, "float32")
    found = estimate.ExtractionPlan(
        cache.path(config), num_samples, 0, num_samples, 0, shape, size, room, size, trial=trial
    )
    return [limit.name for limit in estimate._limits(found, config, num_samples, num_samples)]


@pytest.mark.parametrize(
    ("num_samples", "shape", "room", "names"),
    [
        (2_000_000, POOLED, 1000, []),
        (28_109, HIDDEN, 1000, ["memory"]),
        (28_109, HIDDEN, 150, ["memory", "disk"]),
        (28_109, HIDDEN, 50, ["memory"]),  # it doesn't fit at all
        (500_000, HIDDEN, 10_000, ["memory", "writer"]),
    ],
)
def test_limits(num_samples, shape, room, names, monkeypatch, cache, config):
    """Of a machine with 24 GiB of memory."""
    found = plan_of(num_samples, shape, 24 * GIB, room * GIB, monkeypatch, cache, config)
    assert found == names


@pytest.mark.parametrize(("rate", "names"), [(20, []), (400, ["writer"])])
def test_a_model_that_is_faster_than_the_writer(rate, names, monkeypatch, cache, config):
    """Hidden states at GPU speed wait for the disk."""
    trial = estimate.Trial(rate, 0.9, 1.0, 1, 100, "cuda")
    found = plan_of(100, HIDDEN, 24 * GIB, 1000 * GIB, monkeypatch, cache, config, trial)
    assert found == names


def test_what_is_stored_counts_as_room(cache, config, clips, ast_folder, monkeypatch):
    """A store that is complete has had its room; a second copy needs as much again."""
    with cache.writer(config) as writer:
        writer.put_batch(list(clips), np.ones((len(clips), 64), np.float32))
    monkeypatch.setattr(estimate, "free_bytes", lambda _: 1 << 10)
    plan = plan_extraction(cache, config, clips, model=ast_folder)
    assert plan.fits
    assert [limit["name"] for limit in plan.to_dict()["limits"]] == ["disk"]
