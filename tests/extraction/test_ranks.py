"""Extractions that several ranks do together: shares, kills, resumes at another world size."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from extraction.clips import NUM_CLIPS, Steps, tone, write
from extraction.ranks import BATCH, CONFIG, Neighbours, Ranks, finish, kill, run_rank, to_clips

from lmdbcache import CacheConfig, EmbeddingCache, model_identity
from lmdbcache.cache import read_failures
from lmdbcache.exchange import merge_stores
from lmdbcache.extraction import RankShare, extract
from lmdbcache.storage import EmbeddingWriter

TESTS = Path(__file__).resolve().parents[1]
MARGIN = 2 * BATCH  # what a kill may cost: the unit under way, and one that isn't committed yet


@pytest.fixture
def ranks(tmp_path, dataset_folder):
    ranks = Ranks(tmp_path / "cache", dataset_folder, tmp_path / "log")
    yield ranks
    ranks.end()


@pytest.fixture(scope="session")
def alone(tmp_path_factory, dataset_folder):
    """What one process stores."""
    folder = tmp_path_factory.mktemp("alone")
    run_rank(folder / "cache", dataset_folder, folder / "log", None, num_workers=0)
    return stored(folder / "cache")


def stored(root):
    cache = EmbeddingCache(root)
    if CONFIG not in cache:
        return {}
    with cache.reader(CONFIG) as reader:
        return dict(reader)


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for sample_id, value in expected.items():
        np.testing.assert_array_equal(found[sample_id], value)


def test_ranks_that_start_at_different_moments(ranks, alone):
    """Whatever is stored when a rank looks, each computes its own units, whole and once."""
    first = ranks.start(0, 3, seconds=0.02)
    ranks.wait_until(lambda: stored(ranks.root))
    second = ranks.start(2, 3)
    finish(first, second)
    finish(ranks.start(1, 3))
    check_equal(stored(ranks.root), alone)
    assert ranks.num_computed == NUM_CLIPS


@pytest.mark.parametrize("is_staged", [False, True])
def test_killed_ranks_resumed_at_other_world_sizes(is_staged, ranks, alone, tmp_path):
    """Nothing committed is lost or computed again; every bit is as if nobody had been killed."""
    chance = random.Random(is_staged)
    options = {"staging": tmp_path / "staging"} if is_staged else {}
    kills = 0
    for world_size, num_killed in ((3, 3), (2, 2), (4, 3)):
        started = [ranks.start(r, world_size, seconds=0.05, **options) for r in range(world_size)]
        before = ranks.num_computed
        ranks.wait_until(lambda n=before: ranks.num_computed > n + 4 * BATCH)
        for process in chance.sample(started, num_killed):
            kill(process)
            kills += 1
        finish(*[process for process in started if process.exitcode is None])
    finish(*[ranks.start(rank, 5, **options) for rank in range(5)])
    if is_staged:
        assert not ranks.root.exists()
        (report,) = merge_stores(EmbeddingCache(ranks.root), [tmp_path / "staging"]).stores
        assert (report.num_new, report.num_same, report.conflicts) == (NUM_CLIPS, 0, [])
    check_equal(stored(ranks.root), alone)
    assert NUM_CLIPS <= ranks.num_computed <= NUM_CLIPS + kills * MARGIN


def test_each_rank_speaks_for_its_share(dataset_folder, tmp_path):
    """Counts and failures of the ranks add up; nobody's failures are lost from the list."""
    clips = to_clips(dataset_folder)
    names = sorted(clips)[:22]
    bad = {names[1], names[5], names[20]}
    for name in bad:
        clips[name] = str(tmp_path / "vanished.wav")
    few = {**{name: clips[name] for name in names}, "no colon": clips[names[0]]}
    summaries = []
    for rank in (1, 2, 0):
        options = {"num_workers": 0, "share": RankShare(rank, 3)}
        summaries.append(_extract(tmp_path, few, **options))
    numbers = [(s.num_samples, s.num_cached, s.num_extracted, len(s.failures)) for s in summaries]
    # Units of four: rank 1 has two of them, rank 2 a whole one and the last of two clips.
    assert numbers == [(8, 0, 7, 1), (6, 0, 5, 1), (9, 0, 7, 2)]
    failed = [{failure.sample_id for failure in s.failures} for s in summaries]
    assert sum(map(len, failed)) == len(set.union(*failed)) == 4
    assert "no colon" in failed[-1]
    store = EmbeddingCache(tmp_path / "cache").path(CONFIG)
    assert {failure.sample_id for failure in read_failures(store)} == bad | {"no colon"}
    assert [str(s).split(":")[0] for s in summaries] == [f"rank {r} of 3" for r in (1, 2, 0)]
    again = _extract(tmp_path, few, num_workers=0, share=RankShare(1, 3))
    assert (again.num_cached, again.num_extracted, again.exit_code) == (7, 0, 1)


def _extract(folder, clips, **options):
    return extract(
        EmbeddingCache(folder / "cache"),
        CONFIG,
        clips,
        front_end=Steps(),
        make_embedder=lambda: Neighbours(folder / "log", 0.0),
        batch_size=BATCH,
        **options,
    )


def test_commits_fall_between_units(dataset_folder, tmp_path, monkeypatch):
    """What is computed in one batch is stored in one transaction, however soon a commit is due."""
    sizes = []
    write = EmbeddingWriter._write

    def note(self, batch):
        sizes.append(len(batch.values))
        return write(self, batch)

    monkeypatch.setattr(EmbeddingWriter, "_write", note)
    clips = dict(sorted(to_clips(dataset_folder).items())[:22])
    _extract(tmp_path, clips, num_workers=0, commit_seconds=0.0)
    assert sizes == [4, 4, 4, 4, 4, 2]


def test_a_stopped_rank_tells_of_its_share(start, dataset_folder, ast_folder, tmp_path):
    """SIGTERM, as batch systems and torchrun send it: what is computed is kept, and how much."""
    often = ("--batch-size", 1, "--commit-seconds", 0, "--num-workers", 1, "--class", "dog")
    fixed = ("--root", tmp_path / "cache", "--model", ast_folder, "--duration", 0.5, *often)
    staging = tmp_path / "staging"
    command = start(
        *("extract", dataset_folder, *fixed, "--rank", 1, "--world-size", 3, "--staging", staging)
    )
    command.wait_until(lambda: list(staging.rglob("CURRENT")))
    command.signal(signal.SIGTERM)
    assert command.wait() == 143
    (line,) = command.err.splitlines()
    found = re.fullmatch(
        r"lmdbcache: rank 1 of 3: interrupted; (\d+) of 40 are stored; run the same command again "
        "to go on",
        line,
    )
    (store,) = {path.parent for path in staging.rglob("CURRENT")}
    assert EmbeddingCache(store.parent).stores()[0].num_embeddings == int(found[1]) > 0


def torchrun(*arguments, num_ranks=2, restarts=0):
    options = ["--standalone", f"--nproc-per-node={num_ranks}", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_restarts_what_was_killed(ranks, alone, tmp_path):
    """A killed rank makes torchrun end and restart all: they commit, and go on where they were."""
    program = TESTS / "extraction" / "ranks.py"
    run = torchrun(program, ranks.root, ranks.folder, ranks.log, restarts=1)
    try:
        pid = tmp_path / "pid"
        ranks.wait_until(
            lambda: run.poll() is not None or (pid.exists() and len(stored(ranks.root)) > 20)
        )
        os.kill(int(pid.read_text()), signal.SIGKILL)
        _, err = run.communicate(timeout=200)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 0, err
    check_equal(stored(ranks.root), alone)
    assert NUM_CLIPS <= ranks.num_computed <= NUM_CLIPS + 2 * MARGIN


def test_torchrun_lets_ranks_finish_beside_one_with_a_broken_clip(
    dataset_folder, ast_folder, tmp_path
):
    """A clip that fails is told by its rank and by the exit code, and stops no other rank."""
    folder = tmp_path / "VEGAS"
    for path in sorted(dataset_folder.rglob("*.wav"))[:24]:
        write(folder / "dog" / "audios" / path.name, tone(len(path.name)))
    (folder / "dog" / "audios" / "a broken one.wav").write_bytes(b"not audio")
    config = CacheConfig(duration=0.5, model_name=model_identity(ast_folder), namespace="vegas")
    cache, share = EmbeddingCache(tmp_path / "cache"), RankShare(0, 2)
    # Rank 0 has nothing left to do but to try that clip again.
    clips = to_clips(folder)
    extract(cache, config, clips, model=ast_folder, batch_size=1, num_workers=0, share=share)
    fixed = ("--root", cache.root, "--model", ast_folder, "--duration", 0.5)
    run = torchrun(
        *("-m", "lmdbcache.cli.main", "extract", folder, "--launcher", "auto", "--class", "dog"),
        *(*fixed, "--batch-size", 1, "--commit-seconds", 0, "--num-workers", 0),
    )
    out, err = run.communicate(timeout=250)
    assert run.returncode == 1, err
    lines = out.splitlines()
    assert any(line.startswith("rank 0 of 2: 13 samples: 12 were cached, 0") for line in lines), out
    assert any(line.startswith("rank 1 of 2: 12 samples: 0 were cached, 12") for line in lines), out
    (told,) = [line for line in lines if line.startswith("failed: a broken one:dog")]
    assert "not readable as audio" in told
    assert "rank 1 of 2: interrupted" not in err
    assert cache.info(config).num_embeddings == 24
