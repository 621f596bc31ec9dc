"""Processes that agree, sum, stop waiting, and share axes. One spawn runs many checks: a process costs seconds."""

import os
import re
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from moetrain.base.errors import PlanError, TrainingError
from moetrain.dist.comm import CountExchange, Exchange
from moetrain.dist.heartbeat import Heartbeat
from moetrain.dist.mesh import Mesh, auto_ep
from moetrain.dist.stop import Stop
from moetrain.dist.watch import Watch, Watchdog
from moetrain.dist.world import World
from tests.clock import FakeClock
from tests.kit import run_ranks


def posted(world: World) -> dict[str, str]:
    """What all ranks put on the board."""
    board = world.board()
    board.post(f"rank {world.rank}", str(world.rank))
    world.barrier("posted")
    return board.read([f"rank {rank}" for rank in range(world.size + 1)])


def agree_and_sum(world: World, folder: Path) -> dict[str, object]:
    value = {"name": "run", "list": [1, 2.5, None], "text": "ä"} if world.is_main else None
    world.barrier("start")
    mesh = Mesh(world, ep=2)
    ones = torch.tensor([world.rank + 1], dtype=torch.float64)
    return {
        "agreed": world.agree(value),
        "nothing": world.agree(None),
        "posted": posted(world),
        "gathered": world.gather({"rank": "ä" * world.rank}),
        "sum": int(world.sum_(torch.tensor([world.rank]))),
        "ep": (mesh.ep.ranks, mesh.ep.index, float(mesh.ep.sum_(ones.clone()))),
        "edp": (mesh.edp.ranks, mesh.edp.index, float(mesh.edp.sum_(ones.clone()))),
        "dp": (mesh.dp.ranks, mesh.dp.index, float(mesh.dp.sum_(ones.clone()))),
        "device_mesh": [axis.device_mesh.size() if axis.device_mesh else None for axis in (mesh.dp, mesh.ep, mesh.edp)],
        "exchange": check_exchange(mesh),
        "order": backward_order(mesh),
        "stop": stop_together(world, folder),
        "loops": policies_of_loops(),
    }


def policies_of_loops() -> list[int]:
    """Of the threads of this process that could be gloo's event loops; batch ones may be had where the test runs."""
    if sys.platform != "linux":
        return []
    policies = [os.sched_getscheduler(int(thread.name)) for thread in Path("/proc/self/task").iterdir()]
    return [policy for policy in policies if policy != os.SCHED_OTHER]


def stop_together(world: World, folder: Path) -> list[str | None]:
    """Nobody asks; a file that only rank 0 looks for; a signal that only rank 2 got."""
    with Stop(world, folder / "STOP") as stop:
        reasons = [stop.agreed()]
        if world.rank == 0:
            (folder / "STOP").touch()
        reasons.append(stop.agreed())
        if world.rank == 2:
            signal.raise_signal(signal.SIGUSR1)
        reasons.append(stop.agreed())
    return reasons


def check_exchange(mesh: Mesh) -> bool:
    """Uneven rows, nothing to or from some ranks, several dtypes, two exchanges open at once; the gradient takes the way back."""
    axis = mesh.dp
    rank, size = axis.index, axis.size
    send = [(rank + 2 * to) % 3 for to in range(size)]
    receive = [(source + 2 * rank) % 3 for source in range(size)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        rows = torch.tensor([[rank, to, i] for to in range(size) for i in range(send[to])], dtype=dtype).reshape(-1, 3)
        expected = torch.tensor([[source, rank, i] for source in range(size) for i in range(receive[source])], dtype=dtype).reshape(-1, 3)
        first = Exchange("first", rows, send, receive, axis)
        second = Exchange("second", rows[:0], [0] * size, [0] * size, axis)
        assert second.wait().shape == (0, 3)
        assert torch.equal(first.wait(), expected)
    rows = torch.randn(sum(send), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    came = Exchange("rows", rows, send, receive, axis).wait()
    factor = 3.0 + rank
    (came * factor).sum().backward()
    expected_grad = torch.cat([torch.full((send[to], 2), 3.0 + to, dtype=torch.float64) for to in range(size)])
    assert rows.grad is not None and torch.equal(rows.grad, expected_grad)
    counts = CountExchange("counts", torch.arange(size) + 10 * rank, [1] * size, [1] * size, axis).wait()
    assert counts.tolist() == [10 * source + rank for source in range(size)]
    return True


def backward_order(mesh: Mesh) -> list[str]:
    """What stood between start and wait in the forward stands between them in the backward."""
    axis, seen = mesh.ep, []
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    h = x * 1.0
    exchange = Exchange("shortcut", h, [1, 1], [1, 1], axis)
    main = h * 2.0
    main.register_hook(lambda grad: seen.append(f"main, under way: {exchange.backward is not None}"))
    y = exchange.wait() * 3.0
    y.register_hook(lambda grad: seen.append(f"rows, under way: {exchange.backward is not None}"))
    h.register_hook(lambda grad: seen.append(f"input, under way: {exchange.backward is not None}"))
    (main + y).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((2, 3), 5.0, dtype=torch.float64))
    return seen


@pytest.mark.dist
def test_four_ranks_agree_sum_and_exchange(tmp_path: Path) -> None:
    results = run_ranks(agree_and_sum, 4, tmp_path, tmp_path)
    for rank, result in enumerate(results):
        assert result["agreed"] == {"name": "run", "list": [1, 2.5, None], "text": "ä"}
        assert result["nothing"] is None
        assert result["posted"] == {f"rank {rank}": str(rank) for rank in range(4)}
        assert result["gathered"] == [{"rank": "ä" * other} for other in range(4)]
        assert result["sum"] == 6
        assert result["ep"] == (((0, 1), (2, 3))[rank // 2], rank % 2, (3.0, 7.0)[rank // 2])
        assert result["edp"] == (((0, 2), (1, 3))[rank % 2], rank // 2, (4.0, 6.0)[rank % 2])
        assert result["dp"] == ((0, 1, 2, 3), rank, 10.0)
        assert result["device_mesh"] == [4, 2, 2]
        assert result["exchange"] is True
        assert result["stop"] == [None, "the file STOP", "SIGUSR1"]
        assert result["order"] == ["rows, under way: False", "main, under way: True", "input, under way: False"]
        if sys.platform == "linux":
            assert len(result["loops"]) >= 4  # of the world, and of dp, ep and edp
            assert set(result["loops"]) == {os.SCHED_BATCH}



def one_rank_stays_away(world: World, fifo: Path) -> str:
    """Rank 1 lives but never comes; it leaves when rank 0 opens the fifo."""
    world.watch.timeout_seconds = 3.0  # after joining, which takes longer on a busy machine
    mesh = Mesh(world, ep=1)
    if world.rank == 1:
        fifo.read_text()
        return "away"
    try:
        mesh.dp.sum_(torch.zeros(1))
    except TrainingError as error:
        return str(error)
    finally:
        fifo.write_text("done")
    return "no time-out"


def one_rank_ends(world: World) -> str:
    if world.rank == 1:
        return "ended"
    try:
        world.barrier("evaluation")
    except TrainingError as error:
        return str(error)
    return "no error"


@pytest.mark.dist
def test_waiting_too_long_names_rank_operation_and_seconds(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    sentence = run_ranks(one_rank_stays_away, 2, tmp_path, fifo)[0]
    assert re.match(r"Rank 0 waited 3\.\d s for the other ranks in: sum over dp\.", sentence)
    assert "parallel.timeout_seconds=3" in sentence


@pytest.mark.dist
def test_a_lost_rank_is_named_as_such(tmp_path: Path) -> None:
    sentence = run_ranks(one_rank_ends, 2, tmp_path, limit=5.0)[0]
    assert re.match(r"Rank 0 lost the connection to another rank after \d+\.\d s in: barrier evaluation\.", sentence)


def fails_on_rank_1(world: World, fifo: Path) -> None:
    if world.rank == 1:
        raise ValueError("the reason")
    fifo.read_text()  # nobody ever writes


@pytest.mark.dist
def test_kit_shows_the_traceback_of_the_failing_rank_and_ends_the_others(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(AssertionError, match="the reason"):
        run_ranks(fails_on_rank_1, 2, tmp_path, tmp_path / "fifo")


def test_one_process_needs_no_group() -> None:
    with World.single(torch.device("cpu")) as world:
        mesh = Mesh(world, 1)
        x = torch.ones(3, requires_grad=True)
        assert not dist.is_initialized()
        assert world.agree({"a": [1]}) == {"a": [1]}
        world.barrier("alone")
        assert [axis.size for axis in (mesh.dp, mesh.ep, mesh.edp)] == [1, 1, 1]
        assert mesh.dp.device_mesh is None
        assert mesh.dp.sum_(torch.tensor([2])).tolist() == [2]
        assert Exchange("rows", x, [3], [3], mesh.ep).wait() is x
        with pytest.raises(PlanError, match=r"parallel\.ep=2 does not divide"):
            Mesh(world, 2)


def test_joining_without_torchrun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with World.join() as world:
        assert (world.rank, world.size, world.backend, world.is_main) == (0, 1, "single", True)


@pytest.mark.parametrize(("world_size", "num_experts", "ep"), [(1, 8, 1), (2, 8, 2), (3, 8, 3), (16, 8, 8), (6, 4, 3), (7, 4, 1)])
def test_auto_ep_is_the_largest_divisor_with_an_expert_each(world_size: int, num_experts: int, ep: int) -> None:
    assert auto_ep(world_size, num_experts) == ep


class FakeWork:
    def __init__(self) -> None:
        self.done = False

    def is_completed(self) -> bool:
        return self.done


def test_watchdog_reports_what_a_device_never_finished() -> None:
    clock, said = FakeClock(), []
    watchdog = Watchdog(3, 10.0, said.append, clock)
    finished, stuck = FakeWork(), FakeWork()
    watchdog.track("sum over dp", finished)
    clock.sleep(5.0)
    watchdog.track("rows to experts", stuck)
    ticket = watchdog.open("barrier save")
    finished.done = True
    clock.sleep(9.0)
    watchdog.check()
    assert said == []
    clock.sleep(2.0)
    watchdog.close(ticket)
    watchdog.check()
    assert said == ["Rank 3 waited 11.0 s for the other ranks in: rows to experts."]


def test_errors_that_are_no_time_out_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), Watch(0, 5.0, FakeClock()).operation("sum"):
        raise RuntimeError("shapes differ")


def freezes(world: World) -> str:
    """Rank 1 stops itself as SIGSTOP from outside would; rank 0 waits in a collective that has no end in sight."""
    said: list[str] = []
    ended = threading.Event()

    def on_lost(sentence: str) -> None:
        said.append(sentence)
        ended.set()

    file = FileStore(world.agree(f"{tempfile.mkdtemp()}/store"), world.size)
    heart = Heartbeat(file, world.rank, world.size, 2.0, on_lost)
    heart.start()
    pids = world.gather(os.getpid())
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        assert ended.wait(15.0)
        os.kill(pids[1], signal.SIGCONT)
    heart.stop()
    return said[0] if said else ""


@pytest.mark.dist
def test_a_frozen_rank_is_noticed(tmp_path: Path) -> None:
    assert "Nothing was heard from rank 1 on" in run_ranks(freezes, 2, tmp_path)[0]
