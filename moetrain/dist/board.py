"""A notice board that all ranks of a job read and write without a collective: short texts under keys, the newest counts."""

from collections.abc import Sequence
from threading import Lock
from typing import Protocol


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
