"""`lmdbcache import` and `export`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import click

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.command import Argument, Option
from lmdbcache.cli.config_choice import GivenConfig
from lmdbcache.cli.console import counted, finish, print_table, progress_bar, say, say_some
from lmdbcache.cli.merge import print_conflicts, print_unresolved
from lmdbcache.cli.options import (
    Classes,
    IdsFile,
    Json,
    OnDuplicateChoice,
    Progress,
    Root,
    Store,
    digits_of,
    fields_of,
    find_folder,
    ids_in,
    stored_config,
)
from lmdbcache.cli.wording import in_options
from lmdbcache.datasets import CLASS_LABELS, NAMESPACE
from lmdbcache.exchange import (
    FORMATS,
    ExportReport,
    ImportReport,
    KeyChoice,
    Refusal,
    Source,
    export_embeddings,
    import_embeddings,
    missing_fields,
    open_source,
)
from lmdbcache.files import readable_size
from lmdbcache.storage import split_sample_id

_TYPES: dict[str, type] = {"sample_rate": int, "duration": float}


def import_command(
    source: Annotated[
        Path,
        Argument(help="A .pt, .safetensors, .npz, .parquet or .tar file, or a folder of files."),
    ],
    given: GivenConfig,
    context: click.Context,
    *,
    root: Root = None,
    class_name: Annotated[
        str | None,
        Option("--class", help="Class of names that have none.", show_default=False),
    ] = None,
    keys: Annotated[
        str, Option(help="Order in names: auto, file_id:class or class:file_id.")
    ] = "auto",
    on_duplicate: Annotated[
        OnDuplicateChoice,
        Option(
            help="If a stored embedding differs: error leaves it and reports the conflict, skip "
            "keeps it, overwrite takes the file's."
        ),
    ] = OnDuplicateChoice.ERROR,
    ragged: Annotated[bool, Option("--ragged", help="The first dimension may differ.")] = False,
    squeeze: Annotated[
        bool, Option("--squeeze", help="Take off the leading dimension of a batch of one.")
    ] = False,
    ignore_metadata: Annotated[
        bool,
        Option("--ignore-metadata", help="Take these options, whatever the file says."),
    ] = False,
    weights_digest: Annotated[
        str | None,
        Option(
            help="Digest of the weights that computed them, as `info` shows it.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Read and check everything, store nothing.")
    ] = False,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Bring embeddings of other tools' files into a store, and compare them with the source.

    A stopped import continues where it was when you run it again. Exit code 1 if something of the
    source isn't in the store, 3 if the disk is full.
    """
    opened = open_source(source, KeyChoice(keys, class_name))  # type: ignore[arg-type]
    model = given.described()
    cache = EmbeddingCache(root)
    fields = given.fields(cache, model)
    if opened.entries and not ignore_metadata and not as_json and sys.stdin.isatty():
        fields |= _asked(opened, fields)
    if "namespace" not in fields and "namespace" not in opened.description.facts:
        fields["namespace"] = _namespace_of(opened)
    label = f"checking {source.name}" if dry_run else f"importing {source.name}"
    with progress_bar(label, shown=progress) as report_progress:
        report = import_embeddings(
            cache,
            fields,
            opened,
            on_duplicate=on_duplicate.value,
            ragged=ragged,
            squeeze=squeeze,
            ignore_metadata=ignore_metadata,
            weights_digest=weights_digest,
            model=model,
            dry_run=dry_run,
            progress=report_progress,
        )
    finish(report, partial(_print_report, context), as_json=as_json)


def _asked(source: Source, given: dict[str, Any]) -> dict[str, Any]:
    """What neither the file nor an option says, asked for."""
    missing = missing_fields(source.description, given)
    if missing:
        say(f"{source.path.name} doesn't say {', '.join(missing)}")
    return {name: click.prompt(name, type=_TYPES.get(name, str)) for name in missing}


def _namespace_of(source: Source) -> str:
    classes = {split_sample_id(sample_id)[1] for sample_id in source.entries}
    if classes and classes <= set(CLASS_LABELS):
        source.notes.append(
            f"all classes are those of VEGAS: stored for the dataset {NAMESPACE!r}, where "
            "VEGASDataset and `extract` find them; --namespace says another"
        )
        return NAMESPACE
    others = ", ".join(sorted(classes - set(CLASS_LABELS))[:3])
    why = f"not all classes are VEGAS's ({others}): " if classes & set(CLASS_LABELS) else ""
    source.notes.append(f"{why}stored for no dataset in particular; --namespace names one")
    return ""


def _print_report(context: click.Context, report: ImportReport) -> None:
    found = f"{report.source} ({report.kind})"
    if failure := _failure(report):
        say(f"{found}: {in_options(failure, context.command.params)}")
    else:
        say(f"{found}: {sum(report.classes.values())} usable embeddings")
    if report.classes:
        _print_facts(report)
    for note in report.notes:
        say(f"note: {in_options(note, context.command.params)}")
    lines = [f"not imported: {refusal}" for refusal in _each_reason_first(report.refused)]
    say_some([in_options(line, context.command.params) for line in lines])
    print_conflicts(report)
    checked = "nothing was stored" if report.is_dry_run else "read back and compared bit for bit"
    say(f"{report}; {readable_size(report.num_bytes)}; {checked}")
    if report.path.exists():
        say(str(report.path))
    print_unresolved(report)


def _each_reason_first(refused: Iterable[Refusal]) -> list[Refusal]:
    """Only the first lines are printed: a chunk of hundreds must not hide another reason."""
    seen: Counter[str] = Counter()
    ranked = []
    for refusal in refused:
        ranked.append((seen[refusal.reason], refusal))
        seen[refusal.reason] += 1
    return [refusal for _, refusal in sorted(ranked, key=itemgetter(0))]


def _failure(report: ImportReport) -> str:
    """Why nothing of the source is in the store, where that is a failure."""
    is_taken = report.conflicts and report.on_duplicate == "overwrite"
    if report.num_new or report.num_same or is_taken or not report.exit_code:
        return ""
    if report.refused:
        number = len(report.refused)
        return f"nothing is imported: {number} refused, the first is {report.refused[0]}"
    return (
        f"nothing is imported: {len(report.conflicts)} in conflict, the first is "
        f"{report.conflicts[0].sample_id}; `on_duplicate` says which are kept"
    )


def _print_facts(report: ImportReport) -> None:
    shape = report.embedding_shape
    print_table(("class", "embeddings"), report.classes.items())
    say("")
    facts: dict[str, object] = {
        **fields_of(report.config),
        "embedding_shape": shape if shape is not None else "not known",
        "in the source": ", ".join(report.dtypes),
        "fingerprint": report.config.fingerprint,
    }
    rows = [(name, value) for name, value in facts.items() if value != ""]
    print_table(("field", "value"), rows, num_text_columns=2)


def export_command(
    store: Store,
    *,
    out: Annotated[
        str,
        Option(
            help="A file; for safetensors, parquet and webdataset also a folder of shards; for "
            "these and lance also a URL.",
            show_default=False,
        ),
    ],
    format_: Annotated[
        str,
        Option("--format", help=f"One of {', '.join(FORMATS)}.", show_default=False),
    ],
    root: Root = None,
    classes: Classes = None,
    ids: IdsFile = None,
    shard_size: Annotated[int, Option(help="MiB of embeddings in one shard.", min=1)] = 128,
    num_shards: Annotated[
        int | None,
        Option(help="So many shards instead, of the same size.", show_default=False),
    ] = None,
    shuffle: Annotated[
        int | None,
        Option(help="Random order, by this seed.", metavar="SEED", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace what an earlier export has left there.")
    ] = False,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Write the embeddings of a store to files that other tools and `import` read.

    Nothing is replaced without --overwrite. Exit code 3 if the disk is full.
    """
    cache = EmbeddingCache(root)
    folder = find_folder(cache, store)
    with progress_bar(f"exporting {digits_of(folder)}", shown=progress) as report_progress:
        report = export_embeddings(
            cache,
            stored_config(folder),
            out,
            format=format_,  # type: ignore[arg-type]
            classes=classes,
            sample_ids=ids_in(ids),
            overwrite=overwrite,
            shard_bytes=shard_size << 20,
            num_shards=num_shards,
            shuffle=shuffle,
            progress=report_progress,
        )
    finish(report, _print_export, as_json=as_json)


def _print_export(report: ExportReport) -> None:
    say(
        f"{counted(report.num_embeddings, 'embedding')} in {counted(report.num_files, 'file')}, "
        f"{readable_size(report.num_bytes)}: {report.path}"
    )
