"""The notebooks of docs/gallery."""

from __future__ import annotations

import re

import nbformat
import pytest

pytest.importorskip("nbclient", reason="the notebooks need the extra [dev]")
from run_gallery import GALLERY, executed


@pytest.mark.parametrize("notebook", sorted(GALLERY.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_has_its_outputs(notebook, tmp_path, monkeypatch):
    """Each cell runs, with outputs of the kinds that are stored, which name no path."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = notebook.read_text("utf-8")
    assert kinds_of(executed(notebook, tmp_path)) == kinds_of(nbformat.reads(text, as_version=4))
    assert not re.search(r"/(?:tmp|home|root|work|usr)/", re.sub(r'"image/png": "[^"]*"', "", text))


def kinds_of(notebook) -> list[list[set[str]]]:
    """By cell: of each output that isn't printed text, its types."""
    return [
        [{*one["data"]} for one in cell.get("outputs", []) if "data" in one]
        for cell in notebook.cells
    ]
