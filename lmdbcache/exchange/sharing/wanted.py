"""Which samples of a shared state a store lacks, and which shards to fetch for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lmdbcache.errors import ConfigError
from lmdbcache.exchange.sharing.history import History, Offer
from lmdbcache.files import few
from lmdbcache.storage import canonical_class, canonical_sample_id, split_sample_id

__all__ = ["Plan", "Selection", "Wanted", "alternatives", "make_plan"]

# (sample id, checksum that is stored here, checksum that is shared) → whether to leave it at that.
IsSettled = Callable[[str, bytes, bytes], bool]


class Wanted(NamedTuple):
    """A shard to fetch.

    Args:
        offer: The shard, and who has pushed it.
        rows: Positions in the shard of the samples to bring in.
    """

    offer: Offer
    rows: tuple[int, ...]

    @property
    def versions(self) -> list[tuple[str, bytes]]:
        """Sample id and checksum of each row."""
        entry = self.offer.entry
        return [(entry.sample_ids[row], entry.checksums[row]) for row in self.rows]


class Selection:
    """Some samples, or all.

    Args:
        classes: Only samples of these.
        sample_ids: Only these.

    Raises:
        InvalidSampleIdError: One is none.
    """

    def __init__(
        self, classes: Iterable[str] | None = None, sample_ids: Iterable[str] | None = None
    ) -> None:
        self.classes = None if classes is None else frozenset(map(canonical_class, classes))
        self.sample_ids = (
            None if sample_ids is None else frozenset(map(canonical_sample_id, sample_ids))
        )

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self.classes is None and self.sample_ids is None

    def __contains__(self, sample_id: str) -> bool:
        if self.sample_ids is not None and sample_id not in self.sample_ids:
            return False
        return self.classes is None or split_sample_id(sample_id)[1] in self.classes


@dataclass
class Plan:
    """What a pull has to fetch.

    Args:
        shards: In the order to import them.
        num_samples: Samples that are shared and asked for.
        num_present: Of these, stored with the same bytes.
        num_settled: Of these, shared with other bytes, too, which an earlier pull has compared.
        absent: Sample ids that are asked for and that nobody shares, sorted.
        present: Sample ids of `num_present`.
        settled: Sample ids of `num_settled`.
    """

    shards: list[Wanted] = field(default_factory=list)
    num_samples: int = 0
    num_present: int = 0
    num_settled: int = 0
    absent: list[str] = field(default_factory=list)
    present: set[str] = field(default_factory=set)
    settled: set[str] = field(default_factory=set)


def make_plan(
    history: History,
    stored: Mapping[str, bytes],
    selection: Selection,
    is_settled: IsSettled,
    *,
    newest_wins: bool = False,
) -> Plan:
    """What to fetch so that all that is asked for is compared with what is stored.

    Args:
        history: The state.
        stored: Sample id → checksum of what is stored.
        selection: What is asked for.
        is_settled: Tells what an earlier pull has compared.
        newest_wins: Of several values of one sample that is stored, look at the last alone: what
            takes the others' side must not go to and fro between two of them.

    Raises:
        ConfigError: A class that nobody shares a sample of.
    """
    offers = history.offers()
    last = _last_versions(offers) if newest_wins else {}
    plan = Plan()
    asked: set[str] = set()
    present: set[str] = set()
    settled: set[str] = set()
    taken: set[tuple[str, bytes]] = set()
    for offer in offers:
        rows = []
        for row in offer.rows:
            sample_id, checksum = offer.entry.sample_ids[row], offer.entry.checksums[row]
            if sample_id not in selection:
                continue
            asked.add(sample_id)
            ours = stored.get(sample_id)
            if ours == checksum:
                present.add(sample_id)
            elif ours is not None and last.get(sample_id, checksum) != checksum:
                continue
            elif ours is not None and is_settled(sample_id, ours, checksum):
                settled.add(sample_id)
            elif (sample_id, checksum) not in taken:
                taken.add((sample_id, checksum))
                rows.append(row)
        if rows:
            plan.shards.append(Wanted(offer, tuple(rows)))
    _check_classes(offers, selection)
    plan.num_samples, plan.num_present = len(asked), len(present)
    plan.num_settled = len(settled)
    plan.present, plan.settled = present, settled
    plan.absent = sorted((selection.sample_ids or frozenset()) - asked)
    return plan


def alternatives(
    history: History, missed: Iterable[tuple[str, bytes]], tried: Iterable[str]
) -> tuple[list[Wanted], set[tuple[str, bytes]]]:
    """Other shards that hold what a damaged one was to bring.

    Args:
        history: The state.
        missed: Sample ids and checksums.
        tried: Digests of shards that are no use.

    Returns:
        The shards, and what none of them has.
    """
    left, found, tried = set(missed), [], set(tried)
    for offer in history.offers():
        if not left or offer.entry.sha256 in tried:
            continue
        entry = offer.entry
        rows = tuple(
            row for row in offer.rows if (entry.sample_ids[row], entry.checksums[row]) in left
        )
        if rows:
            found.append(Wanted(offer, rows))
            left.difference_update(found[-1].versions)
    return found, left


def _last_versions(offers: Iterable[Offer]) -> dict[str, bytes]:
    return {
        offer.entry.sample_ids[row]: offer.entry.checksums[row]
        for offer in offers
        for row in offer.rows
    }


def _check_classes(offers: Iterable[Offer], selection: Selection) -> None:
    if selection.classes is None:
        return
    there = {
        split_sample_id(offer.entry.sample_ids[row])[1] for offer in offers for row in offer.rows
    }
    if unknown := sorted(selection.classes - there):
        raise ConfigError(
            f"class {', '.join(unknown)}: nobody shares a sample of it; there: {few(sorted(there))}"
        )
