"""The one all-to-all: started at one line, waited for at another, and in the backward pass the other way round.

Each differentiable exchange is two autograd nodes. Wait's backward *starts* the reverse exchange and returns; Start's backward *waits* for
it. Autograd runs later-made nodes first, so what stood between start and wait in the forward stands between them in the backward too
(arXiv 2404.05019 gives no backward schedule; this one needs no hooks). Rows travel along dim 0; S rows are sent, R received.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from moetrain.dist.mesh import Axis
from moetrain.dist.transport import Passed, Stall, Work, bytes_to_others


@dataclass
class Flight:
    """Bytes under way. `sent` and `received` belong to the transport until `land`; keeping `sent` here keeps its memory alive."""

    name: str
    axis: Axis
    sent: Tensor
    received: Tensor
    dtype: torch.dtype  # of the rows at both ends; on the wire they may be smaller
    work: Work

    def land(self) -> Tensor:
        """Waits (on a GPU: makes the current stream wait) and returns the received rows."""
        link, watch = self.axis.link, self.axis.world.watch
        stall = None if link.stalls is None else Stall()
        started = watch.clock.monotonic()
        try:
            with watch.operation(self.name):
                self.work.wait()
        finally:
            link.landed(self.work)
        if stall is not None and link.stalls is not None:
            stall.end()
            link.stalls.append(stall)
        if watch.watchdog and self.received.is_cuda:
            watch.track(self.name, Passed(self.received.device))
        link.of(self.name).waited_seconds += watch.clock.monotonic() - started
        return self.received.to(self.dtype)


def launch(name: str, rows: Tensor, send_sizes: list[int], receive_sizes: list[int], axis: Axis) -> Flight:
    """The only caller of a transport: `send_sizes[r]` rows to rank r of the axis, in rank order. Returns at once."""
    link = axis.link
    sent = link.on_wire(rows)
    received = sent.new_empty(sum(receive_sizes), *sent.shape[1:])
    traffic = link.of(name)
    traffic.times += 1
    traffic.sent_bytes += bytes_to_others(sent, send_sizes, axis)
    with axis.world.watch.operation(name):
        work = link.launch(lambda: link.transport.launch(name, sent, received, send_sizes, receive_sizes, axis))
    return Flight(name, axis, sent, received, rows.dtype, work)


class Exchange:
    """A started exchange. The rows given to it must not change before `wait` has returned.

    `wait` may be called once; only what it returns may be read. On an axis of one rank it returns the rows themselves.
    """

    def __init__(self, name: str, rows: Tensor, send_sizes: list[int], receive_sizes: list[int], axis: Axis) -> None:
        self.name = name
        self.axis = axis
        self.send_sizes = send_sizes
        self.receive_sizes = receive_sizes
        self.forward: Flight | None = None
        self.backward: Flight | None = None
        self._placeholder: Tensor | None = rows if axis.size == 1 else cast(Tensor, _Start.apply(rows, self))

    def wait(self) -> Tensor:
        """[R, ...]: rows by source rank. Differentiable; its gradient must reach every rank of the axis or none."""
        assert self._placeholder is not None, f"{self.name} was already waited for"
        placeholder, self._placeholder = self._placeholder, None  # it has exactly one consumer, so autograd never adds into it
        return placeholder if self.axis.size == 1 else cast(Tensor, _Wait.apply(placeholder, self))


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange  # type: ignore[attr-defined]
        exchange.forward = launch(exchange.name, rows, exchange.send_sizes, exchange.receive_sizes, exchange.axis)
        return rows.new_zeros(1).expand(exchange.forward.received.shape)  # a placeholder of one element; Wait returns what came

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, placeholder: Tensor) -> tuple[Tensor, None]:
        exchange: Exchange = ctx.exchange  # type: ignore[attr-defined]
        assert exchange.backward is not None
        flight, exchange.backward = exchange.backward, None
        return flight.land(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, placeholder: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange  # type: ignore[attr-defined]
        assert exchange.forward is not None
        flight, exchange.forward = exchange.forward, None
        return flight.land()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        exchange: Exchange = ctx.exchange  # type: ignore[attr-defined]
        name = f"gradient of {exchange.name}"
        exchange.backward = launch(name, grad, exchange.receive_sizes, exchange.send_sizes, exchange.axis)
        return grad.new_zeros(1).expand(grad.shape), None  # as in Start: zeros, in which anomaly detection finds no NaN


class CountExchange:
    """A started exchange of int64 counts, not differentiable. The counts given to it must not change before `wait`."""

    def __init__(self, name: str, counts: Tensor, send_sizes: list[int], receive_sizes: list[int], axis: Axis) -> None:
        self._alone = counts
        self._flight = launch(name, counts, send_sizes, receive_sizes, axis) if axis.size > 1 else None

    def wait(self) -> Tensor:
        """Counts by source rank, on the device they were sent from."""
        return self._alone if self._flight is None else self._flight.land()
