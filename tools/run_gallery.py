"""Run the notebooks of docs/gallery and keep their outputs, without what differs by machine.

python tools/run_gallery.py [NOTEBOOK …]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

__all__ = ["GALLERY", "executed"]

GALLERY = Path(__file__).parent.parent / "docs" / "gallery"


def executed(path: Path, folder: Path) -> Any:
    """Return the notebook with the outputs of a run in a folder; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, resources=resources, record_timing=False)
    client.coalesce_streams = True  # else what is printed is in pieces, by chance
    client.execute()
    names = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": names}
    for cell in notebook.cells:
        # Warnings and bars of other libraries, which name files of this machine.
        kept = [one for one in cell.get("outputs", []) if one.get("name") != "stderr"]
        if "outputs" in cell:
            cell.outputs = kept
    return notebook


def main() -> None:
    for path in map(Path, sys.argv[1:] or sorted(GALLERY.glob("*.ipynb"))):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)
        print(path.name)


if __name__ == "__main__":
    main()
