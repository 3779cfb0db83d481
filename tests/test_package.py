"""The package as a whole: its names, its errors, and what importing it costs."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lmdbcache
from lmdbcache import errors

HEAVY = ("torch", "transformers", "torchaudio", "soundfile", "soxr", "tqdm", "cv2", "PIL")
ERROR_CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, Exception)
]


def modules_after(code):
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(printed.split("\n")[-2].split())


def test_the_core_loads_nothing_heavy(tmp_path):
    """Listing, writing and reading a cache needs neither torch nor what decodes audio."""
    code = f"""
import lmdbcache.storage.writer, lmdbcache.storage.reader, lmdbcache.cache
from lmdbcache import CacheConfig, EmbeddingCache, EmbeddingReader, EmbeddingWriter
cache, config = EmbeddingCache({str(tmp_path)!r}), CacheConfig()
with cache.writer(config) as writer:
    writer.put("a:x", [1.0, 2.0])
cache.reader(config)["a:x"], cache.stores(), cache.verify(config), cache.compact(config)
"""
    assert not modules_after(code) & set(HEAVY)


def test_every_public_name_resolves():
    """What `__all__` promises exists and has a docstring."""
    assert [name for name in lmdbcache.__all__ if not getattr(lmdbcache, name).__doc__] == []


def test_dir_lists_the_public_names():
    """`dir` shows lazy names before they are loaded, and the list has no double."""
    assert sorted(set(lmdbcache.__all__)) == sorted(lmdbcache.__all__)
    assert set(lmdbcache.__all__) <= set(dir(lmdbcache))
    assert lmdbcache.__version__


def test_unknown_name_is_an_attribute_error():
    """A misspelt name doesn't end in an import error."""
    with pytest.raises(AttributeError, match="EmbedingCache"):
        lmdbcache.EmbedingCache  # noqa: B018


def test_every_door_offers_what_it_lists():
    """Every name at the door of a room exists."""
    for door in Path(lmdbcache.__file__).parent.glob("*/__init__.pyi"):
        module = importlib.import_module(f"lmdbcache.{door.parent.name}")
        assert [each for each in module.__all__ if not hasattr(module, each)] == []


def test_errors_lists_every_error_class():
    """`errors.__all__` is complete, and every error is a CacheError."""
    assert sorted(errors.__all__) == sorted(error.__name__ for error in ERROR_CLASSES)
    assert all(issubclass(error, errors.CacheError) for error in ERROR_CLASSES)


def test_errors_cross_processes():
    """Each survives pickle, copy and torch's way of raising it again, message intact."""
    for kind in ERROR_CLASSES:
        error = kind("what, where: what to do\nnext")
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), kind(str(error))):
            assert type(again) is kind
            assert str(again) == str(error) == "what, where: what to do\nnext"
            assert again.args == error.args


def test_errors_are_the_builtin_ones_people_catch():
    """Code that catches the builtin exception catches ours."""
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.CacheNotFoundError, FileNotFoundError)
    assert issubclass(errors.SampleNotFoundError, KeyError)
    assert issubclass(errors.InvalidSampleIdError, ValueError)
    assert issubclass(errors.InvalidEmbeddingError, ValueError)
    assert issubclass(errors.DatasetError, ValueError)
    assert issubclass(errors.MissingDependencyError, ImportError)


def test_without_torch_the_core_works_and_the_rest_names_its_extra(tmp_path):
    """Where torch isn't installed, storing works, and what needs it says what to install."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # as if it weren't installed
        "import numpy as np, lmdbcache\n"
        "cache, config = lmdbcache.EmbeddingCache(sys.argv[1]), lmdbcache.CacheConfig()\n"
        "with cache.writer(config) as writer:\n"
        "    writer.put('a:dog', np.ones(3))\n"
        "assert cache.reader(config)['a:dog'].sum() == 3\n"
        "for call in (lambda: lmdbcache.EmbeddingDataset,\n"
        "             lambda: lmdbcache.extract(cache, config, {'b:dog': 'b.wav'},\n"
        "                 front_end=1, make_embedder=1)):\n"
        "    try:\n"
        "        call()\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"lmdbcache[torch]"' in done.stdout
    assert '"lmdbcache[audio]"' in done.stdout


def test_all_extras_want_the_same_torch():
    """No set of extras gets a torch that another one would replace."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    text = (Path(lmdbcache.__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    wanted = [
        requirement.specifier
        for lines in extras.values()
        for requirement in map(Requirement, lines)
        if requirement.name == "torch"
    ]
    assert len(wanted) >= 2
    assert all("2.14.1" in each and "2.15" not in each for each in wanted)


def test_a_users_script_gets_real_types(tmp_path):
    """mypy --strict accepts docs/examples/typed_script.py, and finds each mistake put into it."""
    root = Path(__file__).resolve().parent.parent
    mistakes = """
EmbeddingCache(3)
EmbeddingCache("a").reader("b")
EmbeddingCache("a").reader(CacheConfig()).get_batch(3)
CacheConfig().duration.upper()
extract(EmbeddingCache("a"), CacheConfig(), {}).num_extracted + "1"
open_dataset("a").class_labels + 1
make_dataloader(EmbeddingCache("a").reader(CacheConfig()), batch_size="1")
"""
    text = (root / "docs" / "examples" / "typed_script.py").read_text()
    script = tmp_path / "script.py"
    script.write_text(text + mistakes)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-pretty", script],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    lines = [int(line.split(":")[1]) for line in found.splitlines() if ": error:" in line]
    first = len(text.splitlines()) + 2
    assert sorted(set(lines)) == [*range(first, first + len(mistakes.splitlines()) - 1)], found
