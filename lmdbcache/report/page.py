"""The page: a template, its style, its script and plotly in one file that requests nothing else.

The Content-Security-Policy allows the page's own two scripts by their digests and no request at
all: whatever a sample id or a failure's reason might bring in couldn't run.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.files import readable_size
from lmdbcache.report.figures import CacheReport, StoreFigures
from lmdbcache.report.vectors import Distribution, EmbeddingMap
from lmdbcache.storage import class_of

if TYPE_CHECKING:
    from jinja2 import Environment

GENERATOR: Final = "lmdbcache report"
# Control characters and lone surrogates can't be shown; HTML changes or refuses them.
_NOT_SHOWN: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def page_of(report: CacheReport) -> str:
    """Return the report as HTML."""
    from jinja2.utils import htmlsafe_json_dumps
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    plotly, script = get_plotlyjs(), _template_file("page.js")
    environment = _environment()
    return environment.get_template("page.html.j2").render(
        report=report,
        generator=GENERATOR,
        # Neither holds anything from outside of the package.
        style=Markup(_template_file("style.css")),
        script=Markup(script),
        plotly=base64.b64encode(gzip.compress(plotly.encode("utf-8"), mtime=0)).decode(),
        digests=[_digest(script), _digest(plotly)],
        chart_data=htmlsafe_json_dumps([_chart_data(store) for store in report.stores]),
    )


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lmdbcache.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=readable_size,
        number=lambda number: f"{number:,}",
        percent=_percent,
        short=lambda number: f"{number:.4g}",
        cosine=lambda cosine: f"{cosine:.4f}" if cosine < 0.9995 else f"1 - {1 - cosine:.0e}",
        class_of=class_of,
    )
    environment.globals["class_numbers"] = _class_numbers
    return environment


def _template_file(name: str) -> str:
    folder = resources.files("lmdbcache.report") / "templates"
    return (folder / name).read_text("utf-8")


def _digest(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _shown(value: Any) -> Any:
    """Return text as it can be shown; anything else, escaped markup included, as it is."""
    if type(value) is not str:
        return value
    return _NOT_SHOWN.sub(lambda match: ascii(match[0])[1:-1], value)


def _percent(stored: int, asked: int) -> str:
    """Return a share in percent that is 100 only for all and 0 only for none."""
    share = 100 * stored / asked if asked else 100.0
    if 0 < stored < asked:
        share = min(max(share, 0.1), 99.9)
    return f"{share:.1f}" if 0 < stored < asked else f"{share:.0f}"


def _class_numbers(store: StoreFigures, sample_ids: Iterable[str]) -> str:
    """Return the numbers of some samples' classes, as the page's script knows them."""
    numbers = _numbers(store)
    return " ".join(sorted({str(numbers.get(class_of(sample_id), -1)) for sample_id in sample_ids}))


def _numbers(store: StoreFigures) -> Mapping[str, int]:
    return {each.name: number for number, each in enumerate(store.classes)}


def _chart_data(store: StoreFigures) -> dict[str, Any]:
    """Return what the page's script draws for a store."""
    found = store.map
    drawn = None
    if isinstance(found, EmbeddingMap):
        numbers = _numbers(store)
        drawn = {
            "names": list(map(_shown, found.sample_ids)),
            "classes": [numbers[class_of(sample_id)] for sample_id in found.sample_ids],
            "x": _rounded(found.x),
            "y": _rounded(found.y),
            "shares": found.explained_variance,
            "paths": [_shown(store.paths.get(name, "")) for name in found.sample_ids],
        }
    return {
        "classes": [_shown(each.name) for each in store.classes],
        "map": drawn,
        "norms": _bars(store.norms),
        "values": _bars(store.values),
    }


def _bars(found: Distribution | None) -> dict[str, Any] | None:
    return {"edges": found.edges, "counts": found.counts} if found else None


def _rounded(numbers: Iterable[float]) -> list[float]:
    return [float(f"{number:.5g}") for number in numbers]
