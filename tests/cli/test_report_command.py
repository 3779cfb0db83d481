"""`lmdbcache report`."""

from __future__ import annotations

import json


def test_report_with_a_dataset(cli, cache, configs, data, tmp_path):
    """One line says what was written; the dataset's classes and splits are in the page."""
    result = cli("report", "--data", data, "--out", "mine.html")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("mine.html: 3 stores, no damage found; ")
    page = (tmp_path / "mine.html").read_text("utf-8")
    assert page.count("<h3>Coverage of") == 3
    assert "train (%)" in page
    result = cli("report", "--data", data, "--out", "mine.html", root=tmp_path / "empty")
    assert str(data) in result.stdout  # no store is of it


def test_report_of_chosen_stores_as_json(cli, cache, configs, data, tmp_path):
    """--json prints the same facts and writes nothing."""
    result = cli("report", configs[0].fingerprint, "--json", "--data", data)
    facts = json.loads(result.stdout)
    (store,) = facts["stores"]
    assert store["info"]["fingerprint"] == configs[0].fingerprint
    (coverage,) = store["coverage"]
    stored = sum(counts[0] for counts in coverage["in_all"].values())
    asked = sum(counts[1] for counts in coverage["in_all"].values())
    assert (stored, asked) == (3, 6)
    assert not list(tmp_path.glob("*.html"))


def test_report_refuses_another_file(cli, refused, cache, tmp_path):
    """A file that isn't a report stays, unless --overwrite."""
    (tmp_path / "report.html").write_text("mine")
    assert "--overwrite" in refused("report")
    assert cli("report", "--overwrite").returncode == 0
    assert cli("report").returncode == 0


def test_report_of_a_damaged_store(cli, cache, configs, tmp_path):
    """The page is made, the line says so, and the exit code is 1."""
    (database,) = cache.path(configs[0]).glob("gen-*/data.mdb")
    database.write_bytes(database.read_bytes()[:100])
    result = cli("report")
    assert result.returncode == 1
    assert "DAMAGED" in result.stdout
    assert (tmp_path / "report.html").exists()


def test_wrong_data(refused, cache, tmp_path):
    """A dataset that isn't there is one line."""
    assert "nowhere" in refused("report", "--data", tmp_path / "nowhere")
