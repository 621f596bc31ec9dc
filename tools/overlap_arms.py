"""The arms of tools/bench_overlap.py: transports set on one link in turn, and the exchanges of a unit noted and made again alone."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from moetrain.dist import comm
from moetrain.dist.mesh import Axis, Mesh
from moetrain.dist.transport import Blocking, Collective, Null, PointToPoint, Transport, Work
from tools.overlap_cases import NULL, OVERLAPPED, REST, SERIAL, STOCK
from tools.overlap_unit import Lap, Unit


@dataclass(frozen=True)
class Shipment:
    """One exchange as a rank saw it: rows to and from every rank."""

    name: str
    width: int  # values a row
    dtype: torch.dtype
    send_sizes: tuple[int, ...]
    receive_sizes: tuple[int, ...]

    def bytes_out(self, index: int) -> int:
        """To other ranks, by the rank at this place of the axis."""
        return self.width * self.dtype.itemsize * (sum(self.send_sizes) - self.send_sizes[index])


@dataclass
class Noting:
    """Passes every exchange on, and keeps a list."""

    inner: Transport
    shipments: list[Shipment] = field(default_factory=list)

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        width = sent.shape[1:].numel()
        self.shipments.append(Shipment(name, width, sent.dtype, tuple(send_sizes), tuple(receive_sizes)))
        return self.inner.launch(name, sent, received, send_sizes, receive_sizes, axis)


class Arms:
    """The transports of the expert-parallel axis by arm. All real ones are over the same PointToPoint, but for the stock one."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.axis = mesh, mesh.ep
        self.fast = PointToPoint()
        # Counts travel in the null arm too: under uneven routing every rank must compute as many rows as with the link.
        null = Null(counts=self.fast)
        self._transports: dict[str, Transport] = {
            SERIAL: Blocking(self.fast), OVERLAPPED: self.fast, NULL: null, REST: null, STOCK: Blocking(Collective()),
        }  # fmt: skip

    @contextlib.contextmanager
    def use(self, arm: str) -> Iterator[None]:
        """The link carries by this arm inside."""
        with self.carrying(self._transports[arm]):
            yield

    @contextlib.contextmanager
    def carrying(self, transport: Transport) -> Iterator[None]:
        before, self.axis.link.transport = self.axis.link.transport, transport
        try:
            yield
        finally:
            self.axis.link.transport = before

    def barrier(self) -> None:
        self.axis.world.barrier("lap")

    def shipments(self, unit: Unit) -> tuple[list[Shipment], list[Shipment]]:
        """All exchanges of one lap, those of the forward pass and those of the backward pass."""
        noting = Noting(self.fast)
        forward = list[Shipment]()

        def between() -> None:
            forward.extend(noting.shipments)
            noting.shipments.clear()

        with self.carrying(noting):
            unit.lap(self.axis.index, self.barrier, between=between)
        return forward, noting.shipments

    def exchange_only(self, forward: list[Shipment], backward: list[Shipment]) -> Lap:
        """The same exchanges one after the other and nothing else. Payload is random."""
        parts = []
        for shipments in (forward, backward):
            rows = [(payload(one, sum(one.send_sizes)), payload(one, sum(one.receive_sizes))) for one in shipments]
            self.barrier()
            seconds, cpu = time.perf_counter(), time.process_time()
            for one, (sent, received) in zip(shipments, rows, strict=True):
                self.fast.launch(one.name, sent, received, one.send_sizes, one.receive_sizes, self.axis).wait()
            parts.append((time.perf_counter() - seconds, time.process_time() - cpu))
        (forward_seconds, forward_cpu), (backward_seconds, backward_cpu) = parts
        return Lap(forward_seconds, backward_seconds, forward_cpu, backward_cpu)


class Added:
    """Seconds in the code that starts and ends exchanges, forward and backward, while `counting`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        start, land = self._timed(comm.launch), self._timed(comm.Flight.land)
        with mock.patch.object(comm, "launch", start), mock.patch.object(comm.Flight, "land", land):
            yield

    def _timed(self, work: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            started = time.perf_counter()
            found = work(*given)
            self.seconds += time.perf_counter() - started
            return found

        return call


def payload(shipment: Shipment, rows: int) -> Tensor:
    return (100 * torch.rand(rows, shipment.width)).to(shipment.dtype)


def sent_on_wire(interface: str) -> int:
    """Bytes that left by this interface so far, as the kernel counts them, headers included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (line,) = [line for line in lines if line.split(":")[0].strip() == interface]
    return int(line.split(":")[1].split()[8])


def counted(interface: str, work: Callable[[], object]) -> int:
    """Bytes that leave while `work` runs; 0 without an interface."""
    before = sent_on_wire(interface) if interface else 0
    work()
    return sent_on_wire(interface) - before if interface else 0
