"""Making the page: of any root, in whatever state, at once or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from report.clusters import CONFIG, clustered, store
from storage.damage import data_file, flip_value

from lmdbcache import EmbeddingCache, ReadStatistics, build_report
from lmdbcache.cache import (
    SOURCES_NAME,
    ClipFailure,
    SourceRecorder,
    source_of,
    update_failures,
)
from lmdbcache.errors import ConfigError, MissingDependencyError
from lmdbcache.report import DatasetSplits, collect_report, vectors, write_report


def test_report_of_nothing(cache, tmp_path):
    """An empty root gives a page that says so, and isn't created."""
    report = build_report(cache, out=tmp_path / "r.html")
    assert report.stores == []
    assert "Nothing is stored here yet." in (tmp_path / "r.html").read_text("utf-8")
    assert not cache.root.exists()


def test_facts_are_plain_and_those_of_the_cache(tmp_path):
    """`to_dict` goes through JSON and agrees with the store; a sample is called one."""
    cache = store(tmp_path / "cache", clustered(30, ["dog", "drum"]))
    report = collect_report(cache, max_samples=20)
    facts = json.loads(json.dumps(report.to_dict()))
    (found,) = facts["stores"]
    assert found["info"]["num_embeddings"] == 60
    assert found["num_looked_at"] == len(found["map"]["x"]) == 20
    assert [
        (each["name"], each["num_embeddings"], each["num_bytes"]) for each in found["classes"]
    ] == [
        ("dog", 30, 30 * 16 * 4),
        ("drum", 30, 30 * 16 * 4),
    ]
    assert sum(found["norms"]["counts"]) == 20
    write_report(report, tmp_path / "r.html")
    page = " ".join((tmp_path / "r.html").read_text("utf-8").split())
    assert "a sample of 20 of 60 embeddings" in page
    assert "No figures recorded." in page


def test_failed_clips_are_counted_by_class(tmp_path):
    """Each class has its own failures, even one with nothing stored; the largest class is first."""
    cache = store(tmp_path / "cache", {**clustered(3, ["dog"]), **clustered(4, ["drum"])})
    failed = ["x:dog", "y:dog", "z:cat"]
    update_failures(cache.path(CONFIG), [], [ClipFailure(name, "x.wav", "bad") for name in failed])
    (found,) = collect_report(cache).stores
    assert [(one.name, one.num_embeddings, one.num_failed) for one in found.classes] == [
        ("drum", 4, 0),
        ("dog", 3, 2),
        ("cat", 0, 1),
    ]
    assert found.num_failures == 3


def test_hit_rates_are_shown(cache, tmp_path):
    """Hits and misses by name, and a dash where nothing was looked up."""
    found = {"run 1": ReadStatistics({"dog": (999, 1)}), "none": ReadStatistics({})}
    report = build_report(cache, out=tmp_path / "r.html", hit_rates=found)
    assert report.to_dict()["hit_rates"]["run 1"]["hits"] == 999
    page = (tmp_path / "r.html").read_text("utf-8")
    assert ">99.9<" in page
    assert "No figures recorded" not in page


def test_flipped_value_is_named(tmp_path):
    """A value that doesn't match its checksum is listed; the others are in the report."""
    embeddings = clustered(10, ["dog", "drum"], hidden_size=600)
    cache = store(tmp_path / "cache", embeddings)
    flip_value(data_file(cache, CONFIG), embeddings["video_00003:dog"])
    report = build_report(cache, out=tmp_path / "r.html")
    (found,) = report.stores
    assert not report.is_sound
    assert list(found.unreadable) == ["video_00003:dog"]
    assert found.num_looked_at == 19
    assert "Damaged embeddings" in (tmp_path / "r.html").read_text("utf-8")


def test_leak_is_an_exit_code(tmp_path):
    """A sound store whose copies lie in two splits: named, counted, and exit code 1."""
    embeddings = clustered(10, ["dog", "drum"])
    embeddings["copy:dog"] = embeddings["video_00001:dog"].copy()
    cache = store(tmp_path / "cache", embeddings)
    halves = {"train": ["copy:dog"], "test": ["video_00001:dog"]}
    splits = DatasetSplits("data", "vegas", halves)
    report = build_report(cache, out=tmp_path / "r.html", datasets=[splits])
    assert (report.is_sound, report.num_leaks, report.exit_code) == (True, 1, 1)
    assert collect_report(cache).exit_code == 0
    assert "1 leak across splits" in (tmp_path / "r.html").read_text("utf-8")


def test_files_of_points_are_named(tmp_path):
    """Where the extraction recorded them; a damaged record costs the paths alone."""
    cache = EmbeddingCache(tmp_path / "cache")
    clip = tmp_path / "data" / "dog" / "a b.wav"
    clip.parent.mkdir(parents=True)
    clip.write_bytes(b"sound")
    recorder = SourceRecorder(cache.path(CONFIG), tmp_path / "data")
    with cache.writer(CONFIG, before_commit=recorder) as writer:
        recorder.note("a b:dog", source_of(clip))
        for sample_id, embedding in {**clustered(3, ["dog"]), "a b:dog": np.ones(16)}.items():
            writer.put(sample_id, embedding)
    (found,) = collect_report(cache).stores
    assert found.paths == {"a b:dog": str(clip)}
    (cache.path(CONFIG) / SOURCES_NAME).write_bytes(b"damaged")
    (found,) = collect_report(cache).stores
    assert (found.paths, found.damage) == ({}, None)


def test_store_that_cannot_be_opened(tmp_path):
    """A cut file is called damaged beside a sound store that is shown in full."""
    cache = store(tmp_path / "cache", clustered(10, ["dog"]))
    other = CONFIG.replace(dtype="bfloat16")
    store(cache.root, clustered(10, ["dog"]), other)
    (database,) = cache.path(CONFIG).glob("gen-*/data.mdb")
    database.write_bytes(database.read_bytes()[:100])
    report = build_report(cache, out=tmp_path / "r.html")
    damaged = {each.info.path: each.damage for each in report.stores}
    assert damaged[cache.path(CONFIG)]
    assert damaged[cache.path(other)] is None
    assert "1 of 2 stores is damaged." in (tmp_path / "r.html").read_text("utf-8")


def test_only_a_report_is_written_over(cache, tmp_path):
    """Another file stays as it is unless that is asked for; a report of ours is replaced."""
    out = tmp_path / "thesis.html"
    out.write_text("years of work")
    with pytest.raises(ConfigError):
        build_report(cache, out=out)
    assert out.read_text() == "years of work"
    build_report(cache, out=out, overwrite=True)
    build_report(cache, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.html"]
    for place in (tmp_path, tmp_path / "nowhere" / "r.html"):
        with pytest.raises(ConfigError):
            build_report(cache, out=place)


def test_failed_write_leaves_the_old_report(cache, tmp_path, monkeypatch):
    """The page is renamed into place: when that fails the old one is whole and nothing is left."""
    out = tmp_path / "r.html"
    build_report(cache, out=out)
    before = out.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        build_report(cache, out=out)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize("module", ["jinja2", "plotly", "sklearn"])
def test_missing_package_is_named(cache, tmp_path, monkeypatch, module):
    """Without a package of the extra, one line says what to install, before any work."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=module):
        build_report(cache, out=tmp_path / "r.html")


def test_torch_is_not_loaded(tmp_path):
    """A report needs neither torch nor transformers."""
    store(tmp_path / "cache", clustered(12, ["dog", "drum"]))
    code = (
        "import sys, lmdbcache\n"
        f"cache = lmdbcache.EmbeddingCache({str(tmp_path / 'cache')!r})\n"
        f"lmdbcache.build_report(cache, out={str(tmp_path / 'r.html')!r})\n"
        "assert not {'torch', 'transformers', 'torchaudio'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_max_samples_is_checked(tmp_path):
    """0 embeddings are no sample."""
    with pytest.raises(ConfigError):
        collect_report(EmbeddingCache(tmp_path), max_samples=0)


def test_progress_goes_from_start_to_end(tmp_path):
    """Steps never go back and end at their number."""
    cache = store(tmp_path / "cache", clustered(20, ["dog", "drum"]))
    store(cache.root, clustered(20, ["dog"]), CONFIG.replace(dtype="float16"))
    steps = []
    collect_report(cache, progress=lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps)
    assert steps[-1] == (60, 60)
    assert len({total for _, total in steps}) == 1
    assert np.all(np.array(steps) <= 60)


def test_store_in_ruins_is_given_up(tmp_path, monkeypatch):
    """Where too many embeddings can't be read, the store is called damaged and left."""
    monkeypatch.setattr(vectors, "_MAX_UNREADABLE", 2)
    embeddings = clustered(10, ["dog"], hidden_size=600)
    cache = store(tmp_path / "cache", embeddings)
    for embedding in list(embeddings.values())[:5]:
        flip_value(data_file(cache, CONFIG), embedding)
    (found,) = collect_report(cache).stores
    assert "2 embeddings and maybe more can't be read" in found.damage
    assert found.map == "Nothing to show."
