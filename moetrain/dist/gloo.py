"""gloo's own threads, and how they share a core with the rank that computes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOOP = "gloo_tcp_loop"  # an event loop, one for every group; before 2026 gloo left it the name of the process
_TASKS = Path("/proc/self/task")  # threads, on Linux


@contextmanager
def polite_loops() -> Iterator[None]:
    """Groups of gloo that are made within have event loops that do not interrupt other threads on their core (elsewhere than on Linux: do).

    A thread that sends holds its connection's lock. A loop that finds it held asks again at once, and again, for as long as the scheduler
    lets it: where a rank has one core, and its loop woke there in the middle of a send, that is until the next tick, 4 ms at 250 Hz. Batch
    threads have their share of a core like others, but wait until it is free or their turn comes.
    """
    before = _threads()
    yield
    made = {thread: name for thread, name in _threads().items() if thread not in before}
    own = before.get(os.getpid(), _LOOP)
    for thread in [thread for thread, name in made.items() if name == (_LOOP if _LOOP in made.values() else own)]:
        with suppress(OSError):  # it has just ended, or a container forbids the call
            if os.sched_getscheduler(thread) == os.SCHED_OTHER:  # nobody asked for something else
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def _threads() -> dict[int, str]:
    """Of this process, by number: what they are called. Empty where that cannot be seen."""
    names = dict[int, str]()
    with suppress(OSError):
        for thread in _TASKS.iterdir():
            with suppress(OSError):
                names[int(thread.name)] = (thread / "comm").read_text(errors="replace").strip()
    return names
