"""The model's forward passes in one run: groups of equal shape, and a look at the first batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch

from lmdbcache.cache import ClipFailure
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import Embedder, FirstBatches, num_repeats, tolerance_of
from lmdbcache.errors import CacheError, ConfigError, ExtractionError, ModuleError
from lmdbcache.extraction.decoding import FeatureBatch
from lmdbcache.files import first_line

_Rows = dict[int, torch.Tensor]
_Errors = dict[int, Exception]
_EmbedOutputs = Callable[..., Mapping[str, torch.Tensor]]
_Groups = list[tuple[list[int], torch.Tensor]]


class ForwardPasses:
    """An embedder and what is known of its outputs in this run.

    Args:
        embedder: The model.
        config: What its embeddings are stored under; of `output` and `dtype` any.
        outputs: Those that will be asked for; of several the embedder has to give all by one pass.
        shapes: Output → the shape that every embedding has to have; any, where it isn't stated.
        is_proven: Whether a store has embeddings of this model. Then, as where the shape is stated,
            a first unit whose clips all fail doesn't end the run.

    Raises:
        ConfigError: The embedder gives one output only.
    """

    def __init__(
        self,
        embedder: Embedder,
        config: CacheConfig,
        outputs: Collection[str],
        shapes: Mapping[str, tuple[int, ...] | None],
        *,
        is_proven: bool = False,
    ) -> None:
        self.embedder: Final = embedder
        shared = _SharedPass(embedder, config.model_name, outputs)
        self._shared = shared
        self._outputs = {
            output: _OutputPasses(
                shared, config.replace(output=output), shapes.get(output), is_proven=is_proven
            )
            for output in outputs
        }

    def embed(
        self, unit: FeatureBatch, sample_ids: Sequence[str], outputs: Collection[str]
    ) -> dict[str, tuple[FeatureBatch, list[torch.Tensor]]]:
        """Embed clips of a unit: those whose features have one shape and dtype in one forward pass.

        Args:
            unit: The features.
            sample_ids: Which of its clips are embedded together.
            outputs: What is wanted of the model.

        Returns:
            For each output the clips that have an embedding, with those that the model fails on in
            `failures`, without a path; and the embeddings in the same order.

        Raises:
            ExtractionError: Too little memory on the device, or another number of embeddings than
                clips.
            ModuleError: The model fails on all clips of the first unit.
            InvalidEmbeddingError: In the first batches: the model answers differently, or gives
                different clips the same embedding.
        """
        groups = unit.only(sample_ids).groups()
        self._shared.begin(outputs)
        found = {}
        for output in outputs:
            batch = unit.only(sample_ids)
            found[output] = batch, self._outputs[output].embed(batch, groups)
        self._shared.begin(())
        return found


class _SharedPass:
    """The forward passes of a unit; each is made once for all outputs that are wanted.

    Args:
        embedder: The model.
        name: Its name in messages.
        outputs: All that will be wanted.

    Raises:
        ConfigError: The embedder gives one output only.
    """

    def __init__(self, embedder: Embedder, name: str, outputs: Collection[str]) -> None:
        self.embedder = embedder
        self._name = name
        self._is_single = len(outputs) == 1
        self._wanted: Collection[str] = ()
        # What is computed and not yet taken, by the pass.
        self._found: dict[Hashable, dict[str, torch.Tensor]] = {}
        check_gives(embedder, name, outputs)

    def begin(self, outputs: Collection[str]) -> None:
        """Forget the last unit; these outputs are wanted of the next."""
        self._wanted = outputs
        self._found.clear()

    def __call__(
        self,
        features: torch.Tensor,
        num_valid: list[int] | None,
        output: str,
        key: Hashable | None = None,
    ) -> torch.Tensor:
        """Return an output of a batch.

        Args:
            features: The batch.
            num_valid: How many samples of each clip aren't padding, where that is known.
            output: Its name.
            key: Equal for equal features of this unit; None for what only this output asks for.

        Raises:
            ExtractionError: Too little memory on the device, or another number of embeddings than
                clips.
        """
        with _memory_errors(len(features)):
            found = self._computed(features, num_valid, output, key)
        if len(found) != len(features):
            raise ExtractionError(
                f"{self._name} returned {len(found)} embeddings for {len(features)} "
                "clips; the first dimension of what it returns has to be the batch"
            )
        return found

    def _computed(
        self,
        features: torch.Tensor,
        num_valid: list[int] | None,
        output: str,
        key: Hashable | None,
    ) -> torch.Tensor:
        if self._is_single:
            return embed_clips(self.embedder, features, num_valid)
        embed_outputs: _EmbedOutputs = self.embedder.embed_outputs  # type: ignore[attr-defined]
        if hasattr(self.embedder, "takes_num_valid"):
            embed_outputs = partial(embed_outputs, num_valid=num_valid)
        if key is not None and key not in self._found:
            try:
                self._found[key] = dict(embed_outputs(features, self._wanted))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # noqa: BLE001 - the outputs one by one show which of them fails
                self._found[key] = {}
        shared = self._found.get(key, {})
        return shared.pop(output) if output in shared else embed_outputs(features, [output])[output]


class _OutputPasses:
    """One output of the model, and what is known of it in this run.

    Args:
        forward: Computes an output of a batch.
        config: What the embeddings are stored under; of any dtype.
        shape: See `ForwardPasses`.
        is_proven: See `ForwardPasses`.
    """

    def __init__(
        self,
        forward: _SharedPass,
        config: CacheConfig,
        shape: tuple[int, ...] | None,
        *,
        is_proven: bool,
    ) -> None:
        self._forward = forward
        self._config = config
        self._shape = shape
        self._is_proven = is_proven or shape is not None
        self._feature_shape: torch.Size | None = None  # of the first that were embedded
        self._is_first = True
        self._first_batches = FirstBatches()

    def embed(self, batch: FeatureBatch, groups: _Groups) -> list[torch.Tensor]:
        """Embed a batch; clips that the model fails on move to its `failures`.

        Raises:
            ExtractionError, ModuleError, InvalidEmbeddingError: See `ForwardPasses.embed`.
        """
        rows: _Rows = {}
        errors: _Errors = {}
        for number, (positions, features) in enumerate(groups):
            varies = len(groups) > 1 or self._feature_shape not in (None, features.shape[1:])
            num_valid = batch.num_valid(positions)
            good, bad = self._embed_group(features, num_valid, number, varies=varies)
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

    def _embed_group(
        self,
        features: torch.Tensor,
        num_valid: list[int] | None,
        number: int | None,
        *,
        varies: bool,
    ) -> tuple[_Rows, _Errors]:
        """Embeddings by row, and errors of the rows without one."""
        output = self._config.output
        try:
            return dict(enumerate(self._forward(features, num_valid, output, number))), {}
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
            own = None if num_valid is None else num_valid[row : row + 1]
            embedded, failed = self._embed_group(features[row : row + 1], own, None, varies=varies)
            good.update((row, one) for one in embedded.values())
            bad.update((row, one) for one in failed.values())
        return good, bad

    def _refuse_other_shapes(self, rows: _Rows, errors: _Errors) -> None:
        for position in [p for p, row in rows.items() if tuple(row.shape) != self._shape]:
            if self._shape is not None:
                found = tuple(rows.pop(position).shape)
                errors[position] = ModuleError(
                    f"an embedding of shape {found}, where a clip of {self._config.duration} s "
                    f"gives {self._shape}; a store holds embeddings of one shape: pool over time"
                )

    def _reason(self, groups: _Groups, position: int, error: Exception) -> str:
        shape = next(tuple(one.shape[1:]) for places, one in groups if position in places)
        said = str(error) if isinstance(error, CacheError) else first_line(error)
        return f"features of shape {shape} by the front end {self._config.front_end}: {said}"

    def _look(self, batch: FeatureBatch, groups: _Groups, rows: _Rows) -> None:
        """Look at the first clips that sound different, and at the first forward passes."""
        model = self._config.model_name
        audio = {position: batch.audio.get(batch.sample_ids[position]) for position in rows}
        heard = {one: rows[position] for position, one in audio.items() if one is not None}
        self._first_batches.compare(heard, model)
        number = max(range(len(groups)), key=lambda one: len(groups[one][0]))
        positions, features = groups[number]
        repeats = num_repeats(next(iter(rows.values())))
        together = [position for position in positions if position in rows]
        if len(together) < len(positions):
            together = together[-1:]  # embedded one by one, as some fail
        self._first_batches.repeat(
            {position: rows[position] for position in together},
            [position for position, one in audio.items() if one is None],
            lambda position: self._repeated(
                features,
                batch.num_valid([position]),
                (number, positions.index(position)),
                repeats,
            ),
            tolerance_of(
                getattr(self._forward.embedder, "module", None), self._config.compute_dtype
            ),
            model,
        )

    def _repeated(
        self,
        features: torch.Tensor,
        num_valid: list[int] | None,
        place: tuple[int, int],
        repeats: int,
    ) -> torch.Tensor:
        """Embeddings of one clip, as often as a batch can have it or at least so many times.

        Args:
            features: Of its group.
            num_valid: How many samples of the clip aren't padding.
            place: The number of the group, and the row in it.
            repeats: How often at least.
        """
        copies = min(repeats, len(features))
        batch = torch.cat([features[place[1]][None]] * copies)
        counts = None if num_valid is None else num_valid * copies
        keys = [(*place, copies, time) for time in range(-(-repeats // copies))]
        return torch.cat([self._forward(batch, counts, self._config.output, key) for key in keys])


def embed_clips(
    embedder: Embedder, features: torch.Tensor, num_valid: list[int] | None
) -> torch.Tensor:
    """Embed a batch; an embedder with `takes_num_valid` gets the lengths of the clips."""
    if num_valid is None or not getattr(embedder, "takes_num_valid", False):
        return embedder.embed(features)
    found: torch.Tensor = embedder.embed(features, num_valid=num_valid)  # type: ignore[call-arg]
    return found


def check_gives(embedder: Embedder, name: str, outputs: Collection[str]) -> None:
    """Check that an embedder gives these outputs by one forward pass.

    Args:
        embedder: The model.
        name: Its name in the message.
        outputs: What is wanted.

    Raises:
        ConfigError: It gives one output only.
    """
    if len(outputs) > 1 and not hasattr(embedder, "embed_outputs"):
        raise ConfigError(
            f"output: {', '.join(outputs)}: the embedder of {name} has no `embed_outputs`, so "
            "one pass gives one output; extract each in a separate call"
        )


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
