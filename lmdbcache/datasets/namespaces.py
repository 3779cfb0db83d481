"""Names that keep the datasets of one cache root apart.

A published dataset has a fixed name (`vegas`, `esc50`, `vggsound`). That of a folder is made
from the folder's name with a prefix, `folder-speech`, so that it can't be one of these. Two
folders may have the same name: `check_namespace` compares where a store was filled from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.audio import shown
from lmdbcache.config import CacheConfig
from lmdbcache.datasets.base import AudioDataset
from lmdbcache.errors import DatasetError

if TYPE_CHECKING:  # listing a dataset needs no cache
    from lmdbcache.cache import EmbeddingCache

# Namespaces of published datasets, each reserved for the adapter of this name.
PUBLISHED: Final = ("vegas", "esc50", "vggsound")

_NOT_IN_A_NAME: Final = re.compile(r"[^a-z0-9_.]+")
_MOST_CHARACTERS: Final = 80

_logger = logging.getLogger(__name__)


def namespace_of(kind: str, given: str | None, name: str = "") -> str:
    """Return the namespace of a dataset.

    Args:
        kind: Its layout.
        given: The one that the user gave, or None.
        name: The folder's name, from which the namespace of an unpublished dataset is made.

    Raises:
        ConfigError: The given one is invalid.
        DatasetError: The given one is empty, or the name of another published dataset.
    """
    if given is None:
        return kind if kind in PUBLISHED else derived_namespace(kind, name)
    namespace = CacheConfig(namespace=given).namespace
    if not namespace:
        raise DatasetError("namespace: it is empty; give a name, or leave it out")
    if namespace in PUBLISHED and namespace != kind:
        raise DatasetError(f"namespace: {given!r}: it belongs to {namespace}; give another name")
    return namespace


def derived_namespace(kind: str, name: str) -> str:
    """Return `kind-name` in letters that a namespace may have.

    A name that loses something by this, such as one in another script, gets six digits of its
    digest, so that two of them stay two.

    Args:
        kind: The layout.
        name: The folder's name.
    """
    slug = _NOT_IN_A_NAME.sub("-", name.lower()).strip("-")[:_MOST_CHARACTERS]
    if slug != name.lower():
        digest = hashlib.blake2b(os.fsencode(name.lower()), digest_size=3).hexdigest()
        slug = f"{slug}-{digest}" if slug else digest
    return f"{kind}-{slug}"


def check_namespace(cache: EmbeddingCache, config: CacheConfig, dataset: AudioDataset) -> None:
    """Refuse a store that was filled from another folder of the same name.

    A published dataset may lie anywhere. A namespace that the user chose is accepted, with a
    warning.

    Args:
        cache: The cache directory.
        config: Of the store; its `namespace` is the dataset's.
        dataset: The dataset to look up or to store.

    Raises:
        DatasetError: The namespace was made from the folder's name, and the store of this config
            was filled from another folder.
    """
    root = getattr(dataset, "root", "")
    if not root or dataset.namespace in PUBLISHED or config not in cache:
        return
    filled_from = cache.info(config).dataset_root
    if not filled_from or _same_place(filled_from, root):
        return
    found = f"the store of {dataset.namespace!r} was filled from {filled_from}, this is "
    if getattr(dataset, "namespace_is_derived", False):
        raise DatasetError(
            f"{found}{shown(root)}. If these are the same clips, moved or mounted elsewhere, open "
            f'the dataset with `namespace="{dataset.namespace}"`; if not, with another namespace'
        )
    _logger.warning("%s%s: one namespace for both", found, shown(root))


def _same_place(filled_from: str, root: Any) -> bool:
    # The metadata holds bytes that aren't UTF-8 escaped.
    here = {os.path.abspath(root), os.path.realpath(root)}  # noqa: PTH100
    there = {filled_from, os.path.realpath(filled_from)}
    return bool({shown(path) for path in here} & there) or root == filled_from
