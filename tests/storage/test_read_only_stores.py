"""Stores on a read-only mount: checked once a machine, whoever's home directory can be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from storage.child_processes import NOBODY
from storage.damage import data_file

from lmdbcache import EmbeddingCache
from lmdbcache.storage.checks.first_opening import SKIP_VARIABLE

READ = """
import logging, sys
from lmdbcache import CacheConfig, EmbeddingCache
logging.basicConfig(level=logging.INFO, format="%(message)s")
with EmbeddingCache(sys.argv[1]).reader(CacheConfig()) as reader:
    assert len(list(reader.items())) == 20
"""
AT_ONCE = """
import subprocess, sys
processes = [subprocess.Popen([sys.executable, *sys.argv[1:]]) for _ in range(4)]
sys.exit(max(process.wait() for process in processes))
"""
UNWRITABLE = "/proc/self/home"


@pytest.fixture
def mounted(filled, tmp_path):
    """A copy of a store, to be mounted read-only by each process that `read` starts."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-m", "true"], check=False).returncode
    ):
        pytest.skip("nothing can be mounted here: that needs root")
    shutil.copytree(filled.root, tmp_path / "copy")
    return EmbeddingCache(tmp_path / "copy")


@pytest.fixture
def read(mounted, tmp_path):
    """Read all of the store in a new process; returns how often it was checked."""
    (tmp_path / "program.py").write_text(READ)
    (tmp_path / "tmp").mkdir()

    def read(*program, **environment):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
            "HOME": UNWRITABLE,
            "TMPDIR": str(tmp_path / "tmp"),
            **environment,
        }
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, mounted.root, sys.executable, *program]
        done = subprocess.run(
            [*command, tmp_path / "program.py", mounted.root],
            check=False, capture_output=True, text=True, env=environment, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.count("first opening of")

    return read


def own_folder(parent):
    return Path(parent) / f"lmdbcache-{os.geteuid()}"


def test_a_read_only_store_is_checked_once_a_machine(read, tmp_path):
    """Without a home directory that can be written, the folder for temporary files remembers."""
    assert [read() for _ in range(2)] == [1, 0]
    assert own_folder(tmp_path / "tmp").stat().st_mode & 0o777 == 0o700


def test_processes_that_come_at_once_wait_for_the_one_that_checks(read):
    """Of four processes one checks, and all read."""
    assert read("-c", AT_ONCE) == 1


def test_a_check_without_values_is_remembered_as_that(read):
    """It vouches for itself, and not for the values."""
    values = {SKIP_VARIABLE: "values"}
    assert [read(**values), read(**values), read(), read(), read(**values)] == [1, 0, 1, 0, 0]


def test_a_store_that_can_be_written_remembers_a_check_without_values(mounted, config, monkeypatch):
    """In its own folder."""
    monkeypatch.setenv(SKIP_VARIABLE, "values")
    with mounted.reader(config) as reader:
        len(reader)
    lines = (data_file(mounted, config).parent / "checked").read_text().splitlines()
    assert lines[-1].endswith(" structure")


def test_another_file_at_the_same_path_is_checked_again(read, mounted, config):
    """An image mounted in its place may give its file the same inode: size and time tell."""
    read()
    path = data_file(mounted, config)
    os.utime(path, ns=(1, 1))
    assert read() == 1


@pytest.mark.parametrize("forged", ["owned by another", "open to others", "a link"])
def test_a_folder_that_others_could_have_filled_vouches_for_nothing(read, tmp_path, forged):
    """A marker counts where only this user can have written it."""
    assert read() == 1
    folder = own_folder(tmp_path / "tmp")
    assert list(folder.iterdir())
    if forged == "owned by another":
        os.chown(folder, NOBODY, NOBODY)
    elif forged == "open to others":
        folder.chmod(0o733)
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    assert read() == 1
