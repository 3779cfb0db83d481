"""`lmdbcache audit`: a few stored embeddings are computed again and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.command import Option
from lmdbcache.cli.console import counted, finish, print_table, progress_bar, say, say_some
from lmdbcache.cli.options import (
    BatchSize,
    Device,
    Json,
    NumWorkers,
    Progress,
    Root,
    Store,
    find_folder,
    stored_config,
    title_of,
)
from lmdbcache.cli.verify import clips_of_store
from lmdbcache.errors import IntegrityError
from lmdbcache.extraction import AuditReport, audit

_FEW: Final = 10


def audit_command(
    store: Store,
    *,
    root: Root = None,
    samples: Annotated[int, Option(help="How many embeddings are computed again.")] = 50,
    data_dir: Annotated[
        Path | None,
        Option(help="Where the dataset is now; default: where it was."),
    ] = None,
    model: Annotated[
        str | None,
        Option(
            help="Hub name or checkpoint folder; default: the one that the store was filled from."
        ),
    ] = None,
    seed: Annotated[int, Option(help="Another one picks other samples.")] = 0,
    tolerance: Annotated[
        float | None,
        Option(
            help="Largest relative L2 distance that isn't drift; default: 1e-5 for float32, 1e-3 "
            "stored as float16, 1e-2 as bfloat16 or computed in float16, 3e-2 in bfloat16; as "
            "int8 1.1 times the error that was measured.",
        ),
    ] = None,
    batch_size: BatchSize = 8,
    num_workers: NumWorkers = None,
    device: Device = None,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Compute some stored embeddings again and report how far they are off. Changes nothing.

    Exit code 1 if one is farther off than rounding explains, or none can be compared.
    """
    cache = EmbeddingCache(root)
    folder = find_folder(cache, store)
    config = stored_config(folder)
    if cache.path(config) != folder:
        raise IntegrityError(f"{folder} isn't named after its config; was it renamed by hand?")
    with progress_bar("embedding again", shown=progress, first="loading torch") as report:
        found = audit(
            cache,
            config,
            num_samples=samples,
            clips=clips_of_store(folder, data_dir) if data_dir is not None else None,
            data_dir=data_dir,
            model=model,
            seed=seed,
            tolerance=tolerance,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            progress=report,
        )
    finish(found, _say_report, as_json=as_json)


def _say_report(report: AuditReport) -> None:
    differences = dict(report.differences)
    if "weights_digest" in differences:
        stored, now = differences.pop("weights_digest")
        say(f"OTHER WEIGHTS: the store was filled with {stored}, this model is {now}")
    for name, (stored, now) in differences.items():
        say(f"{name}: {stored} when it was filled, {now} now")
    if report.samples:
        print_table(
            ("farthest", "relative L2", "max abs", "cosine distance"),
            [
                (
                    s.sample_id,
                    f"{s.relative_l2:.1e}",
                    f"{s.max_abs:.1e}",
                    f"{s.cosine:.1e}",
                )
                for s in report.samples[:_FEW]
            ],
        )
    for what, found in (("skipped", report.skipped), ("FAILED", report.failed)):
        lines = [f"{what}: {sample_id}: {reason}" for sample_id, reason in found.items()]
        say_some(lines, what=what)
    verdict = f"{len(report.drifted)} of {counted(len(report.samples), 'embedding')} DRIFTED"
    if report.is_sound:
        verdict = f"{counted(len(report.samples), 'embedding')} compared, all as stored"
    elif not report.samples:
        verdict = "NOTHING compared: no file is known to be the one that was embedded"
    elif not report.drifted:
        verdict = f"{len(report.failed)} clips give no embedding any more"
    say(f"{title_of(report.store)}: {verdict} (tolerance {report.tolerance:.0e})")
