"""Records one step: when every operator of a block ran and every exchange travelled, forward and backward.

A Recorder is the timer of a ForwardContext and a transport around the link's own. It adds no autograd node and changes no bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.profiler import record_function

from moetrain.base.clock import Clock, SystemClock
from moetrain.dist.mesh import Axis
from moetrain.dist.transport import Blocking, Transport, Work, bytes_to_others
from moetrain.telemetry.lanes import GRADIENT, Computation, Journey, Lanes

Moment = int  # the number of a moment taken by a Stopwatch


class Stopwatch(Protocol):
    """Takes moments while a step runs and says afterwards when they were."""

    def take(self) -> Moment: ...

    def seconds(self) -> list[float]:
        """Of every moment taken, since the first."""
        ...


class HostStopwatch:
    """Moments of this process: right where computation runs on the host."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._taken: list[float] = []

    def take(self) -> Moment:
        self._taken.append(self._clock.monotonic())
        return len(self._taken) - 1

    def seconds(self) -> list[float]:
        return [moment - self._taken[0] for moment in self._taken]


class DeviceStopwatch:
    """Moments on the current stream of a GPU, where the host runs ahead."""

    def __init__(self) -> None:
        self._taken: list[torch.cuda.Event] = []

    def take(self) -> Moment:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._taken.append(event)
        return len(self._taken) - 1

    def seconds(self) -> list[float]:
        """Waits for the last moment."""
        if self._taken:
            self._taken[-1].synchronize()
        return [self._taken[0].elapsed_time(event) / 1e3 for event in self._taken]


def stopwatch(device: torch.device, clock: Clock | None = None) -> Stopwatch:
    """The one that is right where `device` computes."""
    return DeviceStopwatch() if device.type == "cuda" else HostStopwatch(clock or SystemClock())


@dataclass
class _Span:
    """Moments of one computation."""

    name: str
    begin: Moment
    end: Moment | None = None  # None: the next moment taken


@dataclass
class _Flight:
    """Moments of one exchange; `end` is the first at which it was seen complete."""

    name: str
    num_bytes: int
    ready: Moment
    start: Moment
    end: Moment | None = None
    land: Moment | None = None
    landed: Moment | None = None


class Recorder:
    """One per recorded step. Every rank of the axis records the same steps.

    `serial`: every exchange is waited for where it starts, after all ranks of the axis have come there, so that its seconds are the link's
    own. Otherwise exchanges travel as ever.
    """

    def __init__(self, transport: Transport, device: torch.device, serial: bool, clock: Clock | None = None) -> None:
        self.serial = serial
        self._transport = Blocking(transport) if serial else transport
        self._on_host = device.type != "cuda"
        self._stopwatch = stopwatch(device, clock)
        self._flights: list[_Flight] = []
        self._open: list[tuple[_Flight, Work]] = []
        self._computations: list[_Span] = []

    def __call__(self, name: str, operator: Callable[..., Tensor], *inputs: object) -> Tensor:
        """Runs `operator(*inputs)`; its backward pass is recorded too, from its first node to the last that gives its inputs a gradient."""
        span = self._begin(name)
        with record_function(name):
            output = operator(*inputs)
        span.end = self._take()
        if output.grad_fn is not None:
            self._watch_backward(name, output.grad_fn, inputs)
        return output

    def _watch_backward(self, name: str, first: Node, inputs: Sequence[object]) -> None:
        """Hooks on nodes that are there: one of our own between an input and its users would add their gradients in another order."""
        spans: list[_Span] = []

        def begin(*_: object) -> None:
            spans.append(self._begin(GRADIENT + name))

        def end(*_: object) -> None:
            if spans:
                spans[-1].end = self._take()

        first.register_prehook(begin)
        for node in last_nodes(first, [one for one in inputs if isinstance(one, Tensor)]):
            node.register_hook(end)

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        ready = self._take()
        if self.serial:
            axis.sum_(sent.new_zeros(1, dtype=torch.float32))
        flight = _Flight(name, bytes_to_others(sent, send_sizes, axis), ready, self._take())
        work = self._transport.launch(name, sent, received, send_sizes, receive_sizes, axis)
        self._flights.append(flight)
        if self.serial:
            flight.end = self._take()
        elif self._on_host:  # a GPU's host cannot say when the device was done
            self._open.append((flight, work))
        return _Recorded(work, flight, self._take)

    def lanes(self) -> Lanes:
        """Call once the step's backward pass has ended and every exchange has landed."""
        seconds = self._stopwatch.seconds()
        computations = [self._computation(span, seconds) for span in self._computations]
        journeys = [self._journey(flight, seconds) for flight in self._flights]
        return Lanes(self.serial, computations, journeys)

    def _computation(self, span: _Span, seconds: list[float]) -> Computation:
        end = min(span.begin + 1, len(seconds) - 1) if span.end is None else span.end
        return Computation(span.name, seconds[span.begin], seconds[end])

    def _journey(self, flight: _Flight, seconds: list[float]) -> Journey:
        assert flight.land is not None and flight.landed is not None, f"{flight.name} has not landed"
        end = flight.landed if flight.end is None else flight.end
        moments = (flight.ready, flight.start, end, flight.land, flight.landed)
        return Journey(flight.name, flight.num_bytes, *(seconds[moment] for moment in moments))

    def _begin(self, name: str) -> _Span:
        span = _Span(name, self._take())
        self._computations.append(span)
        return span

    def _take(self) -> Moment:
        moment = self._stopwatch.take()
        if self._open:
            for flight, work in self._open:
                if flight.end is None and work.is_completed():
                    flight.end = moment
            self._open = [(flight, work) for flight, work in self._open if flight.end is None and flight.landed is None]
        return moment


@dataclass
class _Recorded:
    """A work whose wait is recorded."""

    work: Work
    flight: _Flight
    take: Callable[[], Moment]

    def wait(self) -> object:
        self.flight.land = self.take()
        result = self.work.wait()
        self.flight.landed = self.take()
        return result

    def is_completed(self) -> bool:
        return self.work.is_completed()


def last_nodes(first: Node, inputs: Sequence[Tensor]) -> list[Node]:
    """The autograd nodes from `first` on that hand a gradient to one of the inputs."""
    sources = {one.grad_fn for one in inputs}  # nodes that made an input; those of leaves have the leaf as `variable`

    def is_source(node: Node) -> bool:
        return node in sources or any(getattr(node, "variable", None) is one for one in inputs)

    found, seen = list[Node](), {first}
    waiting = [] if is_source(first) else [first]
    while waiting:
        node = waiting.pop()
        following = [other for other, _ in node.next_functions if other is not None]
        if any(is_source(other) for other in following):
            found.append(node)
        new = [other for other in dict.fromkeys(following) if other not in seen and not is_source(other)]
        seen.update(new)
        waiting += new
    return found
