"""Writing: when a commit happens, what is skipped, and what an exception leaves."""

from __future__ import annotations

import gc
import pickle
import threading
import warnings

import numpy as np
import pytest
from storage.child_processes import in_fork, peer_process, write

from lmdbcache import CacheConfig
from lmdbcache.errors import (
    ConfigError,
    DuplicateSampleError,
    IntegrityError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
    ProvenanceMismatchError,
    WriterClosedError,
)

ONES = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("limit", "commits_after"),
    [({"commit_records": 3}, 3), ({"commit_bytes": 40}, 3), ({"commit_seconds": 0.0}, 1)],
)
def test_commit_happens_by_count_bytes_and_time(cache, config, limit, commits_after):
    """A writer commits by itself as soon as one of its limits is reached, not before."""
    with cache.writer(config, **limit) as writer:
        for number in range(commits_after):
            assert writer.num_written == 0
            writer.put(f"{number}:x", ONES)
        assert (writer.num_written, writer.num_pending) == (commits_after, 0)
        assert len(cache.reader(config)) == commits_after


def test_time_counts_from_the_oldest_pending_embedding(cache, config, monkeypatch):
    """The clock starts with the first put after a commit."""
    now = [100.0]
    monkeypatch.setattr("lmdbcache.storage.writer.time.monotonic", lambda: now[0])
    with cache.writer(config, commit_seconds=5.0) as writer:
        now[0] += 6
        writer.put("0:x", ONES)
        assert writer.num_written == 0
        now[0] += 4.9
        writer.put("1:x", ONES)
        assert writer.num_written == 0
        now[0] += 0.2
        writer.put("2:x", ONES)
        assert writer.num_written == 3


def test_nothing_is_on_disk_before_the_first_commit(cache, config):
    """An opened writer that commits nothing leaves nothing."""
    with cache.writer(config) as writer:
        writer.put("a:x", ONES)
        assert not cache.root.exists()
        writer.discard()
    assert not cache.root.exists()


def test_exception_discards_what_was_not_committed(cache, config):
    """Committed embeddings stay, the pending ones go, the exception passes."""

    def write_and_fail():
        with cache.writer(config) as writer:
            writer.put("a:x", ONES)
            writer.commit()
            writer.put("b:x", ONES)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail()
    assert list(cache.reader(config)) == ["a:x"]


@pytest.mark.parametrize(
    "limit", [{"commit_records": 2}, {"commit_bytes": 1}, {"commit_seconds": 0}]
)
def test_together_is_one_commit(cache, config, limit):
    """A commit that is due inside the block waits for its end, with `put_batch`, too."""
    many = np.ones((3, 1 << 20), np.float32)
    with cache.writer(config, **limit) as writer:
        with writer.together():
            writer.put("a:x", many[0])
            writer.put_batch(["b:x", "c:x", "d:x"], many)
            assert writer.num_written == 0
        assert (writer.num_written, writer.num_pending) == (4, 0)
        many[:] = 2  # nothing of it was borrowed
    with cache.reader(config) as reader:
        assert all((value == 1).all() for value in reader.values())


def test_exception_drops_what_was_put_together(cache, config):
    """Nothing of the block is stored; what was collected before is, whatever happens after."""
    with cache.writer(config, on_duplicate="overwrite", commit_records=3) as writer:
        writer.put("a:x", ONES)
        writer.put("b:x", ONES)
        with pytest.raises(RuntimeError, match="stop"), writer.together():
            writer.put("b:x", 2 * ONES)
            writer.put("c:x", ONES)
            writer.put("d:x", ONES)
            raise RuntimeError("stop")
        assert writer.num_pending == 2
        writer.put("e:x", ONES)
        assert writer.num_written == 3
    with cache.reader(config) as reader:
        assert list(reader) == ["a:x", "b:x", "e:x"]
        assert (reader["b:x"] == 1).all()


def test_a_failed_commit_loses_nothing_that_is_put_together(cache, config, monkeypatch):
    """A commit that failed in the background meanwhile is tried again with the block's."""
    large = np.ones((34, 1 << 18), np.float32)
    with cache.writer(config, commit_bytes=33 << 20) as writer:
        write = writer._write

        def fail(_):
            monkeypatch.setattr(writer, "_write", write)
            raise OSError("full")

        monkeypatch.setattr(writer, "_write", fail)
        for number, row in enumerate(large[:33]):
            writer.put(f"{number:02d}:x", row)
        writer._in_background.wait()
        with pytest.raises(OSError, match="full"), writer.together():
            writer.put("33:x", large[33])
        assert writer.num_pending == 34
    assert len(cache.reader(config)) == 34


def test_duplicates_are_skipped(filled, config, embeddings):
    """A stored sample keeps its value, and put says so."""
    first = next(iter(embeddings))
    with filled.writer(config) as writer:
        assert not writer.put(first, np.zeros(8))
        assert writer.put("new:x", np.zeros(8))
        assert not writer.put("new:x", np.ones(8))
    assert writer.num_written == 1
    np.testing.assert_array_equal(filled.reader(config)[first], embeddings[first])
    assert not filled.reader(config)["new:x"].any()


def test_duplicates_are_overwritten(filled, config, embeddings):
    """The last value put wins, and its checksum is the new one."""
    first = next(iter(embeddings))
    with filled.writer(config, on_duplicate="overwrite") as writer:
        assert writer.put(first, np.ones(8))
        assert writer.put(first, np.full(8, 2))
        assert writer.num_pending == 1
    assert (filled.reader(config)[first] == 2).all()
    assert len(filled.reader(config)) == len(embeddings)
    assert filled.verify(config).is_sound


def test_duplicates_are_refused(filled, config, embeddings):
    """With "error" a stored or pending sample raises, and the others stay pending."""
    with filled.writer(config, on_duplicate="error") as writer:
        writer.put("new:x", np.zeros(8))
        for sample_id in ("new:x", next(iter(embeddings))):
            with pytest.raises(DuplicateSampleError, match=sample_id):
                writer.put(sample_id, np.zeros(8))
        assert writer.num_pending == 1


def test_unknown_treatment_of_duplicates_is_refused(cache, config):
    """A misspelt `on_duplicate` is an error at once."""
    with pytest.raises(ConfigError, match="on_duplicate"):
        cache.writer(config, on_duplicate="replace")


def test_another_process_stores_the_same_samples_meanwhile(cache, config):
    """What counts is the store at the commit: skip, overwrite and error each as promised."""
    theirs, mine = np.zeros(4, np.float32), np.ones(4, np.float32)
    with peer_process() as peer:
        for treatment in ("skip", "overwrite"):
            with cache.writer(config, on_duplicate=treatment) as writer:
                assert writer.put(f"{treatment}:x", mine)
                peer.call(write, cache.root, config, {f"{treatment}:x": theirs})
        writer = cache.writer(config, on_duplicate="error")
        writer.put("error:x", mine)
        writer.put("other:x", mine)
        peer.call(write, cache.root, config, {"error:x": theirs})
        with pytest.raises(DuplicateSampleError, match=r"1 samples \(error:x"):
            writer.commit()
        assert writer.commit() == 1
        writer.close()
    with cache.reader(config) as reader:
        assert not reader["skip:x"].any()
        assert reader["overwrite:x"].all()
        assert not reader["error:x"].any()
        assert reader["other:x"].all()
    assert cache.verify(config).is_sound


def test_another_process_settles_the_shape_meanwhile(cache, config):
    """Two first writers of different shapes: the second commit is refused, naming the sample."""
    writer = cache.writer(config)
    writer.put("mine:x", np.ones(3))
    in_fork(lambda: write(cache.root, config, {"theirs:x": np.float32(7)}))
    with pytest.raises(InvalidEmbeddingError, match="mine:x"):
        writer.commit()
    writer.discard()
    writer.put("scalar:x", np.float32(1))
    writer.close()
    np.testing.assert_array_equal(
        cache.reader(config).get_batch(["theirs:x", "scalar:x"]), np.array([7, 1], np.float32)
    )


def test_shape_of_discarded_embeddings_binds_nobody(cache, config):
    """The first committed embedding settles the shape, not the first one put."""
    with cache.writer(config) as writer:
        writer.put("a:x", np.ones(3))
        writer.discard()
        writer.put("b:x", np.ones(5))
    assert cache.reader(config).embedding_shape == (5,)


def test_batch_and_ids_must_match_in_number(cache, config):
    """Nothing is added of a batch with a wrong number of embeddings."""
    with cache.writer(config) as writer:
        with pytest.raises(InvalidEmbeddingError):
            writer.put_batch(["a:x", "b:x", "c:x"], np.ones((2, 4)))
        assert writer.num_pending == 0


@pytest.mark.filterwarnings("ignore")
def test_batches_of_sparse_tensors_are_refused(cache, config):
    """As a whole and in a list."""
    torch = pytest.importorskip("torch")
    rows = torch.eye(2).to_sparse()
    with cache.writer(config) as writer:
        for batch in (rows, [rows[0], rows[1]]):
            with pytest.raises(InvalidEmbeddingError):
                writer.put_batch(["a:x", "b:x"], batch)


def test_a_table_is_a_batch_of_its_rows(cache, config):
    """Iterating it would give the names of its columns."""
    pandas = pytest.importorskip("pandas")
    with cache.writer(config) as writer:
        writer.put_batch(["a:x", "b:x"], pandas.DataFrame({0: [1.0, 2.0], 1: [3.0, 4.0]}))
    assert cache.reader(config)["b:x"].tolist() == [2.0, 4.0]


def test_bad_sample_id_is_refused(cache, config):
    """An id without a class never becomes a key."""
    with cache.writer(config) as writer, pytest.raises(InvalidSampleIdError):
        writer.put("no-class", ONES)


@pytest.mark.parametrize("name", ["weights_digest", "feature_extractor"])
def test_other_weights_are_refused(cache, config, name):
    """Embeddings of two models never mix; at opening, and at a commit that lost the race."""
    early = cache.writer(config, provenance={name: "two"})
    early.put("b:x", ONES)
    with cache.writer(config, provenance={name: "one", "host": "h1"}) as writer:
        writer.put("a:x", ONES)
    with pytest.raises(ProvenanceMismatchError, match=f"{name} 'one'.*'two'"):
        cache.writer(config, provenance={name: "two"})
    with pytest.raises(ProvenanceMismatchError, match=f"{name} 'one'.*'two'"):
        early.commit()
    early.discard()
    early.close()
    with cache.writer(config, provenance={name: "one", "host": "h2", "gpu": "g"}) as writer:
        writer.put("c:x", ONES)
    assert cache.info(config).provenance == {name: "one", "host": "h1", "gpu": "g"}


def test_provenance_that_could_not_be_read_back_is_refused_at_once(cache, config):
    """Too large a metadata record fails before anything is computed, not when it is read."""
    for provenance in ({"pip freeze": "x" * 70_000}, {str(n): "" for n in range(300)}):
        with pytest.raises(ConfigError, match="provenance"):
            cache.writer(config, provenance=provenance)


def test_any_folder_name_and_value_can_be_provenance(cache, config):
    """Paths with bytes that aren't UTF-8 and values that aren't text are stored readably."""
    with cache.writer(config, provenance={"n": 5}, dataset_root="/data/\udce9") as writer:
        writer.put("a:x", ONES)
    info = cache.info(config)
    assert (info.dataset_root, info.provenance) == ("/data/\\udce9", {"n": "5"})


def test_folder_of_another_config_is_refused(filled, config):
    """A renamed store is neither read nor written as what its name says."""
    other = CacheConfig(duration=9)
    filled.path(config).rename(filled.path(other))
    for use in (lambda: len(filled.reader(other)), lambda: filled.writer(other)):
        with pytest.raises(IntegrityError, match=r"another config.*duration"):
            use()


def test_closed_writer_says_so(cache, config):
    """After close every call that would write raises; closing again is fine."""
    writer = cache.writer(config)
    writer.put("a:x", ONES)
    writer.close()
    writer.close()
    for use in (lambda: writer.put("b:x", ONES), writer.commit):
        with pytest.raises(WriterClosedError):
            use()


def test_writer_does_not_pickle(cache, config):
    """A writer belongs to its process."""
    with cache.writer(config) as writer, pytest.raises(TypeError, match="pickle"):
        pickle.dumps(writer)


def test_dropped_writer_warns_of_lost_embeddings(cache, config):
    """Pending embeddings never vanish without a word."""
    writer = cache.writer(config)
    writer.put("a:x", ONES)
    with pytest.warns(ResourceWarning, match=r"1 pending.*lost"):
        del writer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.writer(config)
        gc.collect()


def test_threads_share_a_writer(cache, config):
    """Eight threads put into one writer; nothing is lost and no batch is torn."""
    with cache.writer(config, commit_records=7) as writer:

        def put(first):
            for number in range(first, first + 50):
                writer.put(f"{number}:x", np.full(4, number))

        threads = [threading.Thread(target=put, args=(first,)) for first in range(0, 400, 50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with cache.reader(config) as reader:
        assert {sample_id: value[0] for sample_id, value in reader.items()} == {
            f"{number}:x": number for number in range(400)
        }
    assert cache.verify(config).is_sound


@pytest.mark.parametrize("as_rows", [False, True])
def test_some_samples_are_replaced_and_others_skipped(filled, config, embeddings, as_rows):
    """`overwritten` names what is written over; the rest goes by `on_duplicate`."""
    first, second, *_ = embeddings
    with filled.writer(config, overwritten=[first.replace("drum", "DRUM")]) as writer:
        ones = np.ones((2, 8), np.float32)
        given = ones if as_rows else list(ones)
        assert writer.put_batch([first, second], given) == 1
        writer.put_batch([first], 2 * ones[:1] if as_rows else [2 * ones[0]])
    with filled.reader(config) as reader:
        np.testing.assert_array_equal(reader[first], 2 * ones[0])
        np.testing.assert_array_equal(reader[second], embeddings[second])
