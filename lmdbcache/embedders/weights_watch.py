"""Whether a module's weights are still those that its embeddings are stored under.

torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.embedders.module_weights import module_digest, module_state, values_digest
from lmdbcache.errors import ProvenanceMismatchError
from lmdbcache.files import few

if TYPE_CHECKING:
    import torch

__all__ = ["WatchedWeights"]

_SAMPLED: Final = 64
_SAMPLED_PER_DIMENSION: Final = 4


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
                "must not be mixed. Make a new encoder, with a model_name of its own for these "
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
    """What can be seen of a module's tensors in microseconds each."""

    def __init__(self, module: torch.nn.Module) -> None:
        state = module_state(module)
        self.caches = state.caches
        self._places = _places(state.tensors)
        self._counted = [
            one for one in state.tensors.values() if _is_plain(one) and not one.is_inference()
        ]
        self._counts = self._counters()
        self._others = values_digest(_unplaced(state.tensors) | state.others)
        # These keep the memory alive: its address can't come to stand for other values.
        self._samples = _samples(state.tensors)
        self._values = _values(self._samples)

    def is_written(self) -> bool:
        return self._counters() != self._counts

    def _counters(self) -> list[int]:
        return [one._version for one in self._counted]  # noqa: SLF001

    def is_unchanged(self, module: torch.nn.Module) -> bool:
        state = module_state(module)
        return (
            _places(state.tensors) == self._places
            and _values(self._samples) == self._values
            and values_digest(_unplaced(state.tensors) | state.others) == self._others
        )

    def changed(self, module: torch.nn.Module) -> list[str]:
        """Names of the tensors that were written or replaced, as far as their counters show."""
        now = _places(module_state(module).tensors)
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
    """Some elements of each tensor, as views that can be read in one go: one list for each kind."""
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
