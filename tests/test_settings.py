"""The environment variables, and the command that installs an extra."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

import lmdbcache
from lmdbcache.datasets import ESC50Dataset, VEGASDataset, VGGSoundDataset
from lmdbcache.machine import VARIABLES, dataset_root_variable, install_line

PACKAGE = Path(lmdbcache.__file__).parent
NAMES = {variable.name for variable in VARIABLES}


def test_every_variable_is_in_the_table():
    """No module names a variable that the table lacks, or spells one out beside it."""
    for module in PACKAGE.rglob("*.py"):
        text = module.read_text("utf-8")
        assert set(re.findall(r"\bLMDBCACHE_[A-Z0-9_]*[A-Z0-9]", text)) <= NAMES, module
        if module.name != "machine.py":
            assert not re.search(r"""["']LMDBCACHE_""", text), module


def test_each_dataset_has_its_variable():
    """The folder of each dataset can be given by a variable of the table."""
    for dataset in (VEGASDataset, ESC50Dataset, VGGSoundDataset):
        assert dataset_root_variable(dataset.namespace) in NAMES


def test_the_documented_table_is_the_same():
    """docs/configuration.md has each variable once."""
    text = (PACKAGE.parent / "docs" / "configuration.md").read_text("utf-8")
    rows = re.findall(r"^\| `(LMDBCACHE_\w+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(NAMES)


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (None, None),
        ({"url": "https://host/lmdbcache.whl", "archive_info": {}}, None),
        ({"url": "file:///a%20b", "dir_info": {}}, 'pip install "/a b[audio]"'),
        ({"url": "file:///a", "dir_info": {"editable": True}}, 'pip install -e "/a[audio]"'),
    ],
)
def test_install_line(monkeypatch, tmp_path, record, command):
    """By name, and for what was installed from a folder by that folder."""
    info = tmp_path / "lmdbcache-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: lmdbcache\nVersion: 1\n")
    if record is not None:
        (info / "direct_url.json").write_text(json.dumps(record))
    installed = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: installed)
    line = install_line.__wrapped__("audio")
    assert line.startswith('pip install "lmdbcache[audio]"')
    assert line.endswith(command or '"lmdbcache[audio]"')
