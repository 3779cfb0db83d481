"""A program that extracts on a Ray cluster with a small module of its own.

Its module lies here, where the processes on the nodes find it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

from lmdbcache import CacheConfig, EmbeddingCache, ModuleEmbedder, config_for, open_dataset
from lmdbcache.errors import CacheError
from lmdbcache.extraction import extract_on_ray, on_ray


class Frames(torch.nn.Module):
    """Hidden states of 20 frames.

    Args:
        gate: A file that each process waits for once it has embedded two batches; None waits for
            nothing.
        crashes: End any process but the one that made it.
    """

    def __init__(self, gate: str | None = None, *, crashes: bool = False) -> None:
        super().__init__()
        self.gate = gate
        self.num_batches = 0
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(400, 50, generator=generator))
        self.harmless_in = os.getpid() if crashes else None

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        if self.harmless_in not in (None, os.getpid()):
            os.kill(os.getpid(), signal.SIGKILL)
        # Copies of one clip are the look at the first batch.
        self.num_batches += not torch.equal(waveforms[0], waveforms[-1])
        while self.gate and self.num_batches > 2 and not os.path.exists(self.gate):
            time.sleep(0.05)
        return waveforms.reshape(len(waveforms), 20, 400) @ self.weight


def frames(gate: str | None = None, *, crashes: bool = False) -> ModuleEmbedder:
    return ModuleEmbedder(Frames(gate, crashes=crashes), name="frames/1", sample_rate=16000)


def frames_config(dataset: str) -> CacheConfig:
    return config_for(frames(), duration=0.5, namespace=dataset)


def main() -> int:
    """The exit code; the summary, or the error, is printed."""
    options = json.loads(sys.argv[1])
    dataset = open_dataset(options.pop("data"))
    cache = EmbeddingCache(options.pop("root"))
    model = frames(options.pop("gate", None), crashes=options.pop("crashes", False))
    on_ray._RETRIES = options.pop("retries", 3)
    try:
        config = frames_config(dataset.namespace)
        summary = extract_on_ray(cache, config, dataset, model=model, **options)
    except CacheError as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(summary.to_dict()))
    return 0


if __name__ == "__main__":
    import extraction.ray_driver  # by its name, so that nodes import it

    sys.exit(extraction.ray_driver.main())
