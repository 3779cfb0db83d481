"""`ls`, `info`, `coverage` and `verify`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from storage.damage import data_file, flip_value

from lmdbcache import CacheConfig
from lmdbcache.cache import ClipFailure, update_failures


def parsed(result):
    return json.loads(result.stdout)


def test_ls(cli, cache, configs):
    """One line per store with its fingerprint, config and size, and the sum."""
    result = cli("ls")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    for config in configs:
        (line,) = [line for line in lines if line.startswith(config.fingerprint)]
        assert line.split()[1:8] == [
            "vegas",
            "mine",
            config.output,
            "16000",
            "1",
            config.dtype,
            "6",
        ]
    assert lines[-1].startswith("3 stores, ")
    assert str(cache.root) in lines[-1]


def test_ls_json(cli, cache, configs):
    """JSON has for each store what `EmbeddingCache.info` knows."""
    listed = {entry["fingerprint"]: entry for entry in parsed(cli("ls", "--json"))}
    assert listed.keys() == {config.fingerprint for config in configs}
    for config in configs:
        entry = listed[config.fingerprint]
        assert CacheConfig.from_dict(entry["config"]) == config
        assert entry["path"] == str(cache.path(config))
        assert entry["num_embeddings"] == 6
        assert entry["embedding_shape"] == list(cache.info(config).embedding_shape)
        assert entry["dataset_root"] == "/data/Gerätusche"
        assert entry["provenance"] == {"weights_digest": "abc"}
        assert entry["damage"] is None


def test_json_of_a_store_is_documented(cli, cache):
    """docs/command_line.md names what `ls --json` has, and nothing else."""
    text = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text("utf-8")
    section = text.partition("## JSON of a store")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    (entry, *_) = parsed(cli("ls", "--json"))
    assert set(documented) == entry.keys()


def test_ls_sorts_and_filters(cli, cache, configs):
    """By size and last use; only what has a text in its name or config."""
    with cache.writer(configs[2], without_provenance=True) as writer:
        writer.put("large:dog", np.ones(8))
    for days, config in enumerate(configs):
        data = next(cache.path(config).glob("gen-*/data.mdb"))
        os.utime(data, (time.time() - 86400 * (3 - days),) * 2)

    def order(*options):
        return [entry["fingerprint"] for entry in parsed(cli("ls", "--json", *options))]

    prints = [config.fingerprint for config in configs]
    assert order("--sort", "used") == prints[::-1]
    sizes = {config.fingerprint: cache.size(config) for config in configs}
    assert [sizes[one] for one in order("--sort", "size")] == sorted(sizes.values(), reverse=True)
    assert order("--filter", "FLOAT16") == [prints[2]]
    assert "none of 3 stores" in cli("ls", "--filter", "zz").stdout
    (line,) = [line for line in cli("ls").stdout.splitlines() if line.startswith(prints[0])]
    age, last_written, last_read = line.split()[-3:]
    assert re.fullmatch(r"\d+[mh]", age)
    assert (last_written, last_read) == ("3d", "-")


def test_looking_is_no_use(cli, cache, configs):
    """ls, info and verify leave the time of last use alone; info shows when it was read."""
    name = configs[0].fingerprint
    for command in (["ls"], ["info", name], ["verify", name]):
        cli(*command)
    assert cache.info(configs[0]).last_used is None
    assert "never, as far as is known" in cli("info", name).stdout
    with cache.reader(configs[0]) as reader:
        len(reader)
    details = parsed(cli("info", name, "--json"))
    assert details["last_used"] == cache.info(configs[0]).last_used.isoformat(timespec="seconds")
    assert details["last_written"]


def test_ls_imports_no_model_library(cache, configs):
    """Listing stores takes no longer than numpy, LMDB and the table take to import."""
    command = ["-X", "importtime", "-m", "lmdbcache", "ls", "--root", str(cache.root)]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    lines = result.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "lmdb" in imported
    heavy = {"torch", "transformers", "soundfile", "datasets", "sklearn", "pandas", "pydantic"}
    assert not heavy & imported


def test_nothing_stored(cli, tmp_path):
    """An empty or absent root is no error and isn't created."""
    result = cli("ls")
    assert (result.returncode, result.stdout) == (0, f"nothing is stored under {tmp_path}/cache\n")
    assert parsed(cli("ls", "--json")) == []
    assert not (tmp_path / "cache").exists()


def test_root_option_and_variable(cli, cache, tmp_path):
    """--root wins over LMDBCACHE_ROOT, which wins over the user's cache directory."""
    assert len(parsed(cli("ls", "--json", "--root", cache.root, root="/nowhere"))) == 3
    assert len(parsed(cli("ls", "--json", root=cache.root))) == 3
    assert str(tmp_path) in cli("ls", root=None, XDG_CACHE_HOME=str(tmp_path)).stdout


def test_info(cli, cache, configs):
    """Config, shape, provenance, samples per class, failed clips."""
    failure = ClipFailure("x:dog", "/data/x.wav", "/data/x.wav: not readable as audio")
    update_failures(cache.path(configs[0]), ["x:dog"], [failure])
    text = cli("info", configs[0].fingerprint).stdout
    for word in ("mine", "pooler_output", "(8,)", "weights_digest", "drum", "failed: x:dog: /data"):
        assert word in text
    details = parsed(cli("info", configs[0].fingerprint, "--json"))
    assert details["classes"] == {"dog": 3, "drum": 3}
    assert details["failures"] == [vars(failure)]
    assert details["num_embeddings"] == 6


def test_ways_to_name_a_store(cli, cache, configs):
    """The beginning of a fingerprint, the folder's name, and its path mean the store."""
    path = cache.path(configs[1])
    for name in (configs[1].fingerprint[:8].upper(), path.name, path, f"{path}/"):
        assert parsed(cli("info", name, "--json"))["path"] == str(path)


def test_wrong_names(refused, cache, configs, tmp_path):
    """Unknown and ambiguous names are one line that lists the choices."""
    line = refused("info", "zzzz")
    assert "isn't a store" in line
    assert all(cache.path(config).name in line for config in configs)
    assert "isn't a store" in refused("info", "")
    assert "isn't a store" in refused("info", tmp_path / "other" / cache.path(configs[0]).name)
    assert "--root" in refused("info", "abc", root=tmp_path / "empty")


def test_ambiguous_beginning(refused, cache, configs):
    """A beginning that several stores share asks for more digits."""
    first = configs[0].fingerprint[0]
    twins = (configs[0].replace(namespace=f"n{number}") for number in range(1000))
    twin = next(config for config in twins if config.fingerprint[0] == first)
    with cache.writer(twin) as writer:
        writer.put("a:dog", [1.0])
    line = refused("info", first)
    assert "Give more digits" in line
    assert cache.path(twin).name in line


def test_coverage(cli, cache, configs, data):
    """Stored and asked by class; exit code 1 while something is missing."""
    options = ("--model-name", "mine", "--duration", 1)
    result = cli("coverage", data, *options, "--missing")
    assert result.returncode == 1
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["dog", "1", "3", "33.3"] in lines  # dog: 1, 3, 5 are stored; 0, 1, 2 are asked
    assert ["drum", "2", "3", "66.7"] in lines
    assert "3 of 6 stored (50.0 %)" in result.stdout
    assert ["video_00001:drum"] in lines
    found = parsed(cli("coverage", data, *options, "--json"))
    assert found["fingerprint"] == configs[0].fingerprint
    assert (found["num_asked"], found["num_present"], found["fraction"]) == (6, 3, 0.5)
    assert found["by_class"] == {"dog": [1, 3], "drum": [2, 3]}
    assert sorted(found["missing"]) == ["video_00000:dog", "video_00001:drum", "video_00002:dog"]


def test_coverage_of_another_config_says_why(cli, cache, data):
    """Nothing stored for a config: the nearest one and the difference are named."""
    result = cli("coverage", data, "--model-name", "mine", "--duration", 2)
    assert result.returncode == 1
    assert "--duration 2.0 asked, 1.0 stored" in result.stdout


def test_a_store_in_the_place_of_a_config(cli, cache, refused, configs, data):
    """--config with some digits is the same as all options; it allows no other option."""
    options = ("--model-name", "mine", "--duration", 1)
    chosen = ("--config", configs[0].fingerprint[:6])
    for command in (["coverage", data], ["explain"], ["explain", "video_00001:dog"]):
        given = cli(*command, *options, "--json")
        assert parsed(cli(*command, *chosen, "--json")) == parsed(given)
    found = parsed(cli("explain", "--config", configs[2].fingerprint, "--json"))
    assert (found["fingerprint"], found["is_stored"]) == (configs[2].fingerprint, True)
    assert "--dtype" in refused("coverage", data, *chosen, "--dtype", "float16")
    assert "isn't a store" in refused("coverage", data, "--config", "zz")
    assert "--namespace" in refused("coverage", data, *chosen, "--namespace", "others")
    planned = cli("extract", data, *chosen, "--model", "ast", "--dry-run", "--json")
    assert parsed(planned)["store"] == str(cache.path(configs[0]))


def test_verify(cli, cache, configs):
    """Sound stores: exit code 0; flipped bytes: exit code 1 and the sample's name."""
    result = cli("verify", "--all")
    assert result.returncode == 0
    assert result.stdout.count("sound, 6 embeddings") == 3
    assert all(report["is_sound"] for report in parsed(cli("verify", "--all", "--json")))
    with cache.reader(configs[0]) as reader:
        flip_value(data_file(cache, configs[0]), reader["video_00003:dog"])
    result = cli("verify", configs[0].fingerprint)
    assert result.returncode == 1
    assert "video_00003:dog" in result.stdout
    (report,) = parsed(cli("verify", configs[0].fingerprint, "--json"))
    assert report["damaged"] == ["video_00003:dog"]
    assert not report["is_sound"]


def test_damaged_store(cli, cache, configs):
    """A store that can't be opened is listed as damaged, and `info` says why, with exit code 1."""
    (database,) = cache.path(configs[0]).glob("gen-*/data.mdb")
    database.write_bytes(database.read_bytes()[:100])
    listed = cli("ls")
    assert listed.returncode == 0
    assert "DAMAGED" in listed.stdout
    result = cli("info", configs[0].fingerprint)
    assert result.returncode == 1
    assert "damaged: " in result.stdout
    details = cli("info", configs[0].fingerprint, "--json")
    assert details.returncode == 1
    assert parsed(details)["damage"]
    for command in ("verify", "compact"):
        result = cli(command, configs[0].fingerprint)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"LANG": "C", "LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)
def test_plain_locales(cli, cache, configs, environment):
    """Names that a locale can't show are escaped; nothing crashes."""
    strange = configs[0].replace(model_name="模型")
    with cache.writer(strange) as writer:
        writer.put("喵喵 \u2014 é:dog", [1.0, 2.0])
    commands = [["ls"], ["info", strange.fingerprint], ["verify", "--all"]]
    code = f"""if True:
        import sys
        from lmdbcache.cli import main
        for command in {commands}:
            sys.argv = ["lmdbcache", *command]
            try:
                main()
            except SystemExit as ended:
                assert not ended.code
    """
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        env={**os.environ, "LMDBCACHE_ROOT": str(cache.root), **environment},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(strange.fingerprint.encode()) >= len(commands)


def test_pipe_that_is_closed(cache, configs):
    """`lmdbcache … | head -1` ends without a traceback."""
    command = f"{sys.executable} -m lmdbcache.cli.main ls --json | head -1"
    result = subprocess.run(
        ["/bin/sh", "-c", command],
        check=False,
        capture_output=True,
        env={**os.environ, "LMDBCACHE_ROOT": str(cache.root)},
    )
    assert result.stdout == b"[\n"
    assert b"Traceback" not in result.stderr


def test_a_root_that_is_a_file(cli, data, ast_folder, tmp_path):
    """Looking and extracting say that it is a file, not that nothing is stored."""
    (tmp_path / "file").write_text("x")
    for command in (["ls"], ["extract", data, "--model", ast_folder]):
        result = cli(*command, root=tmp_path / "file")
        assert result.returncode == 1
        assert "is a file" in result.stderr.splitlines()[-1]


def test_the_dataset_tells_stores_apart(cli, cache, configs):
    """`ls` has a column for it where one has a name."""
    with cache.writer(configs[0].replace(namespace="esc50")) as writer:
        writer.put("a:b", [1.0])
    lines = cli("ls").stdout.splitlines()
    assert lines[0].split()[:3] == ["fingerprint", "namespace", "model"]
    assert [line.split()[1] for line in lines[1:5]].count("esc50") == 1


def test_windows_tell_stores_apart(cli, refused, cache, configs):
    """`ls` has a column for the hop, and each title its windows, where a store has some."""
    assert "hop" not in cli("ls").stdout.splitlines()[0].split()
    window = configs[0].replace(window=1.0, hop=0.5)
    for config in (window, window.replace(last_window="align")):
        with cache.writer(config) as writer:
            writer.put("a@00000.000000:b", np.ones(8))
    lines = cli("ls").stdout.splitlines()
    assert sum("0.5 align" in line for line in lines) == 1
    assert "mine pooler_output 1 s every 0.5 s\n" in cli("info", window.fingerprint).stdout
    line = refused("similar", "a:b", "--config", window.fingerprint)
    assert "a@00000.000000:b" in line  # a recording isn't searched for: a window is named
    assert "nothing.wav" in refused("similar", "nothing.wav")
