"""Hits of other weights than those that the model, or its name on the Hub, has now."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from embedders.small_folders import folder_of
from extraction.clips import write_tones

from lmdbcache import CachedEncoder, EmbeddingCache, ModuleEmbedder, config_for, extract
from lmdbcache.errors import ProvenanceMismatchError

NAME = "MIT/ast-finetuned-tiny"
FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's cache on this machine, with one revision of a model; it can't be asked."""
    hub = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    add_revision(hub, FIRST)
    return hub


def add_revision(hub, revision, *, change="", weights=True):
    """Download another revision; the name stands for it from now on."""
    repository = hub / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    shutil.copytree(folder_of("ast"), snapshot)
    if change:
        settings = (snapshot / "preprocessor_config.json").read_text()
        (snapshot / "preprocessor_config.json").write_text(settings.replace("}", f"{change}}}"))
    if not weights:
        (snapshot / "model.safetensors").unlink()
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)


@pytest.fixture
def run(hub, tmp_path):
    cache, config = EmbeddingCache(tmp_path / "cache"), config_for(NAME, duration=0.5)
    clips = write_tones(tmp_path / "clips", 2)

    def run(model=NAME):
        summary = extract(cache, config, clips, model=model, num_workers=0)
        with CachedEncoder(cache, config, NAME) as encoder:
            for _ in range(2):
                encoder([None] * 2, sample_ids=sorted(clips))
        return summary

    run()
    return run


MOVES = {
    "other settings": lambda hub: add_revision(hub, SECOND, change=', "x": 1'),
    "the settings alone are here": lambda hub: add_revision(hub, SECOND, weights=False),
}


@pytest.mark.parametrize("move", MOVES)
def test_hits_of_another_revision_are_told(run, hub, caplog, move):
    """In the summary and the log, with both revisions; once by an encoder."""
    MOVES[move](hub)
    for model in (NAME, None):
        caplog.clear()
        summary = run(model)
        assert summary.num_cached == 2
        assert summary.moved_model
        assert summary.moved_model in str(summary)
        assert summary.to_dict()["moved_model"] == summary.moved_model
        told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert [FIRST[:12] in text and SECOND[:12] in text for text in told] == [True, True]


@pytest.mark.parametrize(
    "move",
    [
        lambda _: None,
        lambda hub: add_revision(hub, SECOND),  # another README, say
        shutil.rmtree,
    ],
)
def test_the_same_weights_are_no_news(run, hub, caplog, move):
    """Nor is a model that isn't on this machine any more."""
    move(hub)
    assert not run().moved_model
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_store_of_no_revision_asks_nothing(run, hub, tmp_path):
    """A folder has no name on the Hub, even where it is gone."""
    folder = shutil.copytree(folder_of("ast"), tmp_path / "tiny")
    cache, config = EmbeddingCache(tmp_path / "other"), config_for(folder, duration=0.5)
    clips = write_tones(tmp_path / "more", 1)
    for _ in range(2):
        summary = extract(cache, config, clips, model=folder, num_workers=0)
        assert not summary.moved_model
        shutil.rmtree(folder, ignore_errors=True)


def test_hits_of_a_module_with_other_weights_are_refused(tmp_path):
    """The module is at hand, and what is stored would pass for its embeddings."""
    cache, clips = EmbeddingCache(tmp_path / "cache"), write_tones(tmp_path / "clips", 2)

    def run(bias):
        module = torch.nn.Linear(1600, 4)
        with torch.no_grad():
            module.weight.fill_(0.1)
            module.bias.fill_(bias)
            module.weight[0] = torch.linspace(-1, 1, 1600)
        model = ModuleEmbedder(module, name="linear/1", sample_rate=16000)
        config = config_for(model, duration=0.1)
        return extract(cache, config, clips, model=model, num_workers=0)

    run(0.0)
    assert run(0.0).num_cached == 2
    with pytest.raises(ProvenanceMismatchError):
        run(1.0)
