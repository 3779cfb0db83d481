"""Times and sizes as people write them: `30d`, `2026-01-31`, `50GB`, `500MiB`."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Final

import click

_SECONDS: Final = {
    "s": 1,
    "m": 60,
    "h": 3600,
    "d": 86400,
    "w": 7 * 86400,
    "y": 365 * 86400,
}
_UNITS: Final = {
    "": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGTP", 1)},
    "B": 1,
}
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhdwy])")
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_moment(text: str) -> datetime:
    """The moment so long ago (`30d`, `12h`, `2w`), or of a date (local time).

    Raises:
        click.BadParameter: Neither, or a moment to come.
    """
    now = datetime.now(timezone.utc)
    try:
        if duration := _DURATION.fullmatch(text.strip()):
            return now - timedelta(seconds=float(duration[1]) * _SECONDS[duration[2]])
        moment = datetime.fromisoformat(text.strip()).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{text!r} is neither a duration (30d, 12h, 2w, 1y; m are minutes) nor a date "
            "(2026-01-31)"
        ) from None
    if moment > now:
        raise click.BadParameter(f"{text!r} lies in the future")
    return moment


def parse_size(text: str) -> int:
    """Bytes: `50GB` (1000 each), `500MiB` (1024 each), `1000000`.

    Raises:
        click.BadParameter: Not a size.
    """
    size = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(size[2].upper()) if size else None
    if size is None or unit is None:
        raise click.BadParameter(f"{text!r} isn't a size such as 50GB, 500MiB or 1000000")
    return int(float(size[1]) * unit)


def age(moment: datetime | None) -> str:
    """How long ago, in one unit: `5m`, `3h`, `12d`; `-` if that isn't known."""
    if moment is None:
        return "-"
    seconds = (datetime.now(timezone.utc) - moment).total_seconds()
    for unit, following in (("m", "h"), ("h", "d"), ("d", "y")):
        if seconds < _SECONDS[following]:
            return f"{max(0.0, seconds) // _SECONDS[unit]:.0f}{unit}"
    return f"{seconds / _SECONDS['y']:.1f}y"
