"""A process with closed standard descriptors: what it prints never reaches a file of a store."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from lmdbcache import EmbeddingCache

NUM_VALUES = 120
# Prints as C libraries do: to a number, whatever is there.
PRELUDE = """
import multiprocessing, os, sys
import numpy as np
from lmdbcache import CacheConfig, EmbeddingCache

ROOT, CLOSED, NUM_VALUES = sys.argv[1], [int(n) for n in sys.argv[2:]], 120
config = CacheConfig()
cache = EmbeddingCache(ROOT)

def close_again():
    for number in CLOSED:
        os.close(number)

def warn():
    for number in range(3):
        try:
            os.write(number, b"warning: this function is deprecated\\n" * 400)
        except OSError:
            pass
    names = []
    for number in range(3):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            pass
    if any(name.startswith(ROOT) for name in names):
        os._exit(9)

def write(first, last):
    with cache.writer(config, commit_records=20) as writer:
        for number in range(first, last):
            writer.put(f"c{number}:dog", np.full(300, number, np.float32))
            warn()

def read():
    with cache.reader(config) as reader:
        warn()
        reader["c0:dog"], reader.get_batch(list(reader))
        warn()
"""
PROGRAMS = {
    "one process": "write(0, NUM_VALUES)\nread()\n",
    "closed between two openings": (
        "write(0, 60)\nclose_again()\nwrite(60, NUM_VALUES)\nclose_again()\nread()\n"
    ),
    "a reader beside the writer": (
        "write(0, 1)\nreader = cache.reader(config)\nreader.get_batch(['c0:dog'])\nclose_again()\n"
        "write(1, NUM_VALUES)\nreader.refresh()\nclose_again()\n"
        "reader.get_batch(list(reader)), warn()\n"
    ),
    **{
        method: f"""
def write_in_child():
    close_again()
    write(60, NUM_VALUES)

if __name__ == "__main__":
    write(0, 60)
    process = multiprocessing.get_context("{method}").Process(target=write_in_child)
    process.start(), process.join()
    sys.exit(process.exitcode)
"""
        for method in ("fork", "spawn")
    },
}


def run(program, root, closed, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PRELUDE + program)

    def close():
        for number in closed:
            os.close(number)

    nowhere = subprocess.DEVNULL
    arguments = [sys.executable, script, root, *map(str, closed)]
    return subprocess.run(
        arguments, stdin=nowhere, stdout=nowhere, stderr=nowhere, preexec_fn=close, check=False
    ).returncode


@pytest.mark.parametrize(
    ("program", "closed"),
    [
        *((program, (0, 1, 2)) for program in PROGRAMS),
        *(("one process", closed) for closed in ((2,), (0, 2), (1, 2))),
    ],
)
def test_no_file_of_a_store_is_a_standard_descriptor(tmp_path, config, program, closed):
    """All values are there after a process printed without standard descriptors."""
    root = tmp_path / "cache"
    assert run(PROGRAMS[program], root, closed, tmp_path) == 0
    reader = EmbeddingCache(root).reader(config, verify="always")
    with reader:
        assert len(reader) == NUM_VALUES
        for number in range(NUM_VALUES):
            assert np.array_equal(reader[f"c{number}:dog"], np.full(300, number, np.float32))


def test_what_a_process_prints_arrives_as_before(tmp_path, config):
    """Open standard descriptors stay what they are, and closed ones are the null device."""
    program = PRELUDE + "os.close(0); write(0, 2); print(os.readlink('/proc/self/fd/0'))"
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "cache"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == os.devnull
    assert done.stderr.count("deprecated") == 2 * 400
