"""A learned mixture of a model's layers, for a cache of all of them."""

from __future__ import annotations

import torch

from lmdbcache.errors import ConfigError


class WeightedSum(torch.nn.Module):
    """The sum of a model's layers with softmax weights, which are learned with what follows.

    It begins with equal weights. What s3prl calls a featurizer.

    Args:
        num_layers: Layers of each sample: 13 for a store of `layers/mean` of 12 blocks.
        normalize: Bring each vector to mean 0 and variance 1 first, for models whose layers differ
            in scale.

    Raises:
        ConfigError: Less than one layer.
    """

    def __init__(self, num_layers: int, *, normalize: bool = False) -> None:
        super().__init__()
        if num_layers < 1:
            raise ConfigError(f"num_layers: {num_layers}; it must be 1 or more")
        self.num_layers = num_layers
        self.normalize = normalize
        self.scores = torch.nn.Parameter(torch.zeros(num_layers))

    @property
    def weights(self) -> torch.Tensor:
        """The share of each layer, `(num_layers,)`; their sum is 1."""
        return torch.softmax(self.scores, dim=0)

    def forward(self, layers: torch.Tensor) -> torch.Tensor:
        """Mix the layers of a batch.

        Args:
            layers: Floats `(batch, num_layers, ..., width)`, of any dtype.

        Returns:
            `(batch, ..., width)` in the dtype of the weights.

        Raises:
            ConfigError: Another number of layers.
        """
        if layers.ndim < 3 or layers.shape[1] != self.num_layers:
            raise ConfigError(
                f"layers: shape {tuple(layers.shape)}; expected (batch, {self.num_layers}, …, "
                "width), as a store of output 'layers' or 'layers/mean' gives it; `num_layers` is "
                "the model's number of blocks and one more"
            )
        layers = layers.to(self.scores.dtype)
        if self.normalize:
            layers = torch.nn.functional.layer_norm(layers, layers.shape[-1:])
        mixed = torch.matmul(self.weights, layers.flatten(2))
        return mixed.view(len(layers), *layers.shape[2:])

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"{self.num_layers}, normalize={self.normalize}"
