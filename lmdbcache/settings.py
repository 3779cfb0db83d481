"""The environment variables of the package; each is named here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = [
    "NETWORK_VARIABLE",
    "ROOT_VARIABLE",
    "SKIP_VARIABLE",
    "STATISTICS_VARIABLE",
    "VARIABLES",
    "Variable",
    "dataset_root_variable",
]

ROOT_VARIABLE: Final = "LMDBCACHE_ROOT"
NETWORK_VARIABLE: Final = "LMDBCACHE_ALLOW_NETWORK"
SKIP_VARIABLE: Final = "LMDBCACHE_SKIP_FIRST_CHECK"
STATISTICS_VARIABLE: Final = "LMDBCACHE_STATISTICS"


@dataclass(frozen=True)
class Variable:
    """An environment variable.

    Args:
        name: Of the variable.
        default: What holds where it isn't set; may be empty.
        meaning: What it decides, in a few words.
    """

    name: str
    default: str
    meaning: str


def dataset_root_variable(namespace: str) -> str:
    """Return the variable that names the folder of a dataset: `LMDBCACHE_VEGAS_ROOT`."""
    return f"LMDBCACHE_{namespace.upper()}_ROOT"


VARIABLES: Final = (
    Variable(ROOT_VARIABLE, "the user's cache directory", "the cache directory"),
    Variable(NETWORK_VARIABLE, "0", "1: use stores on network file systems"),
    Variable(
        SKIP_VARIABLE,
        "0",
        "1: open a store that this machine didn't write unchecked; values: check its structure",
    ),
    Variable(STATISTICS_VARIABLE, "1", "0: don't count hits and misses"),
    *(
        Variable(dataset_root_variable(namespace), "", f"the folder of {dataset}")
        for namespace, dataset in (
            ("vegas", "VEGASDataset"),
            ("esc50", "ESC50Dataset"),
            ("vggsound", "VGGSoundDataset"),
        )
    ),
)
