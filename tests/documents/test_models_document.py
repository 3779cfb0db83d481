"""docs/models.md against the registry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lmdbcache.embedders.families import FAMILIES

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text("utf-8")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_documented(family):
    """Its kinds of model, its outputs in their order, and its front end."""
    assert f"`{family.front_end_id}`" in TEXT
    (row,) = [line for line in TEXT.splitlines() if f"| `{family.model_types[0]}`" in line] or [
        line for line in TEXT.splitlines() if line.startswith("| `wav2vec2`")
    ]
    kinds, outputs = row.split("|")[1:3]
    assert re.findall(r"`([\w-]+)`", outputs) == list(family.outputs)
    # CLAP's audio half saved by itself is the same kind of model.
    assert set(re.findall(r"`([\w-]+)`", kinds)) == set(family.model_types) - {"clap_audio_model"}
