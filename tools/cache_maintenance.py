"""Sizes of all stores under a root, and compaction of those that would give back the most.

    python tools/cache_maintenance.py VEGAS.cache            # the size report
    python tools/cache_maintenance.py VEGAS.cache --compact  # compact every store
    python tools/cache_maintenance.py VEGAS.cache --json     # for scripts

Compact while nobody has a store open if you can: a reader that stays on the old generation keeps
its space until it refreshes or closes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lmdbcache.cli.inspect import ls_command
from lmdbcache.cli.maintain import compact_command
from lmdbcache.errors import CacheError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="the cache directory")
    parser.add_argument("--compact", action="store_true", help="compact every store")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    try:
        if arguments.compact:
            compact_command(root=arguments.root, everything=True, as_json=arguments.json)
        else:
            ls_command(root=arguments.root, as_json=arguments.json)
    except CacheError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
