"""The map: embeddings in two dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from lmdbcache.report.vectors import Vectors

__all__ = ["MAX_POINTS", "EmbeddingMap", "map_of"]

MAX_POINTS: Final = 5_000  # what a phone still draws and moves as SVG


@dataclass(frozen=True)
class EmbeddingMap:
    """Two principal components.

    Args:
        sample_ids: One for each point.
        x: First component.
        y: Second component.
        explained_variance: Share of the variance along each, 0 to 1.
    """

    sample_ids: list[str]
    x: list[float]
    y: list[float]
    explained_variance: list[float]


def map_of(vectors: Vectors) -> EmbeddingMap | str:
    """The map of the first 5,000 vectors, or why there is none."""
    from sklearn.decomposition import PCA

    if vectors.pooled is None or not vectors.sample_ids:
        return (
            "The embeddings have different lengths." if vectors.sample_ids else "Nothing to show."
        )
    points = vectors.pooled[:MAX_POINTS].astype(np.float64)
    if len(points) == 1:
        return "One embedding alone has no map."
    largest = np.abs(points).max()
    points /= largest or 1.0
    if np.ptp(points, axis=0).max() == 0:
        return "All embeddings that were looked at are equal."
    num_components = min(2, *points.shape)
    pca = PCA(
        num_components,
        svd_solver="covariance_eigh" if points.shape[1] < 4096 else "auto",
        random_state=0,
    )
    coordinates = pca.fit_transform(points)
    coordinates = np.pad(coordinates, ((0, 0), (0, 2 - num_components))) * (largest or 1.0)
    shares = [float(share) for share in pca.explained_variance_ratio_]
    return EmbeddingMap(
        sample_ids=vectors.sample_ids[:MAX_POINTS],
        x=coordinates[:, 0].tolist(),
        y=coordinates[:, 1].tolist(),
        explained_variance=[*shares, 0.0][:2],
    )
