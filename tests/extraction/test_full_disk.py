"""An extraction on a disk that fills up."""

from __future__ import annotations

import pytest
from small_disks import empty, fill, small_disk

from lmdbcache import EmbeddingCache
from lmdbcache.cache import read_failures
from lmdbcache.embedders import ASTEmbedder, find_checkpoint
from lmdbcache.errors import CacheFullError

_RESERVE = 16 << 20  # a commit wants this much free beyond what it writes


@pytest.fixture
def disk(tmp_path):
    """A file system of 48 MiB."""
    with small_disk(tmp_path / "disk", 48) as folder:
        yield folder


@pytest.fixture
def cache(disk):
    return EmbeddingCache(disk / "cache")


def test_disk_that_fills_up(run, stored, cache, config, clips, disk, ast_folder):
    """The run ends in one line, what was committed is readable, and the next run goes on."""
    config = config.replace(output="last_hidden_state")

    class Filling(ASTEmbedder):
        """Another program takes the space while this one computes."""

        def __init__(self, *args):
            super().__init__(*args)
            self.seen = set()  # a first clip comes several times, to be compared

        def embed(self, features):
            self.seen.add(features.numpy().tobytes())
            if len(self.seen) == 4:
                fill(disk, _RESERVE + (32 << 10))
            return super().embed(features)

    with pytest.raises(CacheFullError) as caught:
        run(
            clips,
            config,
            batch_size=1,
            commit_seconds=0,
            make_embedder=lambda: Filling(find_checkpoint(ast_folder), "last_hidden_state"),
        )
    assert "\n" not in str(caught.value)
    assert "ree space" in str(caught.value)
    kept = len(stored(config))
    assert 0 < kept < len(clips)
    assert cache.verify(config).is_sound
    empty(disk)
    summary = run(clips, config)
    assert (summary.num_cached, summary.num_extracted) == (kept, len(clips) - kept)


@pytest.mark.parametrize("leave", [0, 4096, 65536, 1 << 20])
def test_disk_that_is_full_already(run, stored, cache, config, clips, disk, leave):
    """Nothing can be written at all, the list of failures neither: still the error that says so."""
    fill(disk, leave)
    with pytest.raises(CacheFullError) as caught:
        run({**clips, "vanished:dog": "vanished.wav"})
    assert "\n" not in str(caught.value)
    empty(disk)
    assert run(clips).num_extracted == len(clips)
    assert stored().keys() == clips.keys()


def test_no_room_for_the_list_of_failures(run, stored, cache, clips, disk, config, caplog):
    """The list of failed clips is a convenience: a full disk for it ends nothing."""
    run(clips)
    stored_in = cache.path(config)

    class Filling:
        """A front end that takes the last byte when it is asked what it is."""

        min_samples = 1

        def provenance(self):
            fill(disk, 0)
            return {}

    vanished = {**clips, "vanished:dog": "vanished.wav"}
    summary = run(vanished, front_end=Filling(), make_embedder=lambda: None)
    assert [failure.sample_id for failure in summary.failures] == ["vanished:dog"]
    assert "failures.json can't be written" in caplog.text
    assert stored().keys() == clips.keys()
    empty(disk)
    assert len(run(vanished).failures) == 1
    assert len(read_failures(stored_in)) == 1
