"""The recorder: spans of forward and backward computations and of exchanges, on a clock that the operators move on; and no bit changed."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moetrain.dist.mesh import Axis
from moetrain.dist.world import World
from moetrain.model.context import Timer, untimed
from moetrain.parallel.timing import Recorder
from moetrain.telemetry.lanes import Lanes
from tests.clock import FakeClock

CPU = torch.device("cpu")
AXIS = Axis("ep", (0, 1), 0, None, World.single(CPU))


class Tick(torch.autograd.Function):
    """The identity; takes `seconds` forward and twice of it backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, clock: FakeClock, seconds: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds  # type: ignore[attr-defined]
        clock.time += seconds
        return x.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.clock.time += 2 * ctx.seconds  # type: ignore[attr-defined]
        return grad, None, None


class FakeWork:
    """Done at a moment of the clock; waiting moves the clock there."""

    def __init__(self, clock: FakeClock, done: float) -> None:
        self.clock, self.done = clock, done

    def wait(self) -> None:
        self.clock.time = max(self.clock.time, self.done)

    def is_completed(self) -> bool:
        return self.clock.time >= self.done


class FakeTransport:
    """Every exchange takes five seconds."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> FakeWork:
        return FakeWork(self.clock, self.clock.time + 5)


def recorder(clock: FakeClock, serial: bool = False) -> Recorder:
    clock.time += 100  # moments count from the first
    return Recorder(FakeTransport(clock), CPU, serial, clock)


def test_forward_and_backward_of_every_operator_are_spans() -> None:
    clock = FakeClock()
    timer = recorder(clock)
    x = torch.ones(2, requires_grad=True)
    y = timer("a", lambda x: Tick.apply(x, clock, 1.0), x)
    z = timer("b", lambda y: Tick.apply(Tick.apply(y, clock, 1.0), clock, 2.0), y)
    z.sum().backward()
    clock.time += 50  # what comes after the last operator is none of it
    spans = [(its.name, its.start, its.end) for its in timer.lanes().computations]
    assert spans == [("a", 0, 1), ("b", 1, 4), ("gradient of b", 4, 10), ("gradient of a", 10, 12)]


def test_a_backward_ends_with_the_last_of_the_nodes_that_reach_an_input() -> None:
    """What is between two operators belongs to neither; an input may be used more than once, or be no tensor that has a gradient."""
    clock = FakeClock()
    timer = recorder(clock)
    start = Tick.apply(torch.ones(2, requires_grad=True), clock, 1.0)
    y = timer("a", lambda x, other: Tick.apply(x, clock, 1.0) + Tick.apply(x, clock, 2.0) + other, start, torch.ones(2))
    timer("b", lambda y: Tick.apply(y, clock, 1.0), Tick.apply(y, clock, 10.0)).sum().backward()
    spans = [(its.name, its.end - its.start) for its in timer.lanes().computations]
    assert spans == [("a", 3), ("b", 1), ("gradient of b", 2), ("gradient of a", 6)]


@pytest.mark.parametrize(("work_seconds", "end", "waited"), [(1.0, 5.0, 4.0), (7.0, 7.0, 0.0)])
def test_an_exchange_ends_when_it_is_seen_complete_or_waited_for(work_seconds: float, end: float, waited: float) -> None:
    clock = FakeClock()
    timer = recorder(clock)
    work = timer.launch("rows", torch.zeros(4, 3), torch.zeros(4, 3), [1, 3], [2, 2], AXIS)
    timer("a", lambda x: Tick.apply(x, clock, work_seconds), torch.ones(1))
    work.wait()
    (journey,) = timer.lanes().journeys
    assert (journey.start, journey.end, journey.land, journey.waited) == (0, end, work_seconds, waited)
    assert journey.num_bytes == 3 * 3 * 4  # the rows of the other rank


def test_a_serial_exchange_is_over_before_the_next_computation() -> None:
    clock = FakeClock()
    timer = recorder(clock, serial=True)
    work = timer.launch("rows", torch.zeros(2, 3), torch.zeros(2, 3), [1, 1], [1, 1], AXIS)
    assert clock.time == 105 and work.is_completed()
    timer("a", lambda x: Tick.apply(x, clock, 1.0), torch.ones(1))
    work.wait()
    (journey,) = timer.lanes().journeys
    assert (journey.ready, journey.start, journey.end, journey.land, journey.waited) == (0, 0, 5, 6, 0)


def test_computations_without_gradient_have_no_backward() -> None:
    clock = FakeClock()
    timer = recorder(clock)
    with torch.no_grad():
        timer("a", lambda x: Tick.apply(x, clock, 1.0), torch.ones(1, requires_grad=True))
    assert [its.name for its in timer.lanes().computations] == ["a"]


def test_a_step_without_events_has_empty_lanes() -> None:
    assert recorder(FakeClock()).lanes() == Lanes(False, [], [])


def test_gradients_are_those_of_an_untimed_step_bit_for_bit() -> None:
    """Four consumers of one tensor: their gradients are added in the order in which autograd reaches them."""

    def gradients(timer: Timer) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(64, 64, generator=generator).requires_grad_() for _ in range(4)]
        h = torch.randn(64, 64, generator=generator).requires_grad_()
        first = h * 1.1
        y = timer("a", lambda x: torch.tanh(x @ weights[0]) + torch.sin(x @ weights[1]), first)
        z = timer("b", lambda x: torch.tanh(x @ weights[2]), first + y)
        ((first + y + z) @ weights[3]).square().sum().backward()
        return [tensor.grad for tensor in (h, *weights) if tensor.grad is not None]

    plain, recorded = gradients(untimed), gradients(recorder(FakeClock()))
    assert len(plain) == 5 and all(torch.equal(one, other) for one, other in zip(plain, recorded, strict=True))
