"""The sdist and the wheel; the wheel in an environment that holds what it declares."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def declared(name: str, found: dict[str, importlib.metadata.Distribution]) -> None:
    """Collect a distribution and, without extras, all that it requires."""
    distribution = importlib.metadata.distribution(name)
    key = re.sub(r"[-_.]+", "-", distribution.name).lower()
    if key in found:
        return
    found[key] = distribution
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            declared(requirement.name, found)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel built from it: as `make dist` makes them."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def program(wheel, tmp_path_factory) -> Path:
    """The command of an environment with the wheel and the packages that the core declares."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    distributions: dict[str, importlib.metadata.Distribution] = {}
    declared("lmdbcache", distributions)
    del distributions["lmdbcache"]
    for distribution in distributions.values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
        + ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", wheel],
        check=True,
    )
    return folder / "bin" / "lmdbcache"


def tracked(*paths: str) -> list[str]:
    """The files under version control; none where this isn't a checkout."""
    listed = ["git", "-c", "core.quotePath=off", "ls-files", *paths]
    return subprocess.run(
        listed, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()


def run(*command, cwd) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    """The package with its data files and type marker; no tests, no tools."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lmdbcache", *(top for top in tops if top.endswith(".dist-info"))}
    assert "lmdbcache/py.typed" in names
    assert set(tracked("lmdbcache")) <= set(names)


def test_the_sdist_holds_the_project_and_tests_itself(built, tmp_path):
    """All that is under version control; a test of it runs from where it is unpacked."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert [name for name in tracked() if not (unpacked / name).exists()] == []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_config.py"],
        cwd=unpacked,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_an_index_takes_both(built):
    """Metadata and the readme's rendering are what an index accepts."""
    pytest.importorskip("twine")
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()], check=True
    )


def test_the_core_works_from_the_wheel_alone(program, tmp_path):
    """Store, read, list and verify with what the wheel declares, outside of the repository."""
    code = (
        "import lmdbcache, sys; assert 'site-packages' in lmdbcache.__file__\n"
        "from lmdbcache import CacheConfig, EmbeddingCache\n"
        "cache, config = EmbeddingCache('root'), CacheConfig()\n"
        "with cache.writer(config) as writer: writer.put('a:x', [1.0, 2.0])\n"
        "assert cache.reader(config)['a:x'].tolist() == [1.0, 2.0]\n"
    )
    done = run(program.parent / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in (["ls"], ["verify", "--all"], ["info", "d9ec"], ["compact", "--all"]):
        done = run(program, *command, "--root", "root", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "1" in run(program, "ls", "--root", "root", cwd=tmp_path).stdout


def test_what_needs_an_extra_names_it(program, tmp_path):
    """Extracting and training without torch is one line that says what to install."""
    (tmp_path / "VEGAS" / "dog" / "audios").mkdir(parents=True)
    (tmp_path / "VEGAS" / "dog" / "audios" / "video_00001.wav").write_bytes(b"RIFF")
    done = run(program, "extract", "VEGAS", "--class", "dog", "--root", "root", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert 'pip install "lmdbcache[audio]"' in done.stderr
    code = "from lmdbcache import make_dataloader"
    done = run(program.parent / "python", "-c", code, cwd=tmp_path)
    assert 'pip install "lmdbcache[torch]"' in done.stderr
