"""Tables that a benchmark writes into a document, between two marks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

__all__ = ["table_command", "write_between"]


def write_between(text: str, name: str, content: str) -> str:
    """The document with other content between two comments."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def table_command(about: str, document: Path, name: str, table: Callable[..., str]) -> None:
    """The command line of a benchmark with one table: print it, and write it unless `--quick`."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing")
    arguments = parser.parse_args()
    text = table(quick=arguments.quick)
    print(text)
    if not arguments.quick:
        whole = document.read_text(encoding="utf-8")
        document.write_text(write_between(whole, name, text), encoding="utf-8")
        print(f"\nwritten to {document}")
