"""gloo's own threads, and how they share a core with the rank that computes."""

import os
import sys
from contextlib import suppress
from pathlib import Path

LOOP = "gloo_tcp_loop"  # the name of its event loops, one for every group


def let_callers_finish() -> None:
    """Keeps the event loops of this process from interrupting other threads on their core (on Linux; elsewhere it does nothing).

    A thread that sends holds its connection's lock. A loop that finds it held asks again at once, and again, for as long as the scheduler
    lets it: where a rank has one core, and its loop woke there in the middle of a send, that is until the next tick, 4 ms at 250 Hz. Batch
    threads have their share of a core like others, but wait until it is free or their turn comes.
    """
    if not sys.platform.startswith("linux"):
        return
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has just ended, or a container forbids the call
            if (thread / "comm").read_text().strip() == LOOP:
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
