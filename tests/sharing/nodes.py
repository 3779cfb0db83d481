"""Nodes: each has a root of its own and runs `lmdbcache push` and `pull` in processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sharing.command_forks import PATIENCE, SIZES_VARIABLE, CommandForks, ForkedCommand
from sharing.places import Place

from lmdbcache import CacheConfig, EmbeddingCache

CONFIG = CacheConfig(duration=1.0, model_name="mine", namespace="vegas")
PATIENT = {"AWS_MAX_ATTEMPTS": "4"}
# Timeouts of seconds where users have a minute, for the tests that wait for one. With them a busy
# machine looks like a stalled connection, so no other test has them.
IMPATIENT = {
    **PATIENT,
    "FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": 5, "connect_timeout": 5}}),
    "FSSPEC_SSH": json.dumps({"keepalive_interval": 2, "connect_timeout": 9, "login_timeout": 9}),
}
# 16 samples of 1 KiB in a shard, 2 shards in a manifest; a wait before a new try is short.
SIZES = {"SHARD_BYTES": 1 << 14, "_SHARDS_PER_MANIFEST": 2, "_PIECE_BYTES": 1 << 13}
WAITS = {"_FIRST_WAIT": 0.01}


def embeddings(first: int, number: int, *, size: int = 256, seed: int = 0) -> dict[str, Any]:
    """Sample id → embedding; the same for the same id and seed."""
    return {
        f"clip_{index:06d}:{'dog' if index % 2 else 'drum'}": np.random.default_rng([seed, index])
        .normal(size=size)
        .astype(np.float32)
        for index in range(first, first + number)
    }


@dataclass
class Node:
    """One machine that shares its store with others."""

    folder: Path
    forks: CommandForks
    place: Place
    environment: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    num_commands: int = 0

    @property
    def cache(self) -> EmbeddingCache:
        return EmbeddingCache(self.folder / "cache")

    def store(self, items: Mapping[str, Any], config: CacheConfig = CONFIG) -> None:
        """Compute them, as it were."""
        with self.cache.writer(config) as writer:
            writer.put_batch(items, items.values())

    def stored(self, config: CacheConfig = CONFIG) -> dict[str, Any]:
        """All that is stored, each value compared with its checksum."""
        if config not in self.cache:
            return {}
        with self.cache.reader(config, verify="always") as reader:
            return {sample_id: reader[sample_id] for sample_id in reader}

    def holds(self, items: Mapping[str, Any], config: CacheConfig = CONFIG) -> bool:
        """Whether these are stored, bit for bit, and nothing else is."""
        stored = self.stored(config)
        return stored.keys() == items.keys() and all(
            stored[name].tobytes() == value.tobytes() for name, value in items.items()
        )

    def start(self, *arguments: object) -> ForkedCommand:
        """`lmdbcache …` with this node's root."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_commands += 1
        environment = {**os.environ, **self.place.environment, **self.environment}
        environment["LMDBCACHE_ROOT"] = str(self.cache.root)
        environment[SIZES_VARIABLE] = json.dumps({**self.sizes, **WAITS})
        output = self.folder / f"output-{self.num_commands}"
        return self.forks.start([str(one) for one in arguments], environment, self.folder, output)

    def run(self, *arguments: object, seconds: float = PATIENCE) -> ForkedCommand:
        """To its end; whatever happens, nobody is shown a traceback."""
        command = self.start(*arguments).wait(seconds)
        assert "Traceback" not in command.stderr, command.stderr
        return command

    def report(self, *arguments: object, code: int = 0) -> Any:
        """What the command tells with `--json`."""
        command = self.run(*arguments, "--json")
        assert command.returncode == code, command.stdout + command.stderr
        return json.loads(command.stdout)

    def push(self, *options: object, code: int = 0) -> dict[str, Any]:
        (report,) = self.report("push", self.place.url, *options, code=code)
        return dict(report)

    def pull(self, *options: object, code: int = 0) -> dict[str, Any]:
        return dict(self.report("pull", self.place.url, *options, code=code))

    def refused(self, *arguments: object) -> str:
        """The one line on standard error of a command that fails."""
        command = self.run(*arguments)
        assert command.returncode == 1, command.stdout + command.stderr
        (line,) = command.stderr.splitlines()
        assert line.startswith("lmdbcache: ")
        return line
