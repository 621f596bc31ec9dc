"""An agent's side of its partner: what is READY here goes to the memory of another node, in the background. No torch."""

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Event, Thread

from moetrain.checkpoint.arena import Slot
from moetrain.checkpoint.generation import Generation, Key
from moetrain.checkpoint.wire import Address, Refused, exchange
from moetrain.store.manifest import SaveId

LIMIT_SECONDS = 30.0  # for one object


@dataclass(frozen=True)
class Push:
    """A generation, and the slots of its objects in order."""

    generation: Generation
    slots: Sequence[Slot]


@dataclass(frozen=True)
class Keep:
    """What may be given away of one rank, as `Agent` is told with a reservation."""

    rank: int
    complete: SaveId | None
    coming: SaveId
    alone: bool


class Partner:
    """One other agent. What cannot be sent is given up with a sentence; the next generation is tried again."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._done: dict[Key, str] = {}  # "" or why it is not there
        self._tasks: SimpleQueue[Push | Keep | None] = SimpleQueue()
        self._connection: socket.socket | None = None
        self._is_stopped = Event()
        Thread(target=self._work, name="partner", daemon=True).start()

    def push(self, generation: Generation, slots: Sequence[Slot]) -> None:
        """The slots must not change until `state` says that it is done; when they do, the copy is refused at the other end."""
        self._tasks.put(Push(generation, slots))

    def keep(self, rank: int, complete: SaveId | None, coming: SaveId, alone: bool) -> None:
        self._tasks.put(Keep(rank, complete, coming, alone))

    def state(self, key: Key) -> tuple[bool, str]:
        """(whether it was tried, why it did not arrive)."""
        return key in self._done, self._done.get(key, "")

    def stop(self) -> None:
        self._is_stopped.set()
        self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._is_stopped.is_set():
            try:
                self._carry_out(task)
                trouble = ""
            except OSError as error:
                trouble = error.strerror or str(error)
                self._hang_up()
            if isinstance(task, Push):
                self._done[task.generation.key] = trouble
        self._hang_up()

    def _carry_out(self, task: Push | Keep) -> None:
        if isinstance(task, Push):
            self._send(task)
            return
        complete = task.complete
        self._done = {key: trouble for key, trouble in self._done.items() if complete is None or key[0] >= complete}
        self._ask({"op": "keep", "rank": task.rank, "keep": complete, "save": task.coming, "alone": task.alone})

    def _send(self, task: Push) -> None:
        generation, held = task.generation, dict(task.generation.held)
        for name, slot in zip(generation.held, task.slots, strict=True):
            answer = self._ask({"op": "put", "num_bytes": held[name].num_bytes}, memoryview(slot.memory)[: held[name].num_bytes])
            held[name] = replace(held[name], slot=answer["slot"])
        self._ask({"op": "copied", "generation": replace(generation, held=held).to_json()})

    def _ask(self, header: dict, raw: memoryview | bytes = b"") -> dict:
        if self._connection is None:
            self._connection = socket.create_connection((self.address.host, self.address.port), LIMIT_SECONDS)
            self._connection.settimeout(LIMIT_SECONDS)
        found = exchange(self._connection, header | {"token": self.address.token}, raw)[0]
        if "superseded" in found:
            raise Refused(found["superseded"])
        return found

    def _hang_up(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.close()
            self._connection = None
