"""`audit`: compute a few stored embeddings again and compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from lmdbcache.cache import EmbeddingCache, compare, difference_of, recorded_sources
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import AudioModel, Embedder, FrontEnd, ready_model
from lmdbcache.errors import ConfigError, ModelLoadError
from lmdbcache.extraction.clips import features_of
from lmdbcache.extraction.ranks import RankShare
from lmdbcache.storage import EmbeddingReader, Progress, Report, StoreMetadata, recording_of

# Relative L2 distance. Another composition of the batch alone moves float32 by about 2e-7,
# rounding to float16 by 3e-4 and to bfloat16 by 2e-3.
_OF_STORED: Final = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
_MORE_THAN_MEASURED: Final = 1.1  # the error that int8 had when it was written
_OF_COMPUTED: Final = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}
# What decides an embedding's last bits, and is worth a word where it differs.
_COMPARED: Final = (
    "weights_digest",
    "revision",
    "feature_extractor",
    "transformers",
    "torch",
    "torchaudio",
    "soundfile",
    "soxr",
    "device",
)


class AuditedSample(NamedTuple):
    """One stored embedding compared with the one that its clip gives now.

    Args:
        sample_id: The sample.
        path: The clip's file.
        max_abs: Largest difference of two elements.
        cosine: 1 less the cosine of the angle between the two.
        relative_l2: Length of the difference, relative to the stored embedding's.
    """

    sample_id: str
    path: str
    max_abs: float
    cosine: float
    relative_l2: float


@dataclass(frozen=True)
class AuditReport(Report):
    """What an audit found.

    Args:
        store: The store's folder.
        tolerance: Largest `relative_l2` that isn't called drift.
        samples: The embeddings compared, the farthest first.
        skipped: Sample id → why its file isn't the one that was embedded, as far as is known.
        failed: Sample id → why its file gives no embedding now, although it is the same.
        differences: Name in the provenance → (the store's value, the one now).
    """

    derived: ClassVar = ("is_sound", "num_drifted")

    store: Path
    tolerance: float
    samples: tuple[AuditedSample, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    differences: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def drifted(self) -> tuple[AuditedSample, ...]:
        """Those farther away than the tolerance."""
        return tuple(s for s in self.samples if not s.relative_l2 <= self.tolerance)

    @property
    def num_drifted(self) -> int:
        """Number of `drifted`."""
        return len(self.drifted)

    @property
    def is_sound(self) -> bool:
        """Whether every embedding could be compared and is what its clip gives."""
        return bool(self.samples) and not (self.drifted or self.failed)


def tolerance_for(metadata: StoreMetadata) -> float:
    """Return the relative L2 distance that rounding explains, for this dtype and compute dtype."""
    config, of_int8 = metadata.config, _MORE_THAN_MEASURED * (metadata.quantization_error or 0.0)
    return max(_OF_STORED.get(config.dtype, of_int8), _OF_COMPUTED[config.compute_dtype])


def audit(  # noqa: PLR0913
    cache: EmbeddingCache,
    config: CacheConfig,
    *,
    num_samples: int = 50,
    clips: Mapping[str, str] | None = None,
    data_dir: str | Path | None = None,
    model: str | os.PathLike[str] | AudioModel | None = None,
    front_end: FrontEnd | None = None,
    make_embedder: Callable[[], Embedder] | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Compute some stored embeddings again and report how far they are off. Writes nothing.

    Args:
        cache: Where they are stored.
        config: Which store.
        num_samples: How many; which ones a hash of their ids decides.
        clips: Sample id → audio file, for embeddings without a recorded source; of windows the
            recording's id will do.
        data_dir: Where the dataset is now; None looks where it was.
        model: Hub name or checkpoint folder; None takes the folder that the store was filled
            from, else `config.model_name`.
        front_end: Waveform → features; None takes the model's.
        make_embedder: Builds the model; None takes `model`.
        seed: Another one picks other samples.
        tolerance: Largest relative L2 distance; None takes `tolerance_for` the store.
        batch_size: Clips per forward pass.
        num_workers: Decoding processes; None chooses, 0 decodes in this process.
        device: Where the model runs; None takes a CUDA GPU if there is one.
        progress: Called with (samples done, samples in all).

    Raises:
        CacheNotFoundError: Nothing is stored for this config.
        IntegrityError: The store or the records of its sources are damaged.
        ModelLoadError: The model can't be loaded.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples: {num_samples}; it must be 1 or more")
    if tolerance is not None and not tolerance >= 0:
        raise ConfigError(f"tolerance: {tolerance}; it must be 0 or more")
    with cache.reader(config, track_usage=False) as reader:
        limit = tolerance_for(reader.metadata) if tolerance is None else tolerance
        paths, skipped = _pick(reader, num_samples, seed, clips or {}, data_dir)
        if not paths:
            return AuditReport(reader.path, limit, skipped=skipped)
        provenance = reader.metadata.provenance
        if front_end is None or make_embedder is None:
            named = recorded_model(provenance) if model is None else model
            found = ready_model(named or config.model_name, config)
            front_end = front_end or found.make_front_end(config)
            make_embedder = make_embedder or partial(found.make_embedder, config, device)
        embedder = make_embedder()
        now = {**front_end.provenance(), **embedder.provenance()}
        computed, failed = computed_of(
            config,
            paths,
            front_end,
            embedder,
            batch_size=batch_size,
            num_workers=RankShare().decoding_processes() if num_workers is None else num_workers,
            progress=progress,
        )
        samples = [
            AuditedSample(sample_id, paths[sample_id], *difference_of(reader[sample_id], value))
            for sample_id, value in computed
        ]
        return AuditReport(
            reader.path,
            limit,
            # An embedding that isn't finite comes first.
            tuple(sorted(samples, key=lambda s: (s.relative_l2 == s.relative_l2, -s.relative_l2))),
            skipped,
            failed,
            {
                name: (provenance[name], now[name])
                for name in _COMPARED
                if name in provenance and name in now and provenance[name] != now[name]
            },
        )


def _pick(
    reader: EmbeddingReader,
    num_samples: int,
    seed: int,
    clips: Mapping[str, str],
    data_dir: str | Path | None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Return (sample id → file) of those to compare, (sample id → reason) of those skipped."""
    by_hash = sorted(reader, key=lambda i: xxhash.xxh3_64_intdigest(i.encode(), seed=seed))
    picked: dict[str, str] = {}
    skipped: dict[str, str] = {}
    step = max(num_samples, 256)
    for start in range(0, len(by_hash), step):
        chunk = by_hash[start : start + step]
        sources = {i: source for i, _, source in recorded_sources(reader.path, chunk)}
        for sample_id in chunk:
            if len(picked) >= num_samples:
                return picked, skipped
            source = sources.get(sample_id)
            given = clips.get(sample_id, clips.get(recording_of(sample_id)))
            if (source is None or not source.path) and given is not None:
                picked[sample_id] = given
                continue
            path = source.location(data_dir) if source is not None else ""
            state = compare(source, path) if source is not None else "unknown"
            if state in ("unchanged", "touched"):
                picked[sample_id] = path
            else:
                skipped[sample_id] = f"{state}: {path}" if path else "no source is recorded"
    return picked, skipped


def recorded_model(provenance: Mapping[str, str]) -> str | None:
    """Return the folder of the checkpoint that filled a store, if it is still there.

    Raises:
        ModelLoadError: A module or an ONNX file filled it: no name leads to that.
    """
    if "module" in provenance:
        raise ModelLoadError(
            f"a model made in Python ({provenance['module']}) filled this store, and no name leads "
            "to it: pass the model itself to `extract`, `audit` or `embed_clip` in Python"
        )
    folder = provenance.get("checkpoint")
    return folder if folder and (Path(folder) / "config.json").is_file() else None


def computed_of(
    config: CacheConfig,
    paths: Mapping[str, str],
    front_end: FrontEnd,
    embedder: Embedder,
    *,
    batch_size: int,
    num_workers: int,
    progress: Progress | None = None,
) -> tuple[list[tuple[str, npt.NDArray[np.float32]]], dict[str, str]]:
    """Embed audio files: return (sample id, embedding) of each, and sample id → why it failed."""
    # They import torch.
    from lmdbcache.extraction.embedding import embed_clips
    from lmdbcache.extraction.recordings import AllBut

    computed: list[tuple[str, npt.NDArray[np.float32]]] = []
    failed: dict[str, str] = {}
    ordered = sorted(paths.items())
    units = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    others: dict[str, AllBut] = {}
    if config.window is not None:
        recordings = {recording_of(sample_id): path for sample_id, path in ordered}
        units = [[pair] for pair in recordings.items()]
        others = dict.fromkeys(recordings, AllBut(paths))
    with features_of(
        units,
        config,
        front_end,
        num_workers=num_workers,
        batch_size=batch_size,
        stored=others,
    ) as batches:
        for batch in batches:
            failed.update({failure.sample_id: failure.reason for failure in batch.failures})
            for positions, features in batch.groups():
                found = embed_clips(embedder, features, batch.num_valid(positions))
                embeddings = found.numpy()
                computed += zip(
                    [batch.sample_ids[position] for position in positions], embeddings, strict=True
                )
            if progress is not None:
                progress(min(len(paths), len(computed) + len(failed)), len(paths))
    if config.window is not None:
        computed = [pair for pair in computed if pair[0] in paths]
        for sample_id in paths.keys() - dict(computed).keys():
            reason = failed.pop(recording_of(sample_id), "its file has no such window")
            failed[sample_id] = reason
    return computed, failed
