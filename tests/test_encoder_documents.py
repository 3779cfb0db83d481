"""The examples of docs/mixed_batches.md and docs/hidden_states.md, run as they stand."""

from __future__ import annotations

import gc
import re
import shutil
from pathlib import Path

import pytest
from small_ast import save_small_ast
from synthetic_vegas import make_synthetic_vegas

from lmdbcache import EmbeddingCache

DOCS = Path(__file__).resolve().parent.parent / "docs"


def run_blocks(name):
    text = (DOCS / name).read_text("utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    scope: dict[str, object] = {}
    exec(compile(code, name, "exec"), scope)
    return scope


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    gc.collect()


def test_mixed_batches(tmp_path):
    """Two epochs leave every clip stored, and the model ran in the first only."""
    make_synthetic_vegas(tmp_path / "VEGAS", clips_per_class=2, duration=1.0, broken=False)
    for name in ("chainsaw", "dog"):
        shutil.rmtree(tmp_path / "VEGAS" / name)
    save_small_ast(tmp_path / "my-ast", max_length=128)
    scope = run_blocks("mixed_batches.md")
    assert scope["batch"]["mask"].all()
    assert scope["encoder"].num_computed == 4 + 16
    found = EmbeddingCache("VEGAS.cache").coverage(scope["config"], scope["clips"].sample_ids)
    assert (found.num_asked, found.fraction) == (16, 1.0)
    scope["dataset"].close()


def test_hidden_states():
    """Shapes are those of the table."""
    scope = run_blocks("hidden_states.md")
    shapes = {
        view: scope["HiddenStateView"](scope["reader"], view).embedding_shape
        for view in ("cls", "pooler_output", "mean", "valid_mean", "frames", "valid")
    }
    text = (DOCS / "hidden_states.md").read_text("utf-8")
    for view, shape in shapes.items():
        assert re.search(rf"`{view}`.*\| {re.escape(str(shape))} \|", text), (view, shape)
    scope["reader"].close()
