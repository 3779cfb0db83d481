"""Making a report: look at the stores, then write one file at once or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from lmdbcache.cache import EmbeddingCache, info_or_damage
from lmdbcache.errors import ConfigError, MissingDependencyError
from lmdbcache.report.dataset_coverage import DatasetSplits
from lmdbcache.report.hit_rates import HitRate, hit_rates_of, recorded_hit_rates
from lmdbcache.report.page import GENERATOR, page_of
from lmdbcache.report.store_figures import StoreFigures, figures_of_store

__all__ = [
    "DEFAULT_MAX_SAMPLES",
    "Report",
    "build_report",
    "check_replaceable",
    "collect_report",
    "check_dependencies",
    "write_report",
]

DEFAULT_MAX_SAMPLES: Final = 30_000
_NEEDED: Final = {"jinja2": "jinja2", "plotly": "plotly", "sklearn": "scikit-learn"}
_HEAD_BYTES: Final = 2048


@dataclass(frozen=True)
class Report:
    """What a report says.

    Args:
        root: The cache directory.
        creation_time: ISO 8601, UTC.
        version: Of lmdbcache.
        stores: One by one.
        hit_rates: Recorded look-ups; none if nothing was recorded.
    """

    root: Path
    creation_time: str
    version: str
    stores: list[StoreFigures]
    hit_rates: list[HitRate]

    @property
    def is_sound(self) -> bool:
        """Whether no damage was found in what was looked at."""
        return not any(store.damage for store in self.stores)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "root": os.fspath(self.root),
            "creation_time": self.creation_time,
            "version": self.version,
            "is_sound": self.is_sound,
            "stores": [store.to_dict() for store in self.stores],
            "hit_rates": [{**asdict(rate), "rate": rate.rate} for rate in self.hit_rates],
        }


def collect_report(
    cache: EmbeddingCache,
    stores: Sequence[str | Path] | None = None,
    *,
    datasets: Iterable[DatasetSplits] = (),
    hit_rates: Iterable[Mapping[str, Any]] | None = None,
    max_samples: int = DEFAULT_MAX_SAMPLES,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Look at stores; what is damaged is said in the report.

    Args:
        cache: The root.
        stores: Their folders; None takes all under the root.
        datasets: To show how much of them is stored.
        hit_rates: Look-ups by name: `{"name": …, "hits": …, "misses": …}` each; None takes what is
            recorded beside the stores.
        max_samples: Read the values of so many embeddings of a store at most.
        progress: Called with the steps done and those to do.

    Raises:
        ConfigError: `max_samples` isn't 1 or more.
        MissingDependencyError: scikit-learn, plotly or jinja2 isn't installed.
    """
    check_dependencies()
    if max_samples < 1:
        raise ConfigError(f"max_samples: {max_samples}; it must be 1 or more")
    folders = cache.folders() if stores is None else [Path(store) for store in stores]
    infos = [info_or_damage(folder) for folder in folders]
    chosen, figures, done = list(datasets), [], 0
    steps = [2 * min(max_samples, info.num_embeddings) for info in infos]
    for info, own_steps in zip(infos, steps, strict=True):
        figures.append(
            figures_of_store(
                cache,
                info,
                chosen,
                max_samples=max_samples,
                progress=_shifted(progress, done, own_steps, sum(steps)),
            )
        )
        done += own_steps
        if progress is not None:
            progress(done, sum(steps))
    return Report(
        root=cache.root,
        creation_time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=version("lmdbcache"),
        stores=figures,
        hit_rates=hit_rates_of(recorded_hit_rates(cache) if hit_rates is None else hit_rates),
    )


def build_report(
    cache: EmbeddingCache,
    stores: Sequence[str | Path] | None = None,
    *,
    out: str | Path = "report.html",
    overwrite: bool = False,
    **choices: Any,
) -> Report:
    """Write a report of stores as one HTML file that needs nothing else.

    Args:
        cache: The root.
        stores: Their folders; None takes all under the root.
        out: The file. A report that is there already is replaced.
        overwrite: Replace any file.
        **choices: See `collect_report`.

    Returns:
        What the report says.

    Raises:
        ConfigError: `out` is a file that isn't a report, or a choice can't be used.
        MissingDependencyError: scikit-learn, plotly or jinja2 isn't installed.
        OSError: The file can't be written.
    """
    check_dependencies()
    check_replaceable(Path(out), overwrite=overwrite)
    report = collect_report(cache, stores, **choices)
    write_report(report, Path(out))
    return report


def write_report(report: Report, out: Path) -> None:
    """Write the page under another name and rename it.

    Raises:
        OSError: The file can't be written.
    """
    page = page_of(report)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        # A path that isn't UTF-8 holds lone surrogates; they are shown as escapes.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuse to write over what isn't a report, before anything is computed.

    Raises:
        ConfigError: It is a folder, lies in none, or is another file and `overwrite` isn't set.
        OSError: It can't be read.
    """
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"can't be written: there is no {out.parent}"
        raise ConfigError(f"{out} {what}. Name a file in a folder that exists (--out)")
    if overwrite or not out.exists():
        return
    with out.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if f'content="{GENERATOR}'.encode() not in head:
        raise ConfigError(
            f"{out} exists and isn't a report of lmdbcache. Choose another file (--out), or give "
            "--yes (overwrite=True) to replace it"
        )


def check_dependencies() -> None:
    """Tell before any work what isn't installed.

    Raises:
        MissingDependencyError: Names the package and the extra.
    """
    for module, package in _NEEDED.items():
        try:
            found = find_spec(module) is not None
        except ValueError:  # sys.modules holds None in its place
            found = False
        if not found:
            raise MissingDependencyError(
                f'a report needs the package {package}: pip install "lmdbcache[report]"'
            )


def _shifted(
    progress: Callable[[int, int], None] | None, before: int, own: int, in_all: int
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(before + round(own * done / max(1, total)), in_all)
