"""How many cores there are for what this process does beside training. No torch."""

import os
import sys


def usable_cores() -> int:
    """Of this machine, by this process."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cores_of_rank() -> int:
    """This rank's share of the machine, where its launcher tells how many ranks a node has (LOCAL_WORLD_SIZE), or what it is bound to."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = (os.cpu_count() or 1) // max(1, int(ranks) if ranks.isdecimal() else 1)
    return max(1, min(usable_cores(), share))
