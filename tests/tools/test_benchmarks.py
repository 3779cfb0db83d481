"""The benchmark code runs; what it measures is not asserted."""

from __future__ import annotations

import sys

import bench
import bench_exports
import bench_merge
import bench_peers
import bench_push
import numpy as np
import peer_adapter
import pytest
import torch


@pytest.fixture
def _restores_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_restores_threads")
def test_tables_of_a_quick_run_are_complete(monkeypatch, capsys):
    """Every table has its rows, and a quick run writes no document."""
    before = bench.DOCUMENT.read_bytes()
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick"])
    bench.main()
    text = capsys.readouterr().out
    for words in (
        "### P:",
        "### H:",
        "| write, s |",
        "| epoch, µs/sample |",
        "| DataLoader, 2 workers, µs/sample |",
        "| cold page cache, open + epoch, s |",
        "| VEGASDataset, batches of 64 |",
        "| CachedAudioDataset of Hugging Face, batches of 256 |",
        "| bare model on ready features |",
        "| log-mel |",
    ):
        assert words in text
    assert bench.DOCUMENT.read_bytes() == before


@pytest.mark.filterwarnings("ignore:lance is not fork-safe")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of webdataset
def test_the_table_of_exports_is_complete(monkeypatch):
    """Every way reads what it says; the document has the same rows."""
    monkeypatch.setattr(bench_exports, "SIZE", 8)
    sizes, figures = bench_exports.measure(300, 1)
    assert sizes.keys() == {"cache", *bench_exports.FORMATS}
    text = bench_exports.DOCUMENT.read_text("utf-8")
    for way in (*bench_exports.READINGS, *(f"export to {kind}" for kind in bench_exports.FORMATS)):
        assert figures[way][0] > 0
        assert f"| {way} |" in text


@pytest.mark.parametrize("name", ["Adapter", "PrefetchAdapter"])
def test_peer_adapter_gives_back_what_it_was_given(tmp_path, name):
    """Singles, batches and both loaders of the adapter agree with what was written."""
    keys = [f"video_{i:05d}:{i % 10}" for i in range(40)]
    written = np.random.default_rng(0).random((40, 8), dtype=np.float32)
    adapter = getattr(peer_adapter, name)(tmp_path, keys, (8,))
    adapter.write(zip(keys, written, strict=True))
    adapter.open()
    assert np.array_equal(adapter.get(7), written[7])
    assert np.array_equal(adapter.get_batch([3, 1]), written[[3, 1]])
    for workers in (0, 2):
        batches = list(adapter.loader(16, workers, 0))
        rows = torch.cat(batches).numpy()
        assert sorted(map(bytes, rows)) == sorted(map(bytes, written))
    adapter.reader.close()


def test_the_benchmark_of_merging_runs(monkeypatch, capsys):
    """A quick run has a row for each shape."""
    monkeypatch.setattr(sys, "argv", ["bench_merge.py", "--quick"])
    bench_merge.main()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["200", "8"]


def test_the_benchmark_of_push_runs(capsys, monkeypatch, tmp_path):
    """It pushes, adds, and finds all of it sound."""
    monkeypatch.setattr(sys, "argv", ["bench_push.py", f"file://{tmp_path}/shared", "--quick"])
    bench_push.main()
    out = capsys.readouterr().out
    assert all(f"\n{what} " in out for what in ("push", "pull", "copy to there", "verify"))


@pytest.mark.parametrize("way", bench_peers.WAYS, ids=lambda way: way.__name__)
def test_each_way_of_the_comparison_gives_back_what_it_was_given(tmp_path, way):
    """A batch of two shapes comes back bit for bit, as a tensor, in the order asked for."""
    for number, shape in enumerate([(8,), (5, 4)]):
        work = bench_peers.Workload("P", 20, shape, 4, 1)
        written = np.random.default_rng(0).random((20, *shape), dtype=np.float32)
        folder = tmp_path / str(number)
        folder.mkdir()
        made = way(folder, work)
        made.write(written)
        read = made.open()([7, 1, 19])
        assert isinstance(read, torch.Tensor)
        assert np.array_equal(read, written[[7, 1, 19]])


@pytest.mark.usefixtures("_restores_threads")
def test_the_comparison_has_a_row_for_each_way_and_a_chart(monkeypatch):
    """A quick run measures every column in fresh processes and draws, and writes nothing."""
    monkeypatch.setattr(bench_peers, "WAYS", bench_peers.WAYS[:2])
    before = bench_peers.DOCUMENT.read_bytes()
    lines = bench_peers.tables(quick=True).splitlines()
    assert [line.count("|") for line in lines if line.startswith("| lmdbcache")] == [7, 7]
    assert bench_peers.DOCUMENT.read_bytes() == before
