"""The AST cache of a dataset: the methods that scripts have always called."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Final, overload

import torch

from lmdbcache.cache import EmbeddingCache, read_store_info
from lmdbcache.config import CacheConfig
from lmdbcache.datasets.ast_cached.loaded import EmbeddingOverlay, StoredClass, classes_in
from lmdbcache.embedders import model_identity
from lmdbcache.errors import (
    CacheError,
    CacheNotFoundError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
)
from lmdbcache.storage import (
    EmbeddingReader,
    EmbeddingWriter,
    canonical_class,
    has_masked_elements,
    join_sample_id,
    split_sample_id,
)
from lmdbcache.training import (
    HIDDEN,
    MEAN,
    POOLED,
    TensorMapping,
    as_tensor,
    find_stored,
    output_of_dimensions,
    plain_tensor,
    unwrapped,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from lmdbcache.datasets.base import Sample
    from lmdbcache.datasets.batches import Column

_OUTPUT_ORDER: Final = (POOLED, HIDDEN, MEAN)

_logger = logging.getLogger(__name__)


class ASTCache:
    """Save, load and narrow cached embeddings, on top of `EmbeddingCache`.

    Attributes:
        namespace: Goes to `CacheConfig.namespace`.
        root_dir: Folder of the clips; noted in a store that is made.
        ast_cache_dir: Root of the cache; made when something is saved.
        enable_ast_cache: If false, loading and saving do nothing and return False, or {}.
        ast_output: Which output is cached unless a call names one; None: the one that is there.
        active_classes: Class name → label; embeddings are narrowed to these.
        audio_sample_rate: Of the clips, in Hz; an embedding's unless a call names another.
        audio_duration: Of the clips, in seconds; likewise.
    """

    namespace: str
    root_dir: str
    ast_cache_dir: str
    enable_ast_cache: bool
    ast_output: str | None
    active_classes: dict[str, int]
    audio_sample_rate: int
    audio_duration: float
    _audio_embs: MutableMapping[str, Any]
    _audio_embs_from_file: Mapping[str, Any] | None
    # Class name → what is loaded of it; one dict for a dataset and its parts.
    _ast_cache: dict[str, StoredClass]

    samples: list[Sample]

    if TYPE_CHECKING:

        @property
        def sample_ids(self) -> list[str]:
            """`file_id:class` of every sample."""

        def _parts(self) -> Sequence[ASTCache]:
            """The datasets that share what is loaded here (train, val and test of this one)."""

    @property
    def audio_embs(self) -> MutableMapping[str, Any]:
        """Sample id → embedding: where an item looks first. Assignments stay in memory."""
        return self._audio_embs

    @audio_embs.setter
    def audio_embs(self, value: Mapping[str, Any]) -> None:
        embeddings = value if isinstance(value, MutableMapping) else EmbeddingOverlay(value)
        for part in (self, *self._parts()):
            part._audio_embs = embeddings  # noqa: SLF001

    @property
    def audio_embs_from_file(self) -> Mapping[str, Any] | None:
        """Sample id → embedding, of all classes: where an item looks last."""
        return self._audio_embs_from_file

    @audio_embs_from_file.setter
    def audio_embs_from_file(self, value: Mapping[str, Any] | None) -> None:
        self._audio_embs_from_file = value
        for part in self._parts():
            part.audio_embs_from_file = value

    def _class_of(self, name: str) -> str:
        """The class that a user means, as sample ids have it."""
        return canonical_class(name)

    def _is_enabled(self) -> bool:
        if not self.enable_ast_cache:
            _logger.info("the AST cache is switched off (enable_ast_cache=False)")
        return self.enable_ast_cache

    def cache_config(
        self,
        sample_rate: int | None = None,
        duration: float | None = None,
        model_name: str = "ast",
        output: str | None = None,
    ) -> CacheConfig:
        """Return the config under which this dataset's embeddings are stored.

        Args:
            sample_rate: In Hz; None: `audio_sample_rate`.
            duration: In seconds; None: `audio_duration`.
            model_name: Hub name, alias, a name of your own, or a checkpoint folder.
            output: None: `ast_output`, or else the pooled one.

        Raises:
            ConfigError: An invalid value.
            ModelLoadError: A path that isn't a checkpoint folder.
        """
        return CacheConfig(
            sample_rate=self.audio_sample_rate if sample_rate is None else sample_rate,
            duration=self.audio_duration if duration is None else duration,
            model_name=model_identity(model_name),
            output=output or self.ast_output or POOLED,
            namespace=self.namespace,
        )

    @overload
    def load_ast_embeddings_from_cache(
        self,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        classes: Iterable[str] | None = None,
        close_previous: bool = True,
    ) -> dict[str, StoredClass]: ...
    @overload
    def load_ast_embeddings_from_cache(
        self,
        cache_dir: str | os.PathLike[str] | None,
        classes: Iterable[str] | None = None,
        close_previous: bool = True,  # noqa: FBT001, FBT002
        /,
    ) -> dict[str, StoredClass]: ...
    @overload
    def load_ast_embeddings_from_cache(
        self,
        sample_rate: int,
        duration: float | None = None,
        model_name: str | None = None,
        output: str | None = None,
    ) -> bool: ...
    def load_ast_embeddings_from_cache(
        self,
        sample_rate: Any = None,
        duration: Any = None,
        model_name: Any = None,
        output: str | None = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        classes: Iterable[str] | None = None,
        close_previous: bool | None = None,
    ) -> bool | dict[str, StoredClass]:
        """Make stored embeddings available to the items; they are read when they are asked for.

        There are two forms, which the arguments select. `(sample_rate, duration, model_name,
        output)` sets `audio_embs_from_file` to a lazy Mapping of all that is stored for this
        config, and returns a bool. `(cache_dir, classes, close_previous)`, by position or by name,
        loads classes and returns them. Without arguments it does both and returns the classes.

        Args:
            sample_rate: In Hz; None: `audio_sample_rate`.
            duration: In seconds; None: `audio_duration`.
            model_name: Hub name, alias, a name of your own, or a checkpoint folder; None: `"ast"`.
            output: None: `ast_output`, or else what is stored (of several the one with most of this
                dataset's samples).
            cache_dir: Another root than `ast_cache_dir`.
            classes: Names; None: the active ones.
            close_previous: Whether what was loaded earlier is dropped. None: yes.

        Returns:
            The first form: whether anything is stored. The second form: class name →
            `{"manifest", "chunks", "index_map"}`, see `StoredClass`; a class of which nothing is
            stored is left out. The log says why something can't be read.
        """
        if isinstance(sample_rate, (str, os.PathLike)) or isinstance(duration, Iterable):
            cache_dir, sample_rate = sample_rate, None
            classes, duration = classes if duration is None else duration, None
        if isinstance(model_name, bool):
            close_previous, model_name = model_name, None
        if isinstance(classes, str):
            classes = [classes]
        by_class = any(value is not None for value in (cache_dir, classes, close_previous))
        by_config = any(v is not None for v in (sample_rate, duration, model_name, output))
        gives_classes = by_class or not by_config
        if not self._is_enabled():
            return {} if gives_classes else False
        if gives_classes and close_previous is not False:
            self._drop_loaded()
        cache = EmbeddingCache(cache_dir or self.ast_cache_dir)
        found: dict[str, StoredClass] = {}
        try:
            config = self._config_in(cache, sample_rate, duration, model_name or "ast", output)
            reader = _open_reader(cache, config)
            embeddings = None if reader is None else TensorMapping(reader)
            if embeddings is not None and gives_classes:
                names = self.active_classes if classes is None else classes
                found = classes_in(embeddings, [self._class_of(name) for name in names])
        except (CacheError, OSError) as error:
            _logger.error("AST embeddings can't be loaded: %s", str(error))
            return {} if gives_classes else False
        if embeddings is not None:
            if not by_class:
                self._drop_loaded()
                self.audio_embs_from_file = embeddings
            self._ast_cache.update(found)
            _logger.info("loaded %d AST embeddings (%s)", len(embeddings), config.slug)
        return found if gives_classes else embeddings is not None

    def _drop_loaded(self) -> None:
        self._ast_cache.clear()
        self._drop(_is_stored)

    def _drop(self, is_dropped: Callable[[Mapping[str, Any] | None], bool]) -> None:
        """Drop the Mappings for which this holds."""
        embeddings = self.audio_embs
        if isinstance(embeddings, EmbeddingOverlay) and is_dropped(embeddings.below):
            embeddings.put_over(None)
        if is_dropped(self.audio_embs_from_file):
            self.audio_embs_from_file = None

    def close_ast_cache(self) -> None:
        """Drop what was loaded from stores; what `audio_embs` holds stays."""
        closed: dict[str, StoredClass] = {}
        for part in (self, *self._parts()):
            part._ast_cache = closed  # noqa: SLF001
        if _is_stored(self.audio_embs_from_file):
            self.audio_embs_from_file = None

    def get_cached_ast_embedding(
        self, class_name: str, file_id: str
    ) -> npt.NDArray[np.generic] | None:
        """Return the stored embedding of a clip: a read-only copy, stored shape and dtype.

        None if it isn't stored, or nothing is loaded.
        """
        with contextlib.suppress(InvalidSampleIdError):
            class_name = self._class_of(class_name)
            sample_id = join_sample_id(file_id, class_name)
            for store in self._stores(class_name):
                with contextlib.suppress(KeyError):
                    array = store[sample_id]
                    array.setflags(write=False)
                    return array
        return None

    def _log_cache_coverage(self) -> None:
        """Log how many of the samples have an embedding in the stores that are loaded."""
        by_class: dict[str, list[str]] = {}
        for sample in self.samples:
            by_class.setdefault(sample["class_name"], []).append(item_id(sample))
        num_missing, total = 0, len(self.samples)
        for class_name, sample_ids in by_class.items():
            missing = sample_ids
            for store in self._stores(class_name):
                missing = store.missing(missing)
            num_missing += len(missing)
        _logger.log(
            logging.WARNING if num_missing else logging.INFO,
            "AST cache: %d of %d samples (%.1f %%) have a stored embedding",
            total - num_missing,
            total,
            100 * (1 - num_missing / max(total, 1)),
        )

    def _sources(self, class_name: str) -> list[Mapping[str, Any]]:
        """Where an item of an active class looks for its embedding, in order; a store once."""
        first: Mapping[str, Any] | None = self._audio_embs
        if isinstance(first, EmbeddingOverlay):
            first = first if first.is_changed else first.below
        elif not first:
            first = None
        loaded, last = self._ast_cache.get(class_name), self._audio_embs_from_file
        second = None if loaded is None or loaded.embeddings is last else loaded.embeddings
        if first is second is None:
            return [] if last is None else [last]
        sources = [source for source in (first, second, last) if source is not None]
        found: dict[int, Mapping[str, Any]] = {}
        for source in sources:
            arrays = source.arrays if isinstance(source, TensorMapping) else source
            # What was narrowed to the active classes is looked up in the whole, once.
            if id(arrays) not in found or not getattr(source, "is_narrowed", True):
                found[id(arrays)] = source
        return list(found.values())

    def _stores(self, class_name: str) -> list[EmbeddingReader]:
        stores = map(_store_of, self._sources(class_name))
        return [store for store in stores if store is not None]

    def _only_reader(self, class_names: Iterable[str]) -> EmbeddingReader | None:
        """The store in which items of these classes look, if they look nowhere else."""
        readers: dict[int, EmbeddingReader] = {}
        for class_name in class_names:
            match self._sources(class_name):
                case [TensorMapping(is_narrowed=False, arrays=EmbeddingReader() as reader)]:
                    readers[id(reader)] = reader
                case _:
                    return None
        return readers.popitem()[1] if len(readers) == 1 else None

    def _embeddings_of(self, samples: Sequence[Sample]) -> Column:
        """The embeddings of those samples that have one, and which these are."""
        names = {sample["class_name"] for sample in samples} if self._ast_cache else {""}
        if (reader := self._only_reader(names)) is not None:
            # Of several shapes, or removed: the samples are looked up one by one.
            with contextlib.suppress(InvalidEmbeddingError, CacheNotFoundError):
                hits, is_hit = find_stored(reader, list(map(item_id, samples)))
                return [] if hits is None else as_tensor(hits), is_hit.tolist()
        found = list(map(self._embedding_of, samples))
        return [one for one in found if one is not None], [one is not None for one in found]

    def _embedding_of(self, sample: Sample) -> torch.Tensor | None:
        sample_id = item_id(sample)
        for embeddings in self._sources(sample["class_name"]):
            try:
                value = embeddings[sample_id]
            except KeyError:
                continue
            if type(value) is not torch.Tensor:
                return plain_tensor(value)
            # What a store gives is a copy already.
            return value if type(embeddings) is TensorMapping else value.detach()
        return None

    @overload
    def save_ast_embeddings_to_cache(
        self,
        *,
        ast_outputs_dict: Mapping[str, Mapping[str, Any]],
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> dict[str, int]: ...
    @overload
    def save_ast_embeddings_to_cache(
        self,
        ast_outputs_dict: Mapping[str, Mapping[str, Any]],
        cache_dir: str | os.PathLike[str] | None,
        /,
    ) -> dict[str, int]: ...
    @overload
    def save_ast_embeddings_to_cache(
        self,
        embeddings: Mapping[str, Any],
        sample_rate: int | None = None,
        duration: float | None = None,
        model_name: str = "ast",
        embedding_shape: tuple[int, ...] | None = None,
        output: str | None = None,
        *,
        without_provenance: bool = False,
    ) -> bool: ...
    def save_ast_embeddings_to_cache(
        self,
        embeddings: Mapping[str, Any] | None = None,
        sample_rate: Any = None,
        duration: float | None = None,
        model_name: str = "ast",
        embedding_shape: tuple[int, ...] | None = None,
        output: str | None = None,
        *,
        ast_outputs_dict: Mapping[str, Mapping[str, Any]] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        without_provenance: bool = False,
    ) -> bool | dict[str, int]:
        """Store embeddings; samples that are stored already are skipped.

        There are two forms: embeddings by sample id, or by class and file id.

        Args:
            embeddings: `file_id:class` → tensor, array, or a dict holding one under `embeddings`
                or `embedding`. Or class name → file id → one of these.
            sample_rate: In Hz; None: `audio_sample_rate`. In the second form this position may
                hold `cache_dir`.
            duration: In seconds; None: `audio_duration`.
            model_name: Hub name, alias, a name of your own, or a checkpoint folder.
            embedding_shape: Refuse embeddings of any other shape.
            output: None: `ast_output`, or else by the number of dimensions: hidden states for two
                and more, the pooled output for one.
            ast_outputs_dict: Another name for `embeddings` of the second form.
            cache_dir: Another root than `ast_cache_dir`.
            without_provenance: Add to a store that `extract` filled, although nothing shows that
                the same weights computed these. Otherwise that is refused.

        Returns:
            The first form: whether all of them are stored now. The second form: class name → how
            many weren't stored before. Refused ones (NaN, wrong shape, …) are logged by name and
            the others are stored all the same.

        Raises:
            CacheError, OSError: In the second form only, where the first returns False: nothing
                can be stored.
        """
        if isinstance(sample_rate, (str, os.PathLike)):
            cache_dir, sample_rate = sample_rate, None
        given = (ast_outputs_dict if embeddings is None else embeddings) or {}
        by_class = ast_outputs_dict is not None or _is_by_class(given)
        if not self._is_enabled():
            return {} if by_class else False
        rows = _rows(given, self._class_of if by_class else None)
        if not rows:
            _logger.warning("no embeddings to save")
            return {} if by_class else False
        output = output or self.ast_output or _output_of(rows[0][1])
        try:
            config = self.cache_config(sample_rate, duration, model_name, output)
            with EmbeddingCache(cache_dir or self.ast_cache_dir).writer(
                config,
                on_duplicate="skip",
                without_provenance=without_provenance,
                dataset_root=self.root_dir,
            ) as writer:
                is_new = [_put(writer, *row, embedding_shape) for row in rows]
        except (CacheError, OSError) as error:
            if by_class:
                raise
            _logger.error("AST embeddings can't be saved: %s", str(error))
            return False
        num_refused = is_new.count(None)
        _logger.info(
            "%d of %d AST embeddings are saved (%s)",
            len(rows) - num_refused,
            len(rows),
            config.slug,
        )
        if not by_class:
            return num_refused == 0
        outcomes = iter(is_new)
        return {
            class_name: sum(map(bool, itertools.islice(outcomes, len(group))))
            for class_name, group in given.items()
            if group
        }

    def clear_ast_cache(
        self,
        sample_rate: int | None = None,
        duration: float | None = None,
        model_name: str | None = None,
    ) -> None:
        """Remove stored embeddings of this dataset; each argument given narrows what goes.

        Raises:
            CacheError: An invalid argument, or the disk refuses.
        """
        if not self._is_enabled():
            return
        wanted = self.cache_config(
            sample_rate, duration, "ast" if model_name is None else model_name
        )
        cache = self._cache()
        for info in cache.stores():
            config = info.config or self._config_by_folder(wanted, info.path)
            if config is None:
                _logger.warning("%s is damaged and left alone: %s", info.path, info.damage)
            elif (
                config.namespace == self.namespace
                and (sample_rate is None or config.sample_rate == wanted.sample_rate)
                and (duration is None or config.duration == wanted.duration)
                and (model_name is None or config.model_name == wanted.model_name)
            ):
                self._forget(info.path)
                cache.clear(config)
                _logger.info("removed %s (%d embeddings)", info.path, info.num_embeddings)

    def _config_by_folder(self, like: CacheConfig, path: Path) -> CacheConfig | None:
        """The config of a damaged store, by its folder's name."""
        for output in (self.ast_output, *_OUTPUT_ORDER):
            config = like.replace(output=output or POOLED)
            if self._cache().path(config) == path:
                return config
        return None

    def _forget(self, path: Path) -> None:
        """Drop the embeddings that were loaded from this store."""

        def is_of_it(embeddings: Mapping[str, Any] | None) -> bool:
            store = _store_of(embeddings)
            return store is not None and store.path == path

        self._drop(is_of_it)
        for name in [n for n, loaded in self._ast_cache.items() if is_of_it(loaded.embeddings)]:
            del self._ast_cache[name]

    def filter_audio_embeddings_from_file(self) -> None:
        """Let `audio_embs` hold those of `audio_embs_from_file` that belong to the active classes.

        What it held before is gone.
        """
        source = self.audio_embs_from_file
        embeddings = self.audio_embs
        if not isinstance(embeddings, EmbeddingOverlay):
            self.audio_embs = embeddings = EmbeddingOverlay()
        embeddings.clear()  # in place: other datasets may share it
        if source is None:
            _logger.warning("no audio embeddings are loaded; nothing to filter")
        elif isinstance(source, TensorMapping):
            embeddings.put_over(TensorMapping(source.arrays, classes=self.active_classes))
        else:
            for key, value in source.items():
                if _class_of(key, value) in self.active_classes:
                    embeddings[key] = value
        _logger.info("%d audio embeddings after filtering", len(embeddings))

    def get_ast_cache_filepath(
        self,
        sample_rate: int,
        duration: float,
        model_name: str = "ast",
        output: str | None = None,
    ) -> str:
        """Return the folder where the embeddings of this config are, or would be, stored."""
        config = self.stored_config(sample_rate, duration, model_name, output)
        return str(self._cache().path(config))

    def verify_ast_cache_compatibility(
        self,
        cache_file: str | Path,
        expected_sample_rate: int,
        expected_duration: float,
        expected_model: str = "ast",
    ) -> bool:
        """Return whether the store in this folder has this config, whatever the output."""
        try:
            stored = read_store_info(cache_file).config or CacheConfig()
            expected = self.cache_config(
                expected_sample_rate, expected_duration, expected_model, stored.output
            )
        except CacheNotFoundError:
            return False
        except (CacheError, OSError) as error:
            _logger.error("%s can't be verified: %s", cache_file, str(error))
            return False
        if differences := expected.differences(stored):
            _logger.info("%s: (here, there) differ in %s", cache_file, differences)
        return not differences

    _get_ast_cache_filepath = get_ast_cache_filepath
    _verify_ast_cache_compatibility = verify_ast_cache_compatibility

    def _cache(self) -> EmbeddingCache:
        return EmbeddingCache(self.ast_cache_dir)

    def stored_config(
        self, sample_rate: int, duration: float, model_name: str, output: str | None
    ) -> CacheConfig:
        """Return the config to read or to extend: without an output, the one that is stored.

        Of several it is the one with most of this dataset's samples; the pooled output if there is
        none.
        """
        return self._config_in(self._cache(), sample_rate, duration, model_name, output)

    def _config_in(
        self,
        cache: EmbeddingCache,
        sample_rate: int | None,
        duration: float | None,
        model_name: str,
        output: str | None,
    ) -> CacheConfig:
        config = self.cache_config(sample_rate, duration, model_name, output)
        if output or self.ast_output:
            return config
        present = {
            stored: cache.coverage(stored, self.sample_ids).num_present
            for stored in cache
            if stored.replace(output=config.output) == config
        }
        if not present:
            return config
        best = min(present, key=lambda c: (-present[c], _output_rank(c.output), c.output))
        if len(present) > 1:
            _logger.info(
                "several outputs are stored (%s); %s is taken, which has %d of these samples",
                ", ".join(sorted(stored.output for stored in present)),
                best.output,
                present[best],
            )
        return best


def item_id(sample: Sample) -> str:
    """`file_id:class`; both parts are canonical since the files were listed."""
    return f"{sample['file_id']}:{sample['class_name']}"


def _checked(sample_id: str, value: Any, shape: tuple[int, ...] | None) -> Any:
    """Return the tensor or array in a value, if it is one and has this shape.

    Raises:
        InvalidEmbeddingError: It isn't or hasn't; the message names the sample.
    """
    embedding = unwrapped(value)
    if has_masked_elements(embedding):
        raise InvalidEmbeddingError(f"{sample_id}: an embedding with masked elements has no value")
    if not hasattr(embedding, "shape") or not hasattr(embedding, "dtype"):
        raise InvalidEmbeddingError(
            f"{sample_id}: a {type(value).__name__} without a tensor or array in it"
        )
    if shape is not None and tuple(embedding.shape) != tuple(shape):
        raise InvalidEmbeddingError(
            f"{sample_id}: shape {tuple(embedding.shape)}; `embedding_shape` says {tuple(shape)}"
        )
    return embedding


def _output_of(embedding: Any) -> str:
    """Guess which output of the model this is, by its dimensions."""
    return output_of_dimensions(getattr(unwrapped(embedding), "ndim", 1))


def _class_of(key: str, value: Any) -> str:
    """Return the class in a legacy value, or else in the sample id."""
    if isinstance(value, Mapping) and "class_name" in value:
        return str(value["class_name"]).lower()
    try:
        return split_sample_id(key)[1]
    except InvalidSampleIdError:
        return ""


def _is_stored(embeddings: Mapping[str, Any] | None) -> bool:
    return _store_of(embeddings) is not None


def _store_of(embeddings: Mapping[str, Any] | None) -> EmbeddingReader | None:
    """Return the store that these are read from, if they are."""
    arrays = embeddings.arrays if isinstance(embeddings, TensorMapping) else None
    return arrays if isinstance(arrays, EmbeddingReader) else None


def _open_reader(cache: EmbeddingCache, config: CacheConfig) -> EmbeddingReader | None:
    try:
        reader = cache.reader(config)
    except CacheNotFoundError:
        cache.explain(config).log()
        return None
    return reader if len(reader) else None


def _is_by_class(embeddings: Mapping[str, Any]) -> bool:
    """Whether these are by class and file id, not by sample id; a value may be a dict in both."""
    return bool(embeddings) and all(
        ":" not in name and isinstance(value, Mapping) and unwrapped(value) is None
        for name, value in embeddings.items()
    )


def _rows(
    embeddings: Mapping[str, Any], class_of: Callable[[str], str] | None
) -> list[tuple[tuple[str, ...], Any]]:
    """Return (sample id,) or, of embeddings by class, (file id, class name); and the value."""
    if class_of is None:
        return [((sample_id,), value) for sample_id, value in embeddings.items()]
    return [
        ((file_id, class_of(class_name)), value)
        for class_name, group in embeddings.items()
        for file_id, value in group.items()
    ]


def _put(
    writer: EmbeddingWriter, parts: tuple[str, ...], value: Any, shape: tuple[int, ...] | None
) -> bool | None:
    """Return whether it wasn't stored yet; None if it is refused, and the log says why."""
    try:
        sample_id = parts[0] if len(parts) == 1 else join_sample_id(*parts)
        return writer.put(sample_id, _checked(sample_id, value, shape))
    except (InvalidEmbeddingError, InvalidSampleIdError) as error:
        _logger.error("not saved: %s", str(error))
        return None


def _output_rank(output: str) -> int:
    return _OUTPUT_ORDER.index(output) if output in _OUTPUT_ORDER else len(_OUTPUT_ORDER)
