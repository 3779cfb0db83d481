"""Two million embeddings of shape (768,), 8.5 GB: each thing that is done with a store, in turn.

Memory is asserted, which others on the machine don't move; times are printed at the end. What
several sizes take is in docs/scaling.md.
"""

from __future__ import annotations

import shutil

import pytest
from bench_scaling import best, bytes_each, run_step, store_in

pytestmark = pytest.mark.stress
NUM_SAMPLES = 2_000_000
ROOM = 28 << 30  # the store twice, and what is pushed of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with room, emptied afterwards: pytest keeps the last three."""
    folder = tmp_path_factory.mktemp("two_million")
    if shutil.disk_usage(folder).free < ROOM:
        pytest.skip(f"needs {ROOM >> 30} GiB of disk")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def root(folder):
    """The store."""
    return folder / "cache"


@pytest.fixture
def step(root, record_property):
    """Run one step in a process of its own; its figures are printed at the end."""

    def step(name, *arguments, times=1, root=root):
        runs = [run_step(name, root, NUM_SAMPLES, *map(str, arguments)) for _ in range(times)]
        figures = best(runs)
        line = ", ".join(f"{what} {value:.3g}" for what, value in figures.items())
        record_property("faults", (f"{name}: {line}", {}))
        return figures

    return step


def test_written(step, root):
    """One writer, as many bytes as foretold, and no more memory than for a small store."""
    figures = step("write")
    assert figures["bytes per embedding"] == pytest.approx(bytes_each((768,)), rel=0.01)
    assert figures["private peak, MiB"] < 64


def test_opened_and_read_at_once(step):
    """The first sample, the first batches: no walk over the store, no memory that grows with it."""
    assert step("first_reads", times=3)["private, MiB"] < 24
    step("singles")
    assert step("list_stores", times=3)["private, MiB"] < 1


def test_table_of_places(step):
    """It is made once, and costs the processes that read it nothing but how they count reads."""
    made, read = step("table"), step("table")
    assert made["kept file, MB"] == read["kept file, MB"] < 80
    assert read["private, MiB"] < 48
    assert made["private, MiB"] < 96


def test_epoch_of_a_part_and_of_all(step):
    """By position, in random order and front to back; page tables as the formula says."""
    step("epoch", 200_000)
    assert step("page_tables")["MiB per GiB"] < 4.2
    assert step("select_all")["bytes per id"] < 120


def test_half_of_it_dropped_from_the_page_cache(step):
    """As of a store twice as large as the memory; asked ahead it is read no slower than once."""
    step("evicted", 0.5)
    asked = step("evicted", 0.5, "asked")
    assert asked["left in the page cache"] < 0.7


def test_looked_at_as_a_whole(step):
    """Coverage of all ids, `info`, all checksums, `verify`: linear, and with bounded memory."""
    assert step("coverage")["peak bytes per id"] < 100
    assert step("info")["private peak, MiB"] < 8
    assert step("checksums")["private peak, MiB"] < 8
    assert step("verify")["peak bytes per id"] < 250


def test_compacted(step, root):
    """One generation is left, no larger, with all that was there, and opened at once."""
    cache, config = store_in(str(root))
    before = cache.size(config)
    assert step("compact")["private peak, MiB"] < 16
    assert len(list(root.rglob("data.mdb"))) == 1
    assert cache.size(config) < 1.01 * before
    assert step("first_reads", times=2)["private, MiB"] < 24


def test_merged_into_another_root(step, folder):
    """All of it once, with bounded memory; the second time nothing is written."""
    merged = folder / "merged"
    assert step("merge", merged)["new"] == NUM_SAMPLES
    assert step("merge", merged)["new"] == 0
    figures = step("first_reads", root=merged)
    assert figures["private, MiB"] < 24
    shutil.rmtree(merged)


def test_pushed_and_pulled(step, folder):
    """All of it once each way, and nothing the second time; the values arrive as they were."""
    place, pulled = folder / "place", folder / "pulled"
    pushed = step("push", place)
    assert pushed["new"] == NUM_SAMPLES
    assert pushed["there, bytes each"] < 1.03 * 4 * 768
    assert step("push", place)["new"] == 0
    assert step("pull", place, root=pulled)["new"] == NUM_SAMPLES
    assert step("pull", place, root=pulled)["new"] == 0
    step("first_reads", root=pulled)
    assert step("verify", root=pulled)["peak bytes per id"] < 250
