"""Views of stored hidden states: CLS, pooled output, mean, valid frames; nothing is recomputed.

Only the bytes that a view needs are read: one row of 3 KB for CLS, where the whole is 3.7 MB.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.cache.records import clip_lengths
from lmdbcache.config import CacheConfig, is_published_ast
from lmdbcache.errors import ConfigError
from lmdbcache.storage import (
    EmbeddingReader,
    MappedFile,
    Nearest as Nearest,
    Positions,
    RowPart,
    Selection,
    decoded,
    nearest as nearest,
    stored_form,
    value_bytes,
)

_AST_FRONT_END: Final = "ast-fbank/1"
_BLOCK_ROWS: Final = 32


@dataclass(frozen=True)
class TokenLayout:
    """The meaning of the rows of a model's hidden states.

    Special tokens come first. The others are steps of time, `tokens_per_step` each; where
    that is more than one, all steps of the first frequency band come first, then those of the
    second (the order of a flattened convolution over frequency and time, as in AST).

    Args:
        special_tokens: Names of the tokens in front, in order; each is a view.
        pooled_tokens: How many of these have the pooled output as their mean; 0 if it is anything
            else, such as the result of a further layer.
        tokens_per_step: Tokens of one step of time.
        frames_per_step: Feature frames from one step to the next.
        frames_per_token: Feature frames that a token sees.
        hop_milliseconds: From one feature frame to the next.
        window_milliseconds: What a feature frame sees of the waveform.
    """

    special_tokens: tuple[str, ...] = ()
    pooled_tokens: int = 0
    tokens_per_step: int = 1
    frames_per_step: int = 1
    frames_per_token: int = 1
    hop_milliseconds: float = 10.0
    window_milliseconds: float = 25.0

    @classmethod
    def ast(
        cls,
        *,
        patch_size: int = 16,
        frequency_stride: int = 10,
        time_stride: int = 10,
        num_mel_bins: int = 128,
    ) -> TokenLayout:
        """Return the Audio Spectrogram Transformer's: CLS, distillation, 12 bands of 101 steps.

        The arguments are those of transformers' `ASTConfig`; the defaults are as published.
        """
        return cls(
            special_tokens=("cls", "distillation"),
            pooled_tokens=2,
            tokens_per_step=(num_mel_bins - patch_size) // frequency_stride + 1,
            frames_per_step=time_stride,
            frames_per_token=patch_size,
        )

    @property
    def num_special_tokens(self) -> int:
        """Number of special tokens."""
        return len(self.special_tokens)

    def num_steps(self, num_tokens: int) -> int:
        """Return the steps of time among so many tokens.

        Raises:
            ConfigError: No whole number of steps.
        """
        steps, rest = divmod(num_tokens - self.num_special_tokens, self.tokens_per_step)
        if rest or steps < 1:
            raise ConfigError(
                f"layout: {num_tokens} tokens are stored, which aren't {self.num_special_tokens} "
                f"special ones and {self.tokens_per_step} for each step of time; give the "
                "model's own TokenLayout"
            )
        return steps

    def num_valid_steps(self, config: CacheConfig, num_valid: int | None = None) -> int:
        """Return how many steps see only frames of a clip, at least 1.

        For AST and 5 s at 16 kHz: 498 frames of 25 ms every 10 ms, so 49 of the 101 steps; the
        others see frames that were padded.

        Args:
            config: The store's.
            num_valid: How many samples came from the clip's file; None: all of the duration.
        """
        window = int(config.sample_rate * self.window_milliseconds / 1000)
        hop = int(config.sample_rate * self.hop_milliseconds / 1000)
        num_samples = config.num_samples if num_valid is None else num_valid
        num_frames = 1 + (num_samples - window) // hop
        return max(1, (num_frames - self.frames_per_token) // self.frames_per_step + 1)


class StoreView(Mapping[str, npt.NDArray[Any]], ABC):
    """What a store's embeddings become, by id: a source like a reader.

    For `EmbeddingDataset`, `make_dataloader`, `preload` and `TensorMapping`. Values have the stored
    dtype. Pickles, and works in other processes, as its reader does.

    Args:
        reader: Of the store.
    """

    def __init__(self, reader: EmbeddingReader) -> None:
        self.reader: Final = reader

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self.reader.path

    @property
    def config(self) -> CacheConfig:
        """The store's config."""
        return self.reader.config

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype, the view's too."""
        return self.reader.dtype

    def __getitem__(self, sample_id: str) -> npt.NDArray[Any]:
        """Return one value, owned and writable.

        Raises:
            SampleNotFoundError: The newest commit doesn't hold it in full (a KeyError).
        """
        one: npt.NDArray[Any] = self.get_batch([sample_id])[0]
        return one

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self.reader

    def __iter__(self) -> Iterator[str]:
        return iter(self.reader)

    def __len__(self) -> int:
        return len(self.reader)

    __hash__ = None  # type: ignore[assignment]

    def get_batch(self, sample_ids: Sequence[str]) -> npt.NDArray[Any]:
        """Return several values, `(len(sample_ids), *embedding_shape)`, in their order.

        Raises:
            SampleNotFoundError: Names what the newest commit lacks.
        """
        batch: npt.NDArray[Any] = self.select(sample_ids).get_batch(np.arange(len(sample_ids)))
        return batch

    def close(self) -> None:
        """Give back the reader's snapshot; reading again opens it again."""
        self.reader.close()

    @abstractmethod
    def reopened(self) -> StoreView:
        """Return the same view of another reader, see `EmbeddingReader.reopened`."""

    @abstractmethod
    def select(self, sample_ids: Iterable[str] | None = None) -> Any:
        """Return these samples by position, for a training loop; None takes all."""


class HiddenStateView(StoreView):
    """One view of the hidden states in a store, by sample id.

    Each special token of the layout is a view by its name: for AST `"cls"` and `"distillation"`,
    shape `(hidden_size,)`. Views for any model:

    - `"pooler_output"`, `(hidden_size,)`: the model's pooled output, where that is the mean of
      special tokens (AST);
    - `"mean"`, `(hidden_size,)`: over all tokens but the special ones, as the output `mean`;
    - `"valid_mean"`, `(hidden_size,)`: over the valid ones of these: by the clip's own length
      where `clip_lengths` knows it, else by the duration;
    - `"frames"`, `(tokens, hidden_size)`: all tokens but the special ones;
    - `"valid"`, `(valid_tokens, hidden_size)`: those of them whose frames come from audio and not
      from padding: see `TokenLayout.num_valid_steps`.

    Means are taken in float32.

    Args:
        reader: Of a store of hidden states, `(tokens, hidden_size)` each.
        name: Which view.
        layout: What the rows are; None knows AST's as published.

    Raises:
        ConfigError: Not hidden states, an unknown view, or a layout that doesn't fit them.
    """

    def __init__(
        self, reader: EmbeddingReader, name: str, layout: TokenLayout | None = None
    ) -> None:
        super().__init__(reader)
        self.name: Final = name
        self.layout: Final = layout or _known_layout(reader.config)
        stored = reader.embedding_shape
        if stored is None or len(stored) != 2 or reader.config.output.startswith("layers"):
            raise ConfigError(
                f"{reader.path} holds {reader.config.output} of shape {stored}; a view needs "
                "hidden states of shape (tokens, hidden_size): output 'last_hidden_state'"
            )
        self.part: Final = self._part(stored[0])

    def _part(self, num_tokens: int | None) -> RowPart:
        layout, name = self.layout, self.name
        special = layout.num_special_tokens
        if name in layout.special_tokens:
            return RowPart(layout.special_tokens.index(name), 1)
        if name == "pooler_output" and layout.pooled_tokens and not self._is_layer:
            return RowPart(0, layout.pooled_tokens)
        if name in ("mean", "frames"):
            return RowPart(special, None)
        if name in ("valid", "valid_mean"):
            return self._valid_part(num_tokens)
        known = [*layout.special_tokens, *(["pooler_output"] if layout.pooled_tokens else [])]
        known += ["mean", "valid_mean", "frames", "valid"]
        raise ConfigError(
            f"name: {name!r} isn't a view of this model; known are {', '.join(known)}"
        )

    @property
    def _is_layer(self) -> bool:
        # The pooled output is made of the last hidden state only, after the last norm.
        return self.reader.config.output.startswith("layer:")

    def _valid_part(self, num_tokens: int | None) -> RowPart:
        special, per_step = self.layout.num_special_tokens, self.layout.tokens_per_step
        if num_tokens is None:
            raise ConfigError(
                f"name: {self.name!r} needs hidden states of one length; those of "
                f"{self.reader.path} differ, and hold no padding"
            )
        steps = self.layout.num_steps(num_tokens)
        valid = min(steps, self.layout.num_valid_steps(self.reader.config))
        return RowPart(special, valid, per_step, steps)

    @property
    def is_mean(self) -> bool:
        """Whether the view is the mean of the rows that it reads."""
        return self.name in ("mean", "valid_mean", "pooler_output")

    @property
    def is_row(self) -> bool:
        """Whether the view is a single row."""
        return self.name in self.layout.special_tokens

    @property
    def embedding_shape(self) -> tuple[int | None, ...]:
        """Shape of the view of one sample."""
        num_tokens, *rest = self.reader.embedding_shape or ()
        if self.is_row or self.is_mean:
            return tuple(rest)
        if num_tokens is None:
            return (None, *rest)
        return self.part.shape((num_tokens, *(size or 0 for size in rest)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reader!r}, {self.name!r})"

    def reopened(self) -> HiddenStateView:
        """Return the same view of another reader, see `EmbeddingReader.reopened`."""
        return HiddenStateView(self.reader.reopened(), self.name, self.layout)

    def select(self, sample_ids: Iterable[str] | None = None) -> ViewSelection:
        """Return the view of these samples by position, for a training loop; None takes all."""
        return ViewSelection(self, sample_ids)


class ViewSelection:
    """The view of some samples by position.

    Args:
        view: Which view.
        sample_ids: In the order of the positions; None takes all that are stored now, sorted.
    """

    def __init__(self, view: HiddenStateView, sample_ids: Iterable[str] | None = None) -> None:
        self.view = view
        self.rows = Selection(view.reader, sample_ids, view.part)
        self._num_steps = self._own_steps() if view.name == "valid_mean" else None

    @property
    def sample_ids(self) -> list[str]:
        """The samples, in order."""
        return self.rows.sample_ids

    def __len__(self) -> int:
        return len(self.rows)

    def _own_steps(self) -> npt.NDArray[np.int64]:
        """Return how many steps of each sample's part its clip fills, `(len(self),)`."""
        view, per_sample = self.view, self.view.part.num_rows
        steps = np.full(len(self), per_sample or 0, np.int64)
        lengths = clip_lengths(view.reader, self.sample_ids)
        for row, sample_id in enumerate(self.sample_ids):
            if (length := lengths.get(sample_id)) is not None:
                own = view.layout.num_valid_steps(view.config, length)
                steps[row] = min(steps[row], own)
        return steps

    def get_batch(self, positions: Positions) -> npt.NDArray[Any]:
        """Return the view at these positions, `(n, *view_shape)`, stored dtype.

        Raises:
            SampleNotFoundError: Names what the newest commit lacks.
        """
        if self.view.is_mean and self.view.name != "pooler_output":
            own = None if self._num_steps is None else self._num_steps[np.asarray(positions)]
            in_place = functools.partial(self._means_in_place, num_steps=own)
            means: Any = self.rows.copy_with(positions, in_place)
            if means is None:  # one by one, as a batch of whole hidden states is large
                means = [
                    self._mean_of(
                        self.rows.get_batch([position])[0], None if own is None else int(own[place])
                    )
                    for place, position in enumerate(positions)
                ]
            return np.array(means, self.view.dtype).reshape(len(positions), *self._row_shape)
        rows = self.rows.get_batch(positions)
        if self.view.is_mean:
            return _mean(rows).astype(rows.dtype, copy=False)
        return rows[:, 0] if self.view.is_row else rows

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return tuple(size or 0 for size in (self.view.reader.embedding_shape or ())[1:])

    def _mean_of(self, rows: npt.NDArray[Any], num_steps: int | None) -> npt.NDArray[np.float32]:
        part = self.view.part
        if num_steps in (None, part.num_rows):
            return _mean(rows)
        runs = rows.reshape(part.num_runs, -1, rows.shape[-1])
        mean: npt.NDArray[np.float32] = _mean(runs[:, :num_steps]).mean(0)
        return mean

    def _means_in_place(
        self,
        file: MappedFile,
        offsets: npt.NDArray[np.int64],
        length: int,
        num_steps: npt.NDArray[np.int64] | None,
    ) -> npt.NDArray[np.float32]:
        """Return means that are taken where the values lie, without a copy of them."""
        dtype, row = self.view.config.dtype, self._row_shape
        stored_dtype, stored_row = stored_form(row, dtype)
        shape = (length // value_bytes(row, dtype), *(size or 0 for size in stored_row))
        num_runs = self.view.part.num_runs
        means = [
            _mean(
                decoded(
                    file.value(offset, stored_dtype, shape)[
                        : None if num_steps is None else num_steps[place // num_runs]
                    ],
                    dtype,
                )
            )
            for place, offset in enumerate(offsets.tolist())
        ]
        # The runs of one sample are of one length.
        runs = np.array(means, np.float32).reshape(-1, self.view.part.num_runs, *row)
        mean: npt.NDArray[np.float32] = runs.mean(1)
        return mean

    def will_need(self, positions: Positions) -> None:
        """Ask the kernel to read what is needed for these from disk, in the background."""
        self.rows.will_need(positions)


def _mean(rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the mean of `(..., rows, hidden_size)` over the rows."""
    # Block by block: one long sum of float32 loses a digit, and a product's threads cost more.
    rows = rows.astype(np.float32, copy=False)
    *outer, num_rows, hidden_size = rows.shape
    in_blocks = num_rows // _BLOCK_ROWS * _BLOCK_ROWS
    blocks = rows[..., :in_blocks, :].reshape(*outer, -1, _BLOCK_ROWS, hidden_size)
    total = blocks.sum(-2).sum(-2) + rows[..., in_blocks:, :].sum(-2)
    mean: npt.NDArray[np.float32] = total / np.float32(num_rows)
    return mean


def _known_layout(config: CacheConfig) -> TokenLayout:
    if config.front_end.endswith(_AST_FRONT_END) or is_published_ast(config.model_name):
        return TokenLayout.ast()
    raise ConfigError(
        f"layout: what the tokens of {config.model_name} with the front end {config.front_end!r} "
        "mean isn't known here; give a TokenLayout (TokenLayout.ast() for an AST, TokenLayout() "
        "for one token per step and none in front)"
    )
