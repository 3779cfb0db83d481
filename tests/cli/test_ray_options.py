"""The options of `extract --launcher ray` that don't go together."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--num-actors", "2"], "only with --launcher ray"),
        (["--ray-address", "auto"], "only with --launcher ray"),
        (["--launcher", "ray", "--num-workers", "2"], "--num-workers: not with --launcher ray"),
        (["--launcher", "ray", "--rank", "0", "--world-size", "2"], "not with --launcher ray"),
        (["--staging", "s3://bucket/folder"], "ray takes a URL"),
        (["--launcher", "roy"], "known are auto, none, slurm, torchrun, ray"),
    ],
)
def test_options_that_are_refused(refused, data, ast_folder, options, reason):
    """With one line, and before anything is started."""
    given = ("extract", data, "--model", ast_folder, "--duration", "0.5")
    line = refused(*given, "--namespace", "mine", *options)
    assert reason in line
