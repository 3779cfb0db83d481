"""Names that keep the datasets of one cache root apart.

A published dataset has a name of its own (`vegas`, `esc50`, `vggsound`). That of a folder is made
from the folder's name with a prefix, `folder-speech`, so that it can't be one of these. Two
folders may be called alike: `check_namespace` compares where a store was filled from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.audio import shown
from lmdbcache.config import CacheConfig
from lmdbcache.datasets.vegas import layout as vegas_layout
from lmdbcache.errors import DatasetError

if TYPE_CHECKING:
    from lmdbcache.cache import EmbeddingCache
    from lmdbcache.datasets.base import AudioDataset

__all__ = ["PUBLISHED", "check_namespace", "chosen_namespace", "derived_namespace"]

# Adapter → the name that nobody else may take.
PUBLISHED: Final = {"vegas": vegas_layout.NAMESPACE, "esc50": "esc50", "vggsound": "vggsound"}

_NOT_IN_A_NAME: Final = re.compile(r"[^a-z0-9_.]+")
_MOST_CHARACTERS: Final = 80

_logger = logging.getLogger(__name__)


def derived_namespace(prefix: str, name: str) -> str:
    """`prefix-name` in letters that a namespace may have.

    A name that loses something by this, such as one in another script, gets six digits of its
    digest, so that two of them stay two.

    Args:
        prefix: Which adapter.
        name: A folder's name.
    """
    slug = _NOT_IN_A_NAME.sub("-", name.lower()).strip("-")[:_MOST_CHARACTERS]
    if slug != name.lower():
        digest = hashlib.blake2b(os.fsencode(name.lower()), digest_size=3).hexdigest()
        slug = f"{slug}-{digest}" if slug else digest
    return f"{prefix}-{slug}"


def chosen_namespace(namespace: str, kind: str) -> str:
    """A namespace that the user gave, checked.

    Raises:
        ConfigError: It can't be one.
        DatasetError: It is the name of another published dataset.
    """
    name = CacheConfig(namespace=namespace).namespace
    owner = next((owner for owner, published in PUBLISHED.items() if published == name), kind)
    if not name or owner != kind:
        reason = f"it belongs to {owner}" if name else "it is empty"
        raise DatasetError(f"namespace: {namespace!r}: {reason}; give another name")
    return name


def check_namespace(cache: EmbeddingCache, config: CacheConfig, dataset: AudioDataset) -> None:
    """Refuse a store that was filled from another folder of the same name.

    A published dataset may lie anywhere, and a namespace that the user chose is taken at their
    word, with a warning.

    Args:
        cache: The cache directory.
        config: Of the store; its `dataset` is the dataset's namespace.
        dataset: What is about to be looked up or stored.

    Raises:
        DatasetError: The namespace was made from the folder's name, and the store of this config
            was filled from another folder.
    """
    published = PUBLISHED.values()
    root = getattr(dataset, "root", "")
    if not root or dataset.namespace in published or config not in cache:
        return
    filled_from = cache.info(config).dataset_root
    if not filled_from or _same_place(filled_from, root):
        return
    found = f"the store of {dataset.namespace!r} was filled from {filled_from}, this is "
    if getattr(dataset, "namespace_is_derived", False):
        raise DatasetError(
            f"{found}{shown(root)}. If these are the same clips, moved or mounted elsewhere, say "
            f"so with namespace {dataset.namespace!r} (--namespace); if not, give a namespace of "
            "your own"
        )
    _logger.warning("%s%s: one namespace for both", found, shown(root))


def _same_place(filled_from: str, root: Any) -> bool:
    # The metadata holds bytes that aren't UTF-8 escaped.
    here = {os.path.abspath(root), os.path.realpath(root)}  # noqa: PTH100
    there = {filled_from, os.path.realpath(filled_from)}
    return bool({shown(path) for path in here} & there) or root == filled_from
