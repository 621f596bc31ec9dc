"""How much memory copies take: what is chosen for the room there is, and that checkpoints go on in it, whatever it is."""

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.arena import State, possible_bytes, spare_folders
from moetrain.checkpoint.config import AgentConfig, CheckpointConfig
from moetrain.checkpoint.fit import Fit, Share, fit
from moetrain.checkpoint.recover import LoadReport
from moetrain.checkpoint.turns import Horizon, Turns
from moetrain.store.io import Io
from tests.unit import checkpoint_kit
from tests.unit.checkpoint_kit import BANKS, NUM_EXPERTS, Job, LocalNode, assert_equal, expected, manifests

EXPERT = {"gate_up_proj": (128, 64), "down_proj": (64, 64)}  # so large that whole pages do not matter
EXPERT_BYTES = 2 * NUM_EXPERTS * (128 + 64) * 64 * 12
DENSE_BYTES = (256 + 1) * 16 * 12
WHOLE = DENSE_BYTES + EXPERT_BYTES


@pytest.fixture(autouse=True)
def larger_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_kit, "EXPERT", EXPERT)
    monkeypatch.setattr(checkpoint_kit, "DENSE", {"embedding.weight": (256, 16), "final_norm.weight": (16,)})


def small_node(monkeypatch: pytest.MonkeyPatch, room: int) -> LocalNode:
    monkeypatch.setattr("moetrain.checkpoint.node_memory.possible_bytes", lambda folders: room)
    return LocalNode(room=room)


def share(place: str, possible: int, every: int = 0, aside: int = 0) -> Share:
    return Share(place, 100, 800, every, aside, possible)


def test_as_many_experts_are_copied_as_fit_on_every_node_beside_a_whole_copy():
    assert fit([share("a", 10_000)], 8) == Fit(8, 8, False)
    assert fit([share("a", 3000), share("a", 10_000)], 8) == Fit(4, 4, False)  # both ranks of one node count, its room once
    assert fit([share("b", 1500), share("a", 10_000)], 8) == Fit(4, 4, False)
    assert fit([share("b", 1500)], 8, wanted=2) == Fit(2, 4, False)
    assert fit([share("b", 1500)], 8, wanted=6) == Fit(6, 4, False)
    assert fit([share("b", 10_000)], 8, wanted=9) == Fit(8, 8, False)
    assert fit([share("b", 1000)], 8) == Fit(1, -1, False)
    assert fit([share("b", 1050)], 8, fewest=2) == Fit(2, 0, False)
    assert fit([Share("b", 100, 0, 0, 0, 1500)], 0) == Fit(0, 0, False)
    assert fit([Share("b", 100, 0, 0, 0, 150)], 0) == Fit(0, -1, False)
    with pytest.raises(CheckpointError, match=r"there is room for 900 B"):
        fit([share("b", 900)], 8)


def test_what_every_copy_holds_of_all_experts_counts_twice():
    assert fit([share("a", 1500, every=300)], 8) == Fit(1, -1, False)
    assert fit([share("a", 1800, every=300)], 8).beside == 7 - 1
    assert fit([share("a", 1830, every=800)], 8).beside == -1  # mode full: a copy of one expert is a copy of all
    assert fit([share("a", 1840, every=800)], 8).beside == 8
    assert fit([share("a", 1840, aside=100)], 8).beside == 6


def test_a_neighbours_copies_are_left_out_where_they_leave_no_room_for_ones_own():
    two = [share("a", 3700), share("b", 3700)]
    assert fit(two, 8, partner=True) == Fit(8, 8, True)
    assert fit(two[:1], 8, partner=True) == Fit(8, 8, False)
    assert fit([share("a", 3000), share("b", 3000)], 8, partner=True) == Fit(4, 4, True)
    assert fit([share("a", 1900), share("b", 3700)], 8, partner=True) == Fit(8, 8, False)


@pytest.mark.parametrize("mode", ["experts", "moments", "weights16", "full"])
@pytest.mark.parametrize("states", [1.25, 1.6, 2.1])
def test_every_save_is_committed_in_whatever_room_holds_one_copy(tmp_path, monkeypatch, mode, states):
    """Few experts a copy, a full checkpoint that takes the place of the copy before it, the last one of the run."""
    node = small_node(monkeypatch, int(states * WHOLE))
    job = Job(tmp_path, 1, 1, nodes=[node], mode=mode, full_every=5)
    job.load()
    for step in range(1, 9):
        (pending,) = job.save(step)
        assert pending.committed, (step, pending.error or pending.reason)
        if step % 3 == 0:  # a restart after a kill
            job = Job(tmp_path, 1, 1, nodes=[node], mode=mode, full_every=5)
            report, whole = job.load()
            assert report is not None
            assert report.step == step
            if mode != "weights16":
                fresh = {group: step - age for group, age in report.weight_ages.items()}
                assert_equal(_weights(whole), _weights(expected(step, fresh)))
    assert job.save(9, full=True)[0].committed
    job.ranks[0].finish()
    assert manifests(tmp_path)[0].full


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("mode", ["experts", "moments", "weights16"])
@pytest.mark.parametrize("states", [1.4, 2.15])
def test_two_nodes_settle_on_copies_that_fit_on_both(tmp_path, monkeypatch, mode, states, ep):
    """What ranks copy is cut into whole experts, so that one node may get more than half; what does not fit once is not tried for ever."""
    room = int(states * WHOLE / 2 * (1.2 if mode == "weights16" else 1.0))
    monkeypatch.setattr("moetrain.checkpoint.node_memory.possible_bytes", lambda folders: room)
    nodes = [LocalNode(room=room) for _ in range(2)]
    job = Job(tmp_path, 2, ep, nodes=nodes, mode=mode, agent=AgentConfig(partner=False))
    job.load()
    committed = [all(pending.committed for pending in job.save(step)) for step in range(1, 13)]
    assert committed[0]
    assert committed.count(False) <= 2
    assert all(committed[6:])
    assert all(pending.committed for pending in job.save(13, full=True))
    held = [sum(one.num_bytes for one in node.agent.generations.values()) for node in nodes]
    assert max(held) <= room


def test_a_copy_for_which_there_was_no_room_is_followed_by_smaller_ones(tmp_path, monkeypatch):
    """The room was counted as twice what there is: the next copy takes the place of the first, then they hold half the experts."""
    node = LocalNode(room=int(1.7 * WHOLE))
    monkeypatch.setattr("moetrain.checkpoint.node_memory.possible_bytes", lambda folders: 4 * WHOLE)
    job = Job(tmp_path, 1, 1, nodes=[node])
    job.load()
    assert [job.save(step)[0].committed for step in range(1, 9)] == [True, False, True, True, True, True, True, True]
    assert {len(one.job.selection[BANKS[0]]) for one in node.agent.generations.values() if one.job.selection} == {2}


@pytest.mark.parametrize("states", [1.1, 1.4, 2.1])
def test_a_kill_while_a_copy_is_made_goes_back_to_the_newest_whole_one(tmp_path, monkeypatch, states):
    """Copies between checkpoints, before and after the first commit. Where there is room for two the last one is there at any moment."""
    node = small_node(monkeypatch, int(states * WHOLE))
    job = Job(tmp_path, 1, 1, nodes=[node])
    job.load()
    for step in range(1, 6):
        job.copy(step)
        report, whole = _after_a_kill(tmp_path, node)
        assert (report.step, set(report.ages.values())) == (step, {0})
        job = Job(tmp_path, 1, 1, nodes=[node])
        job.load()
        if states > 2:
            with pytest.raises(Killed):
                _die_while_copying(job, monkeypatch, step + 100)
            report, whole = _after_a_kill(tmp_path, node)
            assert report.step == step
            assert_equal(whole, expected(step))
            job = Job(tmp_path, 1, 1, nodes=[node])
            job.load()


class Killed(Exception):
    pass


def _die_while_copying(job: Job, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Slots are reserved and half filled when the process ends."""

    def die(*asked: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("moetrain.checkpoint.memory_lane.copy_fragments", die)
        (pending,) = (rank.save(state, {"step": step}, persists=False) for rank, state in zip(job.ranks, job.states(step), strict=True))
        pending.wait_copied()


def _after_a_kill(path: Path, node: LocalNode) -> tuple[LoadReport, dict]:
    for session in list(node.agent.sessions):
        node.agent.close(session)
    report, whole = Job(path, 1, 1, nodes=[node]).load()
    assert report is not None
    return report, whole


def test_a_store_that_is_slow_takes_no_copy_away(tmp_path, monkeypatch):
    """Room for two; a save is on its way to the store for long: the next copies find no room for a while, and the newest stays."""
    node = small_node(monkeypatch, int(2.1 * WHOLE))
    job = Job(tmp_path, 1, 1, nodes=[node])
    job.load()
    job.save(1)
    goes_on = threading.Event()
    persist = node.agent.for_ranks["persist"]
    monkeypatch.setitem(node.agent.for_ranks, "persist", lambda *asked: goes_on.wait(60) and persist(*asked))
    job.start(2, full=True)
    for step in (3, 4, 5, 6):
        job.copy(step)
    newest = max(one.job.step for one in node.agent.generations.values() if not one.is_trimmed)
    report, _ = _after_a_kill(tmp_path, node)
    goes_on.set()
    assert report.step == newest >= 2


def _weights(whole: dict) -> dict:
    return {key: value for key, value in whole.items() if key.split(":")[1] == "master"}


@pytest.mark.parametrize("mode", ["experts", "moments", "weights16"])
def test_moments_in_memory_outlive_younger_copies_that_lack_them(tmp_path, mode):
    """With one expert a copy and nothing newer on disk the oldest moments are as many copies old as there are experts."""
    job = Job(tmp_path, 1, 1, nodes=[LocalNode()], mode=mode, snapshot_experts=1)
    job.load()
    job.save(1)
    for step in range(2, 10):
        job.copy(step)
    report, _ = Job(tmp_path, 1, 1, nodes=job.nodes, mode=mode, snapshot_experts=1).load()
    assert report is not None
    assert "disk" not in report.read
    assert sorted(report.ages.values()) == [age for age in range(NUM_EXPERTS) for _ in range(2)]


def test_what_a_recovery_from_memory_lost_is_not_lost_again_by_one_from_disk(tmp_path):
    """After the second, of every expert exactly what was routed to it since the step its state is of is lost."""
    horizon = Horizon(dict.fromkeys(BANKS, NUM_EXPERTS), 10**6)

    def job_of(node: LocalNode) -> Job:
        turns = Turns(CheckpointConfig(snapshot_experts=1), horizon)
        return Job(tmp_path, 1, 1, nodes=[node], snapshot_experts=1, turns=turns)

    def trained(job: Job) -> None:
        job.ranks[0].count([[10] * NUM_EXPERTS] * len(BANKS))

    job = job_of(node := LocalNode())
    job.load()
    trained(job)
    job.save(1)
    for step in (2, 3):
        trained(job)
        job.copy(step)
    job = job_of(node)
    report, _ = job.load()
    assert report is not None
    assert report.step == 3
    trained(job)
    known = {group: 4 - age for group, age in report.ages.items()}  # steps that the live state has seen
    assert job.ranks[0]._ledger.lost == lost(4, known)
    job.save(4)
    again = job_of(LocalNode())
    report, _ = again.load()
    assert report is not None
    assert set(report.ages.values()) == {0, 3}
    assert again.ranks[0]._ledger.lost == lost(4, {group: known[group] if age == 0 else 1 for group, age in report.ages.items()})


def lost(steps: int, known: dict[tuple[str, int], int]) -> dict[str, list[int]]:
    """Of ten assignments to every expert in each step."""
    return {bank: [10 * (steps - known[bank, expert]) for expert in range(NUM_EXPERTS)] for bank in BANKS}


@pytest.mark.parametrize("mode", ["experts", "moments", "weights16", "full"])
def test_the_copy_of_a_save_for_the_store_is_a_recovery_point_by_itself(tmp_path, mode):
    """All experts in memory, one of them on disk."""
    job = Job(tmp_path, 1, 1, nodes=[LocalNode()], mode=mode)
    job.load()
    job.save(1)
    job.save(2)
    report, whole = Job(tmp_path, 1, 1, nodes=job.nodes, mode=mode).load()
    assert report is not None
    assert (report.step, set(report.ages.values())) == (2, {0})
    assert "disk" not in report.read
    assert_equal(whole, expected(2))


def test_in_mode_full_two_copies_are_all_there_is(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=[node := LocalNode()], mode="full", snapshot_experts=1)
    job.load()
    for step in range(1, 8):
        job.copy(step)
        assert node.held() < 2.1 * WHOLE


def test_a_copy_that_comes_to_nothing_leaves_no_slot_behind(tmp_path, monkeypatch):
    node = small_node(monkeypatch, int(2.1 * WHOLE))
    job = Job(tmp_path, 1, 1, nodes=[node])
    job.load()
    job.save(1)
    with monkeypatch.context() as patched:
        patched.setitem(node.agent.for_ranks, "filled", lambda *asked: ({"error": "no room for its description"}, b""))
        job.copy(2)
    for step in (3, 4, 5):
        job.copy(step)
        assert max(one.job.step for one in node.agent.generations.values()) == step


def test_two_faults_before_the_first_checkpoint_lose_nothing_that_was_copied(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=[LocalNode()], snapshot_experts=1)
    job.load()
    for step in range(1, 6):
        job.copy(step)
    again = Job(tmp_path, 1, 1, nodes=job.nodes, snapshot_experts=1)
    report, _ = again.load()
    assert report is not None
    assert report.step == 5
    for step in (6, 7):
        again.copy(step)
    report, whole = Job(tmp_path, 1, 1, nodes=job.nodes, snapshot_experts=1).load()
    assert report is not None
    assert report.step == 7
    assert_equal(whole, expected(7, {group: 7 - age for group, age in report.ages.items()}))


def test_copies_of_another_node_give_way_to_the_own_ones(tmp_path, monkeypatch):
    """Node 0 has room for two copies of its own and less; what node 1 sends there is taken while it fits."""
    share_bytes = WHOLE // 2
    monkeypatch.setattr("moetrain.checkpoint.node_memory.possible_bytes", lambda folders: int(2.3 * share_bytes))
    job = Job(tmp_path, 2, 2, nodes=[LocalNode(room=int(2.3 * share_bytes)) for _ in range(2)])
    job.load()
    here, there = (node.agent for node in job.nodes)
    session = here.open(lambda: True, is_local=False)
    arrived = 0
    for step in range(1, 6):
        assert all(pending.committed for pending in job.save(step)), step
        generation = next(one for one in there.generations.values() if one.job.step == step and one.job.rank == 1)
        try:
            send_to(here, session, generation, there)
            arrived += 1
        except CheckpointError:
            session.filling.clear()
    assert arrived


def send_to(agent, session, generation, sender) -> None:
    """As the partner of `sender` does."""
    held = dict(generation.held)
    for name, one in held.items():
        view = agent.room_for_copy(session, {"op": "put"}, one.num_bytes)
        view[:] = memoryview(sender.arena.slots[one.slot].memory)[: one.num_bytes]
        held[name] = replace(one, slot=next(reversed(session.filling)))
    agent.for_agents["copied"](session, {"generation": replace(generation, held=held).to_json()}, b"")


def test_an_outage_of_the_store_leaves_no_memory_behind(tmp_path, monkeypatch):
    """Saves that cannot be committed for a while, in a memory for two and a half states; when the store is back checkpoints are."""
    down = [False]

    def fail(name: str, path: Path) -> None:
        if down[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    job = Job(tmp_path, 1, 1, nodes=[small_node(monkeypatch, int(2.5 * WHOLE))], timeout_seconds=1.0)
    job.load()
    job.save(1)
    monkeypatch.setattr(job.ranks[0]._folder, "io", Io(fail))
    job.nodes[0].io = Io(fail)
    down[0] = True
    assert not any(job.save(step)[0].committed for step in range(2, 8))
    down[0] = False
    job.save(8)
    held = [slot for slot in job.nodes[0].agent.arena.slots.values() if slot.state is State.PERSISTING]
    assert not held
    assert not job.ranks[0]._course._late
    assert all(job.save(step)[0].committed for step in (9, 10))


def test_no_room_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrain.checkpoint.node_memory.possible_bytes", lambda folders: 1000)
    with pytest.raises(CheckpointError, match="fits nowhere"):
        Job(tmp_path, 2, 2).load()


def test_a_folder_that_was_chosen_for_the_memory_is_all_there_is(tmp_path):
    arena = tmp_path / "chosen" / "moetrain-1"
    assert spare_folders(arena, str(tmp_path / "chosen")) == []
    assert [folder.name for folder in spare_folders(arena)] == ["moetrain-1"]
    assert possible_bytes([arena], lambda base: 700 if base == arena.parent else 10**9) == 700
