"""How much of the model's own speed an extraction keeps, and what the front end costs.

    python tools/bench_extraction.py [--quick] [--json FILE]

The model is a full-size AST with random weights; the clips are 5 s of noise at 44.1 kHz stereo.
Ways are measured in turn and the median over the rounds is kept: only ratios of one run count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from small_ast import save_small_ast

from lmdbcache import CacheConfig, EmbeddingCache, ModuleEmbedder, config_for, extract
from lmdbcache.audio import load_clip, load_waveform
from lmdbcache.cache import read_source
from lmdbcache.embedders import ASTEmbedder, ASTFrontEnd, find_checkpoint

FULL_SIZE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "initializer_range": 0.02,
}


def measure(*, quick: bool = False, num_clips: int = 8) -> dict[str, dict[str, float]]:
    """Clips per second of each way, by table row."""
    with tempfile.TemporaryDirectory(prefix="lmdbcache-bench-") as scratch:
        return _Bench(Path(scratch), quick=quick, num_clips=num_clips).run()


class _Bench:
    def __init__(self, folder: Path, *, quick: bool, num_clips: int) -> None:
        self.folder = folder
        self.num_clips, self.rounds = (4, 1) if quick else (num_clips, 3)
        sizes = {"max_length": 128} if quick else FULL_SIZE
        self.model = save_small_ast(folder / "ast", **sizes)
        self.duration = 1.28 if quick else 5.0
        self.checkpoint = find_checkpoint(self.model)
        self.front_end = ASTFrontEnd(self.checkpoint, 16000)
        self.clips = {
            f"clip_{i:03d}:noise": str(self._write_clip(i)) for i in range(self.num_clips)
        }
        self.num_stores = 0

    def _write_clip(self, number: int) -> Path:
        path = self.folder / f"clip_{number:03d}.wav"
        noise = np.random.default_rng(number).normal(scale=0.1, size=(5 * 44100, 2))
        soundfile.write(path, noise, 44100)
        return path

    def run(self) -> dict[str, dict[str, float]]:
        return {
            "end to end, clips/s": self.end_to_end(),
            "windows of one recording, windows/s": self.windows(),
            "bfloat16 against float32, pooled": self.lower_precision(),
            "front end on one core, clips/s": self.front_end_stages(),
            "everything cached, s with start-up": self.resumed(),
        }

    def end_to_end(self) -> dict[str, float]:
        embedder = ASTEmbedder(self.checkpoint)
        half = ASTEmbedder(self.checkpoint, compute_dtype="bfloat16")
        features = torch.stack([torch.from_numpy(self._features(p)) for p in self.clips.values()])

        def bare_model() -> None:
            for start in range(0, self.num_clips, 8):
                embedder.embed(features[start : start + 8])

        def one_by_one() -> None:
            found = {}
            for sample_id, path in self.clips.items():
                clip = torch.from_numpy(self._features(path))[None]
                found[sample_id] = embedder.embed(clip)[0]
            torch.save(found, self.folder / "embeddings.pt")

        return self.compare(
            {
                "bare model on ready features": bare_model,
                "one clip at a time": one_by_one,
                "extract": lambda: self.extract(embedder),
                "extract, four stores by one pass": lambda: self.extract(
                    embedder,
                    [
                        ("pooler_output", "float32"),
                        ("mean", "float32"),
                        ("last_hidden_state", "float32"),
                        ("last_hidden_state", "float16"),
                    ],
                ),
                "extract, bfloat16": lambda: self.extract(half),
            },
            rounds=min(2, self.rounds),  # the most expensive one
        )

    def windows(self) -> dict[str, float]:
        """5 s windows of stereo at 44.1 kHz, by models that take 20 and 5 ms for each elsewhere."""
        path, minutes = self.folder / "recording.wav", 1 if self.rounds == 1 else 10
        minute = np.random.default_rng(0).normal(scale=0.1, size=(60 * 44100, 2))
        with soundfile.SoundFile(path, "w", 44100, 2) as file:
            for _ in range(minutes):
                file.write(minute)
        ready, number = torch.zeros(8, 80000), 12 * minutes
        ways: dict[str, Callable[[], Any]] = {}
        for seconds in (0.02, 0.005):
            model = ModuleEmbedder(_Elsewhere(seconds), name="elsewhere", sample_rate=16000)
            config = config_for(model, window=5.0, namespace=str(seconds))
            embedder = model.make_embedder(config)

            def bare_loop(embedder: Any = embedder) -> None:
                for start in range(0, number, 8):
                    embedder.embed(ready[: number - start])

            def extracted(model: ModuleEmbedder = model, config: CacheConfig = config) -> None:
                self.num_stores += 1
                cache = EmbeddingCache(self.folder / f"cache-{self.num_stores}")
                summary = extract(cache, config, {"recording:noise": str(path)}, model=model)
                assert summary.num_windows == number, summary

            what = f"a model that takes {1000 * seconds:g} ms for a window"
            ways[f"{what}, on ready windows"] = bare_loop
            ways[f"{what}, extract"] = extracted
        return self.compare(ways, number)

    def lower_precision(self) -> dict[str, float]:
        clips = list(self.clips.values())[:4]
        features = torch.stack([torch.from_numpy(self._features(path)) for path in clips])
        exact = ASTEmbedder(self.checkpoint).embed(features)
        half = ASTEmbedder(self.checkpoint, compute_dtype="bfloat16").embed(features)
        return {
            "relative error, L2, largest": float(
                ((half - exact).norm(dim=1) / exact.norm(dim=1)).max()
            ),
            "1 - cosine similarity, largest": float(
                1 - torch.nn.functional.cosine_similarity(half, exact).min()
            ),
        }

    def extract(
        self,
        embedder: ASTEmbedder,
        stores: Sequence[tuple[str, str]] = (("pooler_output", "float32"),),
    ) -> None:
        # The model is loaded once for all rounds: what is timed is the work per clip.
        self.num_stores += 1
        config = CacheConfig(duration=self.duration, compute_dtype=embedder.compute_dtype)
        summaries = extract(
            EmbeddingCache(self.folder / f"cache-{self.num_stores}"),
            [config.replace(output=output, dtype=dtype) for output, dtype in stores],
            self.clips,
            front_end=self.front_end,
            make_embedder=lambda: embedder,
        )
        assert all(summary.num_extracted == self.num_clips for summary in summaries), summaries

    def front_end_stages(self) -> dict[str, float]:
        paths = list(self.clips.values())
        waveforms = [load_waveform(path, 16000, self.duration) for path in paths]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        figures = self.compare(
            {
                "decode and resample": lambda: [
                    load_waveform(path, 16000, self.duration) for path in paths
                ],
                "log-mel": lambda: [self.front_end(waveform) for waveform in waveforms],
                "both": lambda: [self._features(path) for path in paths],
                "both, with the digest, as extract does": lambda: [
                    self._digested_features(path) for path in paths
                ],
            }
        )
        torch.set_num_threads(threads)
        return figures

    def _features(self, path: str) -> Any:
        return self.front_end(load_waveform(path, 16000, self.duration))

    def _digested_features(self, path: str) -> Any:
        _, content = read_source(path)
        return self.front_end(load_clip(path, 16000, self.duration, content=content).waveform)

    def resumed(self) -> dict[str, float]:
        code = (
            "import sys; from lmdbcache import CacheConfig, EmbeddingCache, extract\n"
            "import json; clips = json.loads(sys.stdin.read())\n"
            f"config = CacheConfig(duration={self.duration})\n"
            "summary = extract(EmbeddingCache(sys.argv[1]), config, clips)\n"
            "assert summary.num_extracted == 0 and 'transformers' not in sys.modules\n"
        )
        num_samples = 28_109 if self.rounds > 1 else 100
        ids = [f"video_{i:05d}:dog" for i in range(num_samples)]
        root = self.folder / "resumed"
        with EmbeddingCache(root).writer(CacheConfig(duration=self.duration)) as writer:
            writer.put_batch(ids, np.ones((num_samples, 768), np.float32))
        clips = json.dumps(dict.fromkeys(ids, "clip.wav"))
        times = []
        for _ in range(self.rounds):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", code, str(root)], input=clips, text=True, check=True
            )
            times.append(time.perf_counter() - started)
        return {f"{num_samples} samples": statistics.median(times)}

    def compare(
        self,
        ways: dict[str, Callable[[], Any]],
        number: int | None = None,
        rounds: int | None = None,
    ) -> dict[str, float]:
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds or self.rounds):
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                rates[name].append((number or self.num_clips) / (time.perf_counter() - started))
        return {name: statistics.median(values) for name, values in rates.items()}


class _Elsewhere(torch.nn.Module):
    """Stands for a model on a device: the process waits for it."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.linear = torch.nn.Linear(8, 16)

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds * len(waveforms))
        found: torch.Tensor = self.linear(waveforms[:, :8])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--clips", type=int, default=8, help="clips of each way and round")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    text = json.dumps(
        measure(quick=arguments.quick, num_clips=arguments.clips), indent=1, ensure_ascii=False
    )
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
