"""A Ray cluster of two nodes in a process of its own; asked by lines, it kills and adds nodes.

Nothing of Ray is in the process of the tests, and all of it ends with this one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}


def main() -> None:
    """Start; then each line is `add` or `kill`, and is answered by one."""
    import ray
    from ray.cluster_utils import Cluster

    del ray
    answers, sys.stdout = sys.stdout, sys.stderr
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            **NODE,
            "include_dashboard": False,
            "temp_dir": sys.argv[1],
            # A node that is killed is noticed within two seconds.
            "_system_config": {
                "health_check_initial_delay_ms": 1000,
                "health_check_period_ms": 500,
                "health_check_timeout_ms": 10_000,  # of a node that hangs: a busy one is none
                "health_check_failure_threshold": 3,
            },
        },
    )
    nodes = [cluster.add_node(**NODE)]

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer(cluster.address)
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        else:
            nodes.append(cluster.add_node(**NODE))
        answer(len(nodes))
    cluster.shutdown()


if __name__ == "__main__":
    main()
