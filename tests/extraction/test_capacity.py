"""`extract --plan`: bytes for every output and dtype, and the time by a trial."""

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
from lmdbcache.extraction import capacity, pipeline, plan_capacity


@pytest.fixture
def plan(cache, config, ast_folder):
    def plan(clips, config=config, **options):
        options = {"model": ast_folder, "num_workers": 0, "trial_seconds": 0.2, **options}
        return plan_capacity(cache, config, clips, **options)

    return plan


def test_every_output_and_dtype(plan, clips, cache, config):
    """One row for each, the chosen one among them; nothing is stored."""
    found = plan(clips, config.replace(dtype="float16"))
    rows = [(choice.output, choice.dtype) for choice in found.choices]
    assert rows == [(output, dtype) for output in ASTEmbedder.outputs for dtype in DTYPES]
    assert (found.chosen.output, found.chosen.dtype) == ("pooler_output", "float16")
    assert found.chosen in found.choices
    by_row = dict(zip(rows, found.choices, strict=True))
    large = by_row["last_hidden_state", "float32"].bytes_for_all
    assert large > by_row["last_hidden_state", "float16"].bytes_for_all
    assert large > 10 * by_row["mean", "float32"].bytes_for_all
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
    plan, run, cache, config, dtype, output, tmp_path, monkeypatch
):
    """What a real run then has in data.mdb is what was planned, but for a few pages."""
    monkeypatch.setattr(capacity, "measure_speed", lambda *_, **__: None)
    config = config.replace(dtype=dtype, output=output)
    clips = write_tones(tmp_path / "data", 24)
    planned = plan(clips, config).chosen
    run(clips, config)
    used = next(cache.path(config).glob("gen-*/data.mdb")).stat().st_size
    # Each commit of a slow machine replaces a few pages.
    assert used <= planned.bytes_for_all + (64 << 10)
    assert planned.bytes_for_all <= 1.5 * used + (16 << 10)
    assert (cache.path(config) / SOURCES_NAME).stat().st_size <= 256 * len(clips) + (16 << 10)
    again = plan(clips, config).chosen
    assert (again.plan.num_missing, again.plan.bytes_needed) == (0, 0)
    assert again.bytes_for_all == planned.bytes_for_all


@pytest.mark.parametrize("num_workers", [0, 1])
def test_trial(plan, clips, bad_clips, num_workers):
    """A trial with real clips gives rates, broken clips among them or not, and stores nothing."""
    found = plan({**clips, **bad_clips}, num_workers=num_workers)
    speed = found.speed
    assert found.no_speed == ""
    assert min(speed.front_end, speed.model, speed.together) > 0
    assert (speed.device, speed.num_workers) == ("cpu", num_workers)
    assert found.seconds == pytest.approx(
        speed.start_seconds + (len(clips) + len(bad_clips)) / speed.together
    )
    assert found.seconds_for_all == found.seconds


def test_without_the_model(plan, clips, tmp_path, monkeypatch):
    """Where the model isn't on this machine the table says so and nothing is tried."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = plan(clips, CacheConfig(model_name="nobody/nothing"), model=None)
    assert found.speed is None
    assert found.seconds is None
    assert "isn't on this machine" in found.no_speed
    assert all(choice.bytes_for_all is None for choice in found.choices)


def test_without_the_model_a_store_knows_its_bytes(plan, clips, cache, tmp_path, monkeypatch):
    """Nothing is downloaded for a plan, and what the store knows is told."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = CacheConfig(model_name="nobody/nothing")
    with cache.writer(config) as writer:
        writer.put("other:dog", np.ones(64))
    found = plan(clips, config, model=None)
    assert "isn't on this machine" in found.no_speed
    assert found.chosen.bytes_for_all
    assert found.chosen.plan.num_missing == len(clips)


def test_without_torch(clips, cache, config, ast_folder):
    """The bytes are told, and what to install for the time."""
    code = (
        "import sys; sys.modules['torch'] = None\n"  # as if it weren't installed
        "from lmdbcache import CacheConfig, EmbeddingCache\n"
        "from lmdbcache.extraction import plan_capacity\n"
        "root, model, *clips = sys.argv[1:]\n"
        "found = plan_capacity(EmbeddingCache(root), CacheConfig(duration=1.0),\n"
        "                      {c + ':x': c for c in clips},\n"
        "                      model=model)\n"
        "assert found.chosen.bytes_for_all and found.seconds is None\n"
        "print(found.no_speed)\n"
    )
    arguments = [sys.executable, "-c", code, str(cache.root), str(ast_folder), *clips.values()]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'pip install "lmdbcache[audio]"' in done.stdout


def test_clips_that_all_fail(plan, bad_clips):
    """The bytes are told nevertheless, and why there is no time."""
    found = plan(bad_clips)
    assert "none of the clips" in found.no_speed
    assert found.chosen.bytes_for_all
    assert plan({}).no_speed == "there are no clips"


def test_what_does_not_fit(plan, clips, monkeypatch):
    """Each row says for itself whether it fits."""
    monkeypatch.setattr(pipeline, "free_bytes", lambda _: (16 << 20) + (256 << 10))
    monkeypatch.setattr(capacity, "measure_speed", lambda *_, **__: None)
    fits = {(c.output, c.dtype): c.plan.fits for c in plan(clips).choices}
    assert fits["pooler_output", "float32"]
    assert not fits["last_hidden_state", "float32"]
