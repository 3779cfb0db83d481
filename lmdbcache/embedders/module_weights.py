"""One digest for the weights of a torch module, however the module is wrapped or placed.

torch is imported inside the functions.
"""

from __future__ import annotations

import dataclasses
import enum
import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import xxhash

from lmdbcache.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["ModuleState", "module_digest", "module_state", "values_digest"]

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


class ModuleState(NamedTuple):
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

    It covers parameters, buffers (non-persistent ones, too), packed parameters of quantized
    modules, `get_extra_state`, and the attributes and constants of scripted modules. A tensor in a
    plain attribute isn't covered: register it as a buffer.

    Device, memory layout, `requires_grad`, train or eval mode, tied or equal tensors,
    `torch.compile`, and `DataParallel` or `DistributedDataParallel` around the module change
    nothing.

    Raises:
        ConfigError: Something has no values yet (meta device, lazy parameter), is a shard, or is of
            a kind that can't be digested; the message names it.
    """
    state = module_state(module)
    return values_digest({**state.tensors, **state.others})


def module_state(module: torch.nn.Module) -> ModuleState:
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
    return ModuleState(tensors, others, frozenset(caches))


def values_digest(values: Mapping[str, Any]) -> str:
    """Return 16 hex digits over named values, in whatever order they come.

    Raises:
        ConfigError: A value can't be digested; the message names it.
    """
    digest = xxhash.xxh3_64()
    for name, value in sorted(values.items()):
        _add(digest, name, value)
    return str(digest.hexdigest())


def _parts(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every submodule under each of its names, with the prefix of its tensors' names."""
    import torch

    yield prefix, module
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    for name, part in module._modules.items():  # noqa: SLF001
        is_wrapped = name == _COMPILED or isinstance(module, parallel)
        if part is not None:
            yield from _parts(part, prefix if is_wrapped else f"{prefix}{name}.")


def _saved_besides(part: torch.nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """What a module saves of itself by code of its own."""
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
    """What a scripted module holds besides tensors, and the constants of its code.

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
    """Its kind and components, of a tensor that isn't plain memory."""
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
        "tell these weights from others"
    )
