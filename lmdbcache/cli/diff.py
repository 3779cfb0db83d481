"""`lmdbcache diff`: what differs between two stores, two roots, or two configs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from lmdbcache.cache import (
    DEFAULT_TOLERANCE,
    EmbeddingCache,
    StoreComparison,
    compare_stores,
    is_store,
)
from lmdbcache.cli.command import Argument, Option
from lmdbcache.cli.console import counted, print_json, print_table, progress_bar, say
from lmdbcache.cli.options import (
    Json,
    Progress,
    Root,
    Tolerance,
    complete_store,
    digits_of,
    find_folder,
    stored_config,
    title_of,
)
from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError
from lmdbcache.files import expand_user

Side = Annotated[
    str,
    Argument(
        help="A store (fingerprint, folder name, or a path), a config (JSON file), or a root.",
        complete=complete_store,
    ),
]


@dataclass(frozen=True)
class _Options:
    values: bool
    tolerance: float
    progress: bool | None

    def compare(self, a: Path, b: Path) -> StoreComparison:
        with progress_bar(f"comparing {digits_of(a)}", shown=self.progress) as report:
            return compare_stores(
                a, b, values=self.values, tolerance=self.tolerance, progress=report
            )


def diff_command(
    a: Side,
    b: Side,
    *,
    root: Root = None,
    values: Annotated[
        bool,
        Option("--values/--no-values", help="Read values, or compare checksums alone."),
    ] = True,
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Show what differs: config, provenance, samples, values. Exit code 1 if something does.

    Two roots are compared store by store.
    """
    cache = EmbeddingCache(root)
    options = _Options(values, tolerance, progress)
    sides = (_side(cache, a), _side(cache, b))
    if any(isinstance(side, CacheConfig) for side in sides):
        is_equal = _show_configs(sides, as_json=as_json)
    elif all(is_store(side) for side in sides if isinstance(side, Path)):
        found = options.compare(*sides)  # type: ignore[arg-type]
        is_equal = found.is_equal
        print_json(found.to_dict()) if as_json else _show(found)
    elif any(is_store(side) for side in sides if isinstance(side, Path)):
        raise ConfigError(f"{a} and {b}: one is a store, the other a root; give two of a kind")
    else:
        is_equal = _show_roots(sides, options, as_json=as_json)  # type: ignore[arg-type]
    raise click.exceptions.Exit(0 if is_equal else 1)


def _side(cache: EmbeddingCache, text: str) -> Path | CacheConfig:
    path = expand_user(text)
    if path.is_file():
        try:
            content = json.loads(path.read_text("utf-8"))
            return CacheConfig.from_dict(content.get("config", content))
        except (ValueError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise ConfigError(f"{path}: {error}") from None
            raise ConfigError(f"{path} isn't a JSON object with the fields of a config") from None
    if path.is_dir() and (is_store(path) or EmbeddingCache(path).folders()):
        return path.absolute()
    return find_folder(cache, text)


def _show_configs(sides: tuple[Path | CacheConfig, ...], *, as_json: bool) -> bool:
    a, b = (s if isinstance(s, CacheConfig) else stored_config(s) for s in sides)
    differences = a.differences(b)
    if as_json:
        print_json(
            {
                "is_equal": not differences,
                "fingerprints": [a.fingerprint, b.fingerprint],
                "config": {name: list(pair) for name, pair in differences.items()},
            }
        )
    elif differences:
        _show_fields("config", differences)
    else:
        say(f"the same config, {a.fingerprint}")
    return not differences


def _show_roots(sides: tuple[Path, Path], options: _Options, *, as_json: bool) -> bool:
    first, second = ({f.name: f for f in EmbeddingCache(side).folders()} for side in sides)
    only_a, only_b = sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())
    found = [
        options.compare(first[name], second[name]) for name in sorted(first.keys() & second.keys())
    ]
    is_equal = not (only_a or only_b) and all(one.is_equal for one in found)
    if as_json:
        stores = [one.to_dict() for one in found]
        print_json({"is_equal": is_equal, "only_a": only_a, "only_b": only_b, "stores": stores})
        return is_equal
    for name in only_a:
        say(f"only in {sides[0]}: {name}")
    for name in only_b:
        say(f"only in {sides[1]}: {name}")
    for one in found:
        _show(one)
    return is_equal


def _show(found: StoreComparison) -> None:
    if found.is_equal:
        say(f"{title_of(found.a)}: equal, {_of_common(found)}")
        if not found.worst:
            return
    else:
        # Stores of two roots may have the same name.
        name = title_of if found.a.name != found.b.name else str
        say(f"first:  {name(found.a)}\nsecond: {name(found.b)}")
    _show_fields("config", found.config)
    _show_fields("provenance", found.provenance)
    for side, number, names in (
        ("first", found.num_only_a, found.only_a),
        ("second", found.num_only_b, found.only_b),
    ):
        if number:
            more = f" and {number - len(names)} more" if number > len(names) else ""
            say(f"{counted(number, 'sample')} only in the {side}: {', '.join(names)}{more}")
    say(_of_common(found))
    if found.worst:
        print_table(
            ("furthest apart", "max. difference", "1 - cosine"),
            [(w.sample_id, f"{w.max_abs:.3g}", f"{w.cosine:.3g}") for w in found.worst],
        )


def _of_common(found: StoreComparison) -> str:
    parts = [f"{found.num_equal} bit for bit equal"]
    parts += [f"{found.num_close} within {found.tolerance:g}"] if found.num_close else []
    parts += [f"{found.num_different} different"] if found.num_different else []
    parts += [f"{found.num_other_shape} of another shape"] if found.num_other_shape else []
    compared = found.num_equal + found.num_close + found.num_different + found.num_other_shape
    if compared < found.num_common:
        parts.append(f"{found.num_common - compared} not compared (other dtype, --no-values)")
    return f"{counted(found.num_common, 'sample')} in both: {', '.join(parts)}"


def _show_fields(what: str, differences: Any) -> None:
    if differences:
        rows = [(name, *map(_shown, pair)) for name, pair in differences.items()]
        print_table((what, "first", "second"), rows, num_text_columns=3)


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
