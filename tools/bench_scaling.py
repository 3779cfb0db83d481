"""What is done with a store of any size, step by step, each in a fresh process.

    python tools/bench_scaling.py STEP ROOT NUM_SAMPLES [ARGUMENTS]

prints one JSON object: the step's own figures, its seconds and its memory. `write` comes first;
docs/scaling.md has the figures of several sizes, `make stress` runs all steps with two millions.

Embedding number n holds n in its first place and the rest of row n % 1024 of a fixed random block:
every read can be checked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from page_cache import evict
from process_watch import Figures, Watch, cpu_s

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.extraction.space import estimated_bytes
from lmdbcache.storage import class_of, gather

HIDDEN_SHAPE = (1214, 768)
_EXACT = 1 << 24  # float32 holds the numbers below
BATCH, NUM_SINGLES = 256, 3000
STEPS: dict[str, Callable[..., Figures]] = {}


def name_of(number: int) -> str:
    return f"clip_{number:09d}:{number % 309}"


def names_of(numbers: Any) -> list[str]:
    return [name_of(number) for number in np.asarray(numbers).tolist()]


def config_of(width: int = 768) -> CacheConfig:
    return CacheConfig(namespace="" if width == 768 else f"width-{width}")


def block_of(width: int) -> np.ndarray:
    return np.random.default_rng(0).random((1024, width), dtype=np.float32)


def embeddings_of(numbers: np.ndarray, block: np.ndarray) -> np.ndarray:
    rows = block[numbers % len(block)]
    rows[:, 0] = numbers % _EXACT
    return rows


def check(batch: np.ndarray, numbers: np.ndarray) -> None:
    rows = batch.reshape(len(numbers), -1)
    assert (rows[:, 0] == numbers % _EXACT).all()
    if batch.ndim == 2:
        assert (rows[:, 1:] == block_of(rows.shape[1])[numbers % 1024, 1:]).all()


def store_in(root: str) -> tuple[EmbeddingCache, CacheConfig]:
    """The only store under this root."""
    cache = EmbeddingCache(root)
    [config] = cache
    return cache, config


def step(function: Callable[..., Figures]) -> Callable[..., Figures]:
    STEPS[function.__name__] = function
    return function


def batch_size(reader: Any) -> int:
    return BATCH if len(reader.embedding_shape or ()) == 1 else 8


# ---- writing


@step
def write(root: str, num_samples: str, order: str = "sorted", width: str = "768") -> Figures:
    """Everything through one writer, 1024 at a time, with its default commits."""
    total, block = int(num_samples), block_of(int(width))
    cache, config = EmbeddingCache(root), config_of(int(width))
    numbers = np.arange(total)
    if order == "random":
        numbers = np.random.default_rng(1).permutation(total)
    with Watch() as watch, cache.writer(config) as writer:
        for start in range(0, total, 1024):
            part = numbers[start : start + 1024]
            writer.put_batch(names_of(part), embeddings_of(part, block))
    size = cache.size(config)
    return {
        **watch.figures,
        "bytes per embedding": size / total,
        "overhead, bytes": size / total - 4 * int(width),
    }


@step
def write_random(root: str, num_samples: str, dtype: str = "float32") -> Figures:
    """Independent normal values, which a search can tell apart."""
    total, dice = int(num_samples), np.random.default_rng(0)
    cache, config = EmbeddingCache(root), CacheConfig(dtype=dtype)
    with Watch() as watch, cache.writer(config) as writer:
        for start in range(0, total, 1024):
            part = np.arange(start, min(start + 1024, total))
            writer.put_batch(names_of(part), dice.standard_normal((len(part), 768), np.float32))
    return {**watch.figures, "bytes per embedding": cache.size(config) / total}


@step
def write_hidden(root: str, num_samples: str) -> Figures:
    """Hidden states one by one, as an extraction puts them."""
    total = int(num_samples)
    cache, config = EmbeddingCache(root), hidden_config()
    rows = np.random.default_rng(0).random((4, *HIDDEN_SHAPE), dtype=np.float32)
    with Watch() as watch, cache.writer(config) as writer:
        for number in range(total):
            row = rows[number % 4]
            row[0, 0] = number
            writer.put(name_of(number), row)
    size = cache.size(config)
    return {
        **watch.figures,
        "MB/s": rows[0].nbytes * total / 1e6 / watch.figures["s"],
        "CPU MB/s": rows[0].nbytes * total / 1e6 / watch.figures["CPU s"],
        "bytes per embedding": size / total,
        "overhead, bytes": size / total - rows[0].nbytes,
    }


def hidden_config() -> CacheConfig:
    return CacheConfig(output="last_hidden_state")


# ---- reading


@step
def first_reads(root: str, num_samples: str) -> Figures:
    """What a script does that opens a store and reads by sample id."""
    total, dice = int(num_samples), np.random.default_rng(os.getpid())
    cache, config = store_in(root)
    figures: Figures = {}
    with Watch() as watch:
        started = time.perf_counter()
        reader = cache.reader(config)
        reader[name_of(total // 2)]
        figures["open to first sample, ms"] = 1e3 * (time.perf_counter() - started)
        seconds = []
        for _ in range(40):
            numbers = dice.integers(0, total, BATCH)
            names = names_of(numbers)
            started = time.perf_counter()
            batch = reader.get_batch(names)
            seconds.append(time.perf_counter() - started)
            check(batch, numbers)
    figures["first batch by id, ms"] = 1e3 * seconds[0]
    figures["median batch by id, ms"] = 1e3 * sorted(seconds)[20]
    reader.close()
    return {**watch.figures, **figures}


@step
def singles(root: str, num_samples: str) -> Figures:
    """Single random samples by id."""
    numbers = np.random.default_rng(os.getpid()).integers(0, int(num_samples), NUM_SINGLES)
    names = names_of(numbers)
    cache, config = store_in(root)
    with cache.reader(config) as reader:
        reader[names[0]]
        with Watch() as watch:
            rows = [reader[name] for name in names]
        check(np.stack(rows), numbers)
    return {**watch.figures, "µs per sample": 1e6 * watch.figures["s"] / len(names)}


@step
def table(root: str, num_samples: str) -> Figures:
    """Enough batches by id that the table of all places is made, or read."""
    total = int(num_samples)
    cache, config = store_in(root)
    with cache.reader(config) as reader, Watch() as watch:
        longest = 0.0
        for start in range(0, total // 8, 4096):
            names = names_of(np.arange(start, min(start + 4096, total)) * 7919 % total)
            started = time.perf_counter()
            reader.get_batch(names)
            longest = max(longest, time.perf_counter() - started)
    kept = [path.stat().st_size for path in Path(root).rglob("offsets-*")]
    return {**watch.figures, "longest batch, s": longest, "kept file, MB": sum(kept) / 1e6}


@step
def select_all(root: str, num_samples: str) -> Figures:
    """A selection of all samples: its list of ids, its places, the first batch."""
    total = int(num_samples)
    cache, config = store_in(root)
    with cache.reader(config) as reader, Watch() as watch:
        selection = reader.select()
        selection.get_batch([0, total - 1])
    bytes_each = 2**20 * watch.figures["private, MiB"] / total
    peak_each = 2**20 * watch.figures["private peak, MiB"] / total
    return {**watch.figures, "bytes per id": bytes_each, "peak bytes per id": peak_each}


@step
def epoch(root: str, num_samples: str, num_read: str) -> Figures:
    """A random subset by position, in batches: µs per sample, page tables per GiB touched."""
    total, count = int(num_samples), min(int(num_read), int(num_samples))
    numbers = np.random.default_rng(3).permutation(total)[:count]
    cache, config = store_in(root)
    with cache.reader(config) as reader:
        selection, batch = reader.select(names_of(numbers)), batch_size(reader)
        check(selection.get_batch(np.arange(8)), numbers[:8])
        with Watch() as watch:
            for start in range(0, count, batch):
                selection.get_batch(np.arange(start, min(start + batch, count)))
        with Watch() as again:
            for start in range(0, count, batch):
                selection.get_batch(np.arange(start, min(start + batch, count)))
        check(selection.get_batch(np.arange(count - 8, count)), numbers[-8:])
    return {
        **watch.figures,
        "µs per sample": 1e6 * watch.figures["s"] / count,
        "CPU µs per sample": 1e6 * watch.figures["CPU s"] / count,
        "again, µs per sample": 1e6 * again.figures["s"] / count,
    }


@step
def page_tables(root: str, num_samples: str) -> Figures:
    """The whole map, read front to back in slices: what its page tables take."""
    total = int(num_samples)
    cache, config = store_in(root)
    with Watch() as watch, cache.reader(config) as reader:
        selection = reader.select()
        batch = batch_size(reader)
        for start in range(0, total, batch):
            selection.get_batch(np.arange(start, min(start + batch, total)))
        watch._look()  # noqa: SLF001 - before the map goes
    mapped = max(path.stat().st_size for path in Path(root).rglob("data.mdb")) / 2**30
    each = watch.figures["page tables, MiB"] / mapped
    return {**watch.figures, "mapped, GiB": mapped, "MiB per GiB": each}


@step
def evicted(root: str, num_samples: str, share: str, is_asked: str = "") -> Figures:
    """Random batches with this share of the file dropped from the page cache.

    That is how a store looks that is larger than the memory: of a file twice as large, half.
    `is_asked` has it read as such a store is.
    """
    if is_asked:
        gather.memory_limit = lambda: 0  # type: ignore[assignment]
    total, count = int(num_samples), min(4096, int(num_samples))
    numbers = np.random.default_rng(os.getpid()).permutation(total)[:count]
    left = evict(root, float(share))
    cache, config = store_in(root)
    with cache.reader(config) as reader:
        selection = reader.select(names_of(numbers))
        # The places come from the kept table; nothing of the values is read for it.
        reader.num_read = total
        selection._look_up([0], lambda *_: True)  # noqa: SLF001
        batch = batch_size(reader)
        with Watch() as watch:
            for start in range(0, count, batch):
                positions = np.arange(start, min(start + batch, count))
                check(selection.get_batch(positions), numbers[positions])
    return {
        **watch.figures,
        "left in the page cache": left,
        "µs per sample": 1e6 * watch.figures["s"] / count,
    }


@step
def search(root: str, num_samples: str, share: str = "0") -> Figures:
    """`nearest`: the first query of a process, later ones, and 256 in one call.

    `share` of the file is dropped from the page cache before the first.
    """
    evict(root, float(share))
    cache, config = store_in(root)
    dice, figures = np.random.default_rng(os.getpid()), Figures()
    with cache.reader(config) as reader, Watch() as watch:
        for name, count in (
            *(("first", 1), ("second", 1), ("third", 1)),
            *(("256 at once", 256), ("256 again", 256)),
        ):
            queries = dice.standard_normal((count, 768))
            before = time.perf_counter(), cpu_s()
            found = reader.nearest(queries)
            figures[f"{name}, s"] = time.perf_counter() - before[0]
            figures[f"{name}, CPU s"] = cpu_s() - before[1]
            assert len(found) == count
            assert len(found[0].sample_ids) == min(10, int(num_samples))
    return {**watch.figures, **figures}


# ---- looking after it


@step
def coverage(root: str, num_samples: str) -> Figures:
    """Coverage of as many ids as there are, and of some that aren't."""
    total = int(num_samples)
    names = names_of(np.arange(total + 1000))
    cache, config = store_in(root)
    with Watch() as watch:
        found = cache.coverage(config, names)
    assert (found.num_present, len(found.missing)) == (total, 1000)
    return {**watch.figures, **_each(watch, total)}


@step
def list_stores(root: str, num_samples: str) -> Figures:
    """`ls`."""
    with Watch() as watch:
        [store] = EmbeddingCache(root).stores()
    assert store.num_embeddings == int(num_samples)
    return watch.figures


@step
def info(root: str, num_samples: str) -> Figures:
    """What `info` does: every key is looked at for its class."""
    cache, config = store_in(root)
    with Watch() as watch:
        assert cache.info(config).num_embeddings == int(num_samples)
        with cache.reader(config) as reader:
            classes = Counter(map(class_of, reader))
    assert sum(classes.values()) == int(num_samples)
    return {**watch.figures, **_each(watch, int(num_samples))}


@step
def verify(root: str, num_samples: str) -> Figures:
    """`verify`: every value against its checksum."""
    cache, config = store_in(root)
    with Watch() as watch:
        report = cache.verify(config)
    assert report.is_sound
    assert report.num_embeddings == int(num_samples)
    return {**watch.figures, **_each(watch, int(num_samples))}


@step
def checksums(root: str, num_samples: str) -> Figures:
    """All keys with their checksums: what `diff`, `merge` and `push` begin with."""
    cache, config = store_in(root)
    with cache.reader(config) as reader, Watch() as watch:
        count = sum(1 for _ in reader.checksums())
    assert count == int(num_samples)
    return {**watch.figures, **_each(watch, count)}


@step
def compact(root: str, num_samples: str) -> Figures:
    """`compact`."""
    cache, config = store_in(root)
    with Watch() as watch:
        result = cache.compact(config)
    assert result.num_embeddings == int(num_samples)
    return {**watch.figures, "MB/s": result.bytes_after / 1e6 / watch.figures["s"]}


# ---- beyond one store


@step
def merge(root: str, num_samples: str, target: str) -> Figures:
    """The store into another root; when it is there, nothing is written."""
    from lmdbcache.exchange import merge_stores

    with Watch() as watch:
        [report] = merge_stores(EmbeddingCache(target), [root]).stores
    assert report.num_new + report.num_same == int(num_samples)
    return {**watch.figures, **_each(watch, int(num_samples)), "new": report.num_new}


@step
def push(root: str, num_samples: str, folder: str) -> Figures:
    """The store to a shared folder; when it is there, nothing is moved."""
    from lmdbcache.exchange import push

    cache, config = store_in(root)
    with Watch() as watch:
        report = push(cache, config, Path(folder).absolute().as_uri())
    assert report.num_pushed in (0, int(num_samples))
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    manifests = sum(path.stat().st_size for path in Path(folder).rglob("manifests/*"))
    return {
        **watch.figures,
        **_each(watch, int(num_samples)),
        "new": report.num_pushed,
        "there, bytes each": size / int(num_samples),
        "manifests, bytes each": manifests / int(num_samples),
        "files": sum(1 for path in Path(folder).rglob("*") if path.is_file()),
    }


@step
def pull(root: str, num_samples: str, folder: str) -> Figures:
    """From a shared folder into a new store; when it is there, nothing is moved."""
    from lmdbcache.exchange import pull

    with Watch() as watch:
        report = pull(EmbeddingCache(root), None, Path(folder).absolute().as_uri())
    cache, config = store_in(root)
    assert cache.info(config).num_embeddings == int(num_samples)
    return {**watch.figures, **_each(watch, int(num_samples)), "new": report.num_new}


def _each(watch: Watch, number: int) -> Figures:
    return {
        "µs each": 1e6 * watch.figures["s"] / number,
        "CPU µs each": 1e6 * watch.figures["CPU s"] / number,
        "peak bytes per id": 2**20 * watch.figures["private peak, MiB"] / number,
    }


# ---- for tests


def run_step(name: str, root: Path, num_samples: int, *arguments: str) -> Figures:
    """One step in a process of its own."""
    command = [sys.executable, __file__, name, str(root), str(num_samples), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    figures: Figures = json.loads(done.stdout)
    return figures


def best(runs: list[Figures]) -> Figures:
    """The smallest of each figure; rates are made of these."""
    return {name: min(run[name] for run in runs) for name in runs[0]}


def bytes_each(shape: tuple[int, ...]) -> float:
    """What one more embedding takes on disk, as foretold."""
    names = [name_of(number) for number in range(2000)]
    return (
        estimated_bytes(names, shape, "float32") - estimated_bytes(names[:1000], shape, "float32")
    ) / 1000


def main() -> None:
    name, *arguments = sys.argv[1:]
    print(json.dumps(STEPS[name](*arguments)))


if __name__ == "__main__":
    main()
