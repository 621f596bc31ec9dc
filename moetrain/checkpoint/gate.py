"""One save at a time is committed and swept, in their order. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from moetrain.base.errors import CheckpointError
from moetrain.store.manifest import SaveId


class Gate:
    """Of one agent, which alone commits the saves of its job. A trainer that waits no longer for a save may hand over the next one: without
    the gate its sweep could remove what the late one is about to commit, and the late one's sweep what the next one builds on.
    """

    def __init__(self) -> None:
        self._one = Lock()
        self._newest = SaveId(0, 0)

    @contextmanager
    def passage(self, save: SaveId, limit_seconds: float) -> Iterator[None]:
        """Around whatever reads the parent, commits and sweeps. Raises CheckpointError when the one before takes longer than the limit, or
        a younger save of the job was committed: what this one wrote may be gone."""
        if not self._one.acquire(timeout=limit_seconds):
            raise CheckpointError(f"an earlier checkpoint was not committed within {limit_seconds:g} s.")
        try:
            if save.epoch == self._newest.epoch and save < self._newest:
                raise CheckpointError("a younger checkpoint was committed before it.")
            yield
        finally:
            self._one.release()

    def committed(self, save: SaveId) -> None:
        """Said in the passage, before the sweep."""
        self._newest = max(self._newest, save)
