"""Importing the embedders stays cheap."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lmdbcache import embedders

ROOM = Path(embedders.__file__).parent


def test_no_heavy_package_is_imported():
    """Neither torch nor transformers nor an audio library, in any module of the room."""
    modules = ["families", *(file.stem for file in ROOM.glob("[!_]*.py"))]
    imported = "".join(f", lmdbcache.embedders.{module}" for module in modules)
    code = f"import json, sys{imported}; print(json.dumps(list(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "torchaudio", "huggingface_hub", "soundfile", "soxr"}
    assert not heavy & set(json.loads(result.stdout))


def test_identity_and_front_end_need_no_torch(ast_folder):
    """A run with nothing to compute asks for an identity and a front end's limits only."""
    code = (
        "import sys; from lmdbcache.embedders import *\n"
        f"checkpoint = find_checkpoint({str(ast_folder)!r})\n"
        "assert ASTFrontEnd(checkpoint, 16000).min_samples == 400\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
