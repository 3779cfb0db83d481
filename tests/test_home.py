"""Users without a home directory, as in containers: a path is enough, else the error is ours."""

from __future__ import annotations

import pwd
from pathlib import Path

import numpy as np
import pytest

from lmdbcache import EmbeddingCache
from lmdbcache.cache import ROOT_VARIABLE
from lmdbcache.cli import main
from lmdbcache.datasets import open_dataset
from lmdbcache.errors import ConfigError
from lmdbcache.files import expand_user


@pytest.fixture
def homeless(monkeypatch):
    """No HOME, and a user id without an entry in passwd."""

    def unknown(_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", ROOT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_an_explicit_root_is_enough(tmp_path, config, monkeypatch):
    """A store is written and read, by argument and by variable."""
    with EmbeddingCache(tmp_path).writer(config) as writer:
        writer.put("a:dog", np.ones(4))
    assert len(EmbeddingCache(tmp_path).reader(config)) == 1
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    assert len(EmbeddingCache().reader(config)) == 1


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize(
    "call",
    [
        EmbeddingCache,
        lambda: EmbeddingCache("~/cache"),
        lambda: EmbeddingCache("~nobody-of-that-name/cache"),
        lambda: open_dataset("~/clips"),
    ],
)
def test_what_needs_a_home_directory_is_our_error(call):
    """And no RuntimeError of a library."""
    with pytest.raises(ConfigError):
        call()


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("root", [[], ["--root", "~/cache"]])
def test_the_command_line_says_so_in_one_line(root, monkeypatch, capsys):
    """With exit code 1."""
    monkeypatch.setattr("sys.argv", ["lmdbcache", "ls", *root])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_whose_name_begins_with_a_tilde_is_named(tmp_path, monkeypatch):
    """The home of a user that isn't there is refused; behind ./ it is a file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="home"):
        expand_user("~no-user-has-this-name")
    assert expand_user("./~no-user-has-this-name") == Path("./~no-user-has-this-name")
