"""Units of clips that a Ray cluster decodes and embeds, as answers that come in any order."""

from __future__ import annotations

import contextlib
import math
import pickle
import secrets
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.config import CacheConfig
from lmdbcache.embedders import AudioModel
from lmdbcache.errors import CacheError, ExtractionError, MissingDependencyError
from lmdbcache.extraction.ray_cluster import Pool, first_line, pool_for
from lmdbcache.extraction.ray_ledger import Ledger
from lmdbcache.extraction.staged_units import StagingPlace

if TYPE_CHECKING:
    from lmdbcache.extraction.feature_batch import Clip
    from lmdbcache.extraction.ray_workers import Job, UnitAnswer

__all__ = ["UnitPipeline"]

_MANY_UNITS: Final = 1000
_CLIPS_PER_TASK: Final = 64  # where there are many units; a task that dies is done again as a whole
_FEWEST_STAGED: Final = 8
# A node or process may die while it has a unit; a unit that always kills its process is another
# matter, and Ray itself would go on for ever.
_MOST_BEGINNINGS: Final = 8


class UnitPipeline:
    """Units of clips in, units of embeddings out, through Ray Data.

    Args:
        address: See `extract_on_ray`.
        num_actors: See `extract_on_ray`.
        batch_size: Clips of a unit.
        model: What nodes find the model by.
        weights_digest: What its files must have there.
        device: See `extract_on_ray`.
        shape: That every embedding has to have; None takes any.
        is_proven: Whether the store has embeddings of this model.
    """

    def __init__(
        self,
        address: str | None,
        num_actors: int | None,
        batch_size: int,
        model: str | AudioModel,
        weights_digest: str | None,
        device: str | None,
        *,
        shape: tuple[int, ...] | None = None,
        is_proven: bool = False,
    ) -> None:
        self.address = address
        self.batch_size = batch_size
        self._num_actors, self._device = num_actors, device
        self._model, self._weights_digest = model, weights_digest
        self._shape, self._is_proven = shape, is_proven

    @contextlib.contextmanager
    def answers(
        self,
        ray: Any,
        config: CacheConfig,
        units: Mapping[int, list[Clip]],
        place: StagingPlace | None,
    ) -> Iterator[Iterator[tuple[int, UnitAnswer]]]:
        """Have units computed; the answers come in any order.

        Raises:
            ExtractionError: Ray gives up.
        """
        from lmdbcache.extraction.ray_workers import Job

        pool = pool_for(ray, len(units), self._num_actors, self._device)
        run = secrets.token_hex(8)
        ledger = (
            ray.remote(Ledger)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
            .remote(max(_FEWEST_STAGED, 4 * pool.num_actors))
        )
        with contextlib.ExitStack() as stack:
            stack.callback(_end, ray, ledger)
            if place is not None:
                stack.enter_context(place.marked(run))
            job = Job(
                run,
                config,
                self._model,
                self._weights_digest,
                self._device,
                pool.num_threads,
                ledger,
                _MOST_BEGINNINGS,
                place,
                self._shape,
                self._is_proven,
            )
            rows = stack.enter_context(contextlib.closing(self._rows(ray, job, units, pool)))
            yield rows

    def _rows(
        self, ray: Any, job: Job, units: Mapping[int, list[Clip]], pool: Pool
    ) -> Generator[tuple[int, UnitAnswer], None, None]:
        from lmdbcache.extraction.ray_workers import DecodeUnits, EmbedUnits

        rows = [
            {"unit": number, "clips": ray.cloudpickle.dumps(clips)}
            for number, clips in units.items()
        ]
        per_task = 1
        if job.staging is None and len(rows) > _MANY_UNITS:
            per_task = max(1, _CLIPS_PER_TASK // self.batch_size)
        try:
            data = (
                ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / per_task))
                .map_batches(DecodeUnits(job), batch_size=1, num_cpus=1)
                .map_batches(
                    EmbedUnits,
                    fn_constructor_args=(job,),
                    batch_size=1,
                    # What dies is started and asked again without end: Ray Data's own rule.
                    compute=ray.data.ActorPoolStrategy(size=pool.num_actors),
                    num_cpus=0,  # so that no actor waits for a CPU that decoding has
                    num_gpus=pool.num_gpus or None,
                )
            )
            for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
                for number, answer in zip(batch["unit"], batch["answer"], strict=True):
                    yield int(number), pickle.loads(answer)  # of our own processes
                    job.ledger.finish.remote(int(number))
        except CacheError:
            raise
        except Exception as error:  # Ray's errors have no base class of their own
            raise _given_up(error) from error


def _end(ray: Any, actor: Any) -> None:
    with contextlib.suppress(Exception):  # of a cluster that is gone
        ray.kill(actor)


def _given_up(error: Exception) -> ExtractionError | MissingDependencyError:
    reason = first_line(error)
    if "No module named" in reason:
        return MissingDependencyError(
            f'on a node: {reason}. Every node needs pip install "lmdbcache[ray]", the same version'
        )
    return ExtractionError(
        f"Ray gave up ({type(error).__name__}: {reason}). What was computed is kept; run again to "
        "go on; `ray status` and the logs of the nodes tell more"
    )
