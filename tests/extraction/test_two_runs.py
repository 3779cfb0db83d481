"""Two runs that fill one store at the same time share the work."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading

import pytest
from extraction.clips import Steps
from extraction.processes import PATIENCE

from lmdbcache import EmbeddingCache
from lmdbcache.extraction import extract

NUM_CLIPS = 240
_context = multiprocessing.get_context("fork")


class TurnTaker:
    """Writes down every sample that it computes; no run computes before the others do."""

    outputs = ("pooler_output",)
    embedding_shape = (4,)

    def __init__(self, log, barrier):
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.barrier = barrier

    def embed(self, features):
        with contextlib.suppress(threading.BrokenBarrierError):  # another has ended
            self.barrier.wait()
        os.write(self.log, b"x" * len(features))
        return features[:, :4, 0].clone()

    def provenance(self):
        return {}


def _extract(root, config, clips, folder, barrier):
    summary = extract(
        EmbeddingCache(root),
        config,
        clips,
        front_end=Steps(),
        make_embedder=lambda: TurnTaker(folder / "log", barrier),
        batch_size=2,
        num_workers=1,
        commit_seconds=0.0,
    )
    barrier.abort()
    (folder / f"summary-{os.getpid()}").write_text(json.dumps(summary.to_dict()))


@pytest.mark.parametrize("num_runs", [2, 3])
def test_simultaneous_runs_share_the_clips(num_runs, cache, config, clips, tmp_path):
    """Together they compute each clip once, but for what was in flight where they met."""
    paths = list(clips.values())
    many = {f"{n:04d}:dog": paths[n % len(paths)] for n in range(NUM_CLIPS)}
    barrier = _context.Barrier(num_runs)
    args = (cache.root, config, many, tmp_path, barrier)
    runs = [_context.Process(target=_extract, args=args) for _ in range(num_runs)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(PATIENCE)
        assert run.exitcode == 0
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("summary-*")]
    assert sum(summary["num_extracted"] for summary in summaries) == NUM_CLIPS
    for summary in summaries:
        assert summary["num_cached"] + summary["num_extracted"] == NUM_CLIPS
        assert summary["num_extracted"] > NUM_CLIPS / (10 * num_runs)
    computed = (tmp_path / "log").stat().st_size
    # Both begin with the same units, until one finds what the other has committed; later they
    # rarely meet. Each run looks at its first clip several times.
    looks = num_runs * (8 + 1)  # an embedding of few numbers is looked at most often
    assert computed <= 1.5 * NUM_CLIPS + looks, computed
    assert cache.verify(config).is_sound
