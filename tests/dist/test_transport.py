"""Every transport moves the same rows: any sizes, type and number of ranks, several exchanges under way, both ways through autograd."""

from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.data.batch import Batch
from moetrain.dist.comm import CountExchange, Exchange, launch
from moetrain.dist.mesh import Axis, Mesh
from moetrain.dist.transport import SMALLEST_CHUNK_BYTES, Blocking, Collective, Null, PointToPoint, Transport
from moetrain.dist.world import World
from moetrain.model.config import AttentionConfig, ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.alltoall import AllToAllDispatcher
from moetrain.parallel.config import EngineConfig, ParallelConfig
from moetrain.parallel.native import TorchEngine
from moetrain.routing.config import RoutingConfig
from moetrain.routing.placement import Placement
from tests.dist.test_alltoall import make_routing
from tests.kit import run_ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
CHUNKED = 5 * SMALLEST_CHUNK_BYTES // 8  # float64 values that travel in more than one piece
SIGNAL = 1 << 20  # a tag far above those of a few exchanges
MATRICES = {  # rows from each rank (down) to each rank (across) of four
    "uneven": [[3, 0, 1, 5], [2, 4, 0, 1], [1, 1, 7, 0], [0, 2, 3, 1]],
    "nothing to or from rank 2": [[1, 2, 0, 3], [4, 1, 0, 1], [0, 0, 0, 0], [2, 2, 0, 1]],
    "all to rank 1": [[0, 5, 0, 0], [0, 2, 0, 0], [0, 9, 0, 0], [0, 1, 0, 0]],
    "nothing at all": [[0] * 4] * 4,
}


def contenders() -> dict[str, Transport]:
    return {
        "point to point": PointToPoint(),
        "one chunk": PointToPoint(1),
        "seven chunks": PointToPoint(7),
        "blocking": Blocking(PointToPoint()),
    }


def axes(world: World) -> list[Axis]:
    """An axis of this rank over the first 1, 2, 3 and 4 ranks."""
    found = [Axis("ep", (world.rank,), 0, None, world)]
    for size in (2, 3, 4):
        group = dist.new_group(list(range(size)), timeout=world.timeout)
        if world.rank < size:
            assert isinstance(group, dist.ProcessGroup)
            found.append(Axis("ep", tuple(range(size)), world.rank, group, world))
    return found


def journey(axis: Axis, transport: Transport, rows: Tensor, send: list[int], receive: list[int]) -> list[Tensor]:
    """What comes, and the gradient of what went."""
    axis.link.transport = transport
    if not rows.is_floating_point():
        return [CountExchange("counts", rows, send, receive, axis).wait()]
    rows = rows.clone().requires_grad_()
    came = Exchange("rows", rows, send, receive, axis).wait()
    factor = torch.linspace(1, 2, came.numel(), dtype=torch.float64).view(came.shape).to(came.dtype) + axis.index
    (gradient,) = torch.autograd.grad(came * factor, rows, torch.ones_like(came))
    return [came.detach(), gradient]


def equal_to_the_stock_call(axis: Axis) -> None:
    for case, matrix in MATRICES.items():
        send = matrix[axis.index][: axis.size]
        receive = [matrix[source][axis.index] for source in range(axis.size)]
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(axis.index)
            rows = torch.randint(0, 250, (sum(send), 3, 2), generator=generator).to(dtype)
            expected = journey(axis, Collective(), rows, send, receive)
            for name, transport in contenders().items():
                actual = journey(axis, transport, rows, send, receive)
                assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), (axis.size, case, dtype, name)


def in_pieces(axis: Axis) -> None:
    """Rows so wide that each travels in several pieces, and a size that no number of pieces divides."""
    rows = torch.randn(axis.size, CHUNKED + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(axis.index))
    sizes = [1] * axis.size
    expected = journey(axis, Collective(), rows, sizes, sizes)
    for name, transport in contenders().items():
        actual = journey(axis, transport, rows, sizes, sizes)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), name


def landing_in_the_other_order(axis: Axis) -> None:
    axis.link.transport = PointToPoint()
    sizes = [1] * axis.size
    flights = [launch(f"number {n}", torch.full((axis.size, CHUNKED), float(n + axis.index)), sizes, sizes, axis) for n in (10, 20, 30)]
    for n, flight in reversed(list(zip((10, 20, 30), flights, strict=True))):
        assert flight.land()[:, 0].tolist() == [float(n + source) for source in range(axis.size)]
        assert flight.work.is_completed()


def telling_when_it_landed(axis: Axis) -> None:
    """An exchange that nobody waits for says when it is there, and not before every rank has sent."""
    assert axis.group is not None
    axis.link.transport = PointToPoint()
    sizes = [1] * axis.size
    if axis.index > 0:
        axis.group.recv([torch.empty(1)], 0, SIGNAL).wait()  # they start when rank 0 has asked
    flight = launch("early", torch.full((axis.size, CHUNKED), float(axis.index)), sizes, sizes, axis)
    if axis.index == 0:
        assert not flight.work.is_completed()
        for rank in range(1, axis.size):
            axis.group.send([torch.zeros(1)], rank, SIGNAL).wait()
    while not flight.work.is_completed():
        pass
    assert flight.land()[:, 0].tolist() == [float(source) for source in range(axis.size)]


def landing_from_two_threads(axis: Axis) -> None:
    """Whoever comes first waits for the messages, and both return when they are there."""
    axis.link.transport = PointToPoint()
    sizes = [1] * axis.size
    for number in range(8):
        flight = launch(f"number {number}", torch.full((axis.size, CHUNKED), float(number + axis.index)), sizes, sizes, axis)
        settling = Thread(target=axis.link.settle, daemon=True)
        settling.start()
        assert flight.land()[:, 0].tolist() == [float(number + source) for source in range(axis.size)]
        settling.join()
        assert axis.link.under_way == []


def on_the_wire(axis: Axis) -> None:
    """bfloat16 on the wire rounds rows and gradients once, and halves the bytes; counts and smaller rows stay as they are."""
    axis.link.transport = Blocking(PointToPoint())
    sizes = [2] * axis.size
    rows = torch.randn(2 * axis.size, 5, generator=torch.Generator().manual_seed(axis.index))
    came, gradient = journey(axis, axis.link.transport, rows, sizes, sizes)
    axis.link.take()
    axis.link.wire_dtype = torch.bfloat16
    rounded, rounded_gradient = journey(axis, axis.link.transport, rows, sizes, sizes)
    counts = CountExchange("counts", torch.tensor([1 << 40] * axis.size), [1] * axis.size, [1] * axis.size, axis).wait()
    half = launch("half", rows.half(), sizes, sizes, axis)
    axis.link.wire_dtype = None
    assert rounded.dtype == torch.float32 and torch.equal(rounded, came.bfloat16().float()) and not torch.equal(rounded, came)
    assert rounded_gradient.dtype == torch.float32 and torch.equal(rounded_gradient, gradient.bfloat16().float())
    assert counts.tolist() == [1 << 40] * axis.size
    assert half.received.dtype == torch.float16 and half.land().dtype == torch.float16
    others = axis.size - 1
    traffic = axis.link.take()
    assert {name: account.sent_bytes for name, account in traffic.items()} == {
        "rows": others * 2 * 5 * 2, "gradient of rows": others * 2 * 5 * 2, "counts": others * 8, "half": others * 2 * 5 * 2,
    }  # fmt: skip
    assert all(account.times == 1 and account.waited_seconds >= 0 for account in traffic.values())
    assert axis.link.traffic == {}


def without_peers(axis: Axis) -> None:
    """Null keeps the shape and hears nobody, whatever the sizes; with `counts` integers are heard."""
    rows, counts = torch.ones(axis.size, 3), torch.full((axis.size,), axis.index)
    for receive in (0, 1, 4):
        received = journey(axis, Null(), rows, [1] * axis.size, [receive] * axis.size)[0]
        assert received.shape == (receive * axis.size, 3) and float(received.sum()) == 3 * axis.size * min(receive, 1)
    ones = [1] * axis.size
    assert journey(axis, Null(), counts, ones, ones)[0].tolist() == [axis.index] * axis.size
    assert journey(axis, Null(PointToPoint()), counts, ones, ones)[0].tolist() == list(range(axis.size))


def chunks_share_one_count_exchange(axis: Axis) -> None:
    """Three token chunks: one exchange of counts, and every chunk gets what it would get alone."""
    axis.link.transport = PointToPoint()
    dispatcher = AllToAllDispatcher(axis, Placement.balanced(2 * axis.size, axis.size, seed=1))
    generator = torch.Generator().manual_seed(axis.index)
    chunks = [torch.rand(n, 2 * axis.size, generator=generator).argsort(1)[:, :2] for n in (5, 0, 3)]
    routings = [make_routing(c, torch.ones(c.shape), torch.ones(c.shape, dtype=torch.bool), 2 * axis.size) for c in chunks]
    x = [torch.randn(len(c), 4, generator=generator) for c in chunks]
    axis.link.take()
    tickets = [dispatcher.send(*each) for each in zip(x, routings, dispatcher.announce(routings), strict=True)]
    assert axis.link.take()["expert counts"].times == 1
    together = [dispatcher.receive(ticket) for ticket in tickets]
    for each, (rows, count_e) in zip(zip(x, routings, strict=True), together, strict=True):
        alone, alone_e = dispatcher.receive(dispatcher.send(*each, dispatcher.announce([each[1]])[0]))
        assert torch.equal(rows, alone) and torch.equal(count_e, alone_e)


def sent_in_a_step(
    world: World, wire_dtype: str, autocast: str = "off", experts: str = "auto"
) -> tuple[dict[str, int], list[torch.Tensor], float]:
    """Bytes of rows that one training step sends, by `parallel.wire_dtype` and name, the state after it, and its gradient norm."""
    model = ModelConfig(
        vocab_size=16, hidden_size=16, num_layers=1, pattern=["moe"], expert_ffn_size=8, max_position=8,
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=16), routing=RoutingConfig(num_experts=4, top_k=2),
    )  # fmt: skip
    mesh = Mesh(world, world.size)
    parallel = ParallelConfig(ep=world.size, wire_dtype=wire_dtype)
    engine = TorchEngine(model, parallel, EngineConfig(autocast=autocast, experts=experts), OptimConfig(), world, mesh)
    engine.initialize(seed=3)
    blocking = mesh.ep.link.transport = Blocking(PointToPoint())
    tokens_BS = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(world.rank))
    batch = Batch(tokens_BS, tokens_BS, torch.ones(2, 8, dtype=torch.bool), torch.arange(8).expand(2, 8), None)
    norm = engine.step([batch], 1e-3, lambda: None).grad_norm
    rows = {name: sum(sizes) for name, sizes in blocking.sent_bytes.items() if "rows" in name}
    return rows, [fragment.data.detach().clone() for fragment in engine.state()], norm


def half_the_bytes_in_a_step(world: World) -> None:
    (whole, _, exact), (half, _, rounded) = (sent_in_a_step(world, wire_dtype) for wire_dtype in ("same", "bfloat16"))
    assert sum(whole.values()) == 2 * sum(half.values()) > 0
    assert rounded != exact and abs(rounded - exact) < 0.02 * exact


def fewer_bytes_and_the_same_bits_where_experts_compute_in_bfloat16(world: World) -> None:
    for experts in ("loop", "bmm", "grouped_mm"):
        (same, wide, _), (auto, narrow, _) = (sent_in_a_step(world, wire, "bfloat16", experts) for wire in ("same", "auto"))
        assert sum(same.values()) == 1.5 * sum(auto.values()) > 0  # rows back, and their gradients, are in bfloat16 anyway
        assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True)), experts
    assert sent_in_a_step(world, "auto")[0] == sent_in_a_step(world, "same")[0]


def check_all(world: World) -> str:
    for axis in axes(world):
        if axis.size > 1:
            equal_to_the_stock_call(axis)
            in_pieces(axis)
            landing_in_the_other_order(axis)
            telling_when_it_landed(axis)
            landing_from_two_threads(axis)
            on_the_wire(axis)
            without_peers(axis)
        chunks_share_one_count_exchange(axis) if axis.size > 1 else journey(axis, PointToPoint(), torch.ones(2, 1), [2], [2])
    half_the_bytes_in_a_step(world)
    fewer_bytes_and_the_same_bits_where_experts_compute_in_bfloat16(world)
    return "equal"


@pytest.mark.dist
def test_every_transport_equals_the_stock_call_on_one_to_four_ranks(tmp_path: Path) -> None:
    assert run_ranks(check_all, 4, tmp_path) == ["equal"] * 4
