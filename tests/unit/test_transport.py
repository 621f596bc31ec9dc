"""What a link and a transport do by themselves, without another rank."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moetrain.dist.comm import launch
from moetrain.dist.mesh import Axis
from moetrain.dist.transport import Blocking, Collective, Link, Null, PointToPoint, Traffic, Work, default_transport
from moetrain.dist.world import World
from moetrain.parallel.config import OverlapConfig
from moetrain.parallel.observer import StepObserver
from moetrain.parallel.planner import OverlapPlanner
from tests.clock import FakeClock


class Slow:
    """Every exchange takes two seconds more than the one before; the others send what this rank sends."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.seconds = clock, 0.0

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        Null().launch(name, sent, received, send_sizes, receive_sizes, axis)
        return self

    def wait(self) -> None:
        self.seconds += 2.0
        self.clock.sleep(self.seconds)

    def is_completed(self) -> bool:
        return False


def axis_of_three(clock: FakeClock) -> Axis:
    """Rank 1 of three, on a world whose watch has a fake clock."""
    world = World(1, 3, 1, torch.device("cpu"), "gloo", 10.0)
    world.watch.clock = clock
    return Axis("ep", (0, 1, 2), 1, None, world)


def test_blocking_keeps_seconds_and_bytes_by_name() -> None:
    clock = FakeClock()
    axis = axis_of_three(clock)
    blocking = axis.link.transport = Blocking(Slow(clock), clock)
    for name in ("rows", "rows", "counts"):
        assert launch(name, torch.ones(6, 2), [1, 2, 3], [1, 1, 1], axis).work.is_completed()
    assert blocking.seconds == {"rows": [2.0, 4.0], "counts": [6.0]}
    assert blocking.sent_bytes == {"rows": [4 * 2 * 4] * 2, "counts": [4 * 2 * 4]}  # 4 of 6 rows leave, 2 values of 4 bytes each


def test_the_link_adds_up_what_was_waited_for_until_somebody_takes_it() -> None:
    clock = FakeClock()
    axis = axis_of_three(clock)
    axis.link.transport = Slow(clock)
    flights = [launch("rows", torch.ones(3, 5), [1, 1, 1], [1, 1, 1], axis) for _ in range(2)]
    assert [flight.land().shape for flight in flights] == [(3, 5), (3, 5)]
    assert axis.link.take() == {"rows": Traffic(times=2, sent_bytes=2 * 2 * 5 * 4, waited_seconds=2.0 + 4.0)}
    assert axis.link.take() == {}


class StreamEvent:
    """torch.cuda.Event on a stream that is where the fake clock is."""

    clock = FakeClock()
    num_waits = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = self.clock.time

    def synchronize(self) -> None:
        StreamEvent.num_waits += 1

    def elapsed_time(self, end: "StreamEvent") -> float:
        return 1e3 * (end.time - self.time)


def test_on_a_gpu_what_its_stream_stood_still_counts_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    axis = axis_of_three(clock)
    axis.world.device = torch.device("cuda")
    axis.link.transport = Slow(clock)
    monkeypatch.setattr(StreamEvent, "clock", clock)
    monkeypatch.setattr(torch.cuda, "Event", StreamEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: StreamEvent(enable_timing=True))
    observer = StepObserver(OverlapPlanner(OverlapConfig(), [], axis.world), axis)

    def land() -> None:
        launch("rows", torch.ones(3, 5), [1, 1, 1], [1, 1, 1], axis).land()

    waited = []
    for _ in range(2):
        land()  # of an evaluation
        with observer.step():
            land()
            clock.sleep(100.0)  # computation
            land()
        land()  # of a sum behind the passes
        waited.append(observer.waited_seconds())
        observer.finish(0.1)
    assert waited == [4.0 + 6.0, 12.0 + 14.0]
    assert StreamEvent.num_waits == 2 * (2 + 1)  # every stall, and the end of the passes
    with pytest.raises(RuntimeError), observer.step():
        raise RuntimeError
    assert axis.link.stalls is None


def test_an_exchange_without_rows_sends_no_bytes() -> None:
    axis = axis_of_three(FakeClock())
    axis.link.transport = Null()
    assert launch("rows", torch.ones(0, 5), [0, 0, 0], [0, 0, 0], axis).land().shape == (0, 5)
    assert axis.link.take()["rows"].sent_bytes == 0


@pytest.mark.parametrize(
    ("dtype", "on_wire"),
    [(torch.float64, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
     (torch.int64, torch.int64)],
)  # fmt: skip
def test_only_wider_floats_are_cast_for_the_wire(dtype: torch.dtype, on_wire: torch.dtype) -> None:
    rows = torch.arange(6).view(3, 2).t().to(dtype)  # not contiguous
    assert Link(Null()).on_wire(rows).dtype == dtype
    sent = Link(Null(), torch.bfloat16).on_wire(rows)
    assert sent.dtype == on_wire and sent.is_contiguous() and torch.equal(sent.to(dtype), rows)


def test_gloo_gets_point_to_point_and_nccl_its_own_call() -> None:
    assert isinstance(default_transport("gloo"), PointToPoint)
    assert isinstance(default_transport("nccl"), Collective)
