"""A folder as it comes from the internet: each bad clip is named, each good one stored."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from extraction.clips import tone, write, write_bad, write_good

from lmdbcache.cache import FAILURES_NAME, read_failures


@pytest.fixture
def good(tmp_path):
    return write_good(tmp_path)


@pytest.fixture
def bad(tmp_path):
    return write_bad(tmp_path)


def paths_of(bad):
    return {sample_id: path for sample_id, (path, _) in bad.items()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_bad_clip_is_named_and_each_good_one_stored(
    run, stored, cache, config, good, bad, num_workers
):
    """Bad clips come with path and reason and aren't cached; their neighbours in a batch are."""
    summary = run({**good, **paths_of(bad)}, num_workers=num_workers)
    failures = {failure.sample_id: failure for failure in summary.failures}
    assert failures.keys() == bad.keys()
    for sample_id, (path, reason) in bad.items():
        assert failures[sample_id].path == path
        assert path in failures[sample_id].reason
        assert reason in failures[sample_id].reason
        assert "\n" not in failures[sample_id].reason
    assert stored().keys() == {sample_id.replace("i\u0308", "\u00ef") for sample_id in good}
    assert (summary.num_extracted, summary.num_silent) == (len(good), 1)
    assert summary.exit_code == 1
    assert sorted(read_failures(cache.path(config)), key=str) == sorted(summary.failures, key=str)


def test_unusual_clips_match_their_usual_form(run, stored, good):
    """8 kHz to 96 kHz, 24 bit, float and flac give nearly what the 16-bit clip gives."""
    run(good)
    embeddings = stored()
    for file_id in ("24 bit", "float"):
        np.testing.assert_allclose(embeddings[f"{file_id}:dog"], embeddings["flac:dog"], atol=0.02)
    assert not np.array_equal(embeddings["silence:dog"], embeddings["flac:dog"])


def test_failed_clips_are_tried_again_until_they_are_repaired(run, stored, cache, config, bad):
    """The next run tries them again; a repaired file leaves the list, and the list itself goes."""
    paths = paths_of(bad)
    assert len(run(paths).failures) == len(bad)
    assert config not in cache
    write(cache.root.parent / "text.wav", tone())
    again = run(paths)
    assert again.num_extracted == 1
    assert "text:dog" in stored()
    assert "text:dog" not in {failure.sample_id for failure in read_failures(cache.path(config))}
    assert len(again.failures) == len(bad) - 1
    (cache.root.parent / "folder.wav").rmdir()
    for path in paths.values():
        write(cache.root.parent / Path(path).name, tone())
    assert run(paths).exit_code == 0
    assert not (cache.path(config) / FAILURES_NAME).exists()


def test_a_run_over_other_clips_keeps_the_list(run, cache, config, good, bad):
    """What another selection of clips couldn't use stays in the list."""
    some = dict(list(good.items())[:2])
    run(some)
    run(paths_of(bad))
    run(good)
    assert {failure.sample_id for failure in read_failures(cache.path(config))} == bad.keys()


def test_names_that_are_not_utf8(run, cache, config, tmp_path):
    """A sample id with bytes that aren't UTF-8 fails by name; a path with them is fine."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/latin\xe9.wav")
    samples = tone()
    write(tmp_path / "plain.wav", samples)
    (tmp_path / "plain.wav").rename(path)
    summary = run({"latin\udce9:dog": path, "renamed:dog": path})
    assert summary.num_extracted == 1
    (failure,) = summary.failures
    assert failure.path == path
    assert "UTF-8" in failure.reason
    assert json.loads((cache.path(config) / FAILURES_NAME).read_text("ascii"))
    json.dumps(summary.to_dict()).encode("ascii")
    str(summary)


@pytest.mark.parametrize("sample_id", ["no-class", ":dog", "x:", "a\0b:dog", "x" * 600 + ":dog"])
def test_unusable_sample_ids(run, clips, sample_id):
    """A sample id that can't be stored is a failed clip, not the end of the run."""
    path = next(iter(clips.values()))
    summary = run({sample_id: path, **clips})
    assert summary.num_extracted == len(clips)
    assert [(failure.sample_id, failure.path) for failure in summary.failures] == [
        (sample_id, path)
    ]


def drop_capabilities():
    """Make this thread obey permissions, root's too."""
    if sys.platform == "linux":
        version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
        assert ctypes.CDLL(None).capset(version_3, (ctypes.c_uint32 * 6)()) == 0


def test_unreadable_clip(run, clips, tmp_path):
    """A file without permission fails with that reason."""
    path = write(tmp_path / "secret.wav", tone())
    path.chmod(0)
    run(clips)  # imports what it needs while that is allowed
    summaries = []

    def work():
        drop_capabilities()
        summaries.append(run({"secret:dog": str(path)}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "no permission" in summaries[0].failures[0].reason


def test_no_torch_for_the_list_of_failures():
    """Reading the list needs no torch: `lmdbcache info` shows it."""
    code = "import sys, lmdbcache.extraction.summary; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"failures": [1]}', '{"failures": [{"a": 1}]}']
)
def test_damaged_list_is_made_anew(run, cache, config, clips, bad, content):
    """Whatever stands in failures.json, the next run writes it anew."""
    store = cache.path(config)
    run(dict(list(clips.items())[:1]))
    (store / FAILURES_NAME).write_text(content)
    assert read_failures(store) == []
    run(paths_of(bad))
    assert len(read_failures(store)) == len(bad)


def test_nothing_stored_leaves_no_folder(run, cache, config, bad):
    """If every clip fails there is no store, nor a folder that looks like one."""
    summary = run({f"{n}{i}": path for n in range(3) for i, path in paths_of(bad).items()})
    assert len(summary.failures) == 3 * len(bad)
    assert not cache.root.exists()
    assert "more in `failures`" in str(summary)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_silent_and_cancelled_clips_are_named(run, stored, tmp_path, num_workers):
    """They are stored as any other, and listed in the summary, its JSON and its text."""
    left, right = tone(300), tone(500)
    written = {
        "opposite": np.stack([left, -left], 1),
        "nearly opposite": np.stack([left, -0.98 * left], 1),
        "opposite in pairs": np.stack([left, right, -left, -right], 1),
        "one side": np.stack([left, 0 * left], 1),
        "wide": np.stack([left, -0.5 * left], 1),
        "one of eight": np.stack([left, *[0 * left] * 7], 1),
        "stereo": np.stack([left, right], 1),
        "mono": left,
        "silent": 0 * left,
        "silent stereo": np.stack([0 * left] * 2, 1),
    }
    clips = {
        f"{name}:dog": str(write(tmp_path / f"{name}.wav", samples, subtype="FLOAT"))
        for name, samples in written.items()
    }
    summary = run(clips, num_workers=num_workers)
    assert stored().keys() == clips.keys()
    cancelled = ["nearly opposite:dog", "opposite in pairs:dog", "opposite:dog"]
    assert list(summary.cancelled) == cancelled
    # What cancels exactly is embedded as silence.
    silent = ["opposite:dog", "silent stereo:dog", "silent:dog"]
    assert list(summary.silent) == silent
    assert summary.num_silent == 3
    found = json.loads(json.dumps(summary.to_dict()))
    assert (found["silent"], found["cancelled"], found["num_silent"]) == (silent, cancelled, 3)
    assert all(name in str(summary) for name in (*silent, *cancelled))
    again = run(clips)
    assert again.silent == again.cancelled == ()
