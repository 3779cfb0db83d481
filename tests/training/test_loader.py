"""The loader: every sample once an epoch, the same order everywhere, resumable, leak-free."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from storage.child_processes import in_fork, numbered

from lmdbcache import CacheConfig, EmbeddingCache, EmbeddingDataset
from lmdbcache.errors import ConfigError, SampleNotFoundError
from lmdbcache.training import make_dataloader, preload

NUM_SAMPLES = 103
SAMPLES = numbered(0, NUM_SAMPLES, size=5)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A cache of 103 embeddings that hold their number; tests read it only."""
    cache = EmbeddingCache(tmp_path_factory.mktemp("loader") / "cache")
    with cache.writer(CacheConfig()) as writer:
        writer.put_batch(SAMPLES, list(SAMPLES.values()))
    return cache


@pytest.fixture
def reader(stored):
    with stored.reader(CacheConfig()) as reader:
        yield reader


@pytest.fixture(params=["store", "ram"])
def source(request, reader):
    """The store, and the same in RAM."""
    return reader if request.param == "store" else preload(reader)


def numbers(batches):
    """The number of each sample, batch by batch; every element of an embedding must be it."""
    for batch in batches:
        assert (batch == batch[:, :1]).all()
    return [batch[:, 0].int().tolist() for batch in batches]


def flat(batches):
    return [number for batch in batches for number in batch]


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("lmdbcache-prefetch")]


@pytest.fixture(autouse=True)
def _ends_its_threads():
    yield
    assert not prefetch_threads()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 10, 103, 500])
def test_each_sample_comes_once_an_epoch(source, batch_size, prefetch, shuffle):
    """All of them, in batches of the size asked for but for the last."""
    loader = make_dataloader(source, batch_size, shuffle=shuffle, prefetch=prefetch)
    for _ in range(2):
        batches = numbers(list(loader))
        assert len(batches) == len(loader) == -(-NUM_SAMPLES // batch_size)
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        assert sorted(flat(batches)) == list(range(NUM_SAMPLES))
        assert (flat(batches) == list(range(NUM_SAMPLES))) is not shuffle


def test_an_epoch_counts_each_sample_once(stored, reader):
    """Statistics count what the loop reads: the loader looks at no sample for itself."""
    before = stored.statistics(CacheConfig()).hits
    list(make_dataloader(reader, 10))
    assert stored.statistics(CacheConfig()).hits - before == NUM_SAMPLES


def test_order_depends_on_seed_and_epoch_alone(reader):
    """The same seed and epoch give the same batches whatever the prefetch; others differ."""
    orders = {}
    for seed in (0, 5):
        for prefetch in (0, 2):
            loader = make_dataloader(reader, 10, shuffle=True, seed=seed, prefetch=prefetch)
            for epoch in range(3):
                orders[seed, prefetch, epoch] = tuple(flat(numbers(list(loader))))
                assert loader.epoch == epoch
    assert all(orders[seed, 0, n] == orders[seed, 2, n] for seed in (0, 5) for n in range(3))
    assert len(set(orders.values())) == 6
    loader.set_epoch(1)
    assert tuple(flat(numbers(list(loader)))) == orders[5, 0, 1]


@pytest.mark.parametrize(("batch_size", "expected"), [(10, 10), (103, 1), (104, 0)])
def test_drop_last_leaves_out_the_smaller_batch(reader, batch_size, expected):
    """Only whole batches are left."""
    loader = make_dataloader(reader, batch_size, drop_last=True)
    batches = numbers(list(loader))
    assert len(batches) == len(loader) == expected
    assert {len(batch) for batch in batches} <= {batch_size}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4, 110])
def test_ranks_share_the_samples_evenly(reader, world_size, drop_last, shuffle):
    """All ranks have as many batches; together they have every sample, but for the division."""
    parts = []
    for rank in range(world_size):
        loader = make_dataloader(
            reader,
            1 if world_size == 110 else 5,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            prefetch=0,
        )
        batches = numbers(list(loader))
        assert len(batches) == len(loader)
        parts.append(flat(batches))
    assert len({len(part) for part in parts}) == 1
    together = flat(parts)
    if drop_last:
        assert len(set(together)) == len(together) > NUM_SAMPLES - 5 * world_size - world_size
    else:
        assert set(together) == set(range(NUM_SAMPLES))
        assert len(together) - NUM_SAMPLES < world_size


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 10, 11])
def test_a_state_goes_on_with_the_remaining_batches(reader, prefetch, done):
    """Neither lost nor repeated, though batches were prefetched; then the next epoch follows."""

    def new_loader():
        return make_dataloader(reader, 10, shuffle=True, seed=3, prefetch=prefetch)

    whole = new_loader()
    epochs = [numbers(list(whole)) for _ in range(3)]
    interrupted = new_loader()
    list(interrupted)
    state, seen = interrupted.state_dict(), []
    if done:
        for batch in interrupted:
            seen.append(batch)
            if len(seen) == done:
                state = interrupted.state_dict()
                break
    else:
        interrupted.set_epoch(1)
        state = interrupted.state_dict()
    resumed = new_loader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert numbers(seen) + numbers(list(resumed)) == epochs[1]
    assert numbers(list(resumed)) == epochs[2]


def test_a_state_is_plain_numbers(reader, tmp_path):
    """A checkpoint that holds it loads with weights_only."""
    loader = make_dataloader(reader, 10)
    torch.save(loader.state_dict(), tmp_path / "state")
    loader.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert len(list(loader)) == 11


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", {"seed": 4}),
        ("shuffle", {"shuffle": False}),
        ("drop_last", {"drop_last": True}),
        ("batch_size", {"batch_size": 11}),
        ("world_size", {"rank": 0, "world_size": 2}),
        ("num_samples", {"sample_ids": list(SAMPLES)[1:]}),
    ],
)
def test_a_state_of_another_loader_is_refused(reader, name, change):
    """The message names what differs, and the loader is as before."""
    options = {"batch_size": 10, "shuffle": True, "seed": 3}
    state = make_dataloader(reader, **options).state_dict()
    other = make_dataloader(reader, **{**options, **change})
    with pytest.raises(ConfigError, match=name):
        other.load_state_dict(state)
    with pytest.raises(ConfigError):
        other.load_state_dict({})
    assert len(list(other)) == len(other)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_while_fetching_reaches_the_loop(reader, prefetch):
    """Batches before it come first; the error is ours, and the loader can be used again."""
    sample_ids = [*list(SAMPLES)[:35], "none:x", *list(SAMPLES)[35:]]
    loader = make_dataloader(reader, 10, sample_ids=sample_ids, prefetch=prefetch)
    for _ in range(2):
        with pytest.raises(SampleNotFoundError, match="none:x"):
            list(loader)
        assert not prefetch_threads()


@pytest.mark.parametrize("taken", [1, 5])
def test_leaving_the_loop_ends_the_thread(reader, taken):
    """By break, by an exception, and by dropping the iterator."""
    loader = make_dataloader(reader, 2, prefetch=1)
    for n, _ in enumerate(loader, 1):
        assert n == 1 or prefetch_threads()
        if n == taken:
            break
    assert not prefetch_threads()
    with pytest.raises(ZeroDivisionError):
        for _ in loader:
            raise ZeroDivisionError
    assert not prefetch_threads()
    iterator = iter(loader)
    next(iterator)
    del iterator
    assert not prefetch_threads()
    assert next(iter(loader)).shape == (2, 5)


def test_prefetch_is_bounded(reader):
    """A slow loop doesn't have a whole epoch copied ahead."""
    dataset = EmbeddingDataset(reader)
    fetched = []
    original = dataset.fetch

    def counted(indices, **options):
        fetched.append(len(indices))
        return original(indices, **options)

    dataset.fetch = counted
    iterator = iter(make_dataloader(dataset, 1, prefetch=1))
    next(iterator)
    time.sleep(0.3)
    del iterator
    # Small batches are fetched several at a time.
    assert sum(fetched) < 50


@pytest.mark.parametrize("labels", ["by number", {"x": 4}])
def test_labels_stay_with_their_samples(source, labels):
    """In every order, batch and rank."""
    given = [n * 3 for n in range(NUM_SAMPLES)] if labels == "by number" else labels
    loader = make_dataloader(source, 10, labels=given, shuffle=True, rank=1, world_size=2)
    for embeddings, found in loader:
        assert found.dtype == torch.int64
        expected = embeddings[:, 0].long() * 3 if labels == "by number" else torch.tensor(4)
        assert (found == expected).all()


def test_batches_are_the_callers_own(reader):
    """Changing or keeping a batch changes no other."""
    loader = make_dataloader(reader, 10, prefetch=2)
    kept = list(loader)
    first = kept[0].clone()
    kept[1].zero_()
    assert torch.equal(kept[0], first)
    assert sorted(flat(numbers(list(loader)))) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("batch_size", {"batch_size": 0}),
        ("prefetch", {"prefetch": -1}),
        ("num_threads", {"num_threads": 0}),
        ("rank", {"rank": 2, "world_size": 2}),
        ("rank", {"rank": -1, "world_size": 2}),
        ("world_size", {"world_size": 2}),
        ("world_size", {"rank": 0}),
        ("rank", {"rank": 0, "world_size": 0}),
    ],
)
def test_arguments_out_of_range_are_named(reader, name, options):
    """A rank without a world size would train every process on the same part."""
    with pytest.raises(ConfigError, match=name):
        make_dataloader(reader, **{"batch_size": 10, **options})


def test_a_dataset_brings_its_own_samples_and_labels(reader):
    """They can't be given twice."""
    dataset = EmbeddingDataset(reader, list(SAMPLES)[:7])
    loader = make_dataloader(dataset, 3)
    assert loader.dataset is dataset
    assert [len(batch) for batch in loader] == [3, 3, 1]
    with pytest.raises(ConfigError, match="EmbeddingDataset"):
        make_dataloader(dataset, 3, labels={"x": 1})


def test_no_samples_give_no_batches(source):
    """An empty selection is an empty epoch."""
    loader = make_dataloader(source, 3, sample_ids=[], labels=[])
    assert list(loader) == []
    assert len(loader) == 0


def test_rank_comes_from_torch_distributed(reader, tmp_path):
    """With a process group, rank and world size are the group's unless both are given."""

    def in_group():
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'group'}", world_size=1, rank=0
        )
        loader = make_dataloader(reader, 10, prefetch=0)
        given = make_dataloader(reader, 10, rank=1, world_size=2, prefetch=0)
        torch.distributed.get_rank = lambda: 2
        torch.distributed.get_world_size = lambda: 3
        asked = make_dataloader(reader, 10, prefetch=0)
        parts = [flat(numbers(list(each))) for each in (loader, given, asked)]
        torch.distributed.destroy_process_group()
        return parts

    whole, given, asked = in_fork(in_group)
    assert whole == list(range(NUM_SAMPLES))
    assert given == [*range(1, NUM_SAMPLES, 2), 0]
    assert asked == [*range(2, NUM_SAMPLES, 3), 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_and_large_embeddings(cache, config, dtype):
    """Values on many pages of their own, two bytes each, one batch a step."""
    config = config.replace(dtype=dtype)
    values = torch.arange(9)[:, None, None].expand(9, 60, 700).to(dtype)
    names = [f"{n}:x" for n in range(9)]
    with cache.writer(config) as writer:
        writer.put_batch(names, values)
    for prefetch in (0, 2):
        with cache.reader(config) as reader:
            batches = list(make_dataloader(reader, 4, prefetch=prefetch))
        assert torch.equal(torch.cat(batches), values)
        assert batches[0].dtype == dtype


def test_ragged_embeddings_of_one_length_make_batches(cache, config):
    """A store with a free first dimension is read like any other while all are alike."""
    with cache.writer(config, ragged=True) as writer:
        writer.put_batch(["a:x", "b:x"], np.ones((2, 4, 3), np.float32))
    for prefetch in (0, 2):
        with cache.reader(config) as reader:
            (batch,) = make_dataloader(reader, 4, prefetch=prefetch)
        assert batch.shape == (2, 4, 3)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_threads_copy_every_part_of_a_large_batch(cache, config, prefetch, num_threads):
    """Any number of threads gives the same batches, the last and smaller one included."""
    samples = numbered(0, 11, size=1 << 17)
    with cache.writer(config) as writer:
        writer.put_batch(list(samples), list(samples.values()))
    with cache.reader(config) as reader:
        loader = make_dataloader(reader, 4, prefetch=prefetch, num_threads=num_threads)
        assert numbers(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_copying_threads_are_bounded_and_end(cache, config):
    """num_threads is a bound that counts the calling thread; all have ended after the epoch."""
    samples = numbered(0, 8, size=1 << 18)
    with cache.writer(config) as writer:
        writer.put_batch(list(samples), list(samples.values()))

    def copying():
        return [t for t in threading.enumerate() if t.name.startswith("lmdbcache-copy")]

    with cache.reader(config) as reader:
        for num_threads in (1, 3):
            batches = iter(make_dataloader(reader, 4, num_threads=num_threads))
            next(batches)
            assert min(1, num_threads - 1) <= len(copying()) <= num_threads - 1
            batches.close()
            deadline = time.monotonic() + 240
            while copying() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not copying()
