"""Small modules whose weights are the same in every process."""

from __future__ import annotations

import torch


class Seeded(torch.nn.Module):
    """With a layer that makes 8 numbers of 80."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(80, 8)


class Pooled(Seeded):
    """Features (batch, frames, 80) of any length → (batch, 8); frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.eval().requires_grad_(False)

    def forward(self, features):
        return self.layer(features).mean(dim=1)


def frames(waveform):
    """Features of a waveform: its frames of 80 samples."""
    return waveform[: len(waveform) // 80 * 80].reshape(-1, 80)
