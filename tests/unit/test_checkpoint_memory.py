"""What copies in the memory of nodes bring back, and what they leave to the disk. Agents in this process."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.generation import points_in_memory
from moetrain.checkpoint.hurry import most_valuable
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.plan import Holding
from moetrain.checkpoint.recover import agreed_choice
from moetrain.checkpoint.shelf import GENERATIONS
from moetrain.store.history import History
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, SaveId
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import (
    BANKS,
    NUM_EXPERTS,
    Job,
    LocalNode,
    assert_equal,
    assert_goes_on_from,
    expected,
    flip,
    manifests,
    nodes_of,
    objects_of,
    restart,
)


def test_a_restart_goes_on_from_the_newest_copy_and_loses_nothing(tmp_path):
    job = Job(tmp_path, 2, 2, nodes=nodes_of(2))
    job.save(1)
    job.copy(2)
    job.copy(3)
    again = restart(job)
    report, whole = again.load()
    assert report is not None
    assert report.step == 3
    assert set(report.ages.values()) == {0}
    assert "disk" not in report.read
    assert_equal(whole, expected(3))
    assert all(pending.committed for pending in again.save(4))  # goes on from the checkpoint of step 1
    assert_equal(restart(again).load()[1], expected(4))


def test_what_came_from_memory_is_not_taken_for_committed(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(10)
    job.copy(17)
    again = restart(job)
    report, _ = again.load()
    assert report is not None
    assert (report.step, report.is_from_memory) == (17, True)
    status = again.ranks[0].status()
    assert (status.committed_step, status.committed_seq) == (10, manifests(tmp_path)[0].seq)
    again.nodes[0].dead = True
    again.save(20)
    with pytest.raises(CheckpointError, match="The last good one is of step 10; start the same command again"):
        again.ranks[0].finish()


def test_without_a_commit_nothing_is_committed_after_a_recovery_from_memory(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.copy(3)
    again = restart(job)
    report, _ = again.load()
    assert report is not None and report.step == 3
    assert again.ranks[0].status().committed_step is None


def test_a_copy_that_one_rank_lacks_is_no_recovery_point(tmp_path):
    job = Job(tmp_path, 2, 2, nodes=nodes_of(2))
    job.save(1)
    job.copy(2)
    job.nodes[1].dead = True
    job.copy(3)
    job.nodes[1].dead = False
    assert_goes_on_from(job, 2)


def test_without_memory_the_disk_is_read(tmp_path):
    job = Job(tmp_path, 2, 2, nodes=nodes_of(2))
    job.save(1)
    job.copy(2)
    job.nodes[1] = LocalNode()  # another machine
    report = assert_goes_on_from(job, 1)
    assert set(report.read) == {"the memory of this node", "disk"}  # node 0 still has its part of that save


def test_a_damaged_expert_in_memory_comes_from_an_older_version_and_is_named(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    job.copy(2)
    agent = job.nodes[0].agent
    newest = max(agent.generations.values(), key=lambda one: one.save)
    held = next(held for held in newest.held.values() if held.group == (BANKS[0], 2) and held.size)
    agent.arena.slots[held.slot].memory[5] ^= 0x10
    report, whole = restart(job).load()
    assert report is not None
    assert report.step == 2
    assert any("damaged in memory" in line for line in report.damaged)
    assert any(f"Expert 2 of {BANKS[0]} is taken from the checkpoint of step 1" in line for line in report.damaged)
    assert_equal(whole, expected(2, {(BANKS[0], 2): 1}))


@pytest.mark.parametrize("group", [None, (BANKS[0], 2)], ids=["dense", "expert"])
def test_damage_in_memory_leaves_the_good_checkpoint_of_the_same_save(tmp_path, group):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1, full=True)
    job.save(2, full=True)
    agent = job.nodes[0].agent
    newest = max(agent.generations.values(), key=lambda one: one.save)
    held = next(held for held in newest.held.values() if held.group == group and held.size)
    agent.arena.slots[held.slot].memory[5] ^= 0x10
    report = assert_goes_on_from(job, 2)
    assert set(report.ages.values()) == {0}
    assert report.read.keys() == {"disk", "the memory of this node"}
    assert any("damaged in memory" in line for line in report.damaged)


def test_the_only_checkpoint_is_read_from_disk_when_its_copies_are_gone(tmp_path):
    job = Job(tmp_path, 2, 2, nodes=nodes_of(2))
    job.save(1)
    for node in job.nodes:
        for slot in node.agent.arena.slots.values():
            Path(slot.path).unlink()
    assert list(assert_goes_on_from(job, 1).read) == ["disk"]


def test_a_slot_that_became_too_short_leaves_the_good_checkpoint(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    agent = job.nodes[0].agent
    held = next(held for one in agent.generations.values() for held in one.held.values() if held.num_bytes)
    os.truncate(held.slot, held.num_bytes - 1)
    assert assert_goes_on_from(job, 1).read.keys() == {"disk", "the memory of this node"}


@pytest.mark.parametrize("copies", [0, 1, 3], ids=["disk", "the same save", "a newer copy"])
def test_a_recovery_reads_only_the_newest_manifest(tmp_path, monkeypatch, copies):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1), keep=5)
    for step in range(1, 5):
        job.save(step, full=True)
    for step in range(5, 4 + copies):
        job.copy(step)
    if not copies:
        job.nodes[0] = LocalNode()  # another machine
    read, manifest = [], CheckpointFolder.manifest

    def noted(folder: CheckpointFolder, save: SaveId) -> Manifest:
        read.append(save.seq)
        return manifest(folder, save)

    monkeypatch.setattr(CheckpointFolder, "manifest", noted)
    assert_goes_on_from(job, max(4, 3 + copies))
    assert set(read) == {4}


@pytest.mark.parametrize("snapshot_experts", [0, 1], ids=["whole", "some experts"])
def test_a_damaged_checkpoint_below_a_newer_copy_is_told_and_not_built_on(tmp_path, snapshot_experts):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1), keep=5, snapshot_experts=snapshot_experts)
    for step in (1, 2):
        job.save(step, full=True)
    job.copy(3)
    flip(next((tmp_path / "manifests").glob(f"*{manifests(tmp_path)[0].save}.json")), 40)
    again = restart(job, snapshot_experts)
    report, _ = again.load()
    assert report is not None and report.step == 3
    assert any("is damaged" in line for line in report.damaged)
    again.save(4)
    assert manifests(tmp_path)[0].full


def test_an_object_damaged_in_memory_and_on_disk_comes_from_the_older_checkpoint(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1, full=True)
    job.save(2, full=True)
    group = (BANKS[0], 2)
    agent = job.nodes[0].agent
    newest = max(agent.generations.values(), key=lambda one: one.save)
    held = next(held for held in newest.held.values() if held.group == group and held.size)
    agent.arena.slots[held.slot].memory[5] ^= 0x10
    (folder,) = objects_of(tmp_path, manifests(tmp_path)[0], f"{group[0]}.{group[1]}.")
    flip(folder / "c.0", 3)
    report, whole = restart(job).load()
    assert report is not None
    assert any("is taken from the checkpoint of step 1" in line for line in report.damaged)
    assert_equal(whole, expected(2, {group: 1}))


def test_a_damaged_slot_is_never_written_to_the_store(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    agent = job.nodes[0].agent
    persist = agent.for_ranks["persist"]

    def damage_then_persist(session, request, raw):
        held = next(held for held in next(iter(agent.generations.values())).held.values() if held.size)
        agent.arena.slots[held.slot].memory[0] ^= 1
        return persist(session, request, raw)

    agent.for_ranks["persist"] = damage_then_persist
    (pending,) = job.save(1)
    assert not pending.committed
    assert "damaged" in pending.reason


def test_an_agent_takes_over_from_one_that_was_killed(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    job.copy(2)
    (job.nodes[0].folder / "slots" / "half-made").write_bytes(b"x" * 4096)
    job.nodes[0].start()
    assert not (job.nodes[0].folder / "slots" / "half-made").exists()
    assert_goes_on_from(job, 2)


@pytest.mark.parametrize("damage", [b"", b"{}", b"flip"])
def test_a_damaged_description_hides_its_copy_and_no_other(tmp_path, damage):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    job.copy(2)
    newest = sorted((job.nodes[0].folder / GENERATIONS).glob("*.json"))[-1]
    data = newest.read_bytes()
    newest.write_bytes(damage if damage != b"flip" else data.replace(b'"step":2', b'"step":3'))
    job.nodes[0].start()
    assert_goes_on_from(job, 1)


def test_starting_anew_forgets_what_is_in_memory(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    again = restart(job)
    assert again.load("never")[0] is None
    assert job.nodes[0].agent.generations == {}


def test_a_run_that_took_its_leave_is_read_from_disk(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    job.ranks[0].finish()
    assert list(assert_goes_on_from(job, 1).read) == ["disk"]


@pytest.mark.parametrize("sharded", [False, True])
def test_copies_of_some_experts_take_the_others_from_older_copies(tmp_path, sharded):
    job = Job(tmp_path, 2, 2, sharded, nodes=nodes_of(2), snapshot_experts=1)
    job.load()
    job.save(1)
    for step in range(2, 2 + 2 * NUM_EXPERTS):
        job.copy(step)
    again = restart(job, snapshot_experts=1)
    report, whole = again.load()
    assert report is not None
    last = 1 + 2 * NUM_EXPERTS
    assert report.step == last
    assert "disk" not in report.read
    assert {bank: sorted(report.ages[bank, expert] for expert in range(NUM_EXPERTS)) for bank in BANKS} == {
        bank: list(range(NUM_EXPERTS)) for bank in BANKS
    }
    assert_equal(whole, expected(last, {group: last - age for group, age in report.ages.items()}))


def test_what_two_nodes_have_counts_once_and_the_fuller_part_of_two(tmp_path):
    """A partner lists what its owner lists too; what is left of an older copy need not be the same on both."""
    job = Job(tmp_path, 2, 2, sharded=True, nodes=nodes_of(2), snapshot_experts=1)
    job.load()
    job.save(1)
    for step in range(2, 2 + 2 * NUM_EXPERTS):
        job.copy(step)
    own = [one for node in job.nodes for one in node.agent.generations.values()]
    copies = [replace(one, is_copy=True) for one in own]
    for listed in (own + copies, [one.only(set()) for one in own] + copies, copies + [one.only(set()) for one in own]):
        (wanted, *_), (found, *_) = points_in_memory(own, History(None)), points_in_memory(listed, History(None))
        assert (found.step, found.ages()) == (1 + 2 * NUM_EXPERTS, wanted.ages())


def test_a_copy_is_completed_from_a_checkpoint_that_was_being_written_when_it_was_made(tmp_path):
    """Its commit swept the one that the copy named as its parent."""
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    job.nodes[0] = LocalNode()  # what is in memory is lost
    job = Job(tmp_path, 1, 1, nodes=job.nodes, snapshot_experts=1, keep=1)
    job.load()
    job.copy(2)
    may_go_on = threading.Event()

    class Slow(Io):
        def rename(self, source: Path, target: Path) -> None:
            may_go_on.wait(30)
            super().rename(source, target)

    job.nodes[0].io = Slow()
    (pending,) = job.start(3)
    assert pending.safe.wait(30)
    job.copy(4)
    may_go_on.set()
    assert pending.done.wait(30)
    assert [point.step for point in manifests(tmp_path)] == [3]
    report, whole = restart(job, snapshot_experts=1).load()
    assert report is not None
    assert (report.step, sorted(report.ages.values())) == (4, [0, 0, 1, 1, 2, 2, 3, 3])
    assert_equal(whole, expected(4, {group: 4 - age for group, age in report.ages.items()}))


def test_experts_that_no_copy_holds_come_from_the_checkpoint_it_goes_on_from(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1))
    job.save(1)
    job.nodes[0] = LocalNode()
    job = restart(job, snapshot_experts=2)
    job.load()
    job.copy(2)
    report, whole = restart(job, snapshot_experts=2).load()
    assert report is not None
    assert report.step == 2
    assert sorted(report.ages.values()) == [0] * 4 + [1] * 4
    assert "disk" in report.read
    assert_equal(whole, expected(2, {group: 2 - age for group, age in report.ages.items()}))


def test_a_hurried_last_save_writes_the_most_valuable_experts_that_fit(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1), grace_seconds=1e-9, keep=9)
    job.load()
    for step in (1, 2):
        job.save(step)
    (pending,) = [rank.save(state, {"step": 3}, full=True, hurried=True) for rank, state in zip(job.ranks, job.states(3), strict=True)]
    assert pending.done.wait(60)
    assert pending.committed
    job.ranks[0].finish()
    choice = agreed_choice(tmp_path, "must")
    assert choice is not None
    assert choice.manifest.step == 3
    assert min(choice.manifest.ages().values()) > 0, "there was time for what belongs to no expert only"
    report = assert_goes_on_from(job, 3)
    assert set(report.ages.values()) == {0}, "memory has what the store lacks, should this node come back"


def test_a_grace_that_is_long_enough_is_a_full_save(tmp_path):
    job = Job(tmp_path, 1, 1, nodes=nodes_of(1), grace_seconds=1e6)
    job.load()
    job.save(1)
    (pending,) = [rank.save(state, {"step": 2}, full=True, hurried=True) for rank, state in zip(job.ranks, job.states(2), strict=True)]
    assert pending.done.wait(60)
    choice = agreed_choice(tmp_path, "must")
    assert choice is not None
    assert choice.manifest.full


def test_value_is_unsaved_tokens_times_age():
    holdings = [Holding(None, "master", (0,), 100), *(Holding(("bank", expert), "master", (0,), 10) for expert in range(4))]
    ledger = Ledger.of_banks({"bank": 4}).count([[5, 9, 0, 6]])
    ledger = replace(ledger, age={"bank": [3, 0, 7, 0]})  # unsaved x (age + 1): 20, 9, 0, 6
    assert most_valuable(holdings, "experts", ledger, 100 + 25) == {"bank": [0, 1]}
    assert most_valuable(holdings, "experts", ledger, 100 + 35) == {"bank": [0, 1, 3]}
    assert most_valuable(holdings, "experts", ledger, 50) == {"bank": []}
    assert most_valuable(holdings, "experts", ledger, 140) is None
