"""Check the prose of docs, docstrings, help and messages against a list of phrases to avoid.

    python tools/check_prose.py            # everything, as `make prose` does
    python tools/check_prose.py docs/*.md  # these files

Prints file:line: the phrase, and what to write instead. Exit code 1 if there is any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Phrase → what to write. Subject, verb, object; the reader is "you"; programs don't speak.
PHRASES = {
    r"\b(?:is|are|was|were|be|been) told\b|\btold (?:by|apart|to)\b": "is given, is inferred",
    r"\btells?\b": "say what happens: prints, returns, reports, shows",
    r"\b(?:no|any|some|every)body\b|\bsomeone\b": "name the process, the user, or the file",
    r"\bmend(?:s|ed|ing)?\b": "fix, repair, exclude",
    r"\bmeanwhile\b": "since then, in the meantime, while …",
    r"\bstands? for\b": "means, matches, is",
    r"\bbeside\b": "next to, besides, with",
    r"(?<!\bthere )\b(?:is|are|was|were) no (?!longer|more|less|way|need)[a-z]": "isn't a …",
    r"\bof (?:its|their|his|one's) own\b": "say whose, or leave it out",
    r", too\b": "also",
    r"\bno good\b": "invalid",
    r"(?<!\bthere )\b(?:is|are|was) (?-i:none)\b": "there isn't one; matches nothing",
    r"\bno help\b": "can't supply",
    r"\bto the stars\b": "any count",
    r"\bwon't bear\b": "would exceed",
    r"\b(?:says|said) nothing\b": "gives no …",
    r"\bhands? on\b": "passes on",
    r"\bas (?:it|they) should be\b": "correct, sound",
    r"\bin vain\b": "without effect",
    r"\bfor ever\b": "permanently, forever",
    r"\bbehind the (?:end|times)\b": "after the end, out of date",
    r"\bhas it that\b|\blo and behold\b|\balas\b|\bsorry\b": "leave it out",
}
# Words of the implementation, which users' pages do without.
INTERNAL = {
    r"\bgenerations?\b": "an internal word: the store, a copy of the store",
    r"\bsettled\b|\blocated values\b": "an internal word",
}
ABOUT_THE_INSIDE = {"architecture.md", "format.md", "reliability.md", "benchmarks.md"}


def main(arguments: list[str]) -> int:
    """Check the files given, or all prose of the project."""
    files = [Path(argument).resolve() for argument in arguments] or [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "lmdbcache").rglob("*.py")),
    ]
    num_found = 0
    for file in files:
        for line, text in prose_of(file):
            phrases = dict(PHRASES)
            if file.suffix == ".md" and file.name not in ABOUT_THE_INSIDE:
                phrases |= INTERNAL
            for phrase, better in phrases.items():
                for match in re.finditer(phrase, text, re.IGNORECASE):
                    place = line + text.count("\n", 0, match.start())
                    print(f"{file.relative_to(ROOT)}:{place}: {match[0]!r}: {better}")
                    num_found += 1
    return 1 if num_found else 0


def prose_of(file: Path) -> Iterator[tuple[int, str]]:
    """Pieces of prose, each with its first line: paragraphs, or docstrings and messages."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        # Code keeps its lines, so that numbers stay right, and loses its words.
        blank = re.sub(
            r"^(```|~~~).*?^\1|`[^`\n]*`",
            lambda code: "\n" * code[0].count("\n"),
            text,
            flags=re.DOTALL | re.MULTILINE,
        )
        yield 1, blank
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, re.sub(r"`[^`\n]*`", "", node.value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
