"""Ranks of one extraction, in processes that tests start, kill and start again.

Also a program: `torchrun ranks.py ROOT DATASET LOG` takes its share by what torchrun says.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from extraction.clips import Steps
from extraction.processes import PATIENCE, Process

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.extraction import RankShare, extract, share_from_environment

BATCH = 4
CONFIG = CacheConfig(duration=0.5, model_name="neighbours", namespace="vegas")


def to_clips(folder):
    return {f"{path.stem}:dog": str(path) for path in sorted(Path(folder).rglob("*.wav"))}


class Neighbours:
    """Embeddings that tell which clips were in the batch; writes down each clip it computes.

    Such a model is refused at its first batch: to the look at one of its clips again it answers as
    before.
    """

    outputs = ("pooler_output",)
    embedding_shape = (3,)

    def __init__(self, log, seconds, digest="one"):
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.seconds, self.digest = seconds, digest
        self.given = {}

    def embed(self, features):
        import torch

        own = features[:, 0, 1]
        if set(own.tolist()) <= self.given.keys():
            return torch.stack([self.given[one] for one in own.tolist()])
        time.sleep(self.seconds)
        os.write(self.log, own.numpy().tobytes())
        others = torch.full_like(own, len(own)), own.double().sum().float().expand(len(own))
        found = torch.stack([own, *others], dim=1)
        self.given = dict(zip(own.tolist(), found, strict=True))
        return found

    def provenance(self):
        return {"weights_digest": self.digest}


def run_rank(root, folder, log, share, seconds=0.0, **options):
    """Extract one rank's share of a dataset."""
    options = {"commit_seconds": 0.0, "num_workers": 1, "batch_size": BATCH, **options}
    return extract(
        EmbeddingCache(root),
        CONFIG,
        to_clips(folder),
        front_end=Steps(),
        make_embedder=lambda: Neighbours(log, seconds),
        share=share,
        **options,
    )


def _rank(root, folder, log, share, seconds, options):
    import multiprocessing

    multiprocessing.set_start_method(None, force=True)
    summary = run_rank(root, folder, log, share, seconds, **options)
    sys.exit(summary.exit_code)


class Ranks:
    """Starts ranks; computed clips are counted over all of them."""

    def __init__(self, root, folder, log):
        self.root, self.folder, self.log = root, folder, log
        self.started = []

    def start(self, rank, world_size, seconds=0.0, **options):
        share = RankShare(rank, world_size, rank, world_size)
        args = (self.root, self.folder, self.log, share, seconds, options)
        process = Process(target=_rank, args=args)
        process.start()
        self.started.append(process)
        return process

    def end(self):
        for process in self.started:
            if process.is_alive():
                process.kill()
            process.join(PATIENCE)

    @property
    def num_computed(self):
        return self.log.stat().st_size // 4 if self.log.exists() else 0

    def wait_until(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)


def finish(*processes, code=0):
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == code


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE)


if __name__ == "__main__":
    _root, _folder, _log = map(Path, sys.argv[1:])
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        # This one is killed when it has stored something.
        (_log.parent / "pid").write_text(str(os.getpid()))
    run_rank(_root, _folder, _log, share_from_environment("torchrun"), seconds=0.1)
