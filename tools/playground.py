"""Make a folder in which the code of docs/ runs without data or network.

python tools/playground.py FOLDER

It has a small VEGAS, an ESC-50, and a small AST with random weights: as `my-ast`, and in `hub`
under the name that `ast` means.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from small_ast import save_small_ast
from synthetic_layouts import make_esc50
from synthetic_vegas import make_synthetic_vegas

from lmdbcache.config import DEFAULT_MODEL_NAME

__all__ = ["make_playground"]

_REVISION = "0123456789abcdef0123456789abcdef01234567"


def make_playground(folder: Path) -> None:
    """Write the datasets and the model; the folder may exist."""
    make_synthetic_vegas(folder / "VEGAS", clips_per_class=4, duration=1.0, broken=False)
    make_esc50(folder / "ESC-50")
    save_small_ast(folder / "my-ast", max_length=512, hidden_size=96)
    repository = folder / "hub" / f"models--{DEFAULT_MODEL_NAME.replace('/', '--')}"
    shutil.copytree(folder / "my-ast", repository / "snapshots" / _REVISION, dirs_exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(_REVISION)


def main() -> None:
    folder = Path(sys.argv[1])
    make_playground(folder)
    print(f"cd {folder}\n. ../.venv/bin/activate")
    print('export HF_HUB_CACHE="$PWD/hub" HF_HUB_OFFLINE=1')


if __name__ == "__main__":
    main()
