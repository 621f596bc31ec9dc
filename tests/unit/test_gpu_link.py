"""The emulated link and what is measured over it, on a CPU; tests/gpu/test_streams.py has the twins that need a GPU."""

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moetrain.dist.comm import Exchange
from moetrain.dist.mesh import Axis
from moetrain.dist.transport import Null, Work
from moetrain.parallel.timing import stopwatch
from tools import gpu_link
from tools.gpu_link import PIECE_BYTES, AtOnce, CopyEngines, EmulatedLink, Landed, UnderWay, filler_pieces, pretended_axis
from tools.gpu_null import Calls
from tools.gpu_overlap import POINTS, Bench, Point
from tools.gpu_unit import DeviceUnit, check_against_float64
from tools.overlap_cases import NULL, OVERLAPPED, SCMOE, SMALL, Run
from tools.overlap_unit import Lap

CPU = torch.device("cpu")
SIZES = [([3, 0, 4], [3, 0, 4]), ([0, 0, 0], [0, 0, 0]), ([0, 5, 0], [0, 5, 0]), ([2, 4, 1], [2, 1, 3]), ([1, 0, 2], [1, 2, 0])]


def delivered(sent: Tensor, send: list[int], receive: list[int]) -> Tensor:
    """Slab by slab what leaves, cut or followed by zeros."""
    slabs = []
    for rows, size in zip(sent.split(send), receive, strict=True):
        slab = rows.new_zeros(size, *sent.shape[1:])
        slab[: min(size, len(rows))] = rows[:size]
        slabs.append(slab)
    return torch.cat(slabs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(("send", "receive"), SIZES)
def test_what_leaves_comes_back_in_its_place(send: list[int], receive: list[int], dtype: torch.dtype) -> None:
    sent = torch.randint(1, 100, (sum(send), 5)).to(dtype)
    received = torch.full((sum(receive), 5), 77).to(dtype)
    EmulatedLink(CPU, 3.0).launch("rows", sent, received, send, receive, pretended_axis(3, CPU)).wait()
    assert torch.equal(received, delivered(sent, send, receive))


def test_exchanges_over_the_link_are_those_of_the_null_transport_both_ways() -> None:
    found = []
    for transport in (Null(), EmulatedLink(CPU, 2.0), AtOnce(EmulatedLink(CPU))):
        axis = pretended_axis(2, CPU)
        axis.link.transport = transport
        rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        came = Exchange("rows", rows, [4, 3], [4, 3], axis).wait()
        (gradient,) = torch.autograd.grad((came**2).sum(), rows)
        found.append((came.detach(), gradient))
    for came, gradient in found[1:]:
        assert torch.equal(came, found[0][0]) and torch.equal(gradient, found[0][1])


@given(st.integers(0, 50 * PIECE_BYTES), st.floats(1, 40))
def test_filler_makes_an_exchange_as_much_longer_in_small_copies(num_bytes: int, slower: float) -> None:
    pieces = filler_pieces(num_bytes, slower)
    assert sum(pieces) == round((slower - 1) * num_bytes)
    assert all(0 < piece <= PIECE_BYTES for piece in pieces)


def test_a_figure_of_the_link_says_that_it_is_emulated() -> None:
    text = str(EmulatedLink(CPU, 2.5))
    assert text.startswith("EMULATED") and "2.50 times as slow" in text and "nothing overlaps" in text


class Waited:
    """A transport whose exchanges say when they were waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        self.log.append(f"launch {name}")
        return self

    def wait(self) -> None:
        self.log.append("wait")

    def is_completed(self) -> bool:
        return False


def test_the_serial_arm_waits_where_an_exchange_starts_and_only_there() -> None:
    inner = Waited()
    work = AtOnce(inner).launch("rows", torch.ones(2), torch.ones(2), [1, 1], [1, 1], pretended_axis(2, CPU))
    work.wait()
    assert inner.log == ["launch rows", "wait"] and work.is_completed()


class FakeEvent:
    def __init__(self, stream: str, number: int) -> None:
        self.stream, self.number = stream, number

    def query(self) -> bool:
        return True


class FakeStream:
    """Keeps the order in which it was given things. Every stream sees every other one's events."""

    def __init__(self, name: str) -> None:
        self.name, self.log = name, list[str]()

    def record_event(self) -> FakeEvent:
        self.log.append("record")
        return FakeEvent(self.name, len(self.log))

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"wait for {event.stream} {event.number}")

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"wait for all of {other.name}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[FakeStream]:
    """The current stream, and those that are made; copies on CPU tensors are noted in the stream that is current."""
    made = [FakeStream("main")]
    current = [made[0]]
    copy = Tensor.copy_

    def new_stream(device: torch.device) -> FakeStream:
        made.append(FakeStream(("out", "back")[len(made) - 1]))
        return made[-1]

    @contextlib.contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def noted(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        current[-1].log.append(f"copy {self.numel()}")
        return copy(self, source)

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(gpu_link, "pinned", lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
    monkeypatch.setattr(gpu_link, "PIECE_BYTES", 8)
    monkeypatch.setattr(Tensor, "copy_", noted)
    return made


def test_copy_engines_wait_for_the_rows_and_the_current_stream_for_what_came(streams: list[FakeStream]) -> None:
    engines = CopyEngines(CPU)
    main, out, back = streams
    leaving = torch.arange(20, dtype=torch.uint8)
    coming = torch.zeros(20, dtype=torch.uint8)
    work = engines.carry([(leaving[:12], coming[:12]), (leaving[12:], coming[12:])], 1.5)
    assert isinstance(work, UnderWay) and torch.equal(coming, leaving)
    assert main.log == ["record"]
    payload = ["copy 8", "record", "copy 4", "record", "copy 8", "record"]
    assert out.log == ["wait for main 1", *payload, "copy 8", "copy 2"]  # filler behind the rows
    rows = ["wait for out 3", "copy 8", "wait for out 5", "copy 4", "wait for out 7", "copy 8"]
    assert back.log == ["wait for main 1", "copy 8", "copy 2", *rows, "wait for all of out", "record"]
    work.wait()
    assert main.log == ["record", f"wait for back {len(back.log)}"] and work.is_completed()


class Lossy:
    """A link that loses the last row of what came from others."""

    def __init__(self, inner: EmulatedLink) -> None:
        self.inner = inner

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        self.inner.launch(name, sent, received, send_sizes, receive_sizes, axis).wait()
        if received.is_floating_point():
            received[-1] = 0
        return Landed()


def test_a_unit_over_the_link_is_that_of_one_process_and_a_lost_row_is_seen() -> None:
    axis = pretended_axis(2, CPU)
    unit = DeviceUnit(SCMOE, SMALL, axis, CPU, torch.float32, evenly=False)
    axis.link.transport = EmulatedLink(CPU)
    assert check_against_float64(unit) < 1e-4
    axis.link.transport = Lossy(EmulatedLink(CPU))
    with pytest.raises(RuntimeError, match="ScMoE Pos-2 is off float64"):
        check_against_float64(unit)


def test_nothing_is_timed_over_a_link_that_changes_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.gpu_overlap.opponents", lambda: [Run(SCMOE, NULL), Run(SCMOE, OVERLAPPED, (2,))])
    bench = Bench(Point(0.5, SMALL), CPU, torch.float32)
    assert bench.check()["ScMoE Pos-2 O 2"] == {"gradients equal to the bit": True, "gradient error": 0.0}
    bench.link = Lossy(bench.link)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="ScMoE Pos-2 O 2 computes something else"):
        bench.check()


def test_the_filler_is_chosen_for_the_share_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(Point(0.6, SMALL), CPU, torch.float32)
    seconds = {"C": 2.0, "N": 10.0, "rest": 4.0}  # 6 of computation: 9 of exchange are 60 %
    monkeypatch.setattr(bench, "lap", lambda run: Lap(seconds[run.arm], 0.0, 0.0, 0.0))
    assert bench.settle_on(0.6)["slower"] == pytest.approx(4.5)
    assert bench.settle_on(0.1)["slower"] == 1.0 == bench.link.slower  # no link is faster than its copies


def test_added_code_is_every_call_that_starts_or_ends_an_exchange() -> None:
    unit = DeviceUnit(SCMOE, SMALL, pretended_axis(2, CPU), CPU, torch.float32, evenly=True)
    calls = Calls(stopwatch(CPU))
    with calls.counting():
        seconds = unit.time().seconds
    assert len(calls) == 2 * (1 + 2 + 2)  # counts, rows there and back, and their gradients: each starts and ends
    assert 0 < calls.host_seconds <= calls.device_seconds() < seconds
    unit.time()
    assert len(calls) == 10


def test_every_point_asks_for_another_share_size_or_routing() -> None:
    assert len(set(POINTS.values())) == len(POINTS)
    assert {POINTS[name].share for name in POINTS} == {0.15, 0.6, 0.75}
