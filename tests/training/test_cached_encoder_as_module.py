"""CachedEncoder: a module among others, in a training step."""

from __future__ import annotations

import pytest
import torch
from training.encoders import (
    OWN,
    WIDTH,
    CountingEncoder,
    ask,
    build,
    direct,
    names_of,
    waveforms_of,
)

from lmdbcache import CachedEncoder


def test_in_a_training_step(encoder):
    """Only the head is trained; nothing of the encoder is in parameters or state_dict."""
    network = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(WIDTH, 1)})
    assert set(network.state_dict()) == {"head.weight", "head.bias"}
    assert not list(encoder.parameters())
    network.train()
    loss = network["head"](ask(encoder, range(4))).square().mean()
    loss.backward()
    assert network["head"].weight.grad is not None
    assert encoder.config.slug.split("-")[0] in repr(network)


def test_autocast_around_it_changes_nothing(cache, encoder):
    """The model computes as the config says, in a training loop under bfloat16 too."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ask(encoder, range(4))
    assert torch.equal(found, direct(range(4)))
    with CachedEncoder(cache, OWN.replace(compute_dtype="bfloat16"), CountingEncoder()) as half:
        found = ask(half, range(4))
    assert not torch.equal(found, direct(range(4)))
    torch.testing.assert_close(found, direct(range(4)), atol=0.05, rtol=0)


def test_compiled_networks_leave_it_out(encoder, model):
    """torch.compile of a network around it works, and hits stay hits."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = encoder, torch.nn.Linear(WIDTH, 1)

        def forward(self, waveforms, sample_ids):
            return self.head(self.encoder(waveforms, sample_ids=sample_ids))

    network = Network()
    compiled = torch.compile(network, backend="eager")
    for numbers in ([1, 2], [2, 3], [1, 2]):
        args = waveforms_of(numbers), names_of(numbers)
        assert torch.equal(compiled(*args), network(*args))
    assert model.passes == [2, 1]


def test_dtype_and_device_asked_for(encoder, model):
    """to(dtype) changes what is returned, not what is computed; to(device) moves the model too."""
    encoder.to(torch.bfloat16)
    assert torch.equal(ask(encoder, [1]), direct([1]).bfloat16())
    assert model.layer.weight.dtype == torch.float32
    encoder.float().to("meta")
    assert model.layer.weight.device.type == "meta"
    assert ask(encoder, [1]).device.type == "meta"  # from memory


@pytest.mark.gpu
def test_on_a_gpu(cache):
    """Hits and misses come on the GPU; the model is moved there, its inputs too."""
    with CachedEncoder(cache, OWN, build, device="cuda") as encoder:
        for _ in range(2):
            found = ask(encoder, range(3))
            assert found.is_cuda
            torch.testing.assert_close(found.cpu(), direct(range(3)), atol=1e-3, rtol=0)
    with CachedEncoder(cache, OWN, CountingEncoder().cuda()) as encoder:
        assert ask(encoder, [1]).is_cuda
