"""In a training loop: torch tensors, a Dataset, a loader, a store in RAM, a cached encoder."""

from lmdbcache.training.cached_encoder import CachedEncoder
from lmdbcache.training.dataset import CollatedBatch, EmbeddingDataset, collate_embeddings
from lmdbcache.training.loader import EmbeddingLoader, make_dataloader
from lmdbcache.training.preloading import PreloadedEmbeddings, preload
from lmdbcache.training.tensors import TensorMapping, as_tensor

__all__ = [
    "CachedEncoder",
    "CollatedBatch",
    "EmbeddingDataset",
    "EmbeddingLoader",
    "PreloadedEmbeddings",
    "TensorMapping",
    "as_tensor",
    "collate_embeddings",
    "make_dataloader",
    "preload",
]
