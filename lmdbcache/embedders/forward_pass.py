"""One forward pass of a batch: what it gave, the layers on its way, and means over time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass of a batch gave, on the model's device.

    Args:
        named: The model's results by name, such as `"last_hidden_state"`; none where the pass
            ended at a layer.
        layers: The layers that were asked for, by number.
        num_valid: How many samples of each clip aren't padding, where its features say so.
    """

    named: dict[str, torch.Tensor]
    layers: dict[int, torch.Tensor] = field(default_factory=dict)
    num_valid: list[int] | None = None


class _Reached(Exception):  # noqa: N818 - not an error
    """The last layer that was asked for."""


@contextlib.contextmanager
def captured_layers(
    blocks: Sequence[Any], numbers: Collection[int], *, ends: bool
) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the hidden states of a forward pass inside of the block.

    Args:
        blocks: The model's modules, in order.
        numbers: Which layers: number k is the input of block k, the last one the output of the
            last block.
        ends: Leave the block, and so the pass, at the last of these layers.

    Yields:
        Number → hidden states, as they come.
    """
    found: dict[int, torch.Tensor] = {}
    last = max(numbers, default=-1)

    def keep(number: int, states: torch.Tensor) -> None:
        found[number] = states
        if ends and number == last:
            raise _Reached

    def before(number: int) -> Callable[..., None]:
        return lambda _, inputs: keep(number, inputs[0])

    def after(_: Any, __: Any, output: Any) -> None:
        keep(len(blocks), output[0] if isinstance(output, tuple) else output)

    hooks = [
        blocks[-1].register_forward_hook(after)
        if number == len(blocks)
        else blocks[number].register_forward_pre_hook(before(number))
        for number in numbers
    ]
    try:
        with contextlib.suppress(_Reached):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def mean_of_valid(
    frames: torch.Tensor, num_steps: int, num_valid_steps: Sequence[int]
) -> torch.Tensor:
    """Return the mean over each clip's first steps of time, float32 (batch, width).

    Args:
        frames: (batch, bands * num_steps, width), band after band.
        num_steps: Steps of time in each band.
        num_valid_steps: How many of them count, for each clip; at least one does.
    """
    import torch

    bounds = [min(max(1, count), num_steps) for count in num_valid_steps]
    steps = torch.arange(frames.shape[1], device=frames.device) % num_steps
    valid = steps < torch.tensor(bounds, device=frames.device).unsqueeze(1)
    kept = frames.float().where(valid.unsqueeze(-1), 0.0)
    return kept.sum(dim=1) / valid.sum(dim=1, keepdim=True)
