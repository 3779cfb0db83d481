"""Files that changed, moved or vanished after their embeddings were stored."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lmdbcache.cache import (
    SOURCES_NAME,
    adopt_sources,
    changed_clips,
    check_sources,
    num_suspects,
    read_source,
    recorded_sources,
    source_of,
    sources as files,
)


def later(path, seconds=10):
    """Move a file's time on."""
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + seconds * 10**9))


def keep_time(path, content):
    """Write other content under the same time."""
    found = os.stat(path)
    Path(path).write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def states(store, **options):
    return {f.sample_id: f.state for f in check_sources(store, **options).found}


def test_unchanged(store, clips):
    """Right after the extraction every file is as it was."""
    report = check_sources(store)
    assert report.is_trusted
    assert report.found == ()
    assert report.by_class == {"dog": {"unchanged": 6}, "drum": {"unchanged": 6}}
    assert num_suspects(store, clips) == 0
    assert changed_clips(store, clips) == []


def test_each_kind_of_change_is_told_apart(store, clips):
    """Touched, changed in place, truncated, deleted, replaced by a link or by a folder."""
    ids = list(clips)
    later(clips[ids[0]])
    Path(clips[ids[1]]).write_bytes(b"CONTENT 1")  # of the same length
    later(clips[ids[1]])
    Path(clips[ids[2]]).write_bytes(b"cont")
    Path(clips[ids[3]]).unlink()
    Path(clips[ids[4]]).unlink()
    Path(clips[ids[4]]).symlink_to(clips[ids[0]])
    Path(clips[ids[5]]).unlink()
    Path(clips[ids[5]]).symlink_to("nowhere")
    Path(clips[ids[6]]).unlink()
    Path(clips[ids[6]]).mkdir()
    Path(clips[ids[7]]).rename(clips[ids[7]] + ".bak")
    Path(clips[ids[7]]).symlink_to(clips[ids[7]] + ".bak")  # what it leads to is the same file
    expected = dict.fromkeys(ids[:7], "changed")
    expected[ids[0]] = "touched"
    expected |= dict.fromkeys((ids[3], ids[5], ids[6]), "vanished")
    assert states(store) == expected
    report = check_sources(store)
    assert not report.is_trusted
    assert (report.num("unchanged"), report.num("changed"), report.num("vanished")) == (5, 3, 3)
    assert report.ids("changed") == [ids[1], ids[2], ids[4]] == changed_clips(store, clips)
    assert num_suspects(store, clips) == 7
    assert report.by_class["dog"]["changed"] == 1


def test_a_change_behind_size_and_time_needs_the_hash(store, clips):
    """Size and time are trusted; `rehash` trusts nothing."""
    sample_id = next(iter(clips))
    keep_time(clips[sample_id], b"CONTENT 0")
    assert states(store) == {}
    assert states(store, rehash=True) == {sample_id: "changed"}


def test_moved_dataset(store, tmp_path):
    """With the new folder given, a dataset that was moved is found and trusted."""
    (tmp_path / "data").rename(tmp_path / "moved")
    assert set(states(store).values()) == {"vanished"}
    assert states(store, data_dir=tmp_path / "moved") == {}


def test_copied_dataset(store, tmp_path):
    """A copy with new times is touched only; adopting it records the new times."""
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.wav"):
        later(path)
    shutil.rmtree(tmp_path / "data")
    assert set(states(store, data_dir=tmp_path / "copy").values()) == {"touched"}
    copies = {
        f"{path.stem}:{path.parent.name}": str(path) for path in (tmp_path / "copy").rglob("*.wav")
    }
    assert adopt_sources(store, copies, tmp_path / "copy") == 12
    assert states(store) == {}
    assert num_suspects(store, copies) == 0


def test_files_outside_of_the_root_keep_their_path(fill, clips, cache, config, tmp_path):
    """What doesn't lie below the dataset's folder isn't looked for there."""
    fill(clips, root=tmp_path / "elsewhere")
    assert states(cache.path(config), data_dir=tmp_path / "moved") == {}


def test_paths_that_are_relative_are_found_from_anywhere(fill, clips, cache, config, monkeypatch):
    """A path is recorded in full, whatever the working directory was."""
    folder = Path(next(iter(clips.values()))).parent
    monkeypatch.chdir(folder)
    inside = {i: Path(p).name for i, p in clips.items() if Path(p).parent == folder}
    fill(inside, root="")
    monkeypatch.chdir("/")
    assert check_sources(cache.path(config)).num("unchanged") == len(inside)


def test_old_store_adopts_the_files_that_are_there(cache, config, clips, tmp_path):
    """Embeddings without a record are unknown until the present files are adopted."""
    with cache.writer(config) as writer:
        for sample_id in clips:
            writer.put(sample_id, np.ones(8))
        writer.put("other:cat", np.ones(8))
    store = cache.path(config)
    assert check_sources(store).num("unknown") == 13
    assert check_sources(store).is_trusted
    assert not (store / SOURCES_NAME).exists()
    assert adopt_sources(store, clips, tmp_path / "data") == 12
    assert states(store) == {"other:cat": "unknown"}
    assert adopt_sources(store, clips, tmp_path / "data") == 0


def test_adopting_leaves_what_changed(store, clips):
    """A file that differs from its record isn't made right by adopting it."""
    sample_id = next(iter(clips))
    Path(clips[sample_id]).write_bytes(b"something else")
    assert adopt_sources(store, clips) == 0
    assert states(store) == {sample_id: "changed"}


def test_an_embedding_written_by_somebody_else_has_no_source(store, cache, config, clips):
    """A record speaks for the embedding that it was made for, and for no later one."""
    sample_id = next(iter(clips))
    with cache.writer(config, on_duplicate="overwrite") as writer:
        writer.put(sample_id, np.zeros(8))
    assert states(store) == {sample_id: "unknown"}


def test_overwriting_moves_the_record_on(store, fill, clips):
    """An embedding computed again belongs to the file that is there now; no record piles up."""
    path = Path(next(iter(clips.values())))
    for number in range(5):
        path.write_bytes(b"x" * number)
        assert len(states(store)) == 1
        fill(clips, on_duplicate="overwrite")
        assert states(store) == {}
    assert (store / SOURCES_NAME).stat().st_size < 20_000


def test_cleared_and_refilled(store, fill, clips, cache, config):
    """The records go with the store and come back with the next."""
    assert cache.size(config) >= (store / SOURCES_NAME).stat().st_size
    cache.clear(config)
    assert not store.exists()
    fill(dict(list(clips.items())[:3]))
    assert check_sources(store).by_class == {"dog": {"unchanged": 1}, "drum": {"unchanged": 2}}


def test_compaction_and_repair_leave_the_records_alone(store, cache, config):
    """They move embeddings as they are, so their records stay true."""
    before = (store / SOURCES_NAME).read_bytes()
    cache.compact(config)
    cache.repair(config)
    assert cache.verify(config).is_sound
    assert (store / SOURCES_NAME).read_bytes() == before
    assert states(store) == {}
    assert len(cache.stores()) == 1


def test_large_files_have_no_digest(monkeypatch, tmp_path, fill, cache, config):
    """Nobody reads an hour of audio for five seconds of it: size and time have to do."""
    monkeypatch.setattr(files, "LARGEST_DIGESTED_BYTES", 4)
    path = tmp_path / "long.wav"
    path.write_bytes(b"12345")
    fill({"a:dog": str(path)})
    assert states(cache.path(config), rehash=True) == {}
    later(path)
    assert states(cache.path(config)) == {"a:dog": "changed"}


def test_content_comes_with_the_record_unless_it_is_large(monkeypatch, tmp_path):
    """A worker keeps small files for decoding; a large one's digest is the same, its bytes go."""
    path = tmp_path / "clip.wav"
    path.write_bytes(bytes(range(256)) * 2000)
    source, content = read_source(path)
    assert content == path.read_bytes()
    monkeypatch.setattr(files, "LARGEST_KEPT_BYTES", 1000)
    assert read_source(path) == (source, None)
    assert read_source(content)[1] is None


def test_bytes_have_a_digest_and_no_file(fill, cache, config):
    """A clip out of a table is recorded by its bytes; there is no file to look at."""
    assert source_of(b"abc").size == 3
    fill({"a:dog": b"abc"})
    store = cache.path(config)
    ((_, _, source),) = recorded_sources(store)
    assert source == source_of(b"abc")
    assert states(store) == {"a:dog": "unknown"}
    assert num_suspects(store, {"a:dog": b"abc"}) == 0


@pytest.mark.parametrize("name", ["pipe", "folder", "nothing", "nul\0"])
def test_what_is_no_file_has_no_source(tmp_path, name):
    """A pipe isn't waited for; decoding says what is wrong with the rest."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert source_of(f"{tmp_path}/{name}") is None
    assert source_of(7) is None


def test_names_that_are_not_utf8(tmp_path, fill, cache, config):
    """Any name that a file system allows is found again."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    path = os.fsdecode(folder + b"/a b%20\xff.wav")
    Path(path).write_bytes(b"x")
    fill({"a:dog": path}, root=os.fsdecode(folder))
    assert check_sources(cache.path(config)).num("unchanged") == 1


def test_a_file_of_the_same_time_and_another_size_has_changed(store, clips):
    """Whatever restored its time."""
    ids = list(clips)
    keep_time(clips[ids[2]], b"longer than it was before")
    keep_time(clips[ids[5]], b"")
    assert states(store) == {ids[2]: "changed", ids[5]: "changed"}
