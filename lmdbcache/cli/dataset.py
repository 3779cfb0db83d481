"""`lmdbcache dataset` and `partition`: what is in a folder, and who gets what of it."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Final

import click

from lmdbcache.cache import left_out_counts
from lmdbcache.cli.command import Option
from lmdbcache.cli.console import print_json, print_table, say
from lmdbcache.cli.dataset_choice import DatasetChoice
from lmdbcache.cli.options import Json
from lmdbcache.datasets import LeftOut, Sample, overlap_audit, split_names, split_source

_MOST_GROUPS: Final = 20


def dataset_command(
    dataset: DatasetChoice,
    *,
    list_left_out: Annotated[
        bool, Option("--left-out", help="List the files and rows that are left out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a folder is taken for: layout, namespace, classes, splits, what is left out."""
    samples, opened = dataset.narrowing.of(dataset.opened), dataset.opened
    classes = Counter(sample["class_name"] for sample in samples)
    left_out = dataset.left_out
    facts: dict[str, Any] = {
        "dataset": getattr(opened, "kind", type(opened).__name__),
        "namespace": opened.namespace,
        "root": str(getattr(opened, "root", dataset.data_dir)),
        "clips": len(samples),
        "left_out": len(left_out),
        "splits_from": split_source(opened.samples, dataset.split_by),
        "splits": _split_sizes(samples, dataset),
        "folds": dict(sorted(Counter(s["fold"] for s in samples if "fold" in s).items())),
    }
    if as_json:
        found = [item.to_dict() for item in left_out]
        counts = left_out_counts(left_out)
        labels = {name: opened.class_labels[name] for name in sorted(classes)}
        shown = {"left_out": found, "left_out_counts": counts}
        print_json({**facts, "classes": dict(classes), "labels": labels, **shown})
        return
    for name in ("splits", "folds"):
        facts[name] = ", ".join(f"{part}: {size}" for part, size in facts[name].items())
    facts = {"layout": facts.pop("dataset"), **facts}
    rows = [(name.replace("_", " "), value) for name, value in facts.items() if value != ""]
    print_table(("field", "value"), rows, num_text_columns=2)
    say("")
    print_table(
        ("class", "label", "clips"),
        [(name, opened.class_labels[name], count) for name, count in sorted(classes.items())],
    )
    _print_left_out(left_out)
    if list_left_out:
        for item in left_out:
            say(f"left out: {item.name}: {item.reason}")


def _print_left_out(left_out: list[LeftOut]) -> None:
    """How many files and rows of each kind, class and suffix are left out."""
    if not left_out:
        return
    groups = Counter((item.kind, item.class_name, item.suffix) for item in left_out).most_common()
    say("")
    print_table(
        ("left out", "class", "suffix", "number"),
        [(*group, number) for group, number in groups[:_MOST_GROUPS]],
        num_text_columns=3,
    )
    if len(groups) > _MOST_GROUPS:
        rest = sum(number for _, number in groups[_MOST_GROUPS:])
        say(f"… and {rest} more of other kinds, classes and suffixes; see --json")


def partition_command(
    dataset: DatasetChoice,
    *,
    by_content: Annotated[
        bool,
        Option("--content", help="Also compare the bytes of all files; reads them."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how a dataset is divided between nodes, and whether they share clips.

    Each node's samples are those that `extract --num-nodes N --node-split-id K` takes with the
    same options; with --node-split-id only that node is shown. Exit code 1 if two nodes, or two
    splits, share a clip.
    """
    whole, chosen = dataset.opened.samples, dataset.node_split_id
    nodes = dict(enumerate(dataset.narrowing.nodes_of(dataset.opened)))
    num_nodes = len(nodes)
    if chosen is not None:
        nodes = {chosen: nodes[chosen]}
    names = split_names(whole, dataset.split_by)
    parts = {}
    for number, samples in nodes.items():
        for split in names or ("all",):
            part = dataset.split_of(samples, split, number)
            parts[f"node {number} {split}".removesuffix(" all")] = part
    audit = overlap_audit(parts, by_content=by_content)
    counts = [Counter(sample["class_name"] for sample in samples) for samples in nodes.values()]
    classes = sorted(set().union(*counts))
    if as_json:
        print_json(
            {
                "namespace": dataset.namespace,
                "num_nodes": num_nodes,
                "nodes": [
                    {"samples": len(samples), "classes": dict(sorted(count.items()))}
                    for samples, count in zip(nodes.values(), counts, strict=True)
                ],
                "audit": audit.to_dict(),
            }
        )
    else:
        print_table(
            ("class", *(f"node {number}" for number in nodes), "sum"),
            [
                *(
                    (name, *(count[name] for count in counts), sum(c[name] for c in counts))
                    for name in classes
                ),
                ("all", *map(len, nodes.values()), sum(map(len, nodes.values()))),
            ],
        )
        say("")
        print_table(("part", "clips"), list(audit.sizes.items()))
        say(str(audit))
    raise click.exceptions.Exit(0 if audit.is_disjoint else 1)


def _split_sizes(samples: list[Sample], dataset: DatasetChoice) -> dict[str, int]:
    return {
        name: len(dataset.split_of(samples, name, dataset.node_split_id))
        for name in split_names(dataset.opened.samples, dataset.split_by)
    }
