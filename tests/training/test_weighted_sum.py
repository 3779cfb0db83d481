"""WeightedSum against the sum written out, for pooled layers and for frames."""

from __future__ import annotations

import pytest
import torch

from lmdbcache import WeightedSum
from lmdbcache.errors import ConfigError


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 8), (4, 3, 5, 8)])
def test_is_the_sum_with_softmax_weights(shape, normalize):
    """Also of float16 layers; its gradient reaches every weight."""
    layers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    mixture = WeightedSum(3, normalize=normalize)
    assert mixture.weights.tolist() == pytest.approx([1 / 3] * 3)
    with torch.no_grad():
        mixture.scores.copy_(torch.tensor([0.3, -1.0, 2.0]))
    shares = torch.tensor([0.3, -1.0, 2.0]).exp() / torch.tensor([0.3, -1.0, 2.0]).exp().sum()
    values = layers.float()
    if normalize:
        centered = values - values.mean(-1, keepdim=True)
        values = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    found = mixture(layers)
    expected = sum(share * values[:, number] for number, share in enumerate(shares))
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert (mixture.scores.grad != 0).all()


def test_another_number_of_layers_is_refused():
    """Not broadcast."""
    for shape in ((4, 2, 8), (3, 8)):
        with pytest.raises(ConfigError):
            WeightedSum(3)(torch.zeros(shape))
    with pytest.raises(ConfigError):
        WeightedSum(0)
