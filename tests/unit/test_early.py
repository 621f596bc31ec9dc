"""Gradient sums in the backward pass: their order, what they wait for, and how the gradients are cut into pieces."""

import gc
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from threading import Event, Thread
from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import Parameter

from moetrain.dist.mesh import Axis
from moetrain.dist.transport import Link, PointToPoint
from moetrain.dist.world import World
from moetrain.parallel.early import EarlySums
from moetrain.parallel.gradients import pieces

SECONDS = 30.0  # a test that fails waits so long


@dataclass
class Said:
    """A sum that writes down when it was made, and doubles."""

    name: str
    parameters: tuple[Parameter, ...]
    made: list[str]
    done: Event = field(default_factory=Event)
    error: Exception | None = None

    def make(self) -> None:
        if self.error is not None:
            raise self.error
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(2)
        self.made.append(self.name)
        self.done.set()


class Exchange:
    """Under way until told otherwise; says when somebody waits for it."""

    def __init__(self, fails: bool = False) -> None:
        self.asked, self.there, self.fails = Event(), Event(), fails

    def wait(self) -> None:
        self.asked.set()
        assert self.there.wait(SECONDS)
        if self.fails:
            raise RuntimeError("lost")

    def is_completed(self) -> bool:
        return self.there.is_set()


class Until(torch.autograd.Function):
    """A backward that goes on when an event has come."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, event: Event) -> Tensor:  # type: ignore[override]
        ctx.event = event  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        assert ctx.event.wait(SECONDS), "nothing was summed before the backward pass had ended"  # type: ignore[attr-defined]
        return grad, None


def three(made: list[str]) -> tuple[list[Parameter], list[Said]]:
    """Parameters a, b, c, used in that order, and a sum of each, the last one first."""
    parameters = [Parameter(torch.ones(2)) for _ in range(3)]
    return parameters, [Said(name, (parameter,), made) for name, parameter in reversed(list(zip("abc", parameters, strict=True)))]


def backward(parameters: list[Parameter], event: Event | None = None) -> None:
    a, b, c = parameters
    x = torch.ones(2) * a
    if event is not None:
        x = Until.apply(x, event)
    (x * b * c).sum().backward()


def link() -> Link:
    return Link(PointToPoint())


def test_sums_are_made_while_the_backward_pass_goes_on_and_once_a_step() -> None:
    made: list[str] = []
    parameters, sums = three(made)
    early = EarlySums(sums, link())
    for step in range(2):
        early.begin()
        backward(parameters, sums[0].done)  # a's gradient is made when c's is summed
        early.finish()
        assert made == ["c", "b", "a"] * (step + 1)
        assert not early.has_begun
        for parameter in parameters:
            assert parameter.grad is not None and parameter.grad.tolist() == [2.0, 2.0]
            parameter.grad = None
        sums[0].done.clear()


def test_nothing_is_summed_in_a_backward_pass_that_is_not_the_last() -> None:
    made: list[str] = []
    parameters, sums = three(made)
    early = EarlySums(sums, link())
    backward(parameters)
    assert made == []
    early.begin()
    backward(parameters)
    early.finish()
    assert made == ["c", "b", "a"] and parameters[0].grad is not None and parameters[0].grad.tolist() == [4.0, 4.0]


@pytest.mark.parametrize("fails", [False, True])
def test_an_exchange_under_way_goes_first(fails: bool) -> None:
    """Also one that fails: the error is told to whom it is for."""
    made: list[str] = []
    parameters, sums = three(made)
    way, exchanges = link(), [Exchange(fails), Exchange()]
    early = EarlySums(sums, way)
    for exchange in exchanges:
        assert way.launch(partial(lambda it: it, exchange)) is exchange
    early.begin()
    backward(parameters)
    for exchange in exchanges:
        assert exchange.asked.wait(SECONDS)
        assert made == []  # all gradients are there
        exchange.there.set()
    early.finish()
    assert made == ["c", "b", "a"]


def test_an_exchange_is_under_way_from_its_launch_until_it_has_landed() -> None:
    """Also while the transport starts it, which takes until the end where nothing is to overlap."""
    way, exchange = link(), Exchange()
    settled = Thread(target=way.settle, daemon=True)

    def start() -> Exchange:
        settled.start()
        settled.join(0.05)
        assert settled.is_alive()
        return exchange

    way.launch(start)
    assert exchange.asked.wait(SECONDS) and settled.is_alive()
    exchange.there.set()
    settled.join(SECONDS)
    assert not settled.is_alive()
    way.landed(exchange)
    assert way.under_way == []
    way.settle()


def test_the_order_is_the_same_where_gradients_come_in_another_one_or_not_at_all() -> None:
    made: list[str] = []
    parameters, sums = three(made)
    early = EarlySums([sums[1], sums[2], sums[0]], link())
    early.begin()
    a, _, c = parameters
    (a * c).sum().backward()
    early.finish()
    assert made == ["b", "a", "c"]


def test_an_error_is_raised_in_the_main_thread_and_nothing_is_summed_behind_it() -> None:
    made: list[str] = []
    parameters, sums = three(made)
    sums[1].error = ValueError("no peer")
    early = EarlySums(sums, link())
    early.begin()
    with pytest.raises(ValueError, match="no peer"):  # in the pass, where it is told in time
        backward(parameters)
        early.finish()
    early.abandon()
    assert made == ["c"]
    sums[1].error = None
    early.begin()
    backward(parameters)
    early.finish()
    assert made == ["c", "c", "b", "a"]


def test_after_an_error_of_the_step_no_sum_begins() -> None:
    made: list[str] = []
    parameters, sums = three(made)
    way, exchange = link(), Exchange()
    early = EarlySums(sums, way)
    way.launch(lambda: exchange)
    early.begin()
    backward(parameters)
    assert exchange.asked.wait(SECONDS)
    early.abandon()
    exchange.there.set()
    way.landed(exchange)
    backward(parameters)  # not counted
    early.begin()
    backward(parameters)
    early.finish()
    assert made == ["c", "b", "a"]


def test_sums_do_not_outlive_their_parameters() -> None:
    parameters, sums = three([])
    early = EarlySums(sums, link())
    early.begin()
    backward(parameters)
    early.finish()
    memory = ref(parameters[0])
    del early, sums, parameters
    gc.collect()
    assert memory() is None


@dataclass(frozen=True)
class Recorded(Axis):
    """An axis of two ranks whose other one has the same gradients; keeps how many bytes each sum had."""

    sizes: list[int] = field(default_factory=list)

    def sum_(self, tensor: Tensor, limit: timedelta | None = None) -> Tensor:
        self.sizes.append(tensor.nbytes)
        return tensor.mul_(2)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.sampled_from(["plain", "transposed", "none"])), max_size=12),
    st.integers(1, 30),
)
def test_pieces_sum_every_element_once_and_none_is_too_big(shapes: list[tuple[int, bool, str]], most: int) -> None:
    world = World(0, 2, 0, torch.device("cpu"), "gloo", 1.0)
    dense, experts = (Recorded(name, (0, 1), 0, None, world) for name in ("dp", "edp"))
    parameters = []
    for number, (length, is_expert, kind) in enumerate(shapes):
        parameter = Parameter(torch.zeros(length, 2))
        if kind != "none":
            values = torch.arange(2.0 * length) + 100 * number
            parameter.grad = values.view(length, 2) if kind == "plain" else values.view(2, length).t()
        parameters.append((parameter, experts if is_expert else dense))
    before = [None if parameter.grad is None else parameter.grad.clone() for parameter, _ in parameters]
    for piece in pieces(parameters, 4 * most):
        piece.make()
    for (parameter, _), grad in zip(parameters, before, strict=True):
        assert (parameter.grad is None) == (grad is None)
        if grad is not None and parameter.grad is not None:
            assert torch.equal(parameter.grad, 2 * grad)
    assert max([*dense.sizes, *experts.sizes], default=0) <= 4 * most


def test_pieces_are_as_big_as_they_may_be() -> None:
    world = World(0, 2, 0, torch.device("cpu"), "gloo", 1.0)
    axis = Axis("dp", (0, 1), 0, None, world)
    parameters = [Parameter(torch.zeros(size)) for size in (3, 5, 20, 2)]
    found = pieces([(parameter, axis) for parameter in parameters], 4 * 8)
    assert [(len(piece.parameters), piece.start, piece.stop) for piece in found] == [
        (1, 0, 8), (1, 8, 16), (1, 16, 24), (2, 0, None), (1, 0, None)
    ]  # fmt: skip
