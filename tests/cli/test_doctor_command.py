"""`doctor`."""

from __future__ import annotations

import json
import os


def test_doctor(cli, cache, configs):
    """Each line has its level; exit code 1 with a remedy once a store is damaged."""
    result = cli("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("ok       python: ", "torchaudio: ", "ulimit -n", "free space", "0 problems"):
        assert word in result.stdout
    next(cache.path(configs[0]).glob("gen-*/data.mdb")).write_bytes(b"")
    without_audio = "from lmdbcache.cli.doctor import software; software._AUDIO = ()"
    result = cli("doctor", "--json", prepare=without_audio)
    assert result.returncode == 1
    (finding,) = [one for one in json.loads(result.stdout) if one["level"] == "problem"]
    assert finding["subject"] == cache.path(configs[0]).name
    assert finding["remedy"].startswith("lmdbcache repair")


def test_settings(cli, cache, tmp_path):
    """Each with what holds and who has set it: an argument, the environment, or nobody."""

    def found(*arguments, **environment):
        listed = json.loads(cli("doctor", "--settings", "--json", *arguments, **environment).stdout)
        return {one["name"]: (one["value"], one["origin"]) for one in listed}

    settings = found(LMDBCACHE_STATISTICS="0", HF_HUB_OFFLINE="1")
    assert settings["root"] == settings["LMDBCACHE_ROOT"] == (str(cache.root), "environment")
    assert settings["LMDBCACHE_STATISTICS"] == ("0", "environment")
    assert settings["LMDBCACHE_ALLOW_NETWORK"] == ("0", "default")
    assert settings["HF_HUB_OFFLINE"] == ("1", "environment")
    assert settings["--model"] == ("ast", "default")
    assert settings.keys() > {"HF_HOME", "TMPDIR", "COLUMNS", "--num-workers"}
    assert found("--root", tmp_path)["root"] == (str(tmp_path), "argument")
    assert found(root=None, XDG_CACHE_HOME=str(tmp_path))["root"][1] == "default"
    assert "LMDBCACHE_STATISTICS" in cli("doctor", "--settings").stdout


def test_doctor_memory(cli, refused):
    """--memory shows processes and nothing else."""
    result = cli("doctor", "--memory", os.getpid(), "--memory", os.getpid())
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"{os.getpid()} ") == 2
    assert "page cache" in result.stdout
    (use, _) = json.loads(
        cli("doctor", "--memory", os.getpid(), "--memory", os.getppid(), "--json").stdout
    )
    assert use["pid"] == os.getpid()
    assert use["private"] > 0
    assert "no process" in refused("doctor", "--memory", 2**22 + 1)
