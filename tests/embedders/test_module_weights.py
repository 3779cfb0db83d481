"""One digest for all weights of a module, and for nothing else."""

from __future__ import annotations

import copy
import warnings
import zlib

import numpy as np
import pytest
import torch

from lmdbcache.embedders import module_digest
from lmdbcache.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def plain(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)
        ).eval()


def dynamic(module, kinds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(module, kinds, dtype=torch.qint8)


def dynamic_linear(seed):
    return dynamic(plain(seed), {torch.nn.Linear})


def dynamic_lstm(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dynamic(torch.nn.Sequential(torch.nn.LSTM(3, 2)), {torch.nn.LSTM})


def static(seed):
    """Quantized layers with their own weights, as a converted checkpoint has them."""
    quantized = torch.ao.nn.quantized
    layers = torch.nn.Sequential(quantized.Conv2d(1, 2, 3), quantized.Linear(4, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            weight = torch.quantize_per_channel(
                torch.randn(layer.weight().shape),
                torch.full((layer.weight().shape[0],), 0.02),
                torch.zeros(layer.weight().shape[0], dtype=torch.int64),
                0,
                torch.qint8,
            )
            layer.set_weight_bias(weight, torch.zeros(weight.shape[0]))
    return layers


class WithState(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


class Holding(torch.nn.Module):
    """One buffer or parameter."""

    def __init__(self, tensor, *, persistent=True):
        super().__init__()
        if isinstance(tensor, torch.nn.Parameter):
            self.held = tensor
        else:
            self.register_buffer("held", tensor, persistent=persistent)


def matrix(seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 6)).round(1))


def scripted(module):
    return torch.jit.script(module)


KINDS = {
    "parameters": plain,
    "persistent buffer": lambda seed: Holding(matrix(seed)),
    "other buffer": lambda seed: Holding(matrix(seed), persistent=False),
    "no dimensions": lambda seed: Holding(torch.tensor(float(seed))),
    "complex": lambda seed: Holding(torch.complex(matrix(0), matrix(seed))),
    "conjugated": lambda seed: Holding(torch.complex(matrix(0), matrix(seed)).conj()),
    "bool": lambda seed: Holding(matrix(seed) > 0),
    "bfloat16": lambda seed: Holding(matrix(seed).to(torch.bfloat16)),
    "float8": lambda seed: Holding(matrix(seed).to(torch.float8_e4m3fn)),
    "sparse COO": lambda seed: Holding(matrix(seed).relu().to_sparse()),
    "sparse CSR": lambda seed: Holding(matrix(seed).relu().to_sparse_csr()),
    "sparse CSC": lambda seed: Holding(matrix(seed).relu().to_sparse_csc()),
    "quantized values": lambda seed: Holding(
        torch.quantize_per_tensor(matrix(seed).float(), 0.1, 0, torch.qint8)
    ),
    "quantization scale": lambda seed: Holding(
        torch.quantize_per_tensor(torch.full((3,), 0.1 + seed), 0.1 + seed, 0, torch.qint8)
    ),
    "zero point": lambda seed: Holding(
        torch.quantize_per_tensor(-0.1 * seed * torch.ones(3), 0.1, seed, torch.quint8)
    ),
    "scales by channel": lambda seed: Holding(
        torch.quantize_per_channel(
            torch.zeros(2, 3), torch.tensor([0.1, 0.2 + seed]), torch.zeros(2), 0, torch.qint8
        )
    ),
    "dynamic Linear": dynamic_linear,
    "dynamic LSTM": dynamic_lstm,
    "static layers": static,
    "extra state": lambda seed: WithState({"table": matrix(seed), "steps": [1, None, "a"]}),
    "extra numbers": lambda seed: WithState({"scale": 0.5 + seed}),
    "extra array": lambda seed: WithState((np.arange(3) + seed, b"bytes")),
    "scripted": lambda seed: scripted(plain(seed)),
    "frozen script": lambda seed: torch.jit.freeze(scripted(plain(seed))),
    "traced": lambda seed: torch.jit.trace(plain(seed), torch.zeros(2, 4)),
    "scripted and quantized": lambda seed: scripted(dynamic_linear(seed)),
    "frozen, scripted and quantized": lambda seed: torch.jit.freeze(
        scripted(dynamic_linear(seed))
    ),
    "parametrized": lambda seed: torch.nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(plain(seed)[0])
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_have_one_digest_and_others_another(kind):
    """Whatever the weights are kept in."""
    make = KINDS[kind]
    first = module_digest(make(0))
    assert module_digest(make(0)) == first
    assert module_digest(make(1)) != first


def test_golden_digest():
    """The digest of a plain module is fixed: stores carry it in their provenance."""
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.arange(6.0).reshape(2, 3))
        module.bias.copy_(torch.tensor([0.5, -0.5]))
    assert module_digest(module) == "59151d3e1432e3f4"


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.requires_grad_(False),
        lambda module: module.train(),
        torch.compile,
        lambda module: torch.nn.Sequential(*(torch.compile(part) for part in module)),
        torch.nn.DataParallel,
        lambda module: torch.compile(torch.nn.DataParallel(module)),
        lambda module: torch.nn.Sequential(*(copy.deepcopy(part) for part in module)),
        torch.jit.script,
    ],
)
def test_how_a_module_is_wrapped_has_no_part(change):
    """Nor whether it is trained."""
    assert module_digest(change(plain())) == module_digest(plain())


def test_memory_layout_has_no_part():
    """Neither strides nor the memory that a tensor is a part of."""
    values = torch.randn(2, 3, 4, 5)
    expected = module_digest(Holding(values))
    assert module_digest(Holding(values.to(memory_format=torch.channels_last))) == expected
    assert module_digest(Holding(torch.stack([values, values])[1])) == expected
    assert module_digest(Holding(values.mT.contiguous().mT)) == expected
    sparse = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 5.0], (4,))
    assert module_digest(Holding(sparse)) == module_digest(Holding(sparse.coalesce()))


@pytest.mark.parametrize(
    "others",
    [
        lambda values: values.to(torch.float64),
        lambda values: values.reshape(3, 2),
        lambda values: values.view(torch.int32),
        lambda values: values.to_sparse(),
    ],
)
def test_dtype_shape_and_kind_have_a_part(others):
    """Equal bytes in another form are other weights."""
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert module_digest(Holding(others(values))) != module_digest(Holding(values))


def test_names_have_a_part():
    """Two layers exchanged are another model."""
    assert module_digest(plain()) != module_digest(torch.nn.Sequential(*reversed(plain())))


def test_tied_weights_are_equal_weights():
    """What two names share counts under both, as in a copy that doesn't share it."""
    layer = torch.nn.Linear(2, 2)
    tied = torch.nn.Sequential(layer, layer)
    untied = torch.nn.Sequential(copy.deepcopy(layer), copy.deepcopy(layer))
    other = torch.nn.Sequential(copy.deepcopy(layer), torch.nn.Linear(2, 2))
    assert module_digest(tied) == module_digest(untied) != module_digest(other)


class Failing(torch.nn.Module):
    def get_extra_state(self):
        raise ValueError("not now")


@pytest.mark.parametrize(
    ("module", "culprit"),
    [
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta")), "0.bias"),
        (lambda: torch.nn.Sequential(torch.nn.LazyLinear(2)), "0.bias"),
        (lambda: torch.nn.Sequential(WithState(object())), "0._extra_state"),
        (lambda: torch.nn.Sequential(WithState({"deep": [zlib.compressobj()]})), "deep"),
        (lambda: WithState(np.array([object()])), "_extra_state"),
        (lambda: torch.nn.Sequential(Failing()), "not now"),
    ],
)
def test_what_cant_be_digested_is_refused(module, culprit):
    """By name: what is passed over could be the difference."""
    with pytest.raises(ConfigError, match=culprit):
        module_digest(module())


def test_a_wrapped_subclass_is_digested_by_its_parts():
    """A tensor made of others counts all of them."""
    two = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    ones, zeros = torch.ones(3), torch.zeros(3)
    digests = {
        module_digest(Holding(torch.nn.Parameter(two(ones.clone(), other.clone()))))
        for other in (ones, zeros, zeros)
    }
    assert len(digests) == 2
