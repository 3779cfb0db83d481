"""What commands print on a terminal: lines that fit, whole words, and what was left out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading

import numpy as np
import pytest

from lmdbcache import CacheConfig, config_for

_STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ENDS_OF_WORDS = re.compile(r"[\s/_+@:-]+")
# In the process of the command. Its streams were made for files, which can be rewound.
_TAKE_TERMINAL = """
import os, sys
terminal = os.open({!r}, os.O_RDWR)
for descriptor in range(3):
    os.dup2(terminal, descriptor)
sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
os.environ.pop("COLUMNS", None)
"""


@pytest.fixture
def on_terminal(cli):
    """Run a command on a terminal of so many columns; gives the lines that it printed."""

    def on_terminal(columns, *arguments):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        chunks = []
        reading = threading.Thread(target=read_all, args=(ours, chunks))
        reading.start()
        cli(*arguments, prepare=_TAKE_TERMINAL.format(os.ttyname(theirs)))
        os.close(theirs)
        reading.join()
        os.close(ours)
        return _STYLES.sub("", b"".join(chunks).decode()).replace("\r\n", "\n").splitlines()

    return on_terminal


def read_all(terminal, chunks):
    """Read until the other end is closed by all."""
    while True:
        try:
            chunks.append(os.read(terminal, 65536))
        except OSError:
            return


@pytest.fixture
def stores(cache):
    """Stores under names as they are in use: long, with a number, of several datasets."""
    of_my_own = CacheConfig(
        model_name="my-encoder/1", output="embedding", duration=1.0, namespace="vegas"
    )
    configs = [
        config_for("ast", namespace="vegas", output="last_hidden_state"),
        CacheConfig(model_name="facebook/wav2vec2-large-xlsr-53", output="mean", namespace="esc50"),
        of_my_own,
        of_my_own.replace(namespace="a-namespace-of-some-length"),
    ]
    for number, config in enumerate(configs):
        with cache.writer(config, without_provenance=True) as writer:
            for clip in range(number + 1):
                writer.put(f"video_{clip:05d}:railway_station_announcement", np.ones((2, 8)))
    return {"hidden": configs[0].fingerprint, "mine": of_my_own.fingerprint, **vars(cache)}


@pytest.mark.parametrize(
    "command",
    [
        "ls",
        "info {mine}",
        "stats",
        "stats {mine}",
        "coverage {data}",
        "coverage {data} --model-name my-encoder/1 --output embedding --duration 2",
        "explain --model-name my-encoder/1 --output embedding --duration 2",
        "explain video_00009:dog --model-name mine --duration 1",
        "diff {hidden} {mine} --no-progress",
        "verify --all --no-progress",
        "prune --older-than 0d --dry-run",
        "rm --all --dry-run",
        "compact --all --dry-run",
        "dataset {data}",
        "partition {data} --num-nodes 3",
        "extract {data} --dry-run",
        "info",
    ],
)
def test_lines_fit_and_words_are_whole(cli, on_terminal, stores, data, command):
    """No line is wider than the terminal, but for one word; no word but a pipe's is in it."""
    arguments = [part.format(data=data, **stores) for part in command.split()]
    in_pipe = cli(*arguments)
    words = set(_ENDS_OF_WORDS.split(in_pipe.stdout + in_pipe.stderr))
    words |= {word[:8] for word in words if re.fullmatch("[0-9a-f]{16}", word)}
    for columns in (60, 80, 120):
        lines = on_terminal(columns, *arguments)
        assert lines
        for line in lines:
            assert len(line) <= columns or " " not in line.strip(), lines
        text = "\n".join(lines)
        note = re.search(r"^not shown: .*?--json\s+has\s+them\)", text, re.DOTALL | re.MULTILINE)
        text = text.replace(note[0], "") if note else text
        found = set(_ENDS_OF_WORDS.split(text))
        # Ages and free space change between two runs.
        assert {word for word in found if not re.fullmatch(r"[\d.,]+\w?", word)} <= words, text


def test_what_is_left_out_is_said(cli, on_terminal, stores):
    """The headings of a narrow terminal and those that it names are those of a pipe."""
    headings = cli("ls").stdout.splitlines()[0].split()
    shown, *lines = on_terminal(80, "ls")
    (note,) = re.findall(r"not shown: ([\w, ]+)", " ".join(line.strip() for line in lines))
    assert [h for h in headings if h in shown.split()] == shown.split()
    assert [h for h in headings if h not in shown.split()] == note.strip().split(", ")


def test_shortened_fingerprints_name_stores(cli, on_terminal, stores):
    """What a narrow `ls` shows of a fingerprint is enough for other commands."""
    digits = [line.split()[0] for line in on_terminal(80, "ls") if re.match("[0-9a-f]{8} ", line)]
    assert len(digits) == 7
    assert all(cli("info", short).returncode == 0 for short in digits)
