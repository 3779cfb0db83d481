"""What README and docs say, tried as a reader would try it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest
from documents.pages import DOCS, DOCUMENTS, ROOT, blocks

import lmdbcache
from lmdbcache import CacheConfig, VEGASDataset, errors
from lmdbcache.cli.main import COMMANDS, app

RUN = ("python", "bash")
ROOMS = {door.parent.name for door in (ROOT / "lmdbcache").glob("*/__init__.pyi")}
LANGUAGES = {*RUN, "text", "json", "console"}
NOT_RUN = re.compile(r"\$ (pip install|make|sbatch|srun|git clone|python -m venv)\b")

# What a page takes for granted beside the dataset and the model.
BEGINNINGS = {
    "README.md": """
        import os
        from pathlib import Path
        os.mkdir(".demo")  # as `make demo` leaves it
        os.symlink(os.path.abspath("VEGAS"), ".demo/VEGAS")
        os.symlink(os.path.abspath("my-ast"), ".demo/small-ast")
        Path(".demo/VEGAS/dog/audios/broken.wav").write_text("no sound")
    """,
}

# What holds after a page's code.
ENDINGS = {
    "cluster.md": """
        from lmdbcache import EmbeddingCache
        stores = EmbeddingCache("cluster.cache").stores()
        assert {s.config.output: s.num_embeddings for s in stores} == {
            "pooler_output": 40, "mean": 40, "last_hidden_state": 40
        }
        (other,) = EmbeddingCache("other.staging").root.glob("world-2-*")
        assert len(list(other.glob("rank-*"))) == 2
    """,
    "hidden_states.md": """
        import re
        table = dict(re.findall(r"^\\| `(.*)` \\| (\\(.*\\)) \\|", page, re.MULTILINE))
        for names, shape in table.items():
            for name in names.split("`, `"):
                assert str(HiddenStateView(reader, name).embedding_shape) == shape, name
        assert {"cls`, `distillation", "frames", "valid"} <= table.keys()
    """,
    "mixed_batches.md": """
        assert batch["mask"].all()
        assert encoder.num_computed == len(["a:dog", "b:dog", "c:drum", "d:drum"]) + len(clips)
        from lmdbcache import EmbeddingCache
        assert EmbeddingCache("mixed.cache").coverage(config, clips.sample_ids).fraction == 1
    """,
    "report.md": """
        assert report.is_sound
        assert report.stores[0].num_looked_at == 20
    """,
    "streaming.md": """
        assert batch["embedding"].shape[1:] == embeddings.shape[1:] == (768,)
        assert [ids[row_of[one]] for one in wanted] == wanted
        assert torch.isfinite(loss)
        from lmdbcache import EmbeddingCache
        assert EmbeddingCache("streaming-copy.cache").reader(config) == cache.reader(config)
    """,
    "windows.md": """
        assert windows.starts.tolist() == [2.5 * n for n in range(10)]
        assert windows.embeddings.shape == (10, 16)
        assert windows.sample_ids[1] == "garden@00002.500000:dawn"
        assert recordings["garden:dawn"].shape == (16,)
    """,
    "vegas.md": """
        hidden = VEGASDataset(
            "VEGAS", ast_cache_dir="scripts.cache", ast_output="last_hidden_state"
        )
        assert hidden.load_ast_embeddings_from_cache()
        assert set(hidden.audio_embs_from_file) == set(hidden.sample_ids)
        assert len({embedding.shape for embedding in hidden.audio_embs_from_file.values()}) == 1
    """,
}

# These speak of a cache that an extraction has filled; the others make what they need.
AFTER_AN_EXTRACTION = {
    "housekeeping.md",
    "misses_and_figures.md",
    "report.md",
    "troubleshooting.md",
    "trust.md",
}

# These fill `VEGAS.cache`, by one and the same extraction; no other page writes there.
EXTRACTING = {"README.md", "index.md"}

# These read from $PLACE, which is a folder, and a bucket on a server that talks S3.
AT_A_PLACE = {"streaming.md"}

# What follows the Python of these pages is what it prints; figures differ.
WITH_OUTPUT = {"README.md"}

RUNNER = """
import json, linecache, os, subprocess
JOB = {"SLURM_TMPDIR": os.path.abspath("job")}  # nothing is left in /tmp
for number, (language, code) in enumerate(json.loads(open("blocks.json").read())):
    name = f"{language} block {number}"
    if language == "python":
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        exec(compile(code, name, "exec"), globals())
    else:
        tasks = [{}]
        if "#SBATCH --array" in code:  # of two tasks, whatever it says
            array = {"COUNT": "2", "MIN": "0", "MAX": "1", "STEP": "1"}
            tasks = [{**array, "ID": str(task)} for task in range(2)]
        for task in tasks:
            own = {f"SLURM_ARRAY_TASK_{name}": value for name, value in task.items()}
            command = ["bash", "-euo", "pipefail", "-c", code]
            subprocess.run(command, check=True, env={**os.environ, **JOB, **own})
"""


def of_page(code: dict[str, str], page: Path) -> str:
    return textwrap.dedent(code.get(page.name, ""))


def _without_figures(line: str) -> str:
    line = re.sub(r"\S+:\w+: \S*/\S+\.wav", "CLIP", line)
    return re.sub(r"\d+(\.\d+)?", "N", line)


def stored() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("VEGAS.cache").rglob("data.mdb")}


PAGES = [page for page in DOCUMENTS if blocks(page, *RUN)]


@pytest.mark.timeout(1200)  # the page on clusters starts twenty processes
@pytest.mark.parametrize(
    ("page", "place"),
    [(page, None) for page in PAGES]
    + [
        pytest.param(page, "s3://bucket", marks=pytest.mark.stress)
        for page in PAGES
        if page.name in AT_A_PLACE
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_code_of_a_page_runs(page, place, reader_at_home, program_server, request, monkeypatch):
    """The Python and shell blocks of a page run, one after the other, in one folder."""
    if page.name in AFTER_AN_EXTRACTION:
        shutil.copytree(request.getfixturevalue("filled_cache"), "VEGAS.cache")
    if place:
        request.getfixturevalue("with_a_bucket")
    monkeypatch.setenv("PLACE", place or f"{reader_at_home.as_uri()}/bucket")
    found = stored()
    before = f"page = {page.read_text('utf-8')!r}\n" + of_page(BEGINNINGS, page)
    after = of_page(ENDINGS, page)
    (reader_at_home / "blocks.json").write_text(
        json.dumps([("python", before), *blocks(page, *RUN), ("python", after)])
    )
    (reader_at_home / "page.py").write_text(RUNNER)
    done = subprocess.run(
        program_server.command("page.py"),
        capture_output=True,
        text=True,
        timeout=1180,
        check=False,
    )
    assert done.returncode == 0, f"{page.name}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    if page.name in WITH_OUTPUT:
        printed = list(map(_without_figures, done.stdout.splitlines()))
        for _, code in blocks(page, "text"):
            for line in map(_without_figures, code.splitlines()):
                assert line in printed, line
    if page.name not in EXTRACTING:
        assert stored() == found


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_a_block_that_is_not_run_says_so(page):
    """Every block names its language; what isn't run installs something or isn't code."""
    for language, code in blocks(page):
        assert language in LANGUAGES, f"{language!r}: {code}"
        if language == "console":
            commands = [line for line in code.splitlines() if line.startswith("$")]
            assert commands, code
            assert all(map(NOT_RUN.match, commands)), code


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_no_code_is_hidden_from_the_tests(page):
    """Code stands in a fenced block, which names its language; none is set apart by four spaces."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^::: .*\n(?: {4}.*\n)*", "", text, flags=re.MULTILINE)  # for mkdocs
    assert not re.findall(r"^(?: {4}|\t).*", text, re.MULTILINE)


def test_each_page_writes_into_folders_of_its_own():
    """No cache directory but that of the quickstart is named in the code of two pages."""
    pages: dict[str, set[Path]] = {}
    for page in DOCUMENTS:
        for _, code in blocks(page, *RUN):
            for root in re.findall(r"[\w-]+\.cache\b", code):
                pages.setdefault(root, set()).add(page)
    assert not {root for root, named in pages.items() if len(named) > 1} - {
        "VEGAS.cache",
        "lmdbcache.cache",
    }


def test_readme_has_the_commands_in_their_groups():
    """README's table has each command that `lmdbcache --help` shows, in the group that it is in."""
    rows = dict(
        re.findall(r"^\| (\w[\w ]*) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    )
    for panel, commands in COMMANDS.items():
        assert all(f"`{name}`" in rows[panel] for name in commands), panel


def test_format_document_gives_the_fingerprint_that_the_code_gives():
    """docs/format.md's JSON and digest are those of the default config."""
    text = (DOCS / "format.md").read_text("utf-8")
    ((_, encoded),) = blocks(DOCS / "format.md", "json")
    digest = hashlib.blake2b(
        b"lmdbcache config 1\n" + encoded.strip().encode(), digest_size=8
    ).hexdigest()
    assert CacheConfig(**json.loads(encoded)).fingerprint == digest
    assert f"`{digest}`" in text


def test_every_command_is_documented():
    """A new command comes with a word about it in docs/command_line.md."""
    text = (DOCS / "command_line.md").read_text("utf-8")
    missing = [name for name in app.list_commands(None) if f"lmdbcache {name}" not in text]
    assert not missing


def test_every_config_field_is_documented():
    """docs/configuration.md has a row for each field of CacheConfig."""
    text = (DOCS / "configuration.md").read_text("utf-8")
    missing = [
        field.name for field in dataclasses.fields(CacheConfig) if f"| `{field.name}`" not in text
    ]
    assert not missing


def test_every_error_has_a_remedy():
    """docs/troubleshooting.md has a section for each error class."""
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    missing = [
        name for name in errors.__all__ if not re.search(rf"^## .*`{name}`", text, re.MULTILINE)
    ]
    assert not missing


def test_every_environment_variable_is_documented():
    """docs/configuration.md has each variable that the package reads."""
    text = (DOCS / "configuration.md").read_text("utf-8")
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "lmdbcache").rglob("*.py"))
    names = set(re.findall(r"\"(LMDBCACHE_[A-Z_]+)\"", sources))
    assert names
    assert not [name for name in names if name not in text]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """Relative links name files that exist."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text("utf-8")):
        assert (document.parent / target).exists(), target


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as by `make docs`: a link, an anchor or a docstring that is wrong ends the build."""
    for package in ("material", "mkdocs_click", "mkdocs_ipynb", "mkdocstrings"):
        pytest.importorskip(package, reason="the site needs the extra [docs]")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", ".mkdocs.yml"]
        + ["--site-dir", str(folder / "site")],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_the_site_asks_nothing_of_other_servers(site):
    """No page loads a script, a style or a font from elsewhere."""
    for page in site.rglob("*.html"):
        sources = re.findall(
            r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]+)", page.read_text("utf-8")
        )
        assert not [source for source in sources if "canonical" not in source], page


def test_every_public_name_is_in_the_reference(site):
    """A page has each name of a door; the first page links those of `lmdbcache`."""
    names = zlib.decompress((site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]).decode()
    documented = {line.split()[0] for line in names.splitlines()}
    for room in ROOMS - {"cli"}:
        offered = importlib.import_module(f"lmdbcache.{room}").__all__
        assert {f"lmdbcache.{room}.{name}" for name in offered} <= documented
    assert {f"lmdbcache.errors.{name}" for name in errors.__all__} <= documented
    linked = re.findall(r"\[(\w+)\]\[", (DOCS / "reference" / "index.md").read_text("utf-8"))
    assert sorted(linked) == sorted(set(lmdbcache.__all__) - set(errors.__all__))


def test_the_search_finds_every_option(site):
    """The search index has each option of each command."""
    text = (site / "search" / "search_index.json").read_text("utf-8")
    words = set(re.findall(r"--[a-z][a-z-]*", text))
    for name in app.list_commands(None):
        options = {each for one in app.get_command(None, name).params for each in one.opts}
        assert {each for each in options if each.startswith("--")} <= words, name


def test_vegas_document_names_real_methods():
    """docs/vegas.md speaks of methods that VEGASDataset has."""
    text = (DOCS / "vegas.md").read_text("utf-8")
    for name in re.findall(r"dataset\.(\w+)\(", text):
        assert hasattr(VEGASDataset, name), name


def test_exit_codes_are_documented():
    """The table has every exit code that the help names."""
    text = (DOCS / "command_line.md").read_text("utf-8")
    codes = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert codes == re.findall(r"(?:: |; )(\d+) ", app.epilog)
