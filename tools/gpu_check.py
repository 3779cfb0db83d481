"""Run the CUDA tests and measure extraction on a GPU, in at most eight minutes.

    python tools/gpu_check.py [--json FILE] [--device cpu --quick]

A bare machine with torch 2.11, torchaudio and transformers lacks a few wheels. Carry them along:

    pip download -d wheels click lazy_loader lmdb msgpack ml_dtypes platformdirs rich xxhash
    pip download -d wheels soundfile soxr pytest pytest-timeout  # where there is a network
    pip install --no-index --find-links wheels click lazy_loader lmdb ...  # there, the same names

Each part has a budget in seconds, prints its rows at once, and is given up when that is over.
Without a GPU the exit code is 2; `--device cpu --quick` runs every part with a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from bench_extraction import FULL_SIZE
from small_ast import save_small_ast

from lmdbcache import CacheConfig, EmbeddingCache, extract
from lmdbcache.audio import load_waveform
from lmdbcache.embedders import ASTEmbedder, ASTFrontEnd, find_checkpoint

NO_GPU = 2
NUM_CLIPS = 256
CALL_SECONDS = 2.0  # of one figure
ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ("pooler_output", "last_hidden_state")
BATCH_SIZES = (8, 16, 32, 64)


class GpuCheck:
    """The parts, in order of what is missed most.

    Args:
        folder: For the clips, the model and the stores.
        device: `"cuda"` or `"cpu"`.
        quick: Tiny sizes.
    """

    def __init__(self, folder: Path, device: str, *, quick: bool) -> None:
        self.folder, self.device, self.quick = folder, device, quick
        self.call_seconds = 0.05 if quick else CALL_SECONDS
        self.batch_sizes = (2, 4) if quick else BATCH_SIZES
        sizes = {"max_length": 128} if quick else FULL_SIZE
        self.checkpoint = find_checkpoint(save_small_ast(folder / "ast", **sizes))
        self.duration = 1.28 if quick else 5.0
        self.front_end = ASTFrontEnd(self.checkpoint, 16000)
        self.clips = {
            f"clip_{i:04d}:noise": str(self._write(i)) for i in range(4 if quick else NUM_CLIPS)
        }
        self.figures: dict[str, Any] = {}
        self.is_sound = True
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run(self) -> dict[str, Any]:
        """Every part's figures, by row; a part that fails has its error as its row."""
        # In all 430 s, and what it takes to import, to write the clips and to end.
        budgets = {
            self.tests: 100,
            self.stages: 20,
            self.models: 110,
            self.extractions: 140,
            self.log_mel: 20,
            self.reads: 40,
        }
        signal.signal(signal.SIGALRM, _end_part)
        for part, seconds in budgets.items():
            signal.alarm(seconds)
            try:
                for name, figure in part():
                    self.add(name, figure)
            except Exception as error:  # noqa: BLE001 - the other parts still count
                self.is_sound = False
                self.add(part.__name__, f"{type(error).__name__}: {error}")
            finally:
                signal.alarm(0)
        return self.figures

    def add(self, name: str, figure: float | str) -> None:
        """Keep and print a figure."""
        self.figures[name] = figure
        print(f"| {name} | {figure if isinstance(figure, str) else f'{figure:.4g}'} |", flush=True)

    def tests(self) -> Iterator[tuple[str, float | str]]:
        """Run the tests that need a GPU; a quick run only collects them."""
        marked = [path for path in (ROOT / "tests").rglob("test_*.py") if _has_gpu_tests(path)]
        found = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
                *(["--collect-only"] if self.quick else []),
                *map(str, marked),
            ],
            check=False,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.is_sound &= found.returncode == 0
        yield "tests that need a GPU", (found.stdout.strip().splitlines() or [found.stderr])[-1]

    def stages(self) -> Iterator[tuple[str, float | str]]:
        """Clips/s of decoding and features on one core."""
        paths = list(self.clips.values())[:32]
        waveforms = [load_waveform(path, 16000, self.duration) for path in paths]
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        decode = self.rate(lambda: load_waveform(paths[0], 16000, self.duration), 1)
        yield "decode, one core, clips/s", decode
        yield "log-mel, one core, clips/s", self.rate(lambda: self.front_end(waveforms[0]), 1)
        torch.set_num_threads(torch_threads)

    def models(self) -> Iterator[tuple[str, float | str]]:
        """Clips/s of the model by precision and batch size, with the way back to the CPU."""
        features = torch.from_numpy(self.features()).repeat(max(self.batch_sizes), 1, 1)
        exact = None
        for dtype in ("float32", "bfloat16"):
            for output in OUTPUTS:
                embedder = ASTEmbedder(self.checkpoint, output, self.device, dtype)
                self.shapes[output] = embedder.embedding_shape
                for size in self.batch_sizes:
                    rate = self.rate(lambda e=embedder, n=size: e.embed(features[:n]), size)
                    yield f"model, {output}, {dtype}, batches of {size}, clips/s", rate
                if output == OUTPUTS[0]:
                    found = embedder.embed(features[:1])
                    exact = found if exact is None else exact
            assert exact is not None
        error = float((found - exact).norm() / exact.norm())
        yield "bfloat16 against float32, pooled, relative L2", error
        batch = features[: max(self.batch_sizes)]
        yield "features to the device, GB/s", self.bandwidth(batch)
        if self.device == "cuda":
            yield "the same, pinned, GB/s", self.bandwidth(batch.pin_memory())

    def extractions(self) -> Iterator[tuple[str, float | str]]:
        """Clips/s of `extract`, and how long the GPU computed meanwhile."""
        size = self.batch_sizes[-1]
        for dtype in ("float32", "bfloat16"):
            for output in OUTPUTS:
                embedder = ASTEmbedder(self.checkpoint, output, self.device, dtype)
                embedder.embed(torch.from_numpy(self.features()).repeat(size, 1, 1))
                timed = _Timed(embedder)
                cache = EmbeddingCache(self.folder / f"{output}-{dtype}")
                config = CacheConfig(duration=self.duration, output=output, compute_dtype=dtype)
                started = time.perf_counter()
                summary = extract(
                    cache,
                    config,
                    self.clips,
                    front_end=self.front_end,
                    make_embedder=lambda timed=timed: timed,
                    batch_size=size,
                )
                seconds = time.perf_counter() - started
                name = f"extract, {output}, {dtype}"
                yield f"{name}, clips/s", summary.num_extracted / seconds
                yield f"{name}, device's busy share", timed.seconds / seconds

        for output in OUTPUTS:
            yield f"limit, {output}, float32", self.limit(output)

    def limit(self, output: str) -> str:
        """The stage with the fewest clips/s, and all of them."""
        found = self.figures
        front_end = [found[f"{name}, one core, clips/s"] for name in ("decode", "log-mel")]
        values = np.random.default_rng(0).random((8, *self.shapes[output]), dtype=np.float32)
        cache, config = EmbeddingCache(self.folder / "written"), CacheConfig(output=output)
        number = iter(range(100_000))

        def write() -> None:
            writer.put_batch([f"{next(number)}:noise" for _ in values], values)
            writer.commit()

        with cache.writer(config) as writer:
            written = self.rate(write, len(values))
        stages = {
            "front end on all cores": (os.cpu_count() or 1) / sum(1 / one for one in front_end),
            "model with transfer": found[
                f"model, {output}, float32, batches of {self.batch_sizes[-1]}, clips/s"
            ],
            "write": written,
        }
        shown = ", ".join(f"{name} {rate:.0f}" for name, rate in stages.items())
        return f"{min(stages, key=lambda name: stages[name])} (clips/s: {shown})"

    def log_mel(self) -> Iterator[tuple[str, float | str]]:
        """How far log-mel features on the device are from those on the CPU."""
        from torchaudio.compliance import kaldi

        waveform = torch.from_numpy(self.waveform())[None]
        options: dict[str, Any] = {"window_type": "hanning", "num_mel_bins": 128}
        there = waveform.to(self.device)
        on_cpu, found = kaldi.fbank(waveform, **options), kaldi.fbank(there, **options).cpu()
        yield (
            "log-mel on the device against the CPU, largest difference",
            float((found - on_cpu).abs().max()),
        )
        yield "log-mel on the device, clips/s", self.rate(lambda: kaldi.fbank(there, **options), 1)

    def reads(self) -> Iterator[tuple[str, float | str]]:
        """Stored hidden states into the device, beside those of a tensor in RAM."""
        config = CacheConfig(duration=self.duration, output=OUTPUTS[1])
        ids = list(self.clips)[:64]
        with EmbeddingCache(self.folder / f"{OUTPUTS[1]}-float32").reader(config) as reader:
            values = torch.from_numpy(np.stack([reader.get(sample_id) for sample_id in ids]))
            pinned = torch.empty_like(values, pin_memory=self.device == "cuda")
            size = min(8, len(ids))

            def from_store() -> None:
                batch = torch.from_numpy(reader.get_batch(ids[:size]))
                pinned[:size].copy_(batch)
                pinned[:size].to(self.device, non_blocking=True)

            yield "hidden states, store → pinned → device, samples/s", self.rate(from_store, size)
            from_ram = self.rate(lambda: values[:size].to(self.device), size)
            yield "hidden states, RAM → device, samples/s", from_ram

    def rate(self, run: Callable[[], Any], size: int) -> float:
        """Items/s of the median call."""
        run()
        times: list[float] = []
        until = time.perf_counter() + self.call_seconds
        while not times or (time.perf_counter() < until and len(times) < 200):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - started)
        return size / sorted(times)[len(times) // 2]

    def bandwidth(self, batch: torch.Tensor) -> float:
        """GB/s of a tensor's way to the device."""
        return self.rate(lambda: batch.to(self.device, copy=True), 1) * batch.nbytes / 1e9

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def waveform(self) -> Any:
        """One clip at 16 kHz."""
        return load_waveform(next(iter(self.clips.values())), 16000, self.duration)

    def features(self) -> Any:
        """One clip's features with a batch dimension."""
        return self.front_end(self.waveform())[None]

    def _write(self, number: int) -> Path:
        path = self.folder / f"clip_{number:04d}.wav"
        noise = np.random.default_rng(number).integers(-9000, 9000, (5 * 44100, 2), np.int16)
        soundfile.write(path, noise, 44100)
        return path


def _end_part(*_: object) -> None:
    raise TimeoutError("given up: its time is over")


def _has_gpu_tests(path: Path) -> bool:
    return "pytest.mark.gpu" in path.read_text(encoding="utf-8")


class _Timed:
    """An embedder, and the seconds that its device was busy: transfers and forward passes."""

    def __init__(self, embedder: ASTEmbedder) -> None:
        self._embedder, self.seconds = embedder, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Embed a batch; the result is on the CPU, so the device has done its work."""
        if self._embedder.device.type != "cuda":
            started = time.perf_counter()
            found = self._embedder.embed(features)
            self.seconds += time.perf_counter() - started
            return found
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        found = self._embedder.embed(features)
        after.record()
        after.synchronize()
        self.seconds += before.elapsed_time(after) / 1000
        return found


def main() -> int:
    """Run all parts; the exit code is 2 without a GPU, 1 if a test or a part fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; see --device cpu --quick")
        return NO_GPU
    if arguments.quick:
        torch.set_num_threads(1)  # a busy machine's second thread would wait for a core
    with tempfile.TemporaryDirectory(prefix="lmdbcache-gpu-") as scratch:
        check = GpuCheck(Path(scratch), arguments.device, quick=arguments.quick)
        figures = check.run()
    if arguments.json:
        text = json.dumps(figures, indent=1, ensure_ascii=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if check.is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
