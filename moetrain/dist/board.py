"""A notice board that all ranks of a job read and write without a collective: short texts under keys, the newest counts."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Lock, Thread
from typing import Protocol, TypeVar

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")


class Board(Protocol):
    """Called from background threads, also while the training thread is inside a collective.

    Neither method raises or takes longer than a deadline: on a board that is lost a post is forgotten and a read finds nothing.
    """

    def post(self, key: str, value: str) -> None:
        """Replaces what stood under this key."""
        ...

    def read(self, keys: Sequence[str]) -> dict[str, str]:
        """What stands under those of the keys that somebody has posted. Does not wait for the others."""
        ...


class DictBoard:
    """The board of one process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = Lock()

    def post(self, key: str, value: str) -> None:
        with self._lock:
            self._values[key] = value

    def read(self, keys: Sequence[str]) -> dict[str, str]:
        with self._lock:
            return {key: self._values[key] for key in keys if key in self._values}


class StoreBoard:
    """A board in torch.distributed's key-value store. `store` is a client of its own, of this start of all ranks alone."""

    def __init__(self, store: Store, deadline_seconds: float = 5.0) -> None:
        self._store = PrefixStore("board", store)
        self._store.set_timeout(timedelta(seconds=deadline_seconds))
        self._deadline = deadline_seconds
        self._turn = Lock()  # a client serves one call at a time
        self._stuck: Thread | None = None  # a call that a cut link keeps from returning, perhaps for ever

    def post(self, key: str, value: str) -> None:
        self._call(lambda: self._store.set(key, value), None)

    def read(self, keys: Sequence[str]) -> dict[str, str]:
        def look() -> dict[str, str]:
            there = [key for key in keys if self._store.check([key])]
            values = self._store.multi_get(there) if there else []
            return {key: value.decode() for key, value in zip(there, values, strict=True)}

        return self._call(look, {})

    def _call(self, work: Callable[[], T], nothing: T) -> T:
        """What `work` gives within the deadline, else `nothing`."""
        answer = [nothing]

        def run() -> None:
            try:
                answer.append(work())
            except RuntimeError:  # the store's host is lost or late
                return

        with self._turn:
            if self._stuck is not None and self._stuck.is_alive():
                return nothing
            self._stuck = Thread(target=run, name="moetrain-board", daemon=True)
            self._stuck.start()
            self._stuck.join(self._deadline)
            return answer[-1]
