"""A look at a model's first batches: do its embeddings belong to their clips?

Needs torch only through what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lmdbcache.errors import InvalidEmbeddingError

_REPEATS, _REPEATS_OF_A_SMALL_ONE, _SMALL = 2, 8, 64

# Relative L2 distance of the same clip in another batch: float32 moves by about 1e-6, bfloat16 by
# 1e-2; dropout and statistics of the batch by several percent.
_FLOAT32_TOLERANCE: Final = 1e-3
_TF32_TOLERANCE: Final = 1e-2
_HALF_TOLERANCE: Final = 5e-2
# Activations are rounded to 8 bits by the range of the whole batch.
_QUANTIZED_TOLERANCE: Final = 1e-1
_ROUNDING: Final = 1e-6  # of an element, where embeddings are close to zero


def tolerance_of(module: Any, compute_dtype: str, *, may_use_tf32: bool = False) -> float:
    """Return the relative L2 distance that rounding explains.

    Args:
        module: The `torch.nn.Module` that computes, or anything else.
        compute_dtype: The config's.
        may_use_tf32: Whether it runs on a GPU as the program has set it up.
    """
    tolerance = _TF32_TOLERANCE if may_use_tf32 else _FLOAT32_TOLERANCE
    parts = list(module.modules()) if hasattr(module, "modules") else []
    weights = list(module.parameters()) if hasattr(module, "parameters") else []
    if compute_dtype != "float32" or any(part.element_size() < 4 for part in weights):
        tolerance = _HALF_TOLERANCE
    if any("quantized" in type(part).__module__ for part in parts):
        tolerance = _QUANTIZED_TOLERANCE
    return tolerance


def num_repeats(embedding: Any) -> int:
    """Return how often a clip is embedded again: a small one may come through dropout unchanged."""
    return _REPEATS if math.prod(embedding.shape) >= _SMALL else _REPEATS_OF_A_SMALL_ONE


class FirstBatches:
    """The results of a model's first batches, until they have shown enough.

    A silent clip, or an embedding that isn't finite, shows nothing: dropout changes no zero.
    """

    def __init__(self) -> None:
        self._heard: dict[int, Any] | None = {}
        self._looked_at: list[tuple[bool, bool]] = []

    @property
    def are_enough(self) -> bool:
        """Whether nothing is left to be looked at."""
        return self._heard is None and (True, True) in self._looked_at

    def compare(self, heard: Mapping[int, Any], model: str) -> None:
        """Refuse one and the same embedding for different audio.

        Args:
            heard: Checksum of a clip's audio → its embedding; without silent clips.
            model: Its name.

        Raises:
            InvalidEmbeddingError: All embeddings are equal.
        """
        if self._heard is None:
            return
        self._heard.update({one: heard[one] for one in heard if _is_finite(heard[one])})
        if len(self._heard) < 2:
            self._heard = {one: _numbers(embedding) for one, embedding in self._heard.items()}
            return
        first, *others = self._heard.values()
        if all(np.array_equal(_numbers(first), _numbers(other)) for other in others):
            raise InvalidEmbeddingError(
                f"{model} gives {len(self._heard)} different clips the same embedding, so none is "
                "stored. Its output doesn't depend on its input: look at the output that is taken, "
                "at weights that are zero or weren't loaded, and at what the front end returns"
            )
        self._heard = None

    def repeat(
        self,
        embeddings: Mapping[int, Any],
        silent: Collection[int],
        embed_again: Callable[[int], Any],
        tolerance: float,
        model: str,
    ) -> None:
        """Embed a clip again, several times and without the others, and compare.

        That is done once for a clip that is heard among others; before that, for the first one by
        itself and for the first silent one.

        Args:
            embeddings: Those of one forward pass, by position.
            silent: Positions of silent clips among them.
            embed_again: Position → the same clip's embedding several times, (n, ...).
            tolerance: See `tolerance_of`.
            model: Its name.

        Raises:
            InvalidEmbeddingError: The model answers differently.
        """
        among = len(embeddings) > 1
        if any(was_heard and others >= among for was_heard, others in self._looked_at):
            return
        finite = [place for place, one in embeddings.items() if _is_finite(one)]
        heard = [place for place in finite if place not in silent]
        if not finite or (self._looked_at and not heard):
            return
        # The last one shows the most: a module that takes the batch for time mixes earlier clips
        # into later ones.
        position = max(heard or finite)
        _check_repeats(embeddings[position], lambda: embed_again(position), tolerance, model)
        self._looked_at.append((bool(heard), among))


def _check_repeats(
    embedding: Any, embed_again: Callable[[], Any], tolerance: float, model: str
) -> None:
    first, again = _numbers(embedding), _numbers(embed_again())
    if all(_is_close(first, other, tolerance) for other in again):
        return
    if not _is_close(again, _numbers(embed_again()), tolerance):
        raise InvalidEmbeddingError(
            f"{model} gives another embedding each time it is called with the same clip, so none "
            "is stored. Something random is left on, such as dropout "
            "(`F.dropout(x, training=True)`), noise or random cropping: switch it off"
        )
    raise InvalidEmbeddingError(
        f"{model} gives a clip another embedding by itself than among other clips, so none is "
        "stored. It mixes the clips of a batch: BatchNorm without running statistics "
        "(`track_running_stats=False`), normalization over the batch, or a wrong batch axis. Make "
        "each embedding depend on its clip only"
    )


def _is_finite(embedding: Any) -> bool:
    return bool(np.isfinite(_numbers(embedding)).all())


def _numbers(embedding: Any) -> NDArray[Any]:
    if hasattr(embedding, "detach"):
        embedding = embedding.detach().cpu()
        embedding = embedding.double() if embedding.is_floating_point() else embedding
    return np.asarray(embedding)


def _is_close(a: NDArray[Any], b: NDArray[Any], tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    bound = tolerance * np.linalg.norm(a.ravel()) + _ROUNDING * np.sqrt(a.size)
    return bool(np.linalg.norm((a - b).ravel()) <= bound)
