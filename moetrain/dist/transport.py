"""How the rows of one all-to-all travel: the ways behind `comm.launch`, and the link of an axis that chooses among them.

S rows are sent, R received, in the order of ranks of the axis, along dim 0; any size may be zero. A transport starts and returns; only
`Blocking` waits. Everything under way may land in any order.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from threading import Lock, Thread
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.base.clock import Clock, SystemClock

if TYPE_CHECKING:
    from moetrain.dist.mesh import Axis

SMALLEST_CHUNK_BYTES = 64 << 10  # below it a message costs more than it frees the link
_TAGS = 1 << 30  # gloo's tags are positive 32-bit numbers


class Work(Protocol):
    """One started exchange; torch.distributed's Work is one."""

    def wait(self) -> object:
        """Returns when the rows are there (on a GPU: makes the current stream wait). Raises RuntimeError when they never come."""
        ...

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        ...


class Passed:
    """A point of a GPU's current stream, complete when the device has come by.

    Made behind the wait for an exchange it stands for the exchange, and holds none of its memory: a work of nccl keeps the received rows
    for as long as anybody keeps the work, the watchdog too.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.current_stream(device).record_event()

    def is_completed(self) -> bool:
        return self._event.query()


class Stall:
    """How long a GPU's current stream stands still for an exchange: begun before the wait is enqueued, ended behind it."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()

    def end(self) -> None:
        self._end.record()

    def seconds(self) -> float:
        """Waits on the host until the device has come by."""
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3


class Transport(Protocol):
    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: "Axis"
    ) -> Work:
        """Starts moving `send_sizes[r]` rows of `sent` [S, ...] to rank r, and `receive_sizes[r]` rows of its into `received` [R, ...].

        Both are contiguous, of one dtype and row shape, and belong to the transport until `Work.wait` has returned. Every rank of the
        axis launches the same exchanges in the same order.
        """
        ...


@dataclass
class Traffic:
    """What the exchanges of one name cost so far."""

    times: int = 0
    sent_bytes: int = 0  # to other ranks
    waited_seconds: float = 0.0  # of the host, in `Flight.land`: what was not hidden (on a GPU the device waits: see `Link.stalls`)


@dataclass
class Link:
    """An axis's way to its other ranks. Both settings may be changed between steps, on all ranks alike."""

    transport: Transport
    wire_dtype: torch.dtype | None = None  # payload is cast to it for the journey and back after it; None = as it is
    traffic: dict[str, Traffic] = field(default_factory=dict)  # by name of the exchange
    stalls: list[Stall] | None = None  # of a GPU's stream, while somebody collects them
    under_way: list[Work] = field(default_factory=list)  # launched, and not yet waited for by whom they are for
    _launching: Lock = field(default_factory=Lock, repr=False, compare=False)

    def on_wire(self, rows: Tensor) -> Tensor:
        """The rows as they travel: contiguous, and smaller where `wire_dtype` is. Counts and other integers are never cast."""
        if self.wire_dtype is None or not rows.is_floating_point() or rows.dtype.itemsize <= self.wire_dtype.itemsize:
            return rows.contiguous()
        return rows.to(self.wire_dtype, memory_format=torch.contiguous_format)

    def of(self, name: str) -> Traffic:
        """The running account of the exchanges of this name."""
        return self.traffic.setdefault(name, Traffic())

    def launch(self, start: Callable[[], Work]) -> Work:
        """Starts an exchange, which `settle` knows of from its first byte on. It counts as under way until `landed`."""
        with self._launching:
            work = start()
            self.under_way = [*self.under_way, work]
        return work

    def landed(self, work: Work) -> None:
        self.under_way = [other for other in self.under_way if other is not work]

    def settle(self) -> None:
        """Waits until this rank has no exchange under way. For another thread than the one that launches them, on the host's transports."""
        waited: list[Work] = []
        while True:
            with self._launching:
                ahead = [work for work in self.under_way if not any(work is other for other in waited)]
            if not ahead:
                return
            with suppress(RuntimeError):  # told to whom the exchange is for
                ahead[0].wait()
            waited.append(ahead[0])

    def take(self) -> dict[str, Traffic]:
        """The accounts by name, which start again at nothing."""
        taken, self.traffic = self.traffic, {}
        return taken


def default_transport(backend: str) -> Transport:
    """PointToPoint on gloo; the backend's own all-to-all elsewhere."""
    return PointToPoint() if backend == "gloo" else Collective()


class PointToPoint:
    """All receives are posted first, then every rank's rows follow in pieces. The default on gloo.

    gloo sends a notice when a receive is posted, on the socket that carries the payload. Behind a bulk send it would arrive late, and
    the two directions of a slow link would take turns: stock `all_to_all_single` does so in about 40 % of its calls.
    """

    def __init__(self, chunks: int = 4) -> None:
        """`chunks`: pieces per peer, fewer where they would be smaller than SMALLEST_CHUNK_BYTES."""
        self.chunks = chunks
        self._next_tag = 0  # the same on all ranks: they launch the same exchanges

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: "Axis"
    ) -> Work:
        assert axis.group is not None
        outgoing, incoming = _slabs(sent, send_sizes), _slabs(received, receive_sizes)
        tag, self._next_tag = self._next_tag, (self._next_tag + self.chunks) % _TAGS
        others = [(axis.index + step) % axis.size for step in range(1, axis.size)]  # no rank is everybody's first
        works = [
            axis.group.recv([piece], rank, tag + number) for rank in others for number, piece in enumerate(self._pieces(incoming[rank]))
        ]
        pieces = [(number, rank, piece) for rank in others for number, piece in enumerate(self._pieces(outgoing[rank]))]
        for number, rank, piece in sorted(pieces, key=lambda item: item[0]):  # every rank's first piece before anybody's second
            works.append(axis.group.send([piece], rank, tag + number))
        incoming[axis.index].copy_(outgoing[axis.index])
        return _Together(works)

    def _pieces(self, slab: Tensor) -> tuple[Tensor, ...]:
        """The same pieces on both ends; none of nothing."""
        if not slab.numel():
            return ()
        return slab.tensor_split(max(1, min(self.chunks, slab.nbytes // SMALLEST_CHUNK_BYTES)))


class Collective:
    """The stock all-to-all. On GPUs nccl runs it on the stream of the axis's own communicator, beside the computation.

    Tensors need no `record_stream`: torch and the Flight both hold them until the current stream was made to wait.
    """

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: "Axis"
    ) -> Work:
        work = dist.all_to_all_single(received, sent, list(receive_sizes), list(send_sizes), group=axis.group, async_op=True)
        assert work is not None
        return work


class Blocking:
    """Waits inside `launch`, so that nothing overlaps: the serial arm of a measurement. Changes no bit of the result."""

    def __init__(self, inner: Transport, clock: Clock | None = None) -> None:
        self.inner = inner
        self.seconds: dict[str, list[float]] = {}  # of every exchange by name, from launch to landing; a late peer counts
        self.sent_bytes: dict[str, list[int]] = {}  # to other ranks, beside `seconds`
        self._clock = clock or SystemClock()

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: "Axis"
    ) -> Work:
        _reach(sent.device)  # the host runs ahead: what was computed before is no part of the exchange
        started = self._clock.monotonic()
        self.inner.launch(name, sent, received, send_sizes, receive_sizes, axis).wait()
        _reach(received.device)
        self.seconds.setdefault(name, []).append(self._clock.monotonic() - started)
        self.sent_bytes.setdefault(name, []).append(bytes_to_others(sent, send_sizes, axis))
        return _Together([])


class Null:
    """No peer: what this rank sends is taken for what it receives, as far as it goes, zeros after it. The communication-free arm.

    `counts`: carries integers all the same, so that under uneven routing every rank computes as many rows as with a link.
    """

    def __init__(self, counts: Transport | None = None) -> None:
        self.counts = counts

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: "Axis"
    ) -> Work:
        if self.counts is not None and not sent.is_floating_point():
            return self.counts.launch(name, sent, received, send_sizes, receive_sizes, axis)
        imitate(sent, received)
        return _Together([])


def _reach(device: torch.device) -> None:
    """Waits on the host until a GPU has done what its current stream was given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def imitate(sent: Tensor, received: Tensor) -> None:
    """Fills `received` as if the others had sent the like of `sent`."""
    source, target = sent.flatten(), received.view(-1)
    there = min(source.numel(), target.numel())
    target[:there].copy_(source[:there])
    target[there:].zero_()


def bytes_to_others(sent: Tensor, send_sizes: Sequence[int], axis: "Axis") -> int:
    """Payload that leaves this rank."""
    rows = sum(send_sizes)
    return sent.nbytes // rows * (rows - send_sizes[axis.index]) if rows else 0


class _Together:
    """Done when all are done. gloo's works know that only while somebody waits for them: the first question starts a thread that does.

    Any thread may wait and ask, any number of times.
    """

    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works
        self._landed: Future[None] = Future()
        self._lock = Lock()
        self._is_claimed = not works  # somebody waits for the works: a second wait for one would wait for another message
        if not works:
            self._landed.set_result(None)

    def wait(self) -> None:
        if self._claim():
            self._land()
        self._landed.result()

    def is_completed(self) -> bool:
        if self._claim():
            Thread(target=self._land, name="moetrain-landing", daemon=True).start()
        return self._landed.done()

    def _claim(self) -> bool:
        with self._lock:
            is_first, self._is_claimed = not self._is_claimed, True
        return is_first

    def _land(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except BaseException as error:  # for all who wait
            self._landed.set_exception(error)
        else:
            self._landed.set_result(None)
        self._works = []


def _slabs(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The rows of every rank as one flat view."""
    width = rows[0].numel() if rows.shape[0] else 0
    ends = list(accumulate(size * width for size in sizes))
    flat = rows.view(-1)
    return [flat[end - size * width : end] for end, size in zip(ends, sizes, strict=True)]
