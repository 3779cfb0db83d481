"""The documents and the code in them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def blocks(document: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks, of these languages or of all."""
    text = document.read_text("utf-8")
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [
        (language, textwrap.dedent(code))
        for _, language, code in found
        if not languages or language in languages
    ]
