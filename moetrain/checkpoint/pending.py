"""One save under way, and what was asked for. No torch.

The training thread makes it and waits; the memory lane fills it in until the copy is made, from there the persist lane does.
"""

import threading
from dataclasses import dataclass

from moetrain.checkpoint.ledger import Ledger
from moetrain.store.manifest import SaveId


@dataclass(frozen=True)
class Order:
    """What a caller of `save` asked for."""

    full: bool
    persists: bool
    hurried: bool
    expected_faults: float


class Pending:
    """One save under way."""

    def __init__(self, save: SaveId, step: int, ledger: Ledger, order: Order) -> None:
        self.save = save
        self.step = step
        self.ledger = ledger  # counted up to this step
        self.order = order
        self.is_in_memory_only = False
        self.is_cut_short = False  # what it left out is in memory only
        self.is_queued = False  # rank 0: it has one of the places in the persist lane
        self.committed = False
        self.reason = ""  # why it was given up
        self.error: Exception | None = None  # what the training thread must hear about
        self.copied = threading.Event()
        self.safe = threading.Event()  # the copy outlives this process, and with a partner this node
        self.done = threading.Event()

    @property
    def seq(self) -> int:
        return self.save.seq

    def wait_copied(self) -> None:
        """Returns when the live state may change again. Raises CheckpointError when there is no room for the copy."""
        self.copied.wait()
        if self.error is not None:
            raise self.error
