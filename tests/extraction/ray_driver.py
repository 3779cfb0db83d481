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
    """Hidden states of 20 frames, slowly; if asked to, it ends any process but its maker's."""

    def __init__(self, seconds: float = 0.0, *, crashes: bool = False) -> None:
        super().__init__()
        self.seconds = seconds
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(400, 50, generator=generator))
        self.harmless_in = os.getpid() if crashes else None

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        if self.harmless_in not in (None, os.getpid()):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return waveforms.reshape(len(waveforms), 20, 400) @ self.weight


def frames(seconds: float = 0.0, *, crashes: bool = False) -> ModuleEmbedder:
    return ModuleEmbedder(Frames(seconds, crashes=crashes), name="frames/1", sample_rate=16000)


def frames_config(dataset: str) -> CacheConfig:
    return config_for(frames(), duration=0.5, namespace=dataset)


def main() -> int:
    """The exit code; the summary, or the error, is printed."""
    options = json.loads(sys.argv[1])
    dataset = open_dataset(options.pop("data"))
    cache = EmbeddingCache(options.pop("root"))
    model = frames(options.pop("seconds", 0.0), crashes=options.pop("crashes", False))
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
