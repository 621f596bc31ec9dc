"""The unit of tools/bench_overlap.py on two processes: all arms run, what they compute is checked, and what is wrong is not timed."""

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moetrain.dist.mesh import Axis, Mesh
from moetrain.dist.transport import PointToPoint, Work
from moetrain.dist.world import World
from moetrain.parallel.planner import MOST_STEPS, WARM_UP, Role
from tests.kit import run_ranks
from tools.bench_overlap import null_summary
from tools.gpu_null import ALONE, NULL
from tools.overlap_adaptive import CONFIG, FINALISTS, HEAT_ROUNDS, PLAN_STEPS, Stepper, every, name, raced
from tools.overlap_arms import Arms, counted
from tools.overlap_cases import GROUPS, OVERLAPPED, SCMOE, SERIAL, SMALL, TOP_2, Run
from tools.overlap_rank import Job, Laps, laps, null
from tools.overlap_transport import summary, transport
from tools.overlap_unit import Unit, balanced


def job(part: str, evenly: bool = True) -> Job:
    return Job(part, "", 1, evenly, SMALL, True)


def everything(world: World) -> dict:
    """All of this page in one start of two processes."""
    arms = Arms(Mesh(world, world.size))
    gc.freeze()  # as the bench does: a lap begins with a collection
    return {
        "even": laps(job("opponents", True), arms, "lo"),
        "real": laps(job("opponents", False), arms, "lo"),
        "exchanges": exchanges(arms),
        "transport": transport(arms, 1),
        "wrong": with_a_wrong_transport(arms),
        "planned": planned(arms),
        "null": null(job("null"), arms),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(everything, 2, tmp_path_factory.mktemp("overlap"))


class LosesARow(PointToPoint):
    """A transport that leaves the first received row unwritten."""

    def launch(
        self, name: str, sent: Tensor, received: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], axis: Axis
    ) -> Work:
        work = super().launch(name, sent, received, send_sizes, receive_sizes, axis)
        work.wait()
        if received.is_floating_point():
            received[0] = 0
        return work


def with_a_wrong_transport(arms: Arms) -> str:
    arms._transports[OVERLAPPED] = LosesARow()
    try:
        Laps(job("opponents"), arms, [Run(SCMOE, SERIAL, (3,)), Run(SCMOE, OVERLAPPED, (3,))]).check()
    except RuntimeError as error:
        return str(error)
    return ""


def exchanges(arms: Arms) -> list[list[tuple[str, int]]]:
    unit = Unit(TOP_2, SMALL, arms.axis)
    unit.decide(True, arms.axis.index)
    parts = arms.shipments(unit)
    lap = arms.exchange_only(*parts)
    assert lap.forward > 0 and lap.backward > 0
    return [[(one.name, one.bytes_out(arms.axis.index)) for one in part] for part in parts]


RACERS = every(SCMOE)[: FINALISTS + 2]


def planned(arms: Arms) -> tuple[list[tuple[int, ...]], Role, dict]:
    """What ran in the steps in which the bench lets the planner choose, and the schedule after them; what the next step would be; and
    seconds of RACERS and of one that is known."""
    stepper = Stepper(SCMOE, SMALL, arms, True)
    ran = []
    for _ in range(PLAN_STEPS):
        assert stepper.step() > 0
        ran.append(stepper.ran)
    return [*ran, stepper.slots], stepper.planner.begin(), raced(stepper, RACERS, [(1, 1, 1, 1)], 2)


@pytest.mark.dist
@pytest.mark.parametrize("routing", ["even", "real"])
def test_every_run_is_right_and_timed_in_all_its_parts(found: list[dict], routing: str) -> None:
    for its in (rank[routing] for rank in found):
        assert list(its["laps"]) == [run.name for run in GROUPS["opponents"]()]
        assert all(len(lap[part]) == 1 and lap[part][0] > 0 for lap in its["laps"].values() for part in ("forward", "backward"))
        assert max(its["errors"].values()) < 2e-5
        assert ["ScMoE Pos-2 S 3", "ScMoE Pos-2 O 2", "ScMoE Pos-2 O 3"] in its["equal"].values()
        assert all(part["main"] > 0 and part["experts"] > 0 for part in its["window"][SCMOE].values())
        assert (its["busiest"][SCMOE] == 1) is (routing == "even")
        assert all(0 < share < 1 for share in its["null_overhead"].values()) and SCMOE in its["null_overhead"]
        assert its["bytes"]["ScMoE Pos-2 O 3"]["counted"] >= its["bytes"]["ScMoE Pos-2 O 3"]["expected"] > 0


@pytest.mark.dist
def test_a_transport_that_loses_a_row_is_not_timed(found: list[dict]) -> None:
    for rank in found:
        assert "off by {'ScMoE Pos-2 O 3'" in rank["wrong"] and "equal to the bit: [{" in rank["wrong"]


@pytest.mark.dist
def test_the_exchanges_made_alone_are_those_of_the_unit(found: list[dict]) -> None:
    """Even routing sends half of N k rows of D float32 values to the other rank, four times; counts go once."""
    rows = SMALL.tokens * 2 * SMALL.hidden * 4 // 2
    counts = SMALL.experts // 2 * 8
    for forward, backward in (rank["exchanges"] for rank in found):
        assert forward == [("expert counts", counts), ("rows to experts", rows), ("rows from experts", rows)]
        assert backward == [("gradient of rows from experts", rows), ("gradient of rows to experts", rows)]


@pytest.mark.dist
def test_all_to_alls_alone_are_measured_beside_one_stream(found: list[dict]) -> None:
    ways = summary([rank["transport"] for rank in found])["ways"]
    assert isinstance(ways, dict) and len(ways) == 8
    assert all(row["of the line"] > 0 for name, row in ways.items() if name != "one way")


@pytest.mark.dist
def test_the_code_around_exchanges_is_timed_beside_a_path_without(found: list[dict]) -> None:
    figures = null_summary([rank["null"] for rank in found])
    assert all(figures["ratios"][name]["median"] > 0 for name in (ALONE, NULL)) and 0 < figures["added_share"]["median"] < 1
    assert all(error < 1e-4 for rank in found for error in rank["null"]["errors"].values())


@pytest.mark.dist
def test_the_planner_has_chosen_when_the_bench_compares(found: list[dict]) -> None:
    """After a measurement in one chunk; in what then, the times of this machine say."""
    assert found[0]["planned"][:2] == found[1]["planned"][:2]
    slots, role, _ = found[0]["planned"]
    assert role is not Role.TRIED
    assert {len(its) for its in slots[: WARM_UP + MOST_STEPS]} == {1} and len(slots[-1]) <= CONFIG.max_chunks


@pytest.mark.dist
def test_all_schedules_run_a_few_times_and_the_fastest_beside_the_known_ones_again(found: list[dict]) -> None:
    for rank in found:
        heats, final = rank["planned"][2]["heats"], rank["planned"][2]["seconds"]
        assert list(heats) == [name(slots) for slots in RACERS]
        assert {len(its) for its in heats.values()} == {HEAT_ROUNDS} and {len(its) for its in final.values()} == {2}
        assert list(final)[0] == "1+1+1+1" and len(final) == 1 + FINALISTS


def test_every_schedule_in_one_to_four_chunks() -> None:
    assert CONFIG.max_chunks == 4 and len(set(every(SCMOE))) == 4 + 10 + 20 + 35


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_balanced_choice_gives_every_expert_as_many_tokens(top_k: int) -> None:
    chosen = balanced(16, 4, top_k).topk(top_k).indices
    assert torch.bincount(chosen.flatten()).tolist() == [4 * top_k] * 4
    assert all(len(set(row)) == top_k for row in chosen.tolist())


def test_an_interface_that_sends_nothing_counts_nothing() -> None:
    assert counted("", lambda: None) == 0
    assert counted("lo", lambda: None) >= 0
