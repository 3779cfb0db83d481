"""The Flower app of docs/examples/flower: two nodes that pull; run by Flower, and a simulation."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.exchange import push

tomllib = pytest.importorskip("tomllib", reason="Flower's app needs Python 3.11")
ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "docs" / "examples" / "flower"
# Flower's packages clash with others, so it has an environment of its own.
FLOWER = Path(sys.prefix) / "flower" / "bin"
CONFIG = CacheConfig(namespace="vegas")
HIDDEN_SIZE = 16

pytestmark = pytest.mark.skipif(
    not (FLOWER / "flwr").exists(),
    reason=f"Flower isn't in {FLOWER.parent}; tools/install_test_programs.sh makes it",
)


@pytest.fixture
def source(tmp_path):
    """A cache of 40 embeddings that tell their class."""
    cache = EmbeddingCache(tmp_path / "source.cache")
    generator = np.random.default_rng(0)
    with cache.writer(CONFIG) as writer:
        for number in range(40):
            sign, name = (1, "dog") if number % 2 else (-1, "drum")
            writer.put(f"video_{number:05d}:{name}", generator.normal(sign, 1, HIDDEN_SIZE))
    return cache


class Flower:
    """Flower's programs in a home of their own, ended with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "flower"
        self.home.mkdir()
        self.address = f"127.0.0.1:{free_port()}"
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "{self.address}"\n'
            "insecure = true\n"
        )
        self.environment = {
            **os.environ,
            "PATH": f"{FLOWER}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_ADDRESS": "local",  # never a cluster that somebody else has started here
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.programs: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(self, *command: str) -> None:
        log = self.folder / f"{len(self.programs)}.log"
        with log.open("wb") as file:
            program = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.programs.append((program, log))

    def superlink(self, *options: str) -> None:
        port = self.address.rpartition(":")[2]
        self.start(
            *("flower-superlink", "--insecure", "--port", port),
            *("--disable-runtime-dependency-installation", *options),
        )
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{self.address}/health", timeout=1).close()
                return
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def supernode(self, node_config: str) -> None:
        self.start(
            *("flower-supernode", "--insecure", "--superlink", self.address),
            *("--port", str(free_port()), "--node-config", node_config),
        )

    def run(self, run_config: str, *options: str) -> str:
        """`flwr run`; what it prints, once the run has finished."""
        done = subprocess.run(
            ["flwr", "run", str(APP), "test", "--stream", "--run-config", run_config, *options],
            env=self.environment, cwd=self.folder, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        # It ends with 0 even if the run failed.
        assert "accuracy" in done.stdout, done.stdout + done.stderr + self.logs()
        return done.stdout

    def logs(self) -> str:
        return "\n".join(log.read_text("utf-8", "replace")[-3000:] for _, log in self.programs)

    def close(self) -> None:
        for program, _ in reversed(self.programs):
            program.terminate()
        for program, _ in self.programs:
            try:
                program.wait(timeout=120)
            except subprocess.TimeoutExpired:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait(timeout=120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def flower(tmp_path):
    flower = Flower(tmp_path)
    yield flower
    flower.close()


def accuracies(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"round \d+: accuracy ([0-9.]+)", printed)]


# What a SuperNode calls: the client app's functions, here by turns of two nodes in one process.
TWO_NODES = """
import json, sys
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from federated_probe.client_app import app
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
settings, nodes = json.loads(sys.argv[1])
contexts = [Context(1, n, node, RecordDict(), settings) for n, node in enumerate(nodes)]
probe = torch.nn.Linear(settings["hidden-size"], 2)
torch.nn.init.zeros_(probe.weight)
def ask(kind, arrays):
    content = RecordDict({"arrays": ArrayRecord(arrays)})
    return [
        app(Message(content=content, dst_node_id=n, message_type=kind), context).content
        for n, context in enumerate(contexts)
    ]
trained = [found["arrays"].to_torch_state_dict() for found in ask("train", probe.state_dict())]
mean = {name: sum(one[name] for one in trained) / len(trained) for name in trained[0]}
print(json.dumps([found["metrics"]["accuracy"] for found in ask("evaluate", mean)]))
"""


def test_a_node_pulls_its_own_part_and_trains(nodes, tmp_path):
    """Without a SuperLink: what the client app answers to the server's messages."""
    settings = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    settings["hidden-size"] = HIDDEN_SIZE
    done = subprocess.run(
        [FLOWER / "python", "-c", TWO_NODES, json.dumps([settings, nodes.configs])],
        env={**os.environ, "PYTHONPATH": f"{APP}{os.pathsep}{ROOT}", "FLWR_TELEMETRY_ENABLED": "0"},
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.mean(json.loads(done.stdout.splitlines()[-1])) > 0.9
    nodes.hold_their_parts()


@pytest.fixture
def nodes(source, tmp_path):
    """What two nodes are told: which part of what was pushed is theirs."""
    url = f"file://{tmp_path}/bucket"
    manifest = push(source, CONFIG, url).manifest
    with source.writer(CONFIG) as writer:  # what comes after the push doesn't concern them
        writer.put("video_99999:dog", np.ones(HIDDEN_SIZE))
    push(source, CONFIG, url)
    with source.reader(CONFIG) as reader:
        ids = [name for name in reader if name != "video_99999:dog"]
    configs = []
    for node in range(2):
        listed = tmp_path / f"node{node}.txt"
        listed.write_text("\n".join(ids[node::2]))
        configs.append(
            {
                "cache-root": str(tmp_path / f"node{node}.cache"),
                "samples": str(listed),
                "url": url,
                "fingerprint": CONFIG.fingerprint,
                "manifest": manifest,
            }
        )

    def hold_their_parts():
        for node, told in enumerate(configs):
            cache = EmbeddingCache(told["cache-root"])
            with cache.reader(CONFIG) as reader, source.reader(CONFIG) as theirs:
                assert list(reader) == ids[node::2]
                assert all(np.array_equal(reader[name], theirs[name]) for name in reader)

    return SimpleNamespace(configs=configs, hold_their_parts=hold_their_parts)


@pytest.mark.stress
def test_nodes_of_a_superlink_pull_their_own_part_and_train(flower, nodes):
    """A SuperLink and two SuperNodes: each pulls its own part, by URL and manifest."""
    flower.superlink()
    for told in nodes.configs:
        flower.supernode(" ".join(f'{name}="{value}"' for name, value in told.items()))
    printed = flower.run(f"num-server-rounds=1 hidden-size={HIDDEN_SIZE}")
    assert accuracies(printed)[-1] > 0.9
    nodes.hold_their_parts()


@pytest.mark.stress
def test_clients_of_a_simulation_share_one_cache(flower, source):
    """Three clients in Ray's processes read one store, each its share; nobody writes to it."""
    before = source.info(CONFIG).last_written
    flower.superlink("--simulation")
    printed = flower.run(
        f'num-server-rounds=1 hidden-size={HIDDEN_SIZE} num-nodes=3 cache-root="{source.root}"'
        f' fingerprint="{CONFIG.fingerprint}"',
        "--federation-config",
        "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2",
    )
    assert accuracies(printed)[-1] > 0.9
    assert "Received 3 results and 0 failures" in printed
    assert source.info(CONFIG).last_written == before
