"""What a plan warns of: figures by the formulas of docs/scaling.md, and a way out of each."""

from __future__ import annotations

import math
import mmap

import bench_scaling
import numpy as np
import pytest

from lmdbcache.extraction import plan_extraction, scaling
from lmdbcache.extraction.scaling import Machine, growth_of, speed_warnings, warnings_for
from lmdbcache.extraction.space import estimated_bytes

POOLED, HIDDEN = (768,), (1214, 768)
GIB, TIB = 1 << 30, 1 << 40
WORKSTATION = Machine(memory=24 * GIB, room=16 * TIB)


def growth(num_samples, shape, **options):
    names = [f"clip_{number:09d}:dog" for number in range(100)]
    each = estimated_bytes(names, shape, "float32") / len(names)
    return growth_of(num_samples, int(num_samples * each), 4 * math.prod(shape), **options)


@pytest.mark.parametrize(
    ("num_samples", "shape", "names"),
    [
        (28_109, POOLED, []),
        (2_000_000, POOLED, []),
        (20_000_000, POOLED, ["clip_list", "page_cache", "sample_list"]),
        (2_000, HIDDEN, []),
        (28_109, HIDDEN, ["page_cache"]),
        (500_000, HIDDEN, ["page_cache", "page_tables", "transfer", "check", "writer"]),
    ],
)
def test_what_breaks_first(num_samples, shape, names):
    """On a machine with 24 GiB of memory, in the order in which it breaks."""
    found = warnings_for(growth(num_samples, shape), WORKSTATION)
    assert [warning.name for warning in found] == names


@pytest.mark.parametrize(
    ("machine", "name", "way_out"),
    [
        (Machine(24 * GIB, 150 * GIB), "second_copy", "--root"),
        (Machine(24 * GIB, 16 * TIB), "page_cache", "--output"),
        (Machine(4 * GIB, 16 * TIB), "page_tables", "make_dataloader"),
    ],
)
def test_a_warning_names_the_figure_and_a_way_out(machine, name, way_out):
    """And says what is exceeded by how much, in JSON too."""
    found = warnings_for(growth(28_109, HIDDEN), machine, smaller="Store a mean (--output), ")
    (warning,) = [warning for warning in found if warning.name == name]
    assert way_out in warning.message
    assert str(warning).endswith("(docs/scaling.md)")
    content = warning.to_dict()
    assert content["figure"] > content["limit"] > 0
    assert (content["unit"], content["see"]) == ("bytes", "docs/scaling.md")


def test_only_what_is_missing_is_written():
    """A store that is nearly full needs no second writer."""
    whole, rest = growth(500_000, HIDDEN), growth(500_000, HIDDEN, num_written=1000)
    assert whole.write_seconds > 3600 > rest.write_seconds
    assert "writer" not in [warning.name for warning in warnings_for(rest, WORKSTATION)]


def test_what_does_not_fit_at_all_needs_no_second_copy():
    """That is the plan's own error, and not a warning beside it."""
    found = warnings_for(growth(28_109, HIDDEN), Machine(TIB, 50 * GIB))
    assert found == ()


def test_a_model_that_is_faster_than_the_writer():
    """Hidden states at GPU speed wait for the disk; pooled ones don't."""
    assert speed_warnings(HIDDEN, "float32", 20) == ()
    (warning,) = speed_warnings(HIDDEN, "float32", 400)
    assert (warning.name, warning.unit) == ("speed", "bytes/s")
    assert warning.figure == 400 * 1214 * 768 * 4
    assert "--staging" in warning.message
    assert "lmdbcache merge" in warning.message
    assert speed_warnings(POOLED, "float32", 400) == ()


def test_a_plan_has_its_warnings(cache, config, clips, ast_folder, monkeypatch):
    """By the memory and the disk of this machine, for what all clips take."""
    plan = plan_extraction(cache, config, clips, model=ast_folder)
    assert plan.warnings == ()
    assert plan.to_dict()["warnings"] == []
    monkeypatch.setattr(scaling, "memory_limit", lambda: 4096)
    plan = plan_extraction(cache, config, clips, model=ast_folder)
    assert {"page_cache", "clip_list"} <= {warning.name for warning in plan.warnings}
    (content,) = [w for w in plan.to_dict()["warnings"] if w["name"] == "page_cache"]
    assert content["figure"] == plan.bytes_for_all
    assert content["limit"] == 4096


def test_a_plan_of_an_unknown_shape_has_none(cache, clips, config, tmp_path, monkeypatch):
    """Without the model nothing is known, and nothing is warned of."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(scaling, "memory_limit", lambda: 4096)
    plan = plan_extraction(cache, config.replace(model_name="nobody/nothing"), clips)
    assert (plan.bytes_for_all, plan.warnings) == (None, ())


def test_what_is_stored_counts_as_room(cache, config, clips, ast_folder, monkeypatch):
    """A store that is complete has had its room; a second copy needs as much again."""
    with cache.writer(config) as writer:
        writer.put_batch(list(clips), np.ones((len(clips), 64), np.float32))
    monkeypatch.setattr("lmdbcache.extraction.pipeline.free_bytes", lambda _: 1 << 10)
    plan = plan_extraction(cache, config, clips, model=ast_folder)
    assert plan.fits
    assert [warning.name for warning in plan.warnings] == ["second_copy"]
    assert plan.warnings[0].limit == 1 << 10


@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="the table is for pages of 4 KiB")
def test_the_document_has_the_table_of_the_formulas():
    """docs/scaling.md says what the functions that warn compute."""
    assert bench_scaling.growth_table() in bench_scaling.DOCUMENT.read_text(encoding="utf-8")
