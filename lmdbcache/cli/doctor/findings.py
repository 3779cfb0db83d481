"""What a check found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmdbcache.storage import Report


@dataclass(frozen=True)
class Finding(Report):
    """One line of the doctor's report.

    Args:
        subject: What was looked at.
        level: `"ok"`; `"note"`: worth knowing; `"problem"`: something won't work.
        text: What was found.
        remedy: What to do; empty if there is nothing to do.
    """

    subject: str
    level: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""


def ok(subject: str, text: str) -> Finding:
    """All is well."""
    return Finding(subject, "ok", text)


def note(subject: str, text: str, remedy: str = "") -> Finding:
    """Worth knowing, and nothing stops working."""
    return Finding(subject, "note", text, remedy)


def problem(subject: str, text: str, remedy: str) -> Finding:
    """Something won't work."""
    return Finding(subject, "problem", text, remedy)
