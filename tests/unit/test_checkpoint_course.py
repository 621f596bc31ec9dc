"""What a save writes and builds on when one before it turns out to have failed, and what that does to the PLT budget."""

import errno
import os
import threading
from pathlib import Path

import pytest

from moetrain.checkpoint.arena import State
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.course import Course, Line
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.plt import plt_if_fault, plt_of_moments
from moetrain.checkpoint.turns import Horizon, Turns
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import BANKS, NUM_EXPERTS, Job, manifests

BUDGET, ASSIGNMENTS = 0.1, 1000
FIRST = {"b": 4}


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    found = CheckpointFolder(tmp_path, Io())
    found.claim(0.0)
    return found


def course(folder: CheckpointFolder, budget: float = BUDGET) -> Course:
    """Behind a full checkpoint, save 1."""
    config = CheckpointConfig(plt_budget=budget, experts_per_save=1, mode="experts")
    found = Course(folder, config, Turns(config, Horizon(FIRST, ASSIGNMENTS)))
    found.continues(Line(SaveId(1, 1), 1, FIRST, Ledger.of_banks(FIRST)))
    return found


def risk(ledger: dict, assignments: int = ASSIGNMENTS) -> float:
    held = Ledger.of_json(ledger, {})
    return plt_of_moments(held, assignments) + plt_if_fault(held, assignments)


EARLIER, LATER = Ledger.of_banks(FIRST).count([[100] * 4]), Ledger.of_banks(FIRST).count([[120] * 4])


def test_a_save_that_counted_on_a_failed_one_never_breaks_the_budget_and_the_next_is_chosen_anew(folder):
    line = course(folder)
    second, third, fourth = (SaveId(1, seq) for seq in (2, 3, 4))
    assert line.next(second, EARLIER, False, 1.0, None).selection == {"b": [0, 1, 3]}
    assert line.next(third, LATER, False, 1.0, None).selection == {"b": [2]}
    folder.give_up(second, "a full disk")
    line.ended(second)
    assert "plt_budget" in line.begin(third).refusal
    chosen = line.next(fourth, LATER, False, 1.0, None)  # before it is known what becomes of the third
    assert chosen.line.parent == SaveId(1, 1)
    folder.give_up(third, "over the budget")
    line.ended(third)
    start = line.begin(fourth)
    assert (start.parent, start.refusal) == (SaveId(1, 1), "")
    assert risk(start.ledger) <= BUDGET


def test_without_a_budget_it_goes_on_from_what_there_is(folder):
    line = course(folder, budget=0.0)
    second, third = SaveId(1, 2), SaveId(1, 3)
    line.next(second, EARLIER, False, 1.0, None)
    line.next(third, LATER, False, 1.0, None)
    folder.give_up(second, "a full disk")
    line.ended(second)
    start = line.begin(third)
    assert (start.parent, start.refusal) == (SaveId(1, 1), "")
    assert risk(start.ledger) == pytest.approx(0.36)


def test_the_hurried_save_of_a_stop_signal_is_worth_more_than_the_budget(folder):
    line = course(folder)
    second, last = SaveId(1, 2), SaveId(1, 3)
    line.next(second, EARLIER, False, 1.0, None)
    line.next(last, LATER, True, 1.0, None, lambda ledger: {"b": [2]})
    folder.give_up(second, "a full disk")
    line.ended(second)
    start = line.begin(last)
    assert not start.refusal
    assert risk(start.ledger) > BUDGET


def test_what_builds_on_a_failed_first_save_is_given_up_and_the_next_is_full(folder):
    line = course(folder)
    line.continues(Line())
    line.knows(FIRST)
    assert line.next(SaveId(1, 1), EARLIER, False, 1.0, None).selection is None
    assert line.next(SaveId(1, 2), LATER, False, 1.0, None).selection is not None
    folder.give_up(SaveId(1, 1), "a full disk")
    line.ended(SaveId(1, 1))
    assert "builds on" in line.begin(SaveId(1, 2)).refusal
    assert line.next(SaveId(1, 3), LATER, False, 1.0, None).selection is None


def test_all_ranks_give_up_a_save_that_would_break_the_budget(tmp_path):
    limits = {"plt_budget": BUDGET, "mode": "experts"}
    turns = Turns(CheckpointConfig(**limits), Horizon(dict.fromkeys(BANKS, NUM_EXPERTS), ASSIGNMENTS))  # type: ignore[arg-type]
    job = Job(tmp_path, 2, 2, turns=turns, **limits)
    job.save(1, full=True)
    hangs, goes_on = threading.Event(), threading.Event()

    def fail(operation: str, path: Path) -> None:
        hangs.set()
        assert goes_on.wait(60)
        if operation == "rename":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def trained(assignments: int) -> None:
        for rank in job.ranks:
            rank.count([[assignments] * NUM_EXPERTS for _ in BANKS])

    healthy, job.nodes[0].io = job.nodes[0].io, Io(fail)
    trained(100)
    failing = job.start(2)
    assert hangs.wait(60)
    trained(20)
    hoping = job.start(3)
    for rank in job.ranks:
        rank.wait_copied()
    goes_on.set()
    assert all(pending.done.wait(60) for pending in [*failing, *hoping])
    assert not any(pending.committed for pending in [*failing, *hoping])
    assert all("plt_budget" in pending.reason for pending in hoping)
    job.nodes[0].io = healthy
    assert all(pending.committed for pending in job.save(4))
    newest = manifests(tmp_path)[0]
    assert risk(newest.ledger) <= BUDGET
    assert not any(slot.holds[State.PERSISTING] for node in job.nodes for slot in node.agent.arena.slots.values())
    assert {path.name for path in (tmp_path / "objects").iterdir()} == {str(point.save) for point in manifests(tmp_path)}
