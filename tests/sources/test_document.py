"""What docs/trust.md says, tried."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "trust.md"


def test_examples_run(tmp_path, monkeypatch, capsys):
    """Each Python example runs as it stands; the last one's file is unchanged."""
    monkeypatch.chdir(tmp_path)
    text = DOCUMENT.read_text("utf-8")
    for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(code, "trust.md", "exec"), {})
    assert capsys.readouterr().out == "1\n"
