"""Identity and digest of a checkpoint: the same everywhere, another one for other weights."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from lmdbcache.config import DEFAULT_FRONT_END, DEFAULT_MODEL_NAME, UNSTATED_FRONT_END, CacheConfig
from lmdbcache.embedders import config_for, find_checkpoint, model_identity, weights_digest
from lmdbcache.embedders.checkpoint_files import canonical_head
from lmdbcache.errors import CacheError, ModelLoadError


def test_golden_digest(tmp_path):
    """The digest is fixed for ever: stores carry it in their provenance."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / "preprocessor_config.json").write_bytes(b"{}\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    assert weights_digest(folder) == "b6980eb2d3ef69ba"
    assert model_identity(folder) == "model@b6980eb2d3ef"


def test_identity_is_the_same_on_every_machine(own_ast_folder, tmp_path, monkeypatch):
    """Place, way of writing the path and unrelated files don't matter."""
    identity = model_identity(own_ast_folder)
    assert identity == f"small-ast@{weights_digest(own_ast_folder)[:12]}"
    copy = shutil.copytree(own_ast_folder, tmp_path / "elsewhere" / "small-ast")
    (copy / "README.md").write_text("notes")
    monkeypatch.chdir(copy.parent)
    for written in (copy, f"{copy}{os.sep}", "./small-ast", "small-ast", Path("small-ast")):
        assert model_identity(written) == identity
    monkeypatch.chdir(copy)
    assert model_identity(".") == identity
    monkeypatch.setenv("HOME", str(copy.parent))
    assert model_identity("~/small-ast") == identity


def test_a_cache_config_takes_an_identity_as_it_is(ast_folder):
    """CacheConfig leaves the identity unchanged, so stores and checkpoints meet."""
    identity = model_identity(ast_folder)
    assert CacheConfig(model_name=identity).model_name == identity


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_identity_changes_with_weights_and_settings(own_ast_folder, name):
    """One byte in any file that decides an embedding is another model."""
    before = model_identity(own_ast_folder)
    content = bytearray((own_ast_folder / name).read_bytes())
    content[-1] ^= 1
    (own_ast_folder / name).write_bytes(content)
    assert model_identity(own_ast_folder) != before


def test_bytes_moved_between_files_change_the_digest(tmp_path):
    """Names and lengths are part of it."""
    digests = set()
    for number, (one, two) in enumerate([(b"ab", b"c"), (b"a", b"bc"), (b"abc", b"")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model-1.safetensors").write_bytes(one)
        (folder / "model-2.safetensors").write_bytes(two)
        digests.add(weights_digest(folder))
    assert len(digests) == 3


def test_pytorch_bin_counts_only_without_safetensors(own_ast_folder):
    """transformers prefers safetensors too."""
    before = weights_digest(own_ast_folder)
    (own_ast_folder / "pytorch_model.bin").write_bytes(b"old")
    assert weights_digest(own_ast_folder) == before
    (own_ast_folder / "model.safetensors").unlink()
    assert weights_digest(own_ast_folder) != before


@pytest.mark.parametrize("name", ["ast", "AST-finetuned", DEFAULT_MODEL_NAME])
def test_aliases_have_one_identity(name, tmp_path, monkeypatch):
    """An alias means the Hub's model also where a folder of that name lies about."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ast").mkdir()
    (tmp_path / "ast" / "config.json").write_text("{}")
    assert model_identity(name) == DEFAULT_MODEL_NAME


def test_hub_names_are_no_paths(tmp_path, monkeypatch):
    """A Hub name has one slash; it is a folder only if that folder exists."""
    monkeypatch.chdir(tmp_path)
    assert model_identity("owner/model") == "owner/model"
    (tmp_path / "owner" / "model").mkdir(parents=True)
    with pytest.raises(ModelLoadError):
        model_identity("owner/model")


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "~/absent-model", Path("absent")])
def test_a_path_that_is_no_checkpoint(path):
    """It isn't taken for a Hub name; the message says what was expected."""
    with pytest.raises(ModelLoadError):
        find_checkpoint(path)


def test_a_file_or_a_folder_without_weights(own_ast_folder):
    """Each is named for what it is."""
    with pytest.raises(ModelLoadError):
        model_identity(own_ast_folder / "model.safetensors")
    (own_ast_folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError):
        model_identity(own_ast_folder)


def test_find_a_folder(own_ast_folder):
    """A folder needs no lookup; the result crosses processes."""
    found = find_checkpoint(own_ast_folder)
    assert found.identity == model_identity(own_ast_folder)
    assert found.location == str(own_ast_folder)
    assert found.weights_digest == weights_digest(own_ast_folder)
    assert found.is_local
    assert found.revision is None
    assert pickle.loads(pickle.dumps(found)) == found


def rewrite_json(path, change=lambda values: values, **layout):
    values = change(json.loads(path.read_text()))
    path.write_text(json.dumps(values, **layout))


def rewrite_header(path, change=lambda header: header, **layout):
    """Give a safetensors file another header over the same bytes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(change(json.loads(raw[8 : 8 + length])), **layout).encode() + b"   "
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def backwards(values):
    return dict(reversed(values.items()))


LAYOUTS = {
    "one line": lambda f: rewrite_json(f / "config.json"),
    "indented": lambda f: rewrite_json(f / "config.json", indent=8),
    "keys in another order": lambda f: rewrite_json(f / "config.json", backwards),
    "preprocessor": lambda f: rewrite_json(f / "preprocessor_config.json", backwards, indent=1),
    "where it was loaded from": lambda f: rewrite_json(
        f / "config.json", lambda values: {"_name_or_path": "/old/place", **values}
    ),
    "header": lambda f: rewrite_header(f / "model.safetensors", backwards, indent=2),
    "header's metadata": lambda f: rewrite_header(
        f / "model.safetensors",
        lambda header: {**header, "__metadata__": {"format": "pt", "by": "me"}},
    ),
    "no metadata": lambda f: rewrite_header(
        f / "model.safetensors",
        lambda header: {name: header[name] for name in header if name != "__metadata__"},
    ),
    "further files": lambda f: [
        (f / name).write_text("{}") for name in ("README.md", "tokenizer.json", "optimizer.pt")
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_files_has_no_part(own_ast_folder, layout):
    """Equal settings and weights are one model, however they are written down."""
    before = model_identity(own_ast_folder)
    LAYOUTS[layout](own_ast_folder)
    assert model_identity(own_ast_folder) == before


def exchanged(header):
    """The same shapes and bytes under each other's names."""
    by_shape = {}
    for name, one in header.items():
        if name != "__metadata__":
            by_shape.setdefault(str(one["shape"]), []).append(name)
    first, second = next(names for names in by_shape.values() if len(names) > 1)[:2]
    return {**header, first: header[second], second: header[first]}


VALUES = {
    "setting": lambda f: rewrite_json(
        f / "config.json", lambda values: {**values, "layer_norm_eps": 1e-3}, indent=2
    ),
    "integer or not": lambda f: rewrite_json(
        f / "config.json", lambda values: {**values, "hidden_size": float(values["hidden_size"])}
    ),
    "mean of the features": lambda f: rewrite_json(
        f / "preprocessor_config.json", lambda values: {**values, "mean": -4.0}
    ),
    "names of tensors": lambda f: rewrite_header(f / "model.safetensors", exchanged),
    "dtype": lambda f: rewrite_header(
        f / "model.safetensors",
        lambda header: {
            name: {**one, "dtype": "I32"} if "dtype" in one else one
            for name, one in header.items()
        },
    ),
    "damaged header": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes().replace(b"{", b"[", 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_other_values_have_a_part(own_ast_folder, value):
    """In settings and weights, and in what says which bytes are which."""
    before = model_identity(own_ast_folder)
    VALUES[value](own_ast_folder)
    assert model_identity(own_ast_folder) != before


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_what_save_pretrained_writes_is_digested_as_it_is(ast_folder, name):
    """So that the digests of stores that exist stay."""
    with (ast_folder / name).open("rb") as file:
        head = canonical_head(name, file)
        assert head + file.read() == (ast_folder / name).read_bytes()


def test_labels_are_sorted_as_the_numbers_they_are():
    """As transformers writes `id2label`: 2 comes before 10."""
    written = {"id2label": {str(n): f"label {n}" for n in range(12)}, "z": [1.0, {}]}
    raw = f"{json.dumps(written, indent=2)}\n".encode()
    assert canonical_head("config.json", io.BytesIO(raw)) == raw


def test_only_an_ast_folder_states_asts_front_end(own_ast_folder):
    """In a config that states none: the folder of another kind of model leaves it unstated."""
    assert CacheConfig(model_name=model_identity(own_ast_folder)).front_end == DEFAULT_FRONT_END
    rewrite_json(own_ast_folder / "config.json", lambda values: {**values, "model_type": "wavlm"})
    identity = model_identity(own_ast_folder)
    assert CacheConfig(model_name=identity).front_end == UNSTATED_FRONT_END


@pytest.mark.parametrize(
    "model", [None, 1, b"ast", ["ast"], CacheConfig(), "a" * 5000, "/" + "a" * 5000, "a\0b"]
)
@pytest.mark.parametrize("ask", [model_identity, config_for])
def test_what_can_not_be_a_model_is_refused(model, ask):
    """In the package's own words, whatever it is."""
    with pytest.raises(CacheError):
        ask(model)


def test_weights_that_are_no_files_are_none(own_ast_folder):
    """A pipe isn't waited for."""
    (own_ast_folder / "model.safetensors").unlink()
    os.mkfifo(own_ast_folder / "model.safetensors")
    with pytest.raises(ModelLoadError):
        model_identity(own_ast_folder)
