"""`lmdbcache ls`, `info` and `stats`: what is stored, and how often it was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from typing import Annotated

import click

from lmdbcache.cache import (
    ClipFailure,
    EmbeddingCache,
    Origin,
    StoreInfo,
    count_origins,
    info_or_damage,
    read_failures,
)
from lmdbcache.cli.command import Argument, Option
from lmdbcache.cli.console import (
    counted,
    print_error,
    print_json,
    print_table,
    say,
    say_some,
)
from lmdbcache.cli.options import (
    Json,
    Root,
    Store,
    Yes,
    check_can_ask,
    fields_of,
    find_folder,
    find_store,
    title_of,
)
from lmdbcache.cli.quantities import age
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError
from lmdbcache.files import readable_size
from lmdbcache.storage import (
    EmbeddingReader,
    ReadStatistics,
    reset_statistics,
    split_sample_id,
    statistics_of,
)

_FEW: int = 10


class Order(str, Enum):
    """What `ls` sorts by."""

    NAME = "name"
    SIZE = "size"
    USED = "used"


def ls_command(
    *,
    root: Root = None,
    text: Annotated[
        str, Option("--filter", help="Only stores with this in their name or config.")
    ] = "",
    order: Annotated[
        Order,
        Option("--sort", help="By name, size (largest first) or last use (newest first)."),
    ] = Order.NAME,
    as_json: Json = False,
) -> None:
    """List the stores under the root: size, when created, last written and last read."""
    cache = EmbeddingCache(root)
    everything = cache.stores()
    stores = [store for store in everything if _has(store, text)]
    if order is not Order.NAME:
        stores.sort(key=_SORT_KEYS[order], reverse=True)
    if as_json:
        print_json([store.to_dict() for store in stores])
        return
    if not stores:
        found = f"none of {counted(len(everything), 'store')} has {text!r} in its name or config"
        say(f"{found}; {cache.root}" if everything else f"nothing is stored under {cache.root}")
        return
    rows = [(_row(store), store.config) for store in stores]
    has_windows = any(store.config and store.config.window for store in stores)
    at = _HEADINGS.index("dtype")
    print_table(
        (*_HEADINGS[:at], *(["hop"] * has_windows), *_HEADINGS[at:]),
        [(*row[:at], *([_hop(one)] * has_windows), *row[at:]) for row, one in rows],
        num_text_columns=_HEADINGS.index("Hz"),
        optional=[*_alike(rows), *_OPTIONAL],
        last=[name for name in ("Hz", "dtype") if name not in _alike(rows)],
    )
    total = sum(store.size_bytes for store in stores)
    say(f"{counted(len(stores), 'store')}, {readable_size(total)} under {cache.root}")


_HEADINGS = (
    *("fingerprint", "namespace", "model", "output", "Hz", "s", "dtype", "embeddings", "size"),
    *("created", "written", "read"),
)
_OPTIONAL = ("created", "written", "read", "size")
_SORT_KEYS: dict[Order, Callable[[StoreInfo], float]] = {
    Order.SIZE: lambda store: store.size_bytes,
    Order.USED: lambda store: store.last_touched.timestamp() if store.last_touched else 0.0,
}


def _has(store: StoreInfo, text: str) -> bool:
    values = store.config.to_dict().values() if store.config else ()
    names = (store.path.name, *map(str, values))
    return any(text.lower() in name.lower() for name in names)


def _row(store: StoreInfo) -> tuple[object, ...]:
    times = age(store.created), age(store.last_written), age(store.last_used)
    if store.config is None:
        name = store.path.name.rpartition("-")[2]
        state = "DAMAGED, see info" if store.is_damaged else "UNREADABLE, see info"
        return name, "", state, "", "", "", "", "", readable_size(store.size_bytes), *times
    config = store.config
    return (
        config.fingerprint,
        config.namespace,
        config.model_alias,
        config.output,
        config.sample_rate,
        f"{config.duration:g}",
        config.dtype,
        store.num_embeddings,
        readable_size(store.size_bytes),
        *times,
    )


def _alike(rows: list[tuple[tuple[object, ...], CacheConfig | None]]) -> list[str]:
    """The headings of a config's fields that distinguish no two stores."""
    fields = {(config.sample_rate, config.dtype) for _, config in rows if config}
    each = zip(*fields, strict=True)
    return [name for name, found in zip(("Hz", "dtype"), each, strict=False) if len(set(found)) < 2]


def _hop(config: CacheConfig | None) -> str:
    """How far windows are apart, and what becomes of the last one unless it is padded."""
    if config is None or config.hop is None:
        return ""
    return f"{config.hop:g} {config.last_window}".removesuffix(" pad")


def info_command(store: Store, *, root: Root = None, as_json: Json = False) -> None:
    """Show one store: config, shape, provenance, samples per class, clips that failed.

    Exit code 1 if it is damaged.
    """
    info = find_store(EmbeddingCache(root), store)
    failures = read_failures(info.path)
    classes: Counter[str] = Counter()
    origins: list[tuple[Origin, int]] = []
    if info.config is not None:
        with EmbeddingReader(info.path, info.config, track_usage=False) as reader:
            classes.update(split_sample_id(sample_id)[1] for sample_id in reader)
        origins = _origins(info)
    if as_json:
        found = [vars(failure) for failure in failures]
        counted_origins = [{**origin.to_dict(), "embeddings": n} for origin, n in origins]
        own = {"classes": dict(classes), "origins": counted_origins, "failures": found}
        print_json({**info.to_dict(), **own})
    else:
        _print_info(info, classes, failures)
        _print_origins(origins)
    raise click.exceptions.Exit(1 if info.damage else 0)


def _print_info(info: StoreInfo, classes: Counter[str], failures: list[ClipFailure]) -> None:
    say(title_of(info))
    say(str(info.path))
    if info.damage:
        say(f"{'damaged' if info.is_damaged else 'unreadable'}: {info.damage}")
        return
    facts = {
        **(fields_of(info.config) if info.config else {}),
        "embedding_shape": info.embedding_shape,
        "embeddings": info.num_embeddings,
        "size": readable_size(info.size_bytes),
        "free": _free(info),
        "created": _moment(info.created),
        "last written": _moment(info.last_written),
        "last read": _moment(info.last_used) or "never, as far as is known",
        "dataset_root": info.dataset_root,
        **info.provenance,
    }
    rows = [(name, value) for name, value in facts.items() if value != ""]
    print_table(("field", "value"), rows, num_text_columns=2)
    say("")
    print_table(("class", "embeddings"), sorted(classes.items()))
    lines = [f"failed: {failure.sample_id}: {failure.reason}" for failure in failures]
    say_some(lines, what="failed clips")


def _origins(info: StoreInfo) -> list[tuple[Origin, int]]:
    try:
        return count_origins(info.path)
    except CacheError as error:
        print_error(f"the origins of its embeddings can't be read: {error}")
        return []


def _print_origins(origins: list[tuple[Origin, int]]) -> None:
    """Where embeddings came from, if some came from elsewhere."""
    if origins:
        say("")
        rows = [(str(origin), number) for origin, number in origins[:_FEW]]
        print_table(("computed in", "embeddings"), rows)
    if len(origins) > _FEW:
        say(f"… and {len(origins) - _FEW} more; see --json")


def _moment(moment: datetime | None) -> str:
    if moment is None:
        return ""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S %z} ({age(moment)})"


def _free(info: StoreInfo) -> str:
    """What compaction would give back, and who keeps writers from using it until then."""
    if not info.free_bytes:
        return ""
    text = f"{readable_size(info.free_bytes)}, given back by compact"
    behind = {process: commits for process, commits in info.readers.items() if commits}
    if info.pinned_bytes:
        oldest = sorted(behind, key=lambda process: -behind[process])[:3]
        held = ", ".join(
            f"process {process} ({counted(behind[process], 'commit')} behind)" for process in oldest
        )
        text += f"; {readable_size(info.pinned_bytes)} of it kept from reuse by readers in {held}"
    return text


def stats_command(
    store: Annotated[
        str | None,
        Argument(help="Fingerprint (its first digits do), or a store's folder name."),
    ] = None,
    *,
    reset: Annotated[bool, Option("--reset", help="Begin again at zero.")] = False,
    root: Root = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Show the hits and misses of a store by class, or of all stores."""
    cache = EmbeddingCache(root)
    folders = cache.folders() if store is None else [find_folder(cache, store)]
    if reset:
        check_can_ask(as_json=as_json, may_ask=not yes)
        if folders and not yes:
            click.confirm(
                f"Set the statistics of {counted(len(folders), 'store')} to zero?", abort=True
            )
        for folder in folders:
            reset_statistics(folder)
    found_in = {folder: statistics_of(folder) for folder in folders}
    if as_json:
        print_json([{"path": str(folder), **found.to_dict()} for folder, found in found_in.items()])
    elif store is None:
        infos = {folder: info_or_damage(folder) for folder in found_in}
        print_table(
            (*_HEADINGS[:4], "hits", "misses", "hit %"),
            [
                (*_row(infos[folder])[:4], found.hits, found.misses, _percent(found))
                for folder, found in found_in.items()
            ],
            num_text_columns=4,
            optional=("namespace",),
        )
    else:
        for found in found_in.values():
            rows = [(name, *numbers) for name, numbers in found.by_class.items()]
            print_table(("class", "hits", "misses"), [*rows, ("all", found.hits, found.misses)])
            say(
                f"hit rate {_percent(found)} %"
                if found.hits or found.misses
                else "nothing was read"
            )


def _percent(found: ReadStatistics) -> str:
    return f"{100 * found.hit_rate:.1f}" if found.hits or found.misses else "-"
