"""The weights of a torch module: one digest for them, and a watch over them.

The digest is the same however the module is wrapped or placed. torch is imported inside the
functions.
"""

from __future__ import annotations

import dataclasses
import enum
import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import xxhash

from lmdbcache.errors import ConfigError, ProvenanceMismatchError
from lmdbcache.files import few

if TYPE_CHECKING:
    import torch

_EXTRA_STATE: Final = "_extra_state"
_COMPILED: Final = "_orig_mod"
# What every scripted module has beside its own attributes.
_SCRIPT_ATTRIBUTES: Final = frozenset({"training", "_is_full_backward_hook"})
_SPARSE_PARTS: Final = {
    "torch.sparse_coo": ("indices", "values"),
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
# A process holds a part of these only: its digest would be another one on each rank.
_SHARDED: Final = ("DTensor", "FlatParameter", "ShardedTensor")
_SAMPLED: Final = 64
_SAMPLED_PER_DIMENSION: Final = 4


class _ModuleState(NamedTuple):
    """All that decides what a module computes, but its code.

    Args:
        tensors: Parameters and buffers by name, non-persistent buffers included; a tensor that has
            several names is under each.
        others: What is kept elsewhere: packed parameters, extra state, constants of a graph.
        caches: Names of non-persistent buffers.
    """

    tensors: dict[str, torch.Tensor]
    others: dict[str, Any]
    caches: frozenset[str]


def module_digest(module: torch.nn.Module) -> str:
    """Return 16 hex digits over the name, dtype, shape and values of all weights of a module.

    It covers parameters, buffers, non-persistent ones included, packed parameters of quantized
    modules, `get_extra_state`, and the attributes and constants of scripted modules. A tensor in a
    plain attribute isn't covered: register it as a buffer.

    Device, memory layout, `requires_grad`, train or eval mode, tied or equal tensors,
    `torch.compile`, and `DataParallel` or `DistributedDataParallel` around the module change
    nothing.

    Raises:
        ConfigError: Something has no values yet (meta device, lazy parameter), is a shard, or is of
            a kind that can't be digested; the message names it.
    """
    state = _module_state(module)
    return _values_digest({**state.tensors, **state.others})


def _module_state(module: torch.nn.Module) -> _ModuleState:
    """Collect what `module_digest` covers.

    Raises:
        ConfigError: Not a `torch.nn.Module`, or its state can't be had.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"module: a {type(module).__name__}; give a torch.nn.Module")
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {}
    caches: set[str] = set()
    for prefix, part in _parts(module, ""):
        registered = {**part._parameters, **part._buffers}  # noqa: SLF001
        tensors |= {prefix + name: one for name, one in registered.items() if one is not None}
        caches |= {prefix + name for name in part._non_persistent_buffers_set}  # noqa: SLF001
        saved = dict(_saved_besides(part, prefix))
        others |= {name: saved[name] for name in saved if name not in tensors}
    return _ModuleState(tensors, others, frozenset(caches))


def _values_digest(values: Mapping[str, Any]) -> str:
    """Return 16 hex digits over named values, in whatever order they come.

    Raises:
        ConfigError: A value can't be digested; the message names it.
    """
    digest = xxhash.xxh3_64()
    for name, value in sorted(values.items()):
        _add(digest, name, value)
    return str(digest.hexdigest())


def _parts(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield every submodule under each of its names, with the prefix of its tensors' names."""
    import torch

    yield prefix, module
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    for name, part in module._modules.items():  # noqa: SLF001
        is_wrapped = name == _COMPILED or isinstance(module, parallel)
        if part is not None:
            yield from _parts(part, prefix if is_wrapped else f"{prefix}{name}.")


def _saved_besides(part: torch.nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield what a module saves of itself by code that overrides torch's."""
    import torch

    plain, kind = torch.nn.Module, type(part)
    has_extra = kind.get_extra_state is not plain.get_extra_state
    try:
        if kind._save_to_state_dict is not plain._save_to_state_dict:  # noqa: SLF001
            found: dict[str, Any] = {}
            part._save_to_state_dict(found, prefix, True)  # noqa: FBT003, SLF001
            yield from found.items()
            has_extra = has_extra and prefix + _EXTRA_STATE not in found
        if has_extra:
            yield prefix + _EXTRA_STATE, part.get_extra_state()
        if isinstance(part, torch.jit.ScriptModule):
            yield from _script_attributes(part, prefix)
    except Exception as error:
        raise ConfigError(
            f"module: the state of {prefix.rstrip('.') or kind.__name__} can't be read "
            f"({type(error).__name__}: {error}), so its weights have no digest"
        ) from error


def _script_attributes(part: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield what a scripted module holds besides tensors, and the constants of its code.

    The weights of a frozen one are such constants.
    """
    import torch

    known: Any = torch._C.ConcreteModuleType.from_jit_type(part._c._type())  # noqa: SLF001
    for name in known.get_attributes():
        if name not in _SCRIPT_ATTRIBUTES:
            yield prefix + name, part._c.getattr(name)  # noqa: SLF001
    blocks = [part._c._get_method(name).graph for name in part._c._method_names()]  # noqa: SLF001
    number = 0
    while blocks:
        for node in blocks.pop().nodes():
            blocks.extend(node.blocks())
            kind = node.kindOf("value") if node.hasAttribute("value") else ""
            if kind in ("t", "ival"):
                value = node.t("value") if kind == "t" else node.ival("value")
                yield f"{prefix}constant {number}", value
                number += 1


# ---- values


def _add(digest: Any, name: str, value: Any) -> None:
    import torch

    try:
        if isinstance(value, torch.Tensor):
            _add_tensor(digest, name, value)
        elif isinstance(value, (np.ndarray, np.generic)):
            _add_array(digest, name, np.asarray(value))
        elif (parts := _parts_of(value)) is not None:
            digest.update(f"{name}\0{type(value).__qualname__}\0{len(parts)}\0".encode())
            for part, content in parts:
                _add(digest, f"{name}\1{part}", content)
        else:
            raw = _raw(value)
            digest.update(f"{name}\0{type(value).__qualname__}\0{len(raw)}\0".encode())
            digest.update(raw)
    except ConfigError:
        raise
    except Exception as error:
        raise _refused(name, value, f"{type(error).__name__}: {error}") from error


def _add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    import torch

    if torch.nn.parameter.is_lazy(tensor):
        raise _refused(name, tensor, "it isn't initialized; run the module once")
    if tensor.is_meta:
        raise _refused(name, tensor, "it has no values on the meta device; load the weights")
    if type(tensor).__name__ in _SHARDED:
        raise _refused(name, tensor, "it is a shard; gather the full weights")
    tensor = tensor.to_dense() if tensor.is_mkldnn else tensor
    if parts := _parts_of_tensor(tensor):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0{parts[0]}\0".encode())
        for part, content in parts[1].items():
            _add(digest, f"{name}\1{part}", content)
        return
    digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    digest.update(values.view(torch.uint8).numpy().data)


def _parts_of_tensor(tensor: torch.Tensor) -> tuple[str, dict[str, Any]] | None:
    """Return kind and components of a tensor that isn't plain memory."""
    import torch

    tensor = tensor.detach()
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names, context = flatten()
        return type(tensor).__qualname__, {
            **{name: getattr(tensor, name) for name in names},
            "context": context,
        }
    if tensor.is_quantized:
        scheme = tensor.qscheme()
        if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            how: dict[str, Any] = {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
        else:
            how = {
                "scale": tensor.q_per_channel_scales(),
                "zero_point": tensor.q_per_channel_zero_points(),
                "axis": tensor.q_per_channel_axis(),
            }
        return str(scheme), {"values": tensor.int_repr(), **how}
    names = _SPARSE_PARTS.get(str(tensor.layout), ())
    if names:
        tensor = tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor
        return str(tensor.layout), {name: getattr(tensor, name)() for name in names}
    return None


def _add_array(digest: Any, name: str, array: np.ndarray[Any, Any]) -> None:
    if array.dtype.hasobject:
        raise _refused(name, array, "an array of Python objects")
    digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
    digest.update(array.tobytes())


def _parts_of(value: Any) -> list[tuple[str, Any]] | None:
    import torch

    if isinstance(value, Mapping):
        items = {f"{type(key).__name__} {key!r}": item for key, item in value.items()}
        return sorted(items.items(), key=lambda item: item[0])
    if isinstance(value, (list, tuple)):
        return [(str(number), item) for number, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return [(name, getattr(value, name)) for name in names]
    if isinstance(value, torch.ScriptObject):
        return [("state", value.__getstate__())]  # type: ignore[attr-defined]
    return None


def _raw(value: Any) -> bytes:
    import torch

    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    if isinstance(value, torch.device):
        return b""  # where something lies has no part
    plain = (bool, int, float, complex, str, torch.dtype, torch.layout, torch.qscheme)
    if value is None or isinstance(value, (*plain, enum.Enum)):
        return repr(value).encode("utf-8", "surrogatepass")
    raise TypeError("an object of this kind")


def _refused(name: str, value: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"module: {name}, a {type(value).__name__}, can't be digested ({reason}); a cache can't "
        "distinguish these weights from others"
    )


# ---- the watch


class WatchedWeights:
    """The weights of a module that must not change while it fills a store.

    Before each computation every tensor's identity, address and version counter are compared with
    those seen last, and a sample of its values, because an update through `.data` or a NumPy view
    moves no counter. Only where these differ is the whole digest taken again, so that a module
    that was moved, or loaded with equal weights, goes on.

    Pickles as module and digest.

    Args:
        module: The module.

    Raises:
        ConfigError: The weights can't be digested.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.digest: Final = module_digest(module)
        self._expected = self.digest
        self._seen: _Glance | None = _Glance(module)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def check(self) -> None:
        """Compare the weights with those that were digested.

        Raises:
            ProvenanceMismatchError: They are others.
        """
        if self._seen is not None and self._seen.is_unchanged(self._module):
            return
        if module_digest(self._module) != self._expected:
            changed = [] if self._seen is None else self._seen.changed(self._module)
            named = f" ({few(changed, 3)})"
            raise ProvenanceMismatchError(
                f"the weights of {type(self._module).__name__} changed{named if changed else ''} "
                "since its first embeddings were computed, and embeddings of different weights "
                "must not be mixed. Make a new encoder, with another `model_name` for these "
                "weights; or load the earlier weights again"
            )
        self._seen = _Glance(self._module)

    def check_written(self) -> None:
        """Check if PyTorch counted a write to one of the tensors: microseconds, for mere hits.

        Raises:
            ProvenanceMismatchError: The weights are others.
        """
        if self._seen is not None and self._seen.is_written():
            self.check()

    def computed(self) -> None:
        """Accept what a forward pass itself wrote into non-persistent buffers: its caches."""
        if self._seen is None or not (changed := self._seen.changed(self._module)):
            return
        if self._seen.caches.issuperset(changed):
            self._expected = module_digest(self._module)
            self._seen = _Glance(self._module)


class _Glance:
    """The state of a module's tensors, as far as it is seen in microseconds each."""

    def __init__(self, module: torch.nn.Module) -> None:
        state = _module_state(module)
        self.caches = state.caches
        self._places = _places(state.tensors)
        self._counted = [
            one for one in state.tensors.values() if _is_plain(one) and not one.is_inference()
        ]
        self._counts = self._counters()
        self._others = _values_digest(_unplaced(state.tensors) | state.others)
        # These keep the memory alive: its address can't come to stand for other values.
        self._samples = _samples(state.tensors)
        self._values = _values(self._samples)

    def is_written(self) -> bool:
        return self._counters() != self._counts

    def _counters(self) -> list[int]:
        return [one._version for one in self._counted]  # noqa: SLF001

    def is_unchanged(self, module: torch.nn.Module) -> bool:
        state = _module_state(module)
        return (
            _places(state.tensors) == self._places
            and _values(self._samples) == self._values
            and _values_digest(_unplaced(state.tensors) | state.others) == self._others
        )

    def changed(self, module: torch.nn.Module) -> list[str]:
        """Return the names of tensors that were written or replaced, as far as counters show."""
        now = _places(_module_state(module).tensors)
        return [name for name in now | self._places if now.get(name) != self._places.get(name)]


def _is_plain(tensor: torch.Tensor) -> bool:
    import torch

    return (
        tensor.layout is torch.strided
        and not tensor.is_quantized
        and not hasattr(tensor, "__tensor_flatten__")
    )


def _places(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int, int]]:
    return {
        name: (id(one), 0 if one.is_inference() else one._version, one.data_ptr())  # noqa: SLF001
        for name, one in tensors.items()
        if _is_plain(one)
    }


def _unplaced(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if not _is_plain(tensor)}


def _samples(tensors: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return some elements of each tensor, as views that can be read in one go: a list a kind."""
    import torch

    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    groups: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
    for tensor in tensors.values():
        size = tensor.element_size()
        if not _is_plain(tensor) or not tensor.numel() or size not in words:
            continue
        values = tensor.detach().as_subclass(torch.Tensor)
        if values.is_contiguous():
            # An odd step, or it would be the same column of each row.
            values = values.view(-1)[:: max(1, values.numel() // _SAMPLED) | 1]
        else:
            steps = [max(1, length // _SAMPLED_PER_DIMENSION) for length in values.shape]
            values = values[tuple(slice(None, None, step) for step in steps)]
        groups.setdefault((tensor.device, size), []).append(values.view(words[size]))
    return list(groups.values())


def _values(samples: list[list[torch.Tensor]]) -> list[bytes]:
    import torch

    return [
        torch.cat([view.reshape(-1) for view in group]).cpu().numpy().tobytes() for group in samples
    ]
