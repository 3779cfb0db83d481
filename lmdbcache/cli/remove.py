"""`lmdbcache rm`: whole stores, or embeddings inside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click

from lmdbcache.cache import EmbeddingCache, StoreInfo, info_or_damage, users_of
from lmdbcache.cli.command import Option
from lmdbcache.cli.console import counted, print_error, print_json, say
from lmdbcache.cli.options import (
    All,
    DryRun,
    Json,
    Root,
    Stores,
    Yes,
    check_can_ask,
    find_folders,
    ids_in,
    title_of,
)
from lmdbcache.config import CacheConfig
from lmdbcache.errors import IntegrityError, SampleNotFoundError, StorageError
from lmdbcache.files import few, readable_size
from lmdbcache.storage import (
    EmbeddingReader,
    canonical_sample_id,
    first_window,
    join_sample_id,
    recording_of,
    split_sample_id,
)


def rm_command(
    stores: Stores = None,
    *,
    root: Root = None,
    everything: All = False,
    class_names: Annotated[
        list[str] | None,
        Option("--class", help="Only the embeddings of this class; may be repeated."),
    ] = None,
    samples: Annotated[
        list[str] | None,
        Option("--sample", help="Only this sample (file_id:class); may be repeated."),
    ] = None,
    ids_file: Annotated[
        Path | None,
        Option(
            "--ids", help="Only the samples that this file lists, one id a line; others are noted."
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove stores, or with --class, --sample or --ids embeddings inside them, after asking.

    Embeddings of one store go in one transaction; its file doesn't shrink: later commits reuse the
    space, and `lmdbcache compact` gives it back.
    """
    check_can_ask(as_json=as_json, may_ask=not (yes or dry_run))
    cache = EmbeddingCache(root)
    folders = find_folders(cache, stores, everything=everything)
    if class_names or samples or ids_file:
        wish = _Wish.of(class_names or [], samples or [], ids_file)
        _remove_embeddings(cache, folders, wish, dry_run=dry_run, yes=yes, as_json=as_json)
    else:
        _remove_stores(cache, folders, dry_run=dry_run, yes=yes, as_json=as_json)


def _remove_stores(
    cache: EmbeddingCache, folders: list[Path], *, dry_run: bool, yes: bool, as_json: bool
) -> None:
    chosen = [info_or_damage(folder) for folder in folders]
    if not as_json and (dry_run or not yes):
        for store in chosen:
            held = "damaged" if store.damage else f"{store.num_embeddings} embeddings"
            users = users_of(store)
            used = f", in use by {', '.join(users)}" if users else ""
            say(f"{title_of(store)}: {held}, {readable_size(store.size_bytes)}{used}")
    if chosen and not (yes or dry_run):
        question = f"Remove {counted(len(chosen), 'store')} from {cache.root}?"
        click.confirm(question, abort=True)
    removed, failed = list(chosen if dry_run else ()), False
    for store in () if dry_run else chosen:
        try:
            removed.append(cache.remove(store.path))
        except StorageError as error:  # the others go
            print_error(error)
            failed = True
    if failed and not removed:
        raise click.exceptions.Exit(1)
    if as_json:
        print_json([store.to_dict() for store in removed])
    else:
        freed = sum(store.size_bytes for store in removed)
        verb = "would remove" if dry_run else "removed"
        say(f"{verb} {counted(len(removed), 'store')}, {readable_size(freed)}")
    if failed:
        raise click.exceptions.Exit(1)


# ---- embeddings inside stores


@dataclass(frozen=True)
class _Wish:
    """Which embeddings are meant."""

    class_names: frozenset[str]
    samples: frozenset[str]
    listed: frozenset[str]

    @classmethod
    def of(cls, class_names: list[str], samples: list[str], ids_file: Path | None) -> _Wish:
        return cls(
            frozenset(split_sample_id(join_sample_id("any", name))[1] for name in class_names),
            frozenset(map(canonical_sample_id, samples)),
            frozenset(ids_in(ids_file) or ()),
        )

    def means(self, sample_id: str) -> bool:
        names = {sample_id, recording_of(sample_id)}
        return (
            not self.samples.isdisjoint(names)
            or not self.listed.isdisjoint(names)
            or sample_id.rpartition(":")[2] in self.class_names
        )


@dataclass(frozen=True)
class _Selection:
    """What a wish means for one store."""

    info: StoreInfo
    config: CacheConfig
    chosen: list[str]
    classes: Counter[str]

    def to_dict(self, num_removed: int) -> dict[str, object]:
        return {
            "path": str(self.info.path),
            "fingerprint": self.config.fingerprint,
            "num_removed": num_removed,
            "num_left": self.info.num_embeddings - num_removed,
        }


def _remove_embeddings(
    cache: EmbeddingCache,
    folders: list[Path],
    wish: _Wish,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    selections = [_selected(folder, wish) for folder in folders]
    _check_known(selections, wish)
    total = sum(len(selection.chosen) for selection in selections)
    if not as_json and (dry_run or not yes):
        for selection in selections:
            _say_selection(selection)
    if total and not (yes or dry_run):
        click.confirm(f"Remove {counted(total, 'embedding')}?", abort=True)
    removed = [len(s.chosen) if dry_run else _remove(cache, s) for s in selections]
    if as_json:
        print_json([s.to_dict(n) for s, n in zip(selections, removed, strict=True)])
        return
    found = _found(selections)
    if absent := len(wish.listed - found):
        say(f"{absent} of the {len(wish.listed)} listed aren't stored")
    if dry_run or not total:
        say(f"would remove {counted(total, 'embedding')}" if total else "nothing to remove")
        return
    say(
        f"removed {counted(sum(removed), 'embedding')}; later commits reuse the space, "
        "`lmdbcache compact` gives it back"
    )


def _selected(folder: Path, wish: _Wish) -> _Selection:
    info = info_or_damage(folder)
    if info.config is None:
        raise IntegrityError(f"{info.damage}. Nothing was removed")
    classes: Counter[str] = Counter()
    chosen = []
    with EmbeddingReader(folder, info.config, track_usage=False) as reader:
        for sample_id in reader:
            classes[sample_id.rpartition(":")[2]] += 1
            if wish.means(sample_id):
                chosen.append(sample_id)
        if info.config.window is not None:  # the first window goes with any other
            first = map(first_window, map(recording_of, chosen))
            chosen = sorted({*chosen, *(one for one in first if one in reader)})
    return _Selection(info, info.config, chosen, classes)


def _check_known(selections: list[_Selection], wish: _Wish) -> None:
    """A class or sample that is named and nowhere stored is a slip of the pen."""
    classes = {name for selection in selections for name in selection.classes}
    found = _found(selections)
    if unknown := sorted(wish.class_names - classes):
        there = ", ".join(sorted(classes)[:20]) or "nothing is stored"
        raise SampleNotFoundError(
            f"no sample of class {', '.join(unknown)}. Nothing was removed; classes there: {there}"
        )
    if absent := sorted(wish.samples - found):
        raise SampleNotFoundError(
            f"{few(absent)}: not stored. Nothing was removed; --ids FILE passes "
            "over what isn't there"
        )


def _found(selections: list[_Selection]) -> set[str]:
    """The samples that are chosen, and recordings of which windows are."""
    chosen = [sample_id for selection in selections for sample_id in selection.chosen]
    return {*chosen, *map(recording_of, chosen)}


def _say_selection(selection: _Selection) -> None:
    by_class = Counter(sample_id.rpartition(":")[2] for sample_id in selection.chosen)
    parts = ", ".join(f"{name}: {count}" for name, count in sorted(by_class.items())[:20])
    say(
        f"{title_of(selection.info)}: {len(selection.chosen)} of "
        f"{counted(selection.info.num_embeddings, 'embedding')}{f' ({parts})' if parts else ''}"
    )


def _remove(cache: EmbeddingCache, selection: _Selection) -> int:
    with cache.writer(selection.config) as writer:
        return writer.remove(selection.chosen)
