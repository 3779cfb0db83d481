"""The small random checkpoint of the tests and demonstrations is good for both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_ast import save_small_ast

from lmdbcache.embedders import ASTEmbedder, ASTFrontEnd, find_checkpoint, weights_digest


def test_deterministic(tmp_path):
    """Equal seeds give equal files, another seed others; the caller's random state stays."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (
        weights_digest(save_small_ast(tmp_path / name, seed=seed, max_length=128))
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), before)


def clips(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tones of ten pitches with random phase, level, vibrato and background noise."""
    labels = np.arange(count) % 10
    time = np.arange(20800) / 16000
    sounds = []
    for label in labels:
        pitch = 150 * 1.45**label * rng.uniform(0.95, 1.05)
        phase = 2 * np.pi * pitch * time + np.sin(2 * np.pi * rng.uniform(3, 6) * time)
        tone = rng.uniform(0.05, 0.2) * np.sin(phase + rng.uniform(0, 6))
        sounds.append(tone + 0.005 * rng.standard_normal(len(time)))
    return np.stack(sounds).astype(np.float32), labels


@pytest.mark.parametrize("output", ["pooler_output", "mean"])
def test_a_linear_probe_tells_ten_classes_apart(ast_folder, output):
    """Embeddings follow the sound: spread of 10 % or more, probe right for 9 of 10 new clips."""
    checkpoint = find_checkpoint(ast_folder)
    front_end = ASTFrontEnd(checkpoint, 16000)
    sounds, labels = clips(240, np.random.default_rng(0))
    features = torch.from_numpy(np.stack([front_end(sound) for sound in sounds]))
    embeddings = ASTEmbedder(checkpoint, output=output).embed(features).numpy()
    spread = np.linalg.norm(embeddings.std(axis=0)) / np.linalg.norm(embeddings, axis=1).mean()
    assert spread > 0.1
    train, test = slice(0, 160), slice(160, 240)
    scaled = (embeddings - embeddings[train].mean(axis=0)) / embeddings[train].std(axis=0)
    inputs = np.concatenate([scaled, np.ones((240, 1))], axis=1)
    penalty = np.eye(inputs.shape[1])
    targets = np.eye(10)[labels[train]]
    weights = np.linalg.solve(inputs[train].T @ inputs[train] + penalty, inputs[train].T @ targets)
    guesses = (inputs[test] @ weights).argmax(axis=1)
    assert (guesses == labels[test]).mean() >= 0.9
