"""A thread that does one thing after the other. No torch."""

import weakref
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

Task = Callable[[], None]


class Lane:
    """Its thread starts with the first task and ends with its owner. A task must not raise.

    Handing over a task takes microseconds: it waits neither for the thread nor for the interpreter, as starting a thread does.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._is_running = False
        weakref.finalize(self, self._tasks.put, None)

    def do(self, task: Task) -> None:
        if not self._is_running:
            Thread(target=_work, args=(self._tasks,), name=self._name, daemon=True).start()
            self._is_running = True
        self._tasks.put(task)


def _work(tasks: "SimpleQueue[Task | None]") -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # what it refers to may go before the next one comes
