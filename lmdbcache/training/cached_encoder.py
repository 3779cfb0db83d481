"""A module in the place of a frozen encoder, which answers from the cache."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError, InvalidEmbeddingError, ProvenanceMismatchError
from lmdbcache.storage import StoreMetadata, as_read, as_stored, canonical_sample_id
from lmdbcache.training.batch_inputs import (
    check_precision,
    features_of,
    select_inputs,
    stacked,
    valid_counts,
)
from lmdbcache.training.frozen_encoder import FrozenEncoder
from lmdbcache.training.tensors import as_tensor
from lmdbcache.training.write_back import WriteBack

_logger: Final = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _left_out_of_graphs(function: _Function) -> _Function:
    """`torch.compiler.disable`, but importing torch's compiler (3 s) is left to who compiles."""
    uncompiled: Any = None

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        nonlocal uncompiled
        if uncompiled is None and "torch._dynamo" in sys.modules:
            uncompiled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return (uncompiled or function)(*args, **options)

    called._torchdynamo_disable = True  # type: ignore[attr-defined] # noqa: SLF001
    return called  # type: ignore[return-value]


@dataclass
class _Inputs:
    """The inputs of a whole batch."""

    positional: Sequence[Any]
    named: Mapping[str, Any]
    num_valid: Any
    are_features: bool = False


class CachedEncoder(torch.nn.Module):
    """A frozen encoder's substitute in a training script, which answers from the cache.

    Called with what the model takes and the sample ids, it returns what the model returns. Only
    what isn't stored is computed: each sample once, the misses of a batch in one forward pass. They
    are committed in large transactions; until then they are answered from memory. Left over ones
    are committed by `flush`, `close`, the end of a `with` block, or the end of the process; the
    next commit isn't waited for, so a killed process loses at most what wasn't committed.

    The model's parameters aren't this module's: an optimizer finds none, `state_dict` is empty, and
    `train()` has no effect on the model. `to(device)` moves the model and where embeddings are
    returned; `to(dtype)` changes the dtype that is returned (float32), not the one computed in,
    which is the config's whatever autocast is on.

    Each process (DDP ranks, forked and spawned workers) has its own reader and writer; writers
    take turns. Pickles and copies as its settings and its model; what isn't committed stays here.

    Args:
        cache: The cache, or its root.
        config: Identity of the embeddings.
        encoder: The frozen encoder: a Hub name, a checkpoint folder or an `AudioModel` (such as
            `ModuleEmbedder`), looked up and loaded at the first miss; a module in eval mode without
            grad, an `Embedder`, or a function of the inputs; or a function without arguments that
            builds one of these, called at the first miss.
        front_end: Waveform → features, for each missing sample's first input; None takes that of
            a model known by its name.
        select_output: Takes the embeddings from what the model returns; None takes a tensor as it
            is, else the attribute or item named `config.output`.
        provenance: Kept in the store's metadata. A `weights_digest` here is believed; else an
            embedder has its own, and a module's is taken over all its weights.
        device: Where the model runs and embeddings are returned; None: returned where the module
            is, else on the CPU, and a model known by its name runs on a CUDA GPU if there is one.
        commit_seconds: Commit at least this often, while it is used.

    Attributes:
        num_hits: Embeddings answered without computing, in this process.
        num_computed: Embeddings computed; repeats within a batch count in neither.

    Raises:
        ConfigError: A model in training or with parameters that require grad, or one that doesn't
            fit the config.
        ProvenanceMismatchError: The store was filled with other weights. When called: the weights
            changed since the first computation.
    """

    def __init__(
        self,
        cache: EmbeddingCache | str | os.PathLike[str],
        config: CacheConfig,
        encoder: Any,
        *,
        front_end: Callable[[Any], Any] | None = None,
        select_output: Callable[[Any], torch.Tensor] | None = None,
        provenance: Mapping[str, str] | None = None,
        device: str | torch.device | None = None,
        commit_seconds: float = 10.0,
    ) -> None:
        super().__init__()
        if not isinstance(cache, EmbeddingCache):
            cache = EmbeddingCache(Path(cache))
        self.config = config
        self._front_end = front_end
        self.num_hits = 0
        self.num_computed = 0
        self._frozen = FrozenEncoder(encoder, config, select_output)
        self._given_provenance = dict(provenance or {})
        self._known_provenance: dict[str, str] | None = None
        self._looked_at_name = False
        self._write_back = WriteBack(cache, config, commit_seconds)
        # Not a buffer: `state_dict` and DDP's broadcasts shall not see it.
        self._like = torch.empty(0, device=self._frozen.device or "cpu")
        if device is not None:
            self._frozen.move(torch.device(device))
            self.to(device)
        if self._frozen.is_built:
            self._check_provenance()

    @property
    def front_end(self) -> Callable[..., Any] | None:
        """Waveform → features; that of a model known by its name is built now.

        Raises:
            ModelLoadError: The model can't be found.
        """
        return self._front_end or self._frozen.front_end

    # ---- the module

    def forward(
        self,
        *inputs: Any,
        sample_ids: Iterable[str],
        num_valid: Any = None,
        **named_inputs: Any,
    ) -> torch.Tensor:
        """Return the embeddings of a batch.

        With a front end the first input is waveforms, cut to no more than the config's duration.
        Shorter ones are padded here. Some front ends (of models with an attention mask, of CLAP)
        treat a clip and the padding after it differently: give these a list of waveforms as they
        are, or padded ones and `num_valid`. A waveform of full length without it counts as a clip
        that fills the duration.

        Args:
            inputs: What the model takes, for the whole batch: tensors or arrays `(batch, ...)`;
                lists of one input for each sample; Mappings of these. So that hits cost nothing, a
                list may hold functions without arguments instead, and a whole input may be a
                function of the sample ids that are missing.
            sample_ids: One for each sample, `file_id:class`; repeats are computed once.
            num_valid: How many samples of each waveform aren't padding, `(batch,)`; None: all.
                Without effect where no front end is used.
            named_inputs: Further inputs by name; what isn't a tensor, array, list or function is
                handed to the model as it is.

        Returns:
            `(batch, *embedding_shape)` in the order of `sample_ids`, without grad. A computed
            embedding comes back as stored, so that every later call returns the same bits.

        Raises:
            InvalidEmbeddingError: The model gave NaN, Inf or another shape for samples that are
                named; the others are kept.
            InvalidSampleIdError: A sample id can't be stored.
            ConfigError: Not as many inputs as samples, inputs in half precision where the config
                says float32, or waveforms that don't fit the config.
            AudioDecodeError: A waveform is too short for the front end.
            ModelLoadError: The model can't be found or loaded.
            ProvenanceMismatchError: The store was filled with other weights.
            CacheFullError: No room for a commit; what was computed is kept in memory.
        """
        given = _Inputs(inputs, named_inputs, num_valid)
        return self._answer(list(sample_ids), given)

    def complete(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the embeddings of a mixed batch: misses are computed in one forward pass.

        Args:
            batch: As `collate_mixed` makes it: `sample_ids`, `mask` (True for a hit), `embeddings`
                of the hits, and of the misses `waveforms` with `num_valid`, or `features`.

        Returns:
            `(batch, *embedding_shape)` in the batch's order, without grad.

        Raises:
            ConfigError: Not such a batch, or without the inputs of its misses.
            InvalidEmbeddingError: See `forward`.
        """
        if not {"mask", "sample_ids"} <= batch.keys():
            raise ConfigError(
                f"batch: it has {', '.join(sorted(map(str, batch)))}; expected one of "
                "`collate_fn=collate_mixed`, with mask and sample_ids"
            )
        mask, hits = batch["mask"], batch.get("embeddings")
        sample_ids = list(batch["sample_ids"])
        missing = [i for i, hit in zip(sample_ids, mask.tolist(), strict=True) if not hit]
        if not missing and hits is not None:
            self.num_hits += len(sample_ids)
            return hits.detach().to(self._like)  # type: ignore[no-any-return]
        features = batch.get("features")
        inputs: Any = batch.get("waveforms") if features is None else features
        if missing and inputs is None:
            raise ConfigError(
                f"batch: {len(missing)} samples aren't cached and it has no waveforms of them; "
                "extract them first, or keep the collated waveforms in the batch"
            )
        if missing and features is None:
            self._check_duration(inputs)
        given = _Inputs((inputs,), {}, batch.get("num_valid"), features is not None)
        computed = self._answer(missing, given, are_refused=True)
        self.num_hits += len(sample_ids) - len(missing)
        if hits is None:
            return computed
        mask = mask.to(computed.device)
        whole = computed.new_empty((len(mask), *computed.shape[1:]))
        whole[mask] = hits.to(computed)
        whole[~mask] = computed
        return whole

    def _check_duration(self, waveforms: Iterable[torch.Tensor]) -> None:
        lengths = {one.shape[-1] for one in waveforms}
        if lengths != {self.config.num_samples}:
            raise ConfigError(
                f"duration: waveforms of {', '.join(map(str, sorted(lengths)))} samples, the "
                f"config says {self.config.num_samples} ({self.config.duration} s at "
                f"{self.config.sample_rate} Hz); load them with the config's values"
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002
        before, self._like = self._like.device, fn(self._like)
        if self._like.device != before:
            self._frozen.move(self._like.device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Return the store's name, which `print` shows."""
        return f"{self._write_back.stored.cache.path(self.config).name}"

    # ---- the cache

    @property
    def cache(self) -> EmbeddingCache:
        """Where it reads and writes."""
        return self._write_back.stored.cache

    def flush(self) -> None:
        """Commit what is computed; durable, and seen by other processes, when this returns.

        Raises:
            CacheFullError: No room; it is kept in memory.
        """
        self._write_back.flush()

    def close(self) -> None:
        """Commit what is computed and give back the store; used again, it opens it again."""
        self._write_back.close()

    def __enter__(self) -> CachedEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        # After an error, too: each embedding stands for itself.
        self.close()

    def _check_provenance(self) -> None:
        reader = self._write_back.stored.reader()
        if reader is not None:
            self._refuse_other_weights(reader.metadata)

    def _look_at_name(self) -> None:
        """Say once if the model's Hub name means other weights than those of the hits."""
        self._looked_at_name = True
        reader = self._write_back.stored.reader()
        if reader is None:
            return
        if moved := self._frozen.moved_weights(reader.metadata.provenance, reader.path):
            _logger.warning("%s", moved)

    def _refuse_other_weights(self, metadata: StoreMetadata) -> None:
        store = self.cache.path(self.config)
        try:
            metadata.with_provenance(self._provenance(), store)
        except ProvenanceMismatchError as error:
            raise ProvenanceMismatchError(
                f"{error}. If you know that these are the same weights (the digest of a module "
                "differs from that of its checkpoint's files), give provenance={'weights_digest': "
                f"{metadata.provenance.get('weights_digest')!r}}}, or an embedder as the model"
            ) from None

    def _provenance(self) -> dict[str, str]:
        if self._known_provenance is None:
            told = getattr(self.front_end, "provenance", None)
            features = dict(told()) if callable(told) else {}
            own = self._given_provenance
            weights = {} if "weights_digest" in own else self._frozen.provenance()
            self._known_provenance = {**features, **weights, **own}
        return self._known_provenance

    # ---- hits and misses

    @_left_out_of_graphs
    def _answer(
        self, sample_ids: list[str], inputs: _Inputs, *, are_refused: bool = False
    ) -> torch.Tensor:
        with self._write_back.lock:
            found = self._write_back.find(sample_ids, are_refused=are_refused)
            missing = found.missing
            if not self._looked_at_name and len(missing) < len(sample_ids):
                self._look_at_name()
            computed = {}
            if missing:
                computed = self._compute(sample_ids, missing, inputs)
            else:
                self._frozen.check_written()
        self.num_hits += len(sample_ids) - len(missing)
        return as_tensor(found.completed(computed)).to(self._like)

    def _compute(
        self, sample_ids: list[str], missing: list[int], inputs: _Inputs
    ) -> dict[int, npt.NDArray[Any]]:
        """Compute, store, and give by position what is missing."""
        names = [canonical_sample_id(sample_ids[position]) for position in missing]
        position_of = dict(zip(names, missing, strict=True))  # any one of a repeated sample
        wanted, positions = list(position_of), list(position_of.values())
        chosen, further, num_valid = self._chosen(inputs, positions, wanted, len(sample_ids))
        self._frozen.build()
        has_own_frames = self.config.output.endswith("valid_mean") and self._frozen.takes_num_valid
        if num_valid is not None and has_own_frames:
            further["num_valid"] = torch.tensor(num_valid, dtype=torch.long)
        self._check_provenance()
        self._write_back.open_writer(self._provenance())
        has_features = inputs.are_features or self.front_end is not None
        if not (has_features and chosen and isinstance(chosen[0], list)):
            chosen = [stacked(one) for one in chosen]
        embeddings = self._frozen.run(chosen, further, wanted)
        self.num_computed += len(wanted)
        lengths: dict[str, int] = {}
        if num_valid is not None and inputs.num_valid is not None:  # and not taken for granted
            lengths = dict(zip(wanted, num_valid, strict=True))
        rows = self._store(wanted, embeddings, lengths)
        return {position: rows[name] for position, name in zip(missing, names, strict=True)}

    def _chosen(
        self, inputs: _Inputs, positions: list[int], wanted: list[str], batch_size: int
    ) -> tuple[list[Any], dict[str, Any], list[int] | None]:
        """Return what the model takes for the samples that are wanted, and their lengths."""
        select = functools.partial(
            select_inputs, positions=positions, sample_ids=wanted, batch_size=batch_size
        )
        chosen = [select(one) for one in inputs.positional]
        further = {name: stacked(select(one)) for name, one in inputs.named.items()}
        if self.config.compute_dtype == "float32":
            check_precision([*chosen, *further.values()])
        front_end = self.front_end
        counts = None
        if front_end is not None and chosen:
            num_valid = None if inputs.num_valid is None else select(inputs.num_valid)
            is_wanted = self.config.output.endswith("valid_mean") and not inputs.are_features
            if num_valid is not None or is_wanted:
                counts = valid_counts(chosen[0], num_valid)
            if not inputs.are_features:
                chosen[0] = features_of(chosen[0], front_end, self.config, wanted, num_valid)
        return chosen, further, counts

    def _store(
        self, names: list[str], embeddings: torch.Tensor, lengths: Mapping[str, int]
    ) -> dict[str, npt.NDArray[Any]]:
        dtype = self.config.dtype
        refused: list[str] = []
        kept, rows = names, None
        try:
            rows = as_stored(names[0], embeddings, dtype, copy=False)
        except InvalidEmbeddingError:  # one by one: the culprits are named, the others kept
            good: dict[str, npt.NDArray[Any]] = {}
            for name, embedding in zip(names, embeddings, strict=True):
                try:
                    good[name] = as_stored(name, embedding, dtype)
                except InvalidEmbeddingError as error:
                    refused.append(str(error))
            kept, rows = list(good), np.stack(list(good.values())) if good else None
        if rows is not None:
            self._write_back.add(kept, rows, lengths)
        if refused:
            more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
            raise InvalidEmbeddingError(
                f"{'; '.join(refused[:3])}{more}. The other {len(kept)} of this batch are kept"
            )
        return dict(zip(kept, as_read(rows, dtype) if rows is not None else (), strict=True))
