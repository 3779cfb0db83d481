"""What README and docs say, tried."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdbcache import CacheConfig, EmbeddingDataset, VEGASDataset
from lmdbcache.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    """The fenced code of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", document.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.fixture
def names(cache, config):
    """What the examples take for granted: an embedding, a model, a filled store."""
    ids = ["video_00001:dog", "video_00002:dog", "video_00003:drum"]
    with cache.writer(config) as writer:
        writer.put_batch(ids, np.ones((3, 768), np.float32))
    reader = cache.reader(config)
    yield {
        "embedding": torch.ones(768, requires_grad=True),
        "sample_ids": [*ids, "video_00004:drum"],
        "my_model": lambda missing: np.zeros((len(missing), 768)),
        "reader": reader,
    }
    reader.close()


def test_readme_examples_run(names, tmp_path, monkeypatch):
    """Each Python example of the README that needs no dataset runs as it stands."""
    monkeypatch.chdir(tmp_path)
    store, _, *loaders = blocks(ROOT / "README.md", "python")
    store = store.replace('"video_00002:dog"]', '"video_00001:dog"]')
    for number, code in enumerate((store, *loaders)):
        scope = dict(names)
        exec(compile(code, f"README.md block {number}", "exec"), scope)
        for made in ("reader", "loader"):
            if made == "loader" and made in scope:
                batches = list(scope["loader"])
                assert sum(len(labels) for _, labels in batches) == 3
                del batches
        if scope["reader"] is not names["reader"]:
            scope["reader"].close()
    assert set(EmbeddingDataset(names["reader"]).sample_ids) == set(names["sample_ids"][:3])


def test_format_document_gives_the_fingerprint_that_the_code_gives():
    """docs/format.md's JSON and digest are those of the default config."""
    text = (ROOT / "docs" / "format.md").read_text("utf-8")
    (encoded,) = blocks(ROOT / "docs" / "format.md", "json")
    digest = hashlib.blake2b(
        b"lmdbcache config 1\n" + encoded.strip().encode(), digest_size=8
    ).hexdigest()
    assert CacheConfig(**json.loads(encoded)).fingerprint == digest
    assert f"`{digest}`" in text


def test_format_document_reads_a_store_without_lmdbcache(cache, config):
    """docs/format.md's few lines of plain lmdb read what was written."""
    expected = np.arange(768, dtype=np.float32)
    with cache.writer(config) as writer:
        writer.put("video_00001:dog", expected)
    (code,) = blocks(ROOT / "docs" / "format.md", "python")
    code = re.sub(r'Path\("VEGAS.cache/.*?"\)', f'Path("{cache.path(config)}")', code)
    scope: dict[str, object] = {}
    exec(compile(code, "format.md", "exec"), scope)
    np.testing.assert_array_equal(scope["embedding"], expected)


def test_every_command_is_documented():
    """A new command comes with a word about it in docs/command_line.md."""
    text = (ROOT / "docs" / "command_line.md").read_text("utf-8")
    missing = [c.name for c in app.registered_commands if f"lmdbcache {c.name}" not in text]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """Relative links name files that exist."""
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text("utf-8")):
        assert (document.parent / target).exists(), target


def test_vegas_document_names_real_methods():
    """docs/vegas.md speaks of methods that VEGASDataset has."""
    text = (ROOT / "docs" / "vegas.md").read_text("utf-8")
    for name in re.findall(r"dataset\.(\w+)\(", text):
        assert hasattr(VEGASDataset, name), name


def test_exit_codes_are_documented():
    """The table has every exit code that the help names."""
    text = (ROOT / "docs" / "command_line.md").read_text("utf-8")
    codes = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert codes == re.findall(r"(?:: |; )(\d+) ", app.info.epilog)
