"""The model's forward passes in one run: groups of equal shape, and a look at the first batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from lmdbcache.cache import ClipFailure
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import NUM_REPEATS, Embedder, FirstBatches, first_line, tolerance_of
from lmdbcache.errors import CacheError, ExtractionError, ModuleError
from lmdbcache.extraction.decoding import FeatureBatch

__all__ = ["ForwardPasses"]

_Rows = dict[int, torch.Tensor]
_Errors = dict[int, Exception]


class ForwardPasses:
    """An embedder and what is known of it in this run.

    Args:
        embedder: The model.
        config: What its embeddings are stored under.
        shape: That every embedding has to have; None takes any.
        is_proven: Whether the store has embeddings of this model. Then, as where `shape` is known,
            a first unit whose clips all fail doesn't end the run.
    """

    def __init__(
        self,
        embedder: Embedder,
        config: CacheConfig,
        shape: tuple[int, ...] | None = None,
        *,
        is_proven: bool = False,
    ) -> None:
        self.embedder: Final = embedder
        self._config = config
        self._shape = shape
        self._is_proven = is_proven or shape is not None
        self._feature_shape: torch.Size | None = None  # of the first that were embedded
        self._is_first = True
        self._first_batches = FirstBatches()

    def embed(self, batch: FeatureBatch) -> list[torch.Tensor]:
        """Embed a unit: clips whose features have one shape and dtype in one forward pass.

        Clips that the model fails on move to the batch's `failures`, without a path.

        Returns:
            The embeddings of `batch.sample_ids`, in order.

        Raises:
            ExtractionError: Too little memory on the device, or another number of embeddings than
                clips.
            ModuleError: The model fails on all clips of the first unit.
            InvalidEmbeddingError: In the first batches: the model answers differently, or gives
                different clips the same embedding.
        """
        groups = batch.groups()
        rows: _Rows = {}
        errors: _Errors = {}
        for positions, features in groups:
            varies = len(groups) > 1 or self._feature_shape not in (None, features.shape[1:])
            good, bad = self._embed_group(features, varies=varies)
            rows.update((positions[row], one) for row, one in good.items())
            errors.update((positions[row], one) for row, one in bad.items())
            if good and self._feature_shape is None:
                self._feature_shape = features.shape[1:]
        self._refuse_other_shapes(rows, errors)
        reasons = {
            position: self._reason(groups, position, error) for position, error in errors.items()
        }
        if not rows and self._is_first and not self._is_proven:
            position = min(reasons)
            raise ModuleError(f"{batch.sample_ids[position]}: {reasons[position]}") from errors[
                position
            ]
        if rows and not self._first_batches.are_enough:
            self._look(batch, groups, rows)
        self._is_first &= not rows
        kept = sorted(rows)
        batch.failures += [
            ClipFailure(batch.sample_ids[position], "", reasons[position])
            for position in sorted(reasons)
        ]
        batch.sample_ids = [batch.sample_ids[position] for position in kept]
        return [rows[position] for position in kept]

    def _embed_group(self, features: torch.Tensor, *, varies: bool) -> tuple[_Rows, _Errors]:
        """Embeddings by row, and errors of the rows without one."""
        try:
            return dict(enumerate(self._forward(features))), {}
        except ModuleError as error:
            failure: Exception = error
        except CacheError:
            raise
        except Exception as error:
            if not varies:  # a bug in an embedder comes out as it is
                raise
            failure = error
        if len(features) == 1:
            return {}, {0: failure}
        good: _Rows = {}
        bad: _Errors = {}
        for row in range(len(features)):  # the culprit is named, the others are kept
            embedded, failed = self._embed_group(features[row : row + 1], varies=varies)
            good.update((row, one) for one in embedded.values())
            bad.update((row, one) for one in failed.values())
        return good, bad

    def _forward(self, features: torch.Tensor) -> torch.Tensor:
        with _memory_errors(len(features)):
            found = self.embedder.embed(features)
        if len(found) != len(features):
            raise ExtractionError(
                f"{self._config.model_name} returned {len(found)} embeddings for {len(features)} "
                "clips; the first dimension of what it returns has to be the batch"
            )
        return found

    def _refuse_other_shapes(self, rows: _Rows, errors: _Errors) -> None:
        for position in [p for p, row in rows.items() if tuple(row.shape) != self._shape]:
            if self._shape is not None:
                found = tuple(rows.pop(position).shape)
                errors[position] = ModuleError(
                    f"an embedding of shape {found}, where a clip of {self._config.duration} s "
                    f"gives {self._shape}; a store holds embeddings of one shape: pool over time"
                )

    def _reason(
        self, groups: list[tuple[list[int], torch.Tensor]], position: int, error: Exception
    ) -> str:
        shape = next(tuple(one.shape[1:]) for places, one in groups if position in places)
        said = str(error) if isinstance(error, CacheError) else first_line(error)
        return f"features of shape {shape} by the front end {self._config.front_end}: {said}"

    def _look(
        self, batch: FeatureBatch, groups: list[tuple[list[int], torch.Tensor]], rows: _Rows
    ) -> None:
        """Look at the first clips that sound different, and at the first forward passes."""
        model = self._config.model_name
        audio = {position: batch.audio.get(batch.sample_ids[position]) for position in rows}
        heard = {one: rows[position] for position, one in audio.items() if one is not None}
        self._first_batches.compare(heard, model)
        positions, features = max(groups, key=lambda group: len(group[0]))
        copies = min(NUM_REPEATS, len(positions))
        together = [position for position in positions if position in rows]
        if len(together) < len(positions):
            together = together[-1:]  # embedded one by one, as some fail
        self._first_batches.repeat(
            {position: rows[position] for position in together},
            [position for position, one in audio.items() if one is None],
            lambda position: self._repeated(features[positions.index(position)][None], copies),
            tolerance_of(getattr(self.embedder, "module", None), self._config.compute_dtype),
            model,
        )

    def _repeated(self, features: torch.Tensor, copies: int) -> torch.Tensor:
        """Embeddings of one clip, as often as a batch can have it or at least so many times."""
        batch = torch.cat([features] * copies)
        return torch.cat([self._forward(batch) for _ in range(-(-NUM_REPEATS // copies))])


@contextmanager
def _memory_errors(batch_size: int) -> Iterator[None]:
    """Around a forward pass: too little memory on the device is an error of ours.

    Args:
        batch_size: Clips of the batch.

    Raises:
        ExtractionError: Says what to do.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ExtractionError(
            f"the device has too little memory for a batch of {batch_size} clips "
            f"({str(error).splitlines()[0]}). What was computed is kept; run again with a smaller "
            "`batch_size`"
        ) from error
