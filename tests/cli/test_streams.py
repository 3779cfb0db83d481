"""The command line wherever its output goes, in any locale, and by `python -m` with any switch."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from lmdbcache import CacheConfig, EmbeddingCache

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root with one store, in a folder whose name is UTF-8."""
    root = tmp_path_factory.mktemp("b\u00fcro") / "cach\u00e9"
    with EmbeddingCache(root).writer(CacheConfig()) as writer:
        writer.put("h\u00fctte:hund", np.ones(4))
    return root


def start(*arguments, switches=(), environment=None, **options):
    command = [sys.executable, *switches, "-m", "lmdbcache", *map(str, arguments)]
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, **options}
    return subprocess.Popen(command, env={**os.environ, **(environment or {})}, **options)


def run(*arguments, **options):
    """Exit code, standard output and error of a command."""
    process = start(*arguments, **options)
    out, err = ((text or b"").decode() for text in process.communicate(timeout=100))
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    return process.returncode, out, err


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize(
    ("arguments", "expected"), [(("ls", "--root"), 0), (("info", "nonesuch", "--root"), 1)]
)
def test_closed_streams_change_no_exit_code(root, closed, arguments, expected):
    """A daemon has none of the standard streams: the command does its work in silence."""

    def close():
        for number in closed:
            os.close(number)

    code, out, err = run(*arguments, root, preexec_fn=close)
    assert code == expected
    assert not (1 in closed and out)
    assert not (2 in closed and err)


@pytest.mark.parametrize("arguments", [["--version"], ["ls", "--json"], ["ls"], ["ls", "--help"]])
def test_output_that_cannot_be_written_is_an_error(root, arguments):
    """A full disk behind standard output is told in one line, and the exit code isn't 0."""
    with open("/dev/full", "wb") as full:
        code, _, err = run(*arguments, stdout=full, environment={"LMDBCACHE_ROOT": str(root)})
    assert code == 1
    assert err.count("\n") == 1


def test_an_error_that_cannot_be_written_keeps_its_exit_code(root):
    """A full disk behind standard error changes nothing."""
    with open("/dev/full", "wb") as full:
        assert run("info", "nonesuch", "--root", root, stderr=full)[0] == 1


@pytest.mark.parametrize("arguments", [["--version"], ["ls"]])
def test_a_reader_that_has_enough_is_no_news(root, arguments):
    """`lmdbcache ls | head -0` ends without a word."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        environment = {"LMDBCACHE_ROOT": str(root)}
        _, _, err = run(*arguments, stdout=pipe, environment=environment)
    assert err == ""


@pytest.mark.parametrize(
    "arguments",
    [("ls",), ("ls", "--json"), ("stats",), ("verify", "--all"), ("extract", "--help")],
    ids="-".join,
)
def test_an_ascii_locale_shows_escapes(root, arguments):
    """Names that the terminal can't show are escaped; a store in such a folder is opened."""
    arguments = arguments if "--help" in arguments else (*arguments, "--root", root)
    code, out, err = run(*arguments, environment=ASCII)
    assert (code, err) == (0, "")
    assert out.isascii()


def test_a_root_whose_name_is_no_text_is_used(tmp_path):
    """Bytes that aren't UTF-8 may name a folder: it is written, read and listed."""
    root = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    with EmbeddingCache(root).writer(CacheConfig()) as writer:
        writer.put("a:dog", np.ones(4))
    cache = EmbeddingCache(root)
    assert len(cache.reader(CacheConfig())) == 1
    cache.compact(CacheConfig())
    assert cache.verify(CacheConfig()).is_sound
    code, out, _ = run("ls", "--root", root)
    assert code == 0
    assert "1 store" in out


@pytest.fixture(scope="module")
def without_switches(root):
    """Commands, and what they give as Python is started by itself."""
    commands = (("stats", "--root", root), ("--help",), ("ls", "--help"))
    return {command: run(*command) for command in commands}


@pytest.mark.parametrize("switches", [("-OO",), ("-I", "-B")], ids="".join)
def test_switches_of_python_change_nothing(without_switches, switches):
    """Without asserts and docstrings, or isolated and without compiled files."""
    for command, expected in without_switches.items():
        assert run(*command, switches=switches) == expected
