"""The end of a rank that torchrun has started: no other is stopped in the middle of its work."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from typing import Any, Final

__all__ = ["finish_with_other_ranks"]

_logger: Final = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.5
_CONNECT_SECONDS: Final = 60.0


def finish_with_other_ranks(exit_code: int) -> None:
    """Wait for the other ranks if this one is about to end with another exit code than 0.

    At the first such code torchrun ends all ranks: a clip that can't be decoded must not stop the
    others. Counted in the store that torchrun itself keeps; without torchrun nothing happens.

    Args:
        exit_code: Of this rank; with 0 the others are told and not waited for.
    """
    store = _store_of_torchrun()
    if store is None:
        return
    name = f"lmdbcache/finished/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        num_finished = store.add(name, 1)
        while exit_code and num_finished < int(os.environ["WORLD_SIZE"]):
            time.sleep(_POLL_SECONDS)
            num_finished = store.add(name, 0)
    except RuntimeError as error:  # torchrun has ended
        _logger.info("the other ranks aren't waited for: %s", error)


def _store_of_torchrun() -> Any:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
        )
    except (KeyError, ValueError, RuntimeError) as error:
        _logger.info("torchrun can't be reached: %s", error)
        return None
