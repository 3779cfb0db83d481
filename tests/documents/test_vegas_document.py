"""docs/vegas.md: its tables against the commands and the datasets."""

from __future__ import annotations

import json
import re
import shlex

from click.testing import CliRunner
from documents.pages import DOCS
from small_ast import save_small_ast
from synthetic_vegas import make_synthetic_vegas

from lmdbcache.cli.main import app

TEXT = (DOCS / "vegas.md").read_text("utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a line that begins so, without the two lines at its top."""
    table = TEXT.partition(f"\n| {heading}")[2].partition("\n\n")[0]
    return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]


def test_options_of_a_pregenerating_script(tmp_path, monkeypatch):
    """All options of the table, in one command, which takes the clips that they name."""
    monkeypatch.chdir(tmp_path)
    make_synthetic_vegas("VEGAS", clips_per_class=4, duration=0.1, broken=False)
    save_small_ast("my-ast", max_length=512)
    here = [" ".join(re.findall(r"`([^`]*)`", cell)) for _, cell in rows("option of a")]
    assert here[-1] == "lmdbcache coverage"
    arguments = shlex.split(
        " ".join(here[:-1]).replace("MIT/ast-finetuned-audioset-10-10-0.4593", "./my-ast")
    )
    monkeypatch.delenv("LMDBCACHE_ROOT", raising=False)
    result = CliRunner().invoke(app, ["extract", *arguments, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_samples"] == 2 * 4
