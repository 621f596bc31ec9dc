"""An exchange under way: what it keeps alive, and until when."""

import gc
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.dist.comm import launch
from moetrain.dist.mesh import Axis
from moetrain.dist.transport import Work, imitate
from moetrain.dist.watch import Watchdog
from moetrain.dist.world import World


class Keeping:
    """A work that holds the received rows, as nccl's do."""

    def __init__(self, received: Tensor) -> None:
        self.received = received

    def wait(self) -> None:
        """Returns."""

    def is_completed(self) -> bool:
        return True


class KeepingTransport:
    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        imitate(sent, received)
        return Keeping(received)


def test_a_landed_exchange_keeps_no_rows_although_the_watchdog_has_not_looked() -> None:
    world = World(0, 2, 0, torch.device("cpu"), "single", 10.0)
    world.watch.watchdog = Watchdog(0, 10.0)
    axis = Axis("ep", (0, 1), 0, None, world)
    axis.link.transport = KeepingTransport()
    rows = torch.randn(4, 3)
    flight = launch("rows", rows, [2, 2], [2, 2], axis)
    came = flight.land()
    assert torch.equal(came, rows)
    memory = weakref.ref(came)
    del flight, came
    gc.collect()
    assert memory() is None
