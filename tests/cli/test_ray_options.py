"""The options of `extract --launcher ray` that don't go together."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--num-actors", "2"], "--num-actors"),
        (["--ray-address", "auto"], "--ray-address"),
        (["--launcher", "ray", "--num-workers", "2"], "--num-workers"),
        (["--launcher", "ray", "--rank", "0", "--world-size", "2"], "--rank"),
        (["--launcher", "roy"], "roy"),
    ],
)
def test_options_that_are_refused(refused, data, ast_folder, options, named):
    """With one line, and before anything is started."""
    given = ("extract", data, "--model", ast_folder, "--duration", "0.5")
    line = refused(*given, "--namespace", "mine", *options)
    assert named in line
