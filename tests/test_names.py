"""Names from outside: sample ids by one rule everywhere, and nothing that leaves the root."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.errors import (
    CacheNotFoundError,
    ConfigError,
    IntegrityError,
    InvalidSampleIdError,
    SampleNotFoundError,
    StorageError,
)

NFC, NFD = (unicodedata.normalize(form, "Café_Å") for form in ("NFC", "NFD"))

# What is asked for, and under which id it is stored.
ACCEPTED = {
    "spaces in  it :dog": "spaces in  it :dog",
    f"{NFC}:dog": f"{NFC}:dog",
    f"{NFD}:dog": f"{NFC}:dog",
    f"a:Ä{NFD[:2]}": "a:äca",
    "a:b:c:dog": "a:b:c:dog",
    "::dog": "::dog",
    "dir/sub/../clip:dog": "dir/sub/../clip:dog",
    "/etc/passwd:dog": "/etc/passwd:dog",
    "back\\slash:dog": "back\\slash:dog",
    "🐕‍🦺\U0001f468\u200d\U0001f469:🐕": "🐕‍🦺\U0001f468\u200d\U0001f469:🐕",
    "line\nbreak\t:dog": "line\nbreak\t:dog",
    "metadata:dog": "metadata:dog",
    "checksums:x": "checksums:x",
    "-rf *;$(id):dog": "-rf *;$(id):dog",
    "A:DOG": "A:dog",
    "a:DOG": "a:dog",
    "\u202eevil:dog": "\u202eevil:dog",
    "x" * 507 + ":dog": "x" * 507 + ":dog",
    "é" * 253 + ":dog": "é" * 253 + ":dog",
}
REFUSED = [
    *("no colon", "", ":dog", "a:", ":", "a\0b:dog", "a:d\0g"),
    *("x" * 508 + ":dog", "x" * 600 + ":dog", "é" * 300 + ":dog"),
    *(os.fsdecode(b"caf\xe9") + ":dog", "\ud800:dog"),
]


def test_accepted_sample_ids(cache, config):
    """Written, read, listed, checked and found again by every way in, under one canonical id."""
    values = {stored: np.full(4, n, np.float32) for n, stored in enumerate(ACCEPTED.values())}
    with cache.writer(config) as writer:
        for asked, stored in ACCEPTED.items():
            value = values[stored]
            is_new = writer.put(asked, value)
            assert is_new or unicodedata.normalize("NFC", asked) != asked
            assert not writer.put(stored, value + 1)  # pending: the same sample
            assert writer.put_batch([asked, stored], np.stack([value, value])) == 0
    with cache.writer(config) as writer:
        assert not any(writer.put(asked, np.zeros(4)) for asked in ACCEPTED)
    with cache.reader(config) as reader:
        assert sorted(reader) == sorted(values)
        for asked, stored in ACCEPTED.items():
            for name in (asked, stored):
                assert name in reader
                assert (reader[name] == values[stored]).all()
                assert (reader.get_batch([name, name]) == values[stored]).all()
                assert (reader.select([name]).get_batch([0]) == values[stored]).all()
        assert reader.missing([*ACCEPTED, *values]) == []
    assert cache.coverage(config, list(ACCEPTED)).missing == ()
    found = cache.get_or_compute(config, list(ACCEPTED), lambda missing: missing)
    assert (found == [values[stored] for stored in ACCEPTED.values()]).all()
    cache.compact(config)
    assert cache.verify(config).is_sound
    assert sorted(cache.reader(config)) == sorted(values)


def test_refused_sample_ids(filled, config):
    """Every way to write says why in one line; to readers they are missing; nothing is stored."""
    value = np.zeros(8, np.float32)
    before = list(filled.reader(config))
    with filled.writer(config) as writer:
        for asked in REFUSED:
            for write in (
                functools.partial(writer.put, asked, value),
                functools.partial(writer.put_batch, ["fine:x", asked], np.stack([value, value])),
                functools.partial(filled.get_or_compute, config, [asked], lambda _: [value]),
            ):
                with pytest.raises(InvalidSampleIdError) as caught:
                    write()
                assert "\n" not in str(caught.value)
                assert len(str(caught.value).encode("utf-8", "backslashreplace")) < 400
        writer.discard()
    with filled.reader(config) as reader:
        assert not any(asked in reader for asked in REFUSED)
        assert reader.missing(REFUSED) == REFUSED
        for asked in REFUSED:
            for read in (reader.__getitem__, lambda asked: reader.get_batch([asked])):
                with pytest.raises(SampleNotFoundError):
                    read(asked)
        assert list(reader) == before
    assert list(filled.coverage(config, REFUSED).missing) == REFUSED


HOSTILE = [
    *("../../etc", "..", "../..", "/etc/passwd", "a/../../b", "..\\..\\x", "~root", "~", "."),
    *("-rf", "con:", "nul", "a;rm -rf *", "$(id)", "`id`", "%2e%2e%2f", "\u202e/../x", "😀"),
    *("é" * 5000, "x" * 20_000, "a" * 127 + "/" + "b" * 300, "org/model@../../x", "/" * 300),
    "\u2025/\uff0e\uff0e/x",
]  # fmt: skip


def test_no_model_name_leaves_the_root(cache, config):
    """Whatever a model is called, its store is one plain folder right under the root."""
    configs = [config.replace(model_name=name) for name in HOSTILE]
    paths = list(map(cache.path, configs))
    for each, path in zip(configs, paths, strict=True):
        assert path.parent == cache.root
        assert len(path.name) <= 128
        assert set(path.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
        assert not path.name.startswith((".", "-"))
        with cache.writer(each) as writer:
            writer.put("a:x", np.ones(4, np.float32))
        assert cache.info(each).config == each
        assert list(cache.reader(each)) == ["a:x"]
    assert set(cache.root.iterdir()) == set(paths)
    assert list(cache.root.parent.iterdir()) == [cache.root]
    cache.clear()
    assert not list(cache.root.iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        *({"model_name": name} for name in ("a\0b", "a\nb", "\x7f", "", " ", "\udcff")),
        *({"model_name": name} for name in (b"ast", None)),
        *({name: "../x"} for name in ("output", "namespace", "front_end")),
        *({name: "../x"} for name in ("dtype", "compute_dtype")),
        *({name: "a\0"} for name in ("output", "namespace", "front_end")),
        *({name: "x" * 129} for name in ("output", "namespace", "front_end")),
    ],
)  # fmt: skip
def test_unusable_names_in_a_config(fields):
    """Control characters, lone surrogates and paths are refused with the field's name."""
    with pytest.raises(ConfigError, match=f"^{next(iter(fields))}: "):
        CacheConfig(**fields)


def test_a_model_name_too_long_for_the_metadata(cache, config):
    """Refused before anything is computed or written."""
    with pytest.raises(ConfigError) as caught:
        cache.writer(config.replace(model_name="x" * 70_000))
    assert len(str(caught.value)) < 400
    assert not cache.root.exists()


def test_current_never_leads_out_of_the_store(filled, config, tmp_path):
    """CURRENT is a plain name of a generation or an error; what lies outside isn't touched."""
    outside = tmp_path / "outside"
    filled.path(config).joinpath("gen-000001").rename(outside)
    before = {path: path.stat().st_mtime_ns for path in outside.iterdir()}
    for content in (
        *("../../outside", "..", ".", "/", "gen-000001/..", "gen-000001\0x"),
        *("../cache/gen-000001", ""),
    ):
        (filled.path(config) / "CURRENT").write_text(content)
        for use in (
            lambda: len(filled.reader(config)),
            lambda: filled.writer(config),
            lambda: filled.compact(config),
            lambda: filled.verify(config),
        ):
            with pytest.raises(IntegrityError):
                use()
    filled.clear(config)
    assert {path: path.stat().st_mtime_ns for path in outside.iterdir()} == before


def test_linked_generation_is_not_removed_through_its_link(filled, config, tmp_path):
    """Clearing and compacting remove links in a store, never what they lead to."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    store = filled.path(config)
    (store / "gen-000009").symlink_to(outside)
    (store / "failures.json").symlink_to(outside / "precious")
    assert filled.compact(config).num_embeddings == 20
    filled.clear(config)
    assert (outside / "precious").read_text() == "kept"
    # A store that is a link is its target's owner's business: removing it is refused or unlinks.
    (filled.root / store.name).symlink_to(outside)
    assert filled.stores() == []
    with pytest.raises((CacheNotFoundError, StorageError)):
        filled.remove(filled.root / store.name)
    assert (outside / "precious").read_text() == "kept"


def test_nothing_in_a_root_is_imported_or_run(filled, config, embeddings, tmp_path):
    """Python files, .pth files and configuration in root, store and generation stay unread."""
    trap = "import pathlib; pathlib.Path('sprung').touch()"
    for folder in (filled.root, filled.path(config), filled.path(config) / "gen-000001"):
        for name in ("lmdb.py", "numpy.py", "sitecustomize.py", "conftest.py", "x.pth"):
            (folder / name).write_text(trap)
    code = (
        "import sys; from lmdbcache import EmbeddingCache; "
        "cache = EmbeddingCache(sys.argv[1]); (config,) = cache; "
        "print(len(cache.reader(config)), cache.verify(config).is_sound, "
        "cache.compact(config).num_embeddings)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONSAFEPATH": "1",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, filled.root] if sys.version_info >= (3, 11)
        else [sys.executable, "-c", code, filled.root],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["20", "True", "20"]
    assert not list(tmp_path.rglob("sprung"))
    assert EmbeddingCache(filled.root).reader(config) == embeddings
