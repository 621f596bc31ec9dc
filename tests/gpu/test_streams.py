"""Exchanges and streams: rows leave when they are computed, land before they are read, and keep no memory. Skipped without a CUDA device.

nccl allows one rank on one GPU: its exchanges here are of one rank with itself, on its own stream as ever.
"""

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from moetrain.dist.comm import Exchange, launch
from moetrain.dist.mesh import Axis
from moetrain.dist.transport import Blocking, Collective, Null, Transport, Work
from moetrain.dist.watch import Watchdog
from moetrain.dist.world import World
from tests.clock import FakeClock
from tools.gpu_link import EmulatedLink, pretended_axis
from tools.gpu_overlap import reference_errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
ROWS, WIDTH = 4096, 1024
LONG = 100_000_000  # cycles: some 50 ms
TIMEOUT = 10.0


class WithItself:
    """nccl's all-to-all of the one rank of `axis`, in place of those between pretended ranks."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        return Collective().launch(name, sent, received, [sum(send_sizes)], [sum(receive_sizes)], self.axis)


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Axis]:
    """The axis of a world of one rank over nccl."""
    torch.cuda.set_device(DEVICE)
    store = FileStore(str(tmp_path_factory.mktemp("nccl") / "store"), 1)
    dist.init_process_group("nccl", rank=0, world_size=1, store=store)
    yield Axis("ep", (0,), 0, dist.group.WORLD, World(0, 1, 0, DEVICE, "nccl", TIMEOUT))
    dist.destroy_process_group()


@pytest.fixture(params=["nccl", "emulated link", "null"])
def transport(request: pytest.FixtureRequest) -> Transport:
    if request.param == "nccl":
        return WithItself(request.getfixturevalue("nccl"))
    return EmulatedLink(DEVICE, 20.0) if request.param == "emulated link" else Null()


def axis_over(transport: Transport) -> Axis:
    axis = pretended_axis(2, DEVICE)
    axis.link.transport = transport
    return axis


def late(source: Tensor) -> Tensor:
    """A copy that the device makes only after a while."""
    rows = torch.full_like(source, float("nan"))
    torch.cuda._sleep(LONG)
    return rows.copy_(source)


def test_rows_leave_when_they_are_computed_and_land_before_they_are_read(transport: Transport) -> None:
    source, axis, half = torch.randn(ROWS, WIDTH, device=DEVICE), axis_over(transport), [ROWS // 2] * 2
    for _ in range(3):
        torch.cuda.synchronize()
        flight = launch("rows", late(source), half, half, axis)
        junk = [torch.full_like(source, float("nan")) for _ in range(4)]  # takes whatever memory is free too early
        read = flight.land() + 0
        del flight, junk
        again = torch.full_like(source, float("nan"))
        assert torch.equal(read, source), "the rows that were read are not those that left"
        assert torch.isnan(again).all()


def test_gradients_come_back_through_an_exchange_with_computation_beside_it(transport: Transport) -> None:
    source, axis, uneven = torch.randn(ROWS, WIDTH, device=DEVICE), axis_over(transport), [ROWS // 4, 3 * ROWS // 4]
    weight = torch.randn(WIDTH, WIDTH, device=DEVICE)
    rows = source.clone().requires_grad_()
    exchange = Exchange("rows", late(source) * 0 + rows, uneven, uneven, axis)
    beside = rows @ weight
    ((exchange.wait() ** 2).sum() + beside.sum()).backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, 2 * source + weight.sum(1), rtol=1e-4, atol=1e-3)


def test_no_rows_travel_too(transport: Transport) -> None:
    assert launch("rows", torch.empty(0, WIDTH, device=DEVICE), [0, 0], [0, 0], axis_over(transport)).land().shape == (0, WIDTH)


def test_a_landed_exchange_keeps_no_memory_although_the_watchdog_has_not_looked(transport: Transport) -> None:
    axis, half = axis_over(transport), [ROWS // 2] * 2
    axis.world.watch.watchdog = Watchdog(0, TIMEOUT)
    launch("rows", torch.randn(ROWS, WIDTH, device=DEVICE), half, half, axis).land()  # communicators and buffers are made
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    launch("rows", torch.randn(ROWS, WIDTH, device=DEVICE), half, half, axis).land()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_the_watchdog_sees_what_the_device_has_not_passed_and_forgets_what_it_has(transport: Transport) -> None:
    axis, half, clock, overdue = axis_over(transport), [ROWS // 2] * 2, FakeClock(), list[str]()
    watchdog = axis.world.watch.watchdog = Watchdog(0, TIMEOUT, overdue.append, clock)
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * LONG)
    launch("rows", torch.randn(ROWS, WIDTH, device=DEVICE), half, half, axis).land()
    clock.time = 2 * TIMEOUT
    watchdog.check()
    assert overdue == ["Rank 0 waited 20.0 s for the other ranks in: rows."]
    torch.cuda.synchronize()
    watchdog.check()
    assert len(overdue) == 1


def test_seconds_of_a_blocking_exchange_begin_when_the_device_comes_to_it(transport: Transport) -> None:
    """The sleep before it lasts about a second, the exchange milliseconds."""
    blocking = Blocking(transport)
    axis, half, rows = axis_over(blocking), [ROWS // 2] * 2, torch.randn(ROWS, WIDTH, device=DEVICE)
    launch("rows", rows, half, half, axis)
    torch.cuda._sleep(20 * LONG)
    launch("rows", rows, half, half, axis)
    assert blocking.seconds["rows"][-1] < 0.5


def test_a_stream_stands_still_for_what_no_computation_hides() -> None:
    """Half of 16 MiB to the host and back at a twentieth of the bus's speed takes milliseconds, the computation some 50."""
    axis, half, rows = axis_over(EmulatedLink(DEVICE, 20.0)), [ROWS // 2] * 2, torch.randn(ROWS, WIDTH, device=DEVICE)

    def stood_still(cycles: int) -> float:
        axis.link.stalls = []
        flight = launch("rows", rows, half, half, axis)
        torch.cuda._sleep(cycles)
        flight.land()
        return axis.link.stalls[0].seconds()

    stood_still(0)  # buffers are made
    exposed, hidden = stood_still(0), stood_still(LONG)
    assert exposed > 5e-4
    assert hidden < 0.1 * exposed


def test_every_model_over_the_emulated_link_equals_float64_without_one() -> None:
    errors = reference_errors(DEVICE, quick=True)
    assert len(errors) > 10 and max(errors.values()) < 1e-4
