"""The AST cache of a dataset: the methods that scripts have always called."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.cache import EmbeddingCache, read_store_info
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import model_identity
from lmdbcache.errors import (
    CacheError,
    CacheNotFoundError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
)
from lmdbcache.storage import EmbeddingReader, has_masked_elements, split_sample_id
from lmdbcache.training import (
    HIDDEN,
    MEAN,
    POOLED,
    TensorMapping,
    output_of_dimensions,
    unwrapped,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["ASTCache"]

_OUTPUT_ORDER: Final = (POOLED, HIDDEN, MEAN)

_logger = logging.getLogger(__name__)


class ASTCache:
    """Save, load and narrow cached embeddings, on top of `EmbeddingCache`.

    Attributes:
        namespace: Goes to `CacheConfig.namespace`.
        root_dir: Folder of the clips; noted in a store that is made.
        ast_cache_dir: Root of the cache; made when something is saved.
        enable_ast_cache: If false, loading and saving do nothing and return False.
        ast_output: Which output is cached unless a call names one; None: the one that is there.
        active_classes: Class name → label; embeddings are narrowed to these.
    """

    namespace: str
    root_dir: str
    ast_cache_dir: str
    enable_ast_cache: bool
    ast_output: str | None
    active_classes: dict[str, int]
    _audio_embs: Mapping[str, Any]
    _audio_embs_from_file: Mapping[str, Any] | None

    if TYPE_CHECKING:

        @property
        def sample_ids(self) -> list[str]:
            """`file_id:class` of every sample."""

        def _parts(self) -> Sequence[ASTCache]:
            """The datasets that share what is loaded here (train, val and test of this one)."""

    @property
    def audio_embs(self) -> Mapping[str, Any]:
        """Sample id → embedding: where an item looks first."""
        return self._audio_embs

    @audio_embs.setter
    def audio_embs(self, value: Mapping[str, Any]) -> None:
        self._audio_embs = value
        for part in self._parts():
            part.audio_embs = value

    @property
    def audio_embs_from_file(self) -> Mapping[str, Any] | None:
        """Sample id → embedding, of all classes: where an item looks next."""
        return self._audio_embs_from_file

    @audio_embs_from_file.setter
    def audio_embs_from_file(self, value: Mapping[str, Any] | None) -> None:
        self._audio_embs_from_file = value
        for part in self._parts():
            part.audio_embs_from_file = value

    def _is_enabled(self) -> bool:
        if not self.enable_ast_cache:
            _logger.info("the AST cache is switched off (enable_ast_cache=False)")
        return self.enable_ast_cache

    def cache_config(
        self,
        sample_rate: int = 16000,
        duration: float = 5.0,
        model_name: str = "ast",
        output: str | None = None,
    ) -> CacheConfig:
        """Return the config under which this dataset's embeddings are stored.

        Args:
            sample_rate: In Hz.
            duration: In seconds.
            model_name: Hub name, alias, a name of your own, or a checkpoint folder.
            output: None: `ast_output`, or else the pooled one.

        Raises:
            ConfigError: An invalid value.
            ModelLoadError: A path that isn't a checkpoint folder.
        """
        return CacheConfig(
            sample_rate=sample_rate,
            duration=duration,
            model_name=model_identity(model_name),
            output=output or self.ast_output or POOLED,
            namespace=self.namespace,
        )

    def load_ast_embeddings_from_cache(
        self,
        sample_rate: int = 16000,
        duration: float = 5.0,
        model_name: str = "ast",
        output: str | None = None,
    ) -> bool:
        """Make the stored embeddings of this config available to the items.

        Nothing is read yet: `audio_embs_from_file` becomes a lazy Mapping.

        Returns:
            False if nothing is stored for it, or it can't be read; the log says why.
        """
        if not self._is_enabled():
            return False
        try:
            config = self.stored_config(sample_rate, duration, model_name, output)
            reader = self._open_reader(config)
        except (CacheError, OSError) as error:
            _logger.error("AST embeddings can't be loaded: %s", str(error))
            return False
        if reader is None:
            return False
        if isinstance(self.audio_embs, TensorMapping):
            self.audio_embs = {}  # narrowed from an earlier load
        self.audio_embs_from_file = TensorMapping(reader)
        _logger.info("loaded %d AST embeddings (%s)", len(reader), config.slug)
        return True

    def save_ast_embeddings_to_cache(
        self,
        embeddings: Mapping[str, Any],
        sample_rate: int = 16000,
        duration: float = 5.0,
        model_name: str = "ast",
        embedding_shape: tuple[int, ...] | None = None,
        output: str | None = None,
        *,
        without_provenance: bool = False,
    ) -> bool:
        """Store embeddings; samples that are stored already are skipped.

        Args:
            embeddings: `file_id:class` → tensor, array, or a dict holding one under `embeddings`
                or `embedding`.
            sample_rate: In Hz.
            duration: In seconds.
            model_name: Hub name, alias, a name of your own, or a checkpoint folder.
            embedding_shape: Refuse embeddings of any other shape.
            output: None: `ast_output`, or else by the number of dimensions: hidden states for two
                and more, the pooled output for one.
            without_provenance: Add to a store that `extract` filled, although nothing shows that
                the same weights computed these. Otherwise that is refused.

        Returns:
            True if all of them are stored now. Refused ones (NaN, wrong shape, …) are logged by
            name and the others are stored all the same.
        """
        if not self._is_enabled():
            return False
        if not embeddings:
            _logger.warning("no embeddings to save")
            return False
        try:
            output = output or self.ast_output or _output_of(embeddings)
            config = self.cache_config(sample_rate, duration, model_name, output)
            refused = self._put_all(
                config, embeddings, embedding_shape, without_provenance=without_provenance
            )
        except (CacheError, OSError) as error:
            _logger.error("AST embeddings can't be saved: %s", str(error))
            return False
        _logger.info(
            "%d of %d AST embeddings are saved (%s)",
            len(embeddings) - refused,
            len(embeddings),
            config.slug,
        )
        return refused == 0

    def _put_all(
        self,
        config: CacheConfig,
        embeddings: Mapping[str, Any],
        embedding_shape: tuple[int, ...] | None,
        *,
        without_provenance: bool,
    ) -> int:
        refused = 0
        with self._cache().writer(
            config,
            on_duplicate="skip",
            without_provenance=without_provenance,
            dataset_root=self.root_dir,
        ) as writer:
            for sample_id, value in embeddings.items():
                try:
                    writer.put(sample_id, _checked(sample_id, value, embedding_shape))
                except (InvalidEmbeddingError, InvalidSampleIdError) as error:
                    _logger.error("not saved: %s", str(error))
                    refused += 1
        return refused

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
            16000 if sample_rate is None else sample_rate,
            5.0 if duration is None else duration,
            "ast" if model_name is None else model_name,
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
        if _is_read_from(self.audio_embs_from_file, path):
            self.audio_embs_from_file = None
        if _is_read_from(self.audio_embs, path):
            self.audio_embs = {}

    def filter_audio_embeddings_from_file(self) -> None:
        """Set `audio_embs` to those of `audio_embs_from_file` that belong to the active classes."""
        source = self.audio_embs_from_file
        if source is None:
            _logger.warning("no audio embeddings are loaded; nothing to filter")
            self.audio_embs = {}
            return
        if isinstance(source, TensorMapping):
            self.audio_embs = TensorMapping(source.arrays, classes=self.active_classes)
        else:
            self.audio_embs = {
                key: value
                for key, value in source.items()
                if _class_of(key, value) in self.active_classes
            }
        _logger.info("%d audio embeddings after filtering", len(self.audio_embs))

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
        config = self.cache_config(sample_rate, duration, model_name, output)
        if output or self.ast_output:
            return config
        present = {
            stored: self._num_present(stored)
            for stored in self._cache()
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

    def _num_present(self, config: CacheConfig) -> int:
        return self._cache().coverage(config, self.sample_ids).num_present

    def _open_reader(self, config: CacheConfig) -> EmbeddingReader | None:
        try:
            reader = self._cache().reader(config)
        except CacheNotFoundError:
            self._cache().explain(config).log()
            return None
        return reader if len(reader) else None


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


def _output_of(embeddings: Mapping[str, Any]) -> str:
    """Guess which output of the model these are, by the dimensions of the first."""
    first = unwrapped(next(iter(embeddings.values())))
    return output_of_dimensions(getattr(first, "ndim", 1))


def _class_of(key: str, value: Any) -> str:
    """Return the class in a legacy value, or else in the sample id."""
    if isinstance(value, Mapping) and "class_name" in value:
        return str(value["class_name"]).lower()
    try:
        return split_sample_id(key)[1]
    except InvalidSampleIdError:
        return ""


def _is_read_from(embeddings: Mapping[str, Any] | None, store: Path) -> bool:
    arrays = embeddings.arrays if isinstance(embeddings, TensorMapping) else None
    return isinstance(arrays, EmbeddingReader) and arrays.path == store


def _output_rank(output: str) -> int:
    return _OUTPUT_ORDER.index(output) if output in _OUTPUT_ORDER else len(_OUTPUT_ORDER)
