"""`import` and `export`."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from embedders.small_folders import folder_of
from exchange.old_caches import save_folder, save_manifests, save_npz, save_seed, values
from small_disks import fill, small_disk

from lmdbcache import CacheConfig, EmbeddingCache, config_for
from lmdbcache.config import DEFAULT_FRONT_END

GIVEN = ("--sample-rate", 16000, "--duration", 5, "--model-name", "ast")


@pytest.fixture
def root(tmp_path):
    return EmbeddingCache(tmp_path / "cache")


def test_import_of_an_old_file(cli, root, tmp_path):
    """One command: classes, config, what was assumed, and that all was compared."""
    path = save_seed(tmp_path / "old.pt", values())
    result = cli("import", path)
    assert (result.returncode, result.stderr) == (0, "")
    for words in (
        "12 usable embeddings", "dog             6", "guessed from the shape", "VEGAS",
        "12 new, 0 stored already; 384 B",
    ):  # fmt: skip
        assert words in result.stdout
    config = CacheConfig(namespace="vegas")
    assert str(root.path(config)) in result.stdout
    assert len(root.reader(config)) == 12
    assert "0 new, 12 stored already" in cli("import", path).stdout


def test_what_was_imported_is_found(cli, data, tmp_path):
    """`coverage` of a dataset counts imported embeddings."""
    arrays = {f"video_{n:05d}:{c}": np.ones(64, "f4") for n in range(9) for c in ("dog", "drum")}
    path = save_npz(tmp_path / "old.npz", arrays, model_name="small")
    assert cli("import", path).returncode == 0
    found = cli("coverage", data, "--model-name", "small", "--front-end", "unstated", "--json")
    assert json.loads(found.stdout)["missing"] == []


@pytest.mark.parametrize(
    ("variant", "shape", "options", "output"),
    [
        ("wav2vec2", (32,), [], "mean"),
        ("wav2vec2", (32,), ["--model-name", "mine"], "mean"),
        ("clap", (64,), [], "pooler_output"),
        ("facebook/wav2vec2-base", (768,), [], "mean"),
        ("facebook/wav2vec2-base", (249, 768), [], "last_hidden_state"),
        ("ast", (8,), [], "pooler_output"),
    ],
)
def test_the_model_says_front_end_and_output(cli, root, tmp_path, variant, shape, options, output):
    """What is imported for a model is stored where an extraction with it looks."""
    model = variant if "/" in variant or variant == "ast" else folder_of(variant)
    rate, duration = (48000, 1.0) if variant == "clap" else (16000, 5.0)
    facts = {"sample_rate": rate, "duration": duration, "model_name": ""}
    path = save_npz(tmp_path / "old.npz", values(4, shape=shape), **facts)
    result = cli("import", path, "--model", model, *options)
    assert result.returncode == 0, result.stderr
    name = options[1] if options else None
    wanted = config_for(model, output=output, duration=duration, namespace="vegas", model_name=name)
    assert list(root) == [wanted]
    assert wanted.front_end in result.stdout


@pytest.mark.parametrize(
    ("model", "facts", "words"),
    [
        ("m/nosuch", {}, "not on this machine"),
        ("./nosuch", {}, "no such folder"),
        ("wav2vec2", {"shape": (8,)}, "gives embeddings of shape (32,) for output 'mean'"),
        ("wav2vec2", {"shape": (32,), "output": "pooler_output"}, "mean, last_hidden_state"),
        ("wav2vec2", {"shape": (32,), "front_end": DEFAULT_FRONT_END}, "that of AST"),
    ],
)
def test_a_model_that_can_not_have_computed_them(refused, root, tmp_path, model, facts, words):
    """A model that isn't there, or gives something else, is refused before anything is stored."""
    path = save_npz(
        tmp_path / "old.npz", values(4, shape=facts.get("shape", (8,))),
        **{"model_name": "", **{k: v for k, v in facts.items() if k != "shape"}},
    )  # fmt: skip
    model = folder_of(model) if model == "wav2vec2" else model
    assert words in refused("import", path, "--model", model)
    assert root.stores() == []


def test_no_store_is_named_where_none_is(cli, root, tmp_path):
    """With nothing imported there is no path."""
    path = save_npz(tmp_path / "old.npz", {"nothing": np.ones(8, "f4")})
    result = cli("import", path)
    assert result.returncode == 1
    assert str(root.root) not in result.stdout


def nothing_usable(kind, folder):
    """A source whose embeddings are all refused; gives its path and the name of the first."""
    bad = {"a:dog": np.full(8, np.nan, "f4"), "b:dog": np.full(8, np.inf, "f4")}
    if kind == "manifests":
        save_manifests(folder / "old", bad, variant="listed")
        (folder / "old" / "dog" / "embeddings_000.npy").unlink()
        return folder / "old", "dog/a"
    if kind == "a folder without manifests":
        save_manifests(folder / "old", bad)
        (folder / "old" / "dog" / "manifest.json").unlink()
        return folder / "old", "dog/embeddings_000.npy"
    if kind == "files":
        return save_folder(folder / "old", bad), "dog/a.npy"
    if kind == "pt":
        return save_seed(folder / "old.pt", bad), "a:dog"
    return save_npz(folder / "old.npz", {"no class": np.ones(8, "f4")}), "no class"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("manifests", given) for given in (GIVEN, [], [*GIVEN, "--dry-run"])),
        *(("a folder without manifests", given) for given in (GIVEN, [])),
        ("files", GIVEN),
        ("pt", []),
        ("npz without classes", []),
    ],
)
def test_an_import_of_nothing_says_why_first(cli, root, tmp_path, kind, options):
    """The first line names what is refused, also where the config isn't stated."""
    path, name = nothing_usable(kind, tmp_path)
    result = cli("import", path, *options)
    assert result.returncode == 1
    first = (result.stderr + result.stdout).splitlines()[0]
    assert "nothing" in first
    assert name in first
    assert root.stores() == []


def test_an_import_of_conflicts_alone_says_so_first(cli, tmp_path):
    """What is stored stays; the option that decides is named."""
    assert cli("import", save_npz(tmp_path / "old.npz", values())).returncode == 0
    path = save_npz(tmp_path / "new.npz", values(seed=1))
    result = cli("import", path)
    assert result.returncode == 1
    assert "--on-duplicate" in result.stdout.splitlines()[0]
    assert "usable" in cli("import", path, "--on-duplicate", "overwrite").stdout.splitlines()[0]


def test_missing_options_are_named(refused, root, tmp_path):
    """In a pipe nothing is asked: the line names what to give."""
    save_folder(tmp_path / "old", values())
    line = refused("import", tmp_path / "old")
    assert "--sample-rate, --duration, --model-name" in line
    assert "--model-name" in refused("import", tmp_path / "old", *GIVEN[:4])
    assert root.stores() == []


def test_missing_options_are_asked_for_on_a_terminal(root, tmp_path):
    """The answers are taken as the options would be."""
    save_manifests(tmp_path / "old", values())
    controller, terminal = pty.openpty()
    os.write(controller, b"16000\n5\nast\n")
    result = subprocess.run(
        [sys.executable, "-m", "lmdbcache.cli.main", "import", tmp_path / "old"],
        check=False, capture_output=True, stdin=terminal, timeout=300,
        env={**os.environ, "LMDBCACHE_ROOT": str(root.root)},
    )  # fmt: skip
    os.close(controller)
    os.close(terminal)
    assert result.returncode == 0, result.stderr
    assert b"doesn't say sample_rate, duration, model_name" in result.stdout
    assert len(root.reader(CacheConfig(namespace="vegas"))) == 12


def test_disagreement_and_other_errors(refused, tmp_path, root):
    """One line each; nothing is stored."""
    path = save_npz(tmp_path / "old.npz", values(), sample_rate=22050)
    assert "says 22050, 16000 is given" in refused("import", path, "--sample-rate", 16000)
    assert "isn't there" in refused("import", tmp_path / "nothing.npz")
    assert "copy it to this one" in refused("import", "s3://bucket/shards")
    path.write_bytes(b"junk")
    assert "not a whole .npz file" in refused("import", path)
    assert root.stores() == []


def test_dry_run_and_json(cli, root, tmp_path):
    """--dry-run stores nothing; JSON has the same figures."""
    path = save_npz(tmp_path / "old.npz", values())
    result = cli("import", path, "--dry-run")
    assert "12 would be new" in result.stdout
    assert not root.root.exists()
    planned = json.loads(cli("import", path, "--dry-run", "--json").stdout)
    done = json.loads(cli("import", path, "--json").stdout)
    assert (planned["is_dry_run"], done["is_dry_run"]) == (True, False)
    assert planned["num_new"] == done["num_new"] == 12
    assert planned["fingerprint"] == done["fingerprint"]
    assert done["classes"] == {"dog": 6, "drum": 6}


def test_what_is_left_out_is_listed(cli, tmp_path):
    """The first ten with reasons, the number of the others, exit code 1."""
    arrays = values()
    arrays |= {f"bad_{n:02d}:cat": np.full(8, np.nan, "f4") for n in range(15)}
    result = cli("import", save_npz(tmp_path / "old.npz", arrays))
    assert result.returncode == 1
    assert result.stdout.count("not imported: bad_") == 10
    assert "NaN" in result.stdout
    assert "… and 5 more; see --json" in result.stdout
    assert "12 new" in result.stdout
    assert "for no dataset in particular" in result.stdout


def test_options_reach_the_import(cli, root, tmp_path):
    """Class, order, squeeze, ragged, digest, dtype and the fields of the config."""
    arrays = {f"a{n}": np.full((1, n + 1, 4), n, "f4") for n in range(3)}
    np.savez(tmp_path / "old.npz", **arrays)
    result = cli(
        "import", tmp_path / "old.npz", *GIVEN, "--class", "dog", "--squeeze", "--ragged",
        "--weights-digest", "abc", "--dtype", "float16", "--output", "mean", "--namespace", "mine",
        "--front-end", "x/1", "--compute-dtype", "bfloat16", "--progress", "--on-duplicate",
        "overwrite", "--keys", "file_id:class",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    assert "importing old.npz" in result.stderr
    (config,) = root
    assert config == CacheConfig(
        dtype="float16", output="mean", namespace="mine", front_end="x/1", compute_dtype="bfloat16"
    )
    info = root.info(config)
    assert info.provenance["weights_digest"] == "abc"
    assert info.embedding_shape == (None, 4)
    assert "imported_from" in cli("info", config.fingerprint).stdout


@pytest.mark.parametrize(
    ("kind", "out"),
    [
        *(("pt", "x.pt"), ("npz", "x.npz"), ("parquet", "shards"), ("lance", "x.lance")),
        *(("safetensors", "x.safetensors"), ("webdataset", "shards")),
    ],
)
def test_export_and_back(cli, cache, configs, tmp_path, kind, out):
    """What one root exports another imports, without further options."""
    done = cli("export", configs[2].fingerprint, "--format", kind, "--out", tmp_path / out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 embeddings in 1 file, ")
    result = cli("import", tmp_path / out, root=tmp_path / "other")
    assert result.returncode == 0, result.stderr
    assert "note: " not in result.stdout
    assert EmbeddingCache(tmp_path / "other").reader(configs[2]) == cache.reader(configs[2])


def test_shards_in_random_order_at_a_url(cli, refused, cache, configs, tmp_path):
    """--num-shards, --shuffle and a URL reach the export; what went wrong there is one line."""
    store, url = configs[2].fingerprint, (tmp_path / "far").as_uri()
    to = ("--format", "webdataset", "--out", url, "--num-shards", 3)
    found = json.loads(cli("export", store, *to, "--shuffle", 5, "--json").stdout)
    assert (found["path"], found["num_files"], found["num_embeddings"]) == (url, 3, 6)
    shards = {path.name: path.read_bytes() for path in (tmp_path / "far").iterdir()}
    assert len(shards) == 3
    assert "--overwrite" in refused("export", store, *to)
    assert cli("export", store, *to, "--overwrite").stdout.startswith("6 embeddings in 3 files")
    assert {path.name: path.read_bytes() for path in (tmp_path / "far").iterdir()} != shards
    assert "nosuch" in refused("export", store, *to[:2], "--out", "nosuch://x/y")
    assert "copy it" in refused("export", store, "--format", "npz", "--out", url)
    assert "1 to 6" in refused("export", store, *to[:2], "--out", f"{url}2", "--num-shards", 7)
    assert cli("import", tmp_path / "far", root=tmp_path / "other").returncode == 0
    assert EmbeddingCache(tmp_path / "other").reader(configs[2]) == cache.reader(configs[2])


def test_export_refuses(cli, refused, cache, configs, tmp_path):
    """Nothing is replaced without --overwrite; what isn't there is an error."""
    store, out = configs[0].fingerprint, tmp_path / "x.npz"
    to = ("--format", "npz", "--out", out)
    (tmp_path / "ids.txt").write_text("video_00001:dog\n\n")
    result = cli("export", store, *to, "--ids", tmp_path / "ids.txt", "--json")
    assert json.loads(result.stdout)["num_embeddings"] == 1
    assert "--overwrite" in refused("export", store, *to)
    result = cli("export", store, *to, "--class", "dog", "--overwrite")
    assert result.stdout.startswith("3 embeddings")
    assert "class cat" in refused("export", store, *to, "--class", "cat", "--overwrite")
    assert "--ids" in refused("export", store, *to, "--ids", tmp_path / "none", "--overwrite")
    assert "known are pt" in refused("export", store, "--format", "csv", "--out", tmp_path / "y")
    assert "isn't a store" in refused("export", "zzz", *to, "--overwrite")
    assert cli("export", store, "--format", "npz").returncode == 2


def test_full_disks(cli, refused, cache, configs, tmp_path):
    """Exit code 3 for both, and nothing half-done is left."""
    path = save_folder(tmp_path / "old", values(4, shape=(1 << 20,)))
    with small_disk(tmp_path / "disk", 40) as disk:
        fill(disk, 20 << 20)
        line = refused("import", path, *GIVEN, root=disk / "cache", code=3)
        assert "20 MiB free, this import needs 32 MiB" in line
        fill(disk, 1 << 20)
        line = refused(
            "export", configs[0].fingerprint, "--format", "pt", "--out", disk / "x.pt", code=3
        )
        assert "this export needs" in line
        assert [path.name for path in disk.iterdir()] == ["ballast"]
