"""What a model has to offer to be run by the extraction: a front end and an embedder.

Both are structural: a class of your own needs these methods, not this base. The module stays free
of torch at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["Embedder", "FrontEnd"]


@runtime_checkable
class FrontEnd(Protocol):
    """Turns one waveform into the model's input, inside DataLoader worker processes.

    An instance is pickled to the workers: keep it small, and build what is heavy at first use.
    """

    @property
    def min_samples(self) -> int:
        """The shortest waveform that gives features, in samples."""
        ...

    def __call__(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute the features of one clip.

        Args:
            waveform: float32 array (num_samples,), mono.

        Returns:
            float32 array of one shape for all clips of equal length.
        """
        ...

    def provenance(self) -> dict[str, str]:
        """What else decides the features' last bits: implementation, library versions."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Turns a batch of features into embeddings, in the main process."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names that `output` can take for this model."""
        ...

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """Shape of one embedding."""
        ...

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Embed a batch.

        Args:
            features: float32 tensor (batch, ...), the front end's features stacked.

        Returns:
            float32 tensor (batch, *embedding_shape) on the CPU.
        """
        ...

    def provenance(self) -> dict[str, str]:
        """Weights, revision, library versions, device and compute dtype."""
        ...
