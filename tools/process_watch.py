"""Time and memory of a part of this process."""

from __future__ import annotations

import re
import resource
import threading
import time
from pathlib import Path

__all__ = ["Figures", "Watch", "cpu_s"]

Figures = dict[str, float]


def status_kib(*names: str) -> list[int]:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return [int(re.findall(rf"{name}:\s+(\d+) kB", text)[0]) for name in names]


def cpu_s() -> float:
    """Processor seconds of this process so far, the kernel's included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Watch:
    """Seconds, CPU seconds, page tables and private memory of what runs within."""

    def __init__(self) -> None:
        self.figures: Figures = {}

    def __enter__(self) -> Watch:
        self._before = status_kib("RssAnon", "VmPTE")
        self._peak, self._end = list(self._before), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._cpu = cpu_s()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        seconds, cpu = time.perf_counter() - self._started, cpu_s() - self._cpu
        self._end.set()
        self._thread.join()
        self._look()
        anonymous = status_kib("RssAnon")[0]
        self.figures = {
            "s": seconds,
            "CPU s": cpu,
            "private, MiB": (anonymous - self._before[0]) / 1024,
            "private peak, MiB": (self._peak[0] - self._before[0]) / 1024,
            "page tables, MiB": (self._peak[1] - self._before[1]) / 1024,
        }

    def _sample(self) -> None:
        while not self._end.wait(0.02):
            self._look()

    def _look(self) -> None:
        now = status_kib("RssAnon", "VmPTE")
        self._peak = [max(pair) for pair in zip(self._peak, now, strict=True)]
