"""A store of its own for each rank: what is left out, what is waited for, and the merge."""

from __future__ import annotations

import logging
import multiprocessing
import sys

import numpy as np
import pytest
import submitit
from extraction.clips import NUM_CLIPS, Steps
from extraction.processes import PATIENCE
from extraction.ranks import BATCH, CONFIG, Neighbours, run_rank

from lmdbcache.cache import read_failures
from lmdbcache.errors import (
    CacheFullError,
    ConfigError,
    ProvenanceMismatchError,
    ReadOnlyCacheError,
    StorageError,
)
from lmdbcache.exchange import merge_stores
from lmdbcache.extraction import (
    RankShare,
    extract,
    plan_extraction,
    staging as staging_module,
    stored_of_share,
)
from lmdbcache.extraction.staging import staging_folder
from lmdbcache.storage import NETWORK_VARIABLE

_context = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "staging"


@pytest.fixture
def stage(cache, clips, folder, tmp_path):
    """Extract one rank's share of ten clips into the staging folder."""

    def stage(rank, world_size, clips=clips, digest="one", **options):
        return extract(
            cache,
            CONFIG,
            clips,
            front_end=Steps(),
            make_embedder=lambda: Neighbours(tmp_path / "log", 0.0, digest),
            share=RankShare(rank, world_size),
            staging=folder,
            **{"num_workers": 0, "batch_size": BATCH, **options},
        )

    return stage


def counts(summary):
    return summary.num_samples, summary.num_cached, summary.num_extracted


def test_each_rank_has_a_store_that_merges_into_the_root(stage, cache, folder, clips):
    """The root isn't touched; merged, it holds what one process would have stored."""
    assert counts(stage(0, 2)) == (6, 0, 6)
    assert counts(stage(1, 2)) == (4, 0, 4)
    assert not cache.root.exists()
    assert merge_stores(cache, [folder]).exit_code == 0
    with cache.reader(CONFIG) as reader:
        merged = dict(reader)
    assert merged.keys() == clips.keys()
    assert sorted(int(value[1]) for value in merged.values()) == [2, 2] + 8 * [4]
    for rank in range(3):
        assert stage(rank, 3).num_extracted == 0


def test_what_root_and_other_ranks_hold_is_left_out(stage, cache, folder, clips, tmp_path):
    """A resume at another world size, batch size or list of clips computes only what is missing."""
    names = sorted(clips)
    with cache.writer(CONFIG) as writer:
        writer.put(names[0], np.ones(3))
    assert counts(stage(0, 2)) == (6, 1, 5)
    few = {name: clips[name] for name in names[:6]}
    assert counts(stage(0, 1, few)) == (6, 4, 2)
    assert counts(stage(0, 1, batch_size=3)) == (10, 8, 2)
    assert counts(stage(0, 3)) == (4, 4, 0)
    (report,) = merge_stores(cache, [folder]).stores
    assert (report.num_new, report.num_same) == (9, 0)


def test_a_rank_runs_once(stage, folder, monkeypatch):
    """A second process of the same rank is refused; one that comes when the first ends isn't."""
    held, go_on = _context.Event(), _context.Event()

    def first():
        embed = Neighbours.embed

        def wait(self, features):
            held.set()
            go_on.wait(PATIENCE)
            return embed(self, features)

        Neighbours.embed = wait
        stage(0, 2)

    process = _context.Process(target=first)
    process.start()
    try:
        assert held.wait(PATIENCE)
        monkeypatch.setattr(staging_module, "_PATIENCE_SECONDS", 0.3)
        with pytest.raises(StorageError, match=f"{process.pid}"):
            stage(0, 2)
        assert counts(stage(1, 2)) == (4, 0, 4)
        # Another world size begins nevertheless; what the old rank hasn't stored is computed.
        assert counts(stage(0, 1)) == (10, 4, 6)
        monkeypatch.setattr(staging_module, "_PATIENCE_SECONDS", 60.0)
        go_on.set()
        assert counts(stage(0, 2)) == (6, 6, 0)
    finally:
        go_on.set()
        process.join(PATIENCE)
    assert process.exitcode == 0


def test_a_killed_rank_leaves_nothing_locked(stage, folder, monkeypatch):
    """Its decoding processes may live on for a moment; the next process of the rank begins."""
    monkeypatch.setattr(staging_module, "_PATIENCE_SECONDS", 0.0)
    started, child = _context.Event(), _context.Queue()

    def hang(self, features):
        started.set()
        child.get()

    def first():
        Neighbours.embed = hang
        stage(0, 2, num_workers=1)

    process = _context.Process(target=first)
    process.start()
    assert started.wait(PATIENCE)
    process.kill()
    process.join(PATIENCE)
    assert counts(stage(0, 2)) == (6, 0, 6)
    child.close()
    child.join_thread()


def test_a_damaged_store_of_another_rank_is_computed_again(stage, folder, caplog):
    """It is named, and stops nobody."""
    stage(0, 2)
    (data,) = folder.rglob("data.mdb")
    data.write_bytes(data.read_bytes()[:5000])
    with caplog.at_level(logging.WARNING, "lmdbcache.extraction"):
        assert counts(stage(0, 1)) == (10, 0, 10)
    assert "rank-0 holds is computed again" in caplog.text


def test_other_weights_than_the_root_are_refused_at_once(stage, cache, folder):
    """Not after hours, by the merge."""
    with cache.writer(CONFIG, provenance={"weights_digest": "another"}) as writer:
        writer.put("other:dog", np.ones(3))
    with pytest.raises(ProvenanceMismatchError, match="weights_digest"):
        stage(0, 2)
    assert not list(folder.rglob("CURRENT"))


def test_changed_clips_are_not_staged(stage):
    """The root would keep the old embedding beside the new one."""
    with pytest.raises(ConfigError, match="recompute_changed"):
        stage(0, 2, recompute_changed=True)


def test_a_url_is_not_a_staging_folder():
    """LMDB needs files."""
    with pytest.raises(ConfigError, match="s3://bucket"):
        staging_folder("s3://bucket/folder")


def test_space_for_the_ranks_of_one_disk(stage, cache, folder, clips, monkeypatch):
    """Ranks of one machine need room for the stores of all."""
    monkeypatch.setattr("lmdbcache.extraction.space.free_bytes", lambda _: 40 << 20)
    for local_world_size, fits in ((1, True), (3, False)):
        options = {"share": RankShare(0, 4, 0, local_world_size), "staging": folder}
        if fits:
            stage(0, 4, **{k: v for k, v in options.items() if k not in ("share", "staging")})
        else:
            with pytest.raises(CacheFullError, match="3 stores"):
                extract(
                    cache,
                    CONFIG,
                    clips,
                    front_end=Steps(),
                    make_embedder=lambda: Neighbours(folder / "log", 0.0),
                    num_workers=0,
                    batch_size=2,
                    **options,
                )


def test_network_folders_need_a_word(stage, folder, monkeypatch):
    """On a shared file system the user says that each store is used by one machine."""
    (folder / "x").mkdir(parents=True)
    network = staging_module.check_local_for_writing.__globals__
    mount = network["Mount"](str(folder), "nfs4", "server:/export")
    monkeypatch.setitem(
        network, "mount_of", lambda path: mount if folder in [path, *path.parents] else None
    )
    with pytest.raises(ReadOnlyCacheError, match=NETWORK_VARIABLE):
        stage(0, 2)
    monkeypatch.setenv(NETWORK_VARIABLE, "1")
    assert counts(stage(0, 2)) == (6, 0, 6)
    assert counts(stage(0, 2)) == (6, 6, 0)
    assert counts(stage(0, 1)) == (10, 6, 4)


def test_plans_of_a_rank(stage, cache, clips, folder):
    """A dry run and an interrupted one tell of this rank's share and its store."""
    stage(0, 2)
    options = {"batch_size": BATCH, "staging": folder}
    plan = plan_extraction(cache, CONFIG, clips, share=RankShare(1, 3), **options)
    assert (plan.num_samples, plan.num_cached, plan.num_missing) == (4, 0, 4)
    assert plan.embedding_shape == (3,)
    assert folder in plan.store.parents
    assert stored_of_share(cache, CONFIG, clips, share=RankShare(2, 3), **options) == (2, 2)


def test_failures_come_along_with_the_merge(stage, cache, folder, clips, tmp_path):
    """Why a clip isn't there is known beside the merged store, too."""
    broken = {**clips, "zz:dog": str(tmp_path / "vanished.wav")}
    stage(0, 2, broken)
    stage(1, 2, broken)
    merge_stores(cache, [folder])
    (failure,) = read_failures(cache.path(CONFIG))
    assert failure.sample_id == "zz:dog"


def _submitted(root, dataset, log, folder):
    environment = submitit.JobEnvironment()
    share = RankShare(environment.global_rank, environment.num_tasks, environment.local_rank)
    return run_rank(root, dataset, log, share, num_workers=0, staging=folder)


def test_submitit(dataset_folder, cache, folder, tmp_path, monkeypatch):
    """Tasks of submitit take their shares."""
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(tasks_per_node=2, timeout_min=3)
    job = executor.submit(_submitted, cache.root, dataset_folder, tmp_path / "log", folder)
    summaries = job.results()
    assert [str(summary).split(":")[0] for summary in summaries] == ["rank 0 of 2", "rank 1 of 2"]
    assert merge_stores(cache, [folder]).exit_code == 0
    assert cache.info(CONFIG).num_embeddings == sum(s.num_extracted for s in summaries) == NUM_CLIPS
