"""The names of outputs: a model's results, its layers, and how they are pooled over time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

LAST_HIDDEN_STATE: Final = "last_hidden_state"
_POOLINGS: Final = ("mean", "valid_mean")
_LAYERED: Final = re.compile(r"(?:layer:(0|[1-9][0-9]{0,3})|layers)(?:/(mean|valid_mean))?")


@dataclass(frozen=True)
class OutputName:
    """What is stored of a forward pass.

    Args:
        state: The model's result by name; empty for layers.
        layer: The number of the one layer; None for all of them, and for a named result.
        pooling: `"mean"` over the frames, `"valid_mean"` over those that aren't padding, or empty.
    """

    state: str = ""
    layer: int | None = None
    pooling: str = ""

    @property
    def is_of_layers(self) -> bool:
        """Whether layers are meant, one or all."""
        return not self.state

    @property
    def is_stack(self) -> bool:
        """Whether all layers are meant."""
        return self.is_of_layers and self.layer is None

    def layers(self, num_layers: int) -> range:
        """Return the numbers of the layers that are needed: 0 is the input of the first block."""
        if not self.is_of_layers:
            return range(0)
        return range(num_layers + 1) if self.layer is None else range(self.layer, self.layer + 1)


def parse_output(name: str) -> OutputName:
    """Return what the name of an output means; a name without a known form is a result's."""
    if name in _POOLINGS:
        return OutputName(LAST_HIDDEN_STATE, pooling=name)
    match = _LAYERED.fullmatch(name)
    if match is None:
        return OutputName(name)
    number, pooling = match.groups()
    return OutputName(layer=None if number is None else int(number), pooling=pooling or "")
