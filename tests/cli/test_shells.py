"""Completion in shells, and bars on terminals alone."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys

import pytest


@pytest.fixture
def home(tmp_path, cache):
    """A fresh home, with the command as an installed one; gives its environment."""
    program = tmp_path / "bin" / "lmdbcache"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom lmdbcache.cli import main\nmain()\n")
    program.chmod(0o755)
    (tmp_path / "home").mkdir()
    path = f"{program.parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "HOME": str(tmp_path / "home"),
        "LMDBCACHE_ROOT": str(cache.root),
    }


def run(*command, env):
    result = subprocess.run(
        [*map(str, command)], check=False, capture_output=True, text=True, env=env, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_completion_in_bash(home, cache, configs):
    """Installed into a fresh home, bash completes commands, fingerprints and folder names."""
    run("lmdbcache", "--install-completion", "bash", env=home)
    script = (
        "source ~/.bashrc\n"
        "for last in 'lmdbcache pru' 'lmdbcache info ' 'lmdbcache rm vegas'; do\n"
        '  read -r -a COMP_WORDS <<< "$last"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n'
        "  [[ $last == *' ' ]] && { COMP_WORDS+=(''); COMP_CWORD=$((COMP_CWORD + 1)); }\n"
        '  COMPREPLY=(); _lmdbcache_completion lmdbcache; echo "${COMPREPLY[@]}"\n'
        "done\n"
    )
    command, digits, names = run("bash", "-c", script, env=home).splitlines()
    assert command == "prune"
    assert set(digits.split()) == {config.fingerprint for config in configs}
    assert set(names.split()) == {cache.path(config).name for config in configs}


@pytest.mark.parametrize(
    ("shell", "file", "variables"),
    [
        ("zsh", ".zfunc/_lmdbcache", {"COMP_WORDS": "lmdbcache diff ", "COMP_CWORD": "2"}),
        (
            "fish",
            ".config/fish/completions/lmdbcache.fish",
            {"COMP_WORDS": "lmdbcache diff ", "COMP_CWORD": ""},
        ),
    ],
)
def test_completion_in_other_shells(home, configs, shell, file, variables):
    """What zsh and fish install is there, and what they ask is answered, one item a store."""
    run("lmdbcache", "--install-completion", shell, env=home)
    assert os.path.exists(os.path.join(home["HOME"], file))
    asked = {**home, **variables, "_LMDBCACHE_COMPLETE": f"{shell}_complete"}
    answer = run("lmdbcache", env=asked)
    assert all(config.fingerprint in answer for config in configs)
    assert len(answer.strip().splitlines()) == (9 if shell == "zsh" else 3)


def test_completion_opens_no_store(home, cache, configs):
    """Damaged stores are offered as well, also by --config; an absent root gives nothing."""
    for data in cache.root.rglob("data.mdb"):
        data.write_bytes(b"")
    asked = {
        **home,
        "_LMDBCACHE_COMPLETE": "bash_complete",
        "COMP_WORDS": "lmdbcache info ",
        "COMP_CWORD": "2",
    }
    assert len(run("lmdbcache", env=asked).split()) == 3
    for command in ("similar", "explain"):
        words = {"COMP_WORDS": f"lmdbcache {command} --config ", "COMP_CWORD": "3"}
        assert len(run("lmdbcache", env={**asked, **words}).split()) == 3
    assert run("lmdbcache", env={**asked, "LMDBCACHE_ROOT": "/nowhere"}).split() == []


def on_terminal(*arguments, env):
    """What a command writes to a terminal that is its standard error."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "lmdbcache.cli.main", *map(str, arguments)]
    result = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=slave, env=env, timeout=300
    )
    os.close(slave)
    written = b""
    try:
        while chunk := os.read(master, 1 << 16):
            written += chunk
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert result.returncode == 0, written
    return written.decode()


def test_bars_are_shown_on_terminals_alone(cli, cache, configs):
    """A terminal shows a bar (srun --pty, too); a pipe or a batch job's log file none."""
    environment = {**os.environ, "LMDBCACHE_ROOT": str(cache.root), "TERM": "xterm"}
    for slurm in ({}, {"SLURM_JOB_ID": "4711"}):
        shown = on_terminal("verify", configs[0].fingerprint, env={**environment, **slurm})
        assert "verifying" in shown
        assert cli("verify", configs[0].fingerprint, **slurm).stderr == ""
    quiet = on_terminal("compact", configs[0].fingerprint, "--no-progress", env=environment)
    assert quiet == ""
