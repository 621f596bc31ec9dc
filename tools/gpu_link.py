"""An emulated link for one GPU: rows that would go to other ranks go to pinned host memory and come back. Not a network; figures say so.

What leaves and what comes travel at once, on two side streams that the copy engines serve: no SM is taken, where nccl would take some. The
link gets slower by filler: so many more bytes behind the rows that leave, and before those that come. Exchanges queue as on a wire. On a
CPU the copies are made by the thread that launches: it shows that everything runs, and nothing overlaps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.dist.mesh import Axis
from moetrain.dist.transport import Null, Transport, Work, imitate
from moetrain.dist.world import World

PIECE_BYTES = 4 << 20  # of one copy: a small copy of somebody else waits behind one of them only
Pair = tuple[Tensor, Tensor]  # bytes that leave and, as many, those that come in their place


def pretended_axis(size: int, device: torch.device) -> Axis:
    """The first of `size` ranks of which there is only this one: it has no group, and whatever its transport is imitates the others."""
    axis = Axis("ep", tuple(range(size)), 0, None, World(0, size, 0, device, "single", float("inf")))
    axis.link.transport = Null()
    return axis


class EmulatedLink:
    """A Transport. As with `Null`, what this rank sends to another is taken for what comes from there, zeros where more comes."""

    def __init__(self, device: torch.device, slower: float = 1.0) -> None:
        """slower: how many times as long as the plain round trip an exchange takes, at least 1."""
        assert slower >= 1, "filler makes a link slower, never faster"
        self.slower = slower
        self._engines = CopyEngines(device) if device.type == "cuda" else HostCopies()

    def __str__(self) -> str:
        return f"EMULATED: {self._engines}, {self.slower:.2f} times as slow as its copies; not a network"

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        outgoing, incoming = sent.split(list(send_sizes)), received.split(list(receive_sizes))
        away = list[Pair]()
        for rank, (leaving, coming) in enumerate(zip(outgoing, incoming, strict=True)):
            leaving, coming = as_bytes(leaving), as_bytes(coming)
            if rank == axis.index:
                imitate(leaving, coming)
                continue
            there = min(leaving.numel(), coming.numel())
            if there < coming.numel():
                coming[there:].zero_()
            if there:
                away.append((leaving[:there], coming[:there]))
        return self._engines.carry(away, self.slower)


class AtOnce:
    """Every exchange is waited for where it starts, by the device and not by the host: the serial arm on a GPU.

    `dist.transport.Blocking` also stops the host, which would charge its opponents for kernels that are launched late.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        self.inner.launch(name, sent, received, send_sizes, receive_sizes, axis).wait()
        return Landed()


class Landed:
    """Nothing to wait for."""

    def wait(self) -> None:
        """Returns."""

    def is_completed(self) -> bool:
        return True


class UnderWay:
    """Copies under way. Keeps both ends until the current stream waits: then their memory may be used again on that stream."""

    def __init__(self, landed: torch.Event, device: torch.device, pairs: list[Pair]) -> None:
        self._landed, self._device, self._pairs = landed, device, pairs

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._landed)
        self._pairs = []

    def is_completed(self) -> bool:
        return self._landed.query()


class CopyEngines:
    """Round trips on two side streams, one for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        # Filler runs both ways at once, so each way has two ends of its own.
        self._near = [torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
        self._far = [pinned(PIECE_BYTES) for _ in range(2)]

    def __str__(self) -> str:
        return "a round trip through pinned host memory on two side streams"

    def carry(self, pairs: list[Pair], slower: float) -> Work:
        """Starts when the current stream has come here. The pinned memory's allocator keeps it until the copies have ended."""
        ready = torch.cuda.current_stream(self._device).record_event()
        for stream in (self._out, self._back):  # filler waits too: a link does nothing ahead
            stream.wait_event(ready)
        hosts = [pinned(leaving.numel()) for leaving, _ in pairs]
        filler = filler_pieces(sum(host.numel() for host in hosts), slower)
        arrived = list[torch.Event]()
        with torch.cuda.stream(self._out):
            for (leaving, _), host in zip(pairs, hosts, strict=True):
                for source, target in zip(leaving.split(PIECE_BYTES), host.split(PIECE_BYTES), strict=True):
                    target.copy_(source, non_blocking=True)
                    arrived.append(self._out.record_event())
            fill(self._far[0], self._near[0], filler)
        pieces = iter(arrived)
        with torch.cuda.stream(self._back):
            fill(self._near[1], self._far[1], filler)
            for (_, coming), host in zip(pairs, hosts, strict=True):
                for source, target in zip(host.split(PIECE_BYTES), coming.split(PIECE_BYTES), strict=True):
                    self._back.wait_event(next(pieces))
                    target.copy_(source, non_blocking=True)
        self._back.wait_stream(self._out)
        return UnderWay(self._back.record_event(), self._device, pairs)


class HostCopies:
    """The same bytes copied by the launching thread."""

    def __init__(self) -> None:
        self._filler = torch.empty(PIECE_BYTES, dtype=torch.uint8), torch.empty(PIECE_BYTES, dtype=torch.uint8)

    def __str__(self) -> str:
        return "copies by the launching thread on a CPU, so that nothing overlaps"

    def carry(self, pairs: list[Pair], slower: float) -> Work:
        for leaving, coming in pairs:
            coming.copy_(leaving.clone())
        fill(*self._filler, filler_pieces(sum(leaving.numel() for leaving, _ in pairs), slower))
        return Landed()


def filler_pieces(num_bytes: int, slower: float) -> list[int]:
    """Bytes of every copy that makes an exchange of `num_bytes` take `slower` times as long."""
    whole, rest = divmod(round((slower - 1) * num_bytes), PIECE_BYTES)
    return [PIECE_BYTES] * whole + ([rest] if rest else [])


def fill(target: Tensor, source: Tensor, pieces: list[int]) -> None:
    for num_bytes in pieces:
        target[:num_bytes].copy_(source[:num_bytes], non_blocking=True)


def pinned(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def as_bytes(rows: Tensor) -> Tensor:
    """A flat view."""
    return rows.view(-1).view(torch.uint8)
