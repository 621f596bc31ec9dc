"""The hook that saves: when it does, what it records of commits and failures, and the interval and budget it gives."""

from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest

from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.interval import best_interval
from moetrain.checkpoint.status import Status
from moetrain.checkpoint.turns import Figures
from moetrain.train.hooks import SaveHook
from tests.unit.hook_kit import Bench, step_result


def test_saves_come_at_their_steps_and_the_last_is_left_to_the_loop(tmp_path: Path) -> None:
    bench = Bench(tmp_path, total_steps=9).drive(SaveHook(CheckpointConfig(every_steps=3)), 9)
    assert bench.checkpoint.saves == [("the state", {"step": step, "tokens": 100 * step, "samples": step}) for step in (3, 6)]


def test_zero_saves_only_at_the_end(tmp_path: Path) -> None:
    assert Bench(tmp_path).drive(SaveHook(CheckpointConfig(every_steps=0)), 9).checkpoint.saves == []


def test_copies_in_memory_are_made_between_checkpoints(tmp_path):
    bench = Bench(tmp_path, total_steps=9).drive(SaveHook(CheckpointConfig(every_steps=4, snapshot_every=2)), 9)
    assert [progress["step"] for _, progress in bench.checkpoint.saves] == [4, 8]
    assert bench.checkpoint.copies == [2, 6]


def test_a_commit_is_recorded_when_it_happened_and_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, total_steps=7).drive(SaveHook(CheckpointConfig(every_steps=4)), 7, commit_after=(5,))
    at = {4: {"train/step": 4, "train/tokens": 400}, 6: {"train/step": 6, "train/tokens": 600}}
    facts = {"checkpoint/seq": 1, "checkpoint/step": 5, "checkpoint/bytes": 500, "checkpoint/seconds": 0.5}
    assert bench.sink.records == [
        at[4] | {"checkpoint/pending": 1, "checkpoint/failures": 0},
        at[6] | {"checkpoint/pending": 0, "checkpoint/failures": 0} | facts | {"checkpoint/oldest_expert_steps": 3},
    ]


def test_the_final_commit_is_recorded_and_the_restored_one_is_not(tmp_path: Path) -> None:
    bench = Bench(tmp_path, start=5, status=Status(committed_seq=7, committed_step=5))
    hook = SaveHook(CheckpointConfig(every_steps=0))
    bench.drive(hook, 3, reason="SIGTERM")
    assert bench.sink.records == []
    bench.checkpoint.commit(8)
    hook.on_finish(bench.run, "SIGTERM")
    assert [record["checkpoint/step"] for record in bench.sink.records] == [8]


def test_failures_are_recorded(tmp_path: Path) -> None:
    bench, hook = Bench(tmp_path), SaveHook(CheckpointConfig(every_steps=0))
    hook.on_start(bench.run)
    bench.checkpoint.now = Status(failures=2, last_failure="disk full")
    hook.on_step(bench.run, step_result())
    assert bench.sink.records == [{"train/step": 0, "train/tokens": 0, "checkpoint/pending": 0, "checkpoint/failures": 2}]


def saving(bench: Bench, hook: SaveHook, num_steps: int, seconds: list[float], persist_steps: int = 1) -> list[int]:
    """Drives a hook through steps that take `seconds`; a save commits after so many steps. The steps of the saves."""
    agreed = []
    bench.run.world.agree = lambda value, name: agreed.append(value) or value  # type: ignore[method-assign, assignment]
    hook.on_start(bench.run)
    for number in range(num_steps):
        started = bench.checkpoint.saves[-1][1]["step"] if bench.checkpoint.saves else None
        result = replace(step_result(), seconds=seconds[min(number, len(seconds) - 1)])
        bench.progress.advance(result, samples=1)
        if started is not None and bench.checkpoint.now.pending and bench.progress.step - started == persist_steps:
            bench.checkpoint.commit(started)
        hook.on_step(bench.run, result)
    return [progress["step"] for _, progress in bench.checkpoint.saves]


def test_an_automatic_interval_follows_what_saves_cost(tmp_path: Path) -> None:
    config = CheckpointConfig(every_steps=2, interval="auto", mean_hours_between_failures=100 / 3600)
    bench = Bench(tmp_path, total_steps=40)
    # steps of 1 s, 1.5 s beside the first save: 0.5 s a save and a fault every 100 s
    steps = saving(bench, SaveHook(config), 39, [1.0, 1.0, 1.5, 1.0])
    assert steps[0] == 2
    assert steps[1] == 4  # what the first cost is known now
    assert steps[2] - steps[1] == ceil(best_interval(0.5, 100.0))


def test_a_budget_is_shared_among_the_faults_that_are_to_be_expected(tmp_path: Path) -> None:
    config = CheckpointConfig(every_steps=5, plt_budget=0.01, mean_hours_between_failures=10 / 3600)
    bench = Bench(tmp_path, total_steps=100)
    assert saving(bench, SaveHook(config), 11, [1.0]) == [5, 10]
    assert bench.checkpoint.expected_faults == [pytest.approx(9.5), pytest.approx(9.0)]


def test_without_a_budget_or_an_automatic_interval_ranks_need_not_meet(tmp_path: Path) -> None:
    bench = Bench(tmp_path).drive(SaveHook(CheckpointConfig(every_steps=3)), 9)  # these ranks cannot agree
    assert bench.checkpoint.expected_faults == [1.0, 1.0, 1.0]


def test_a_commit_says_what_faults_have_cost_and_would_cost(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    hook = SaveHook(CheckpointConfig(every_steps=0))
    hook.on_start(bench.run)
    bench.checkpoint.now = Status(4, 8, figures=Figures(weights=0.01, moments=0.02, if_fault=0.005, experts_per_save=2))
    hook.on_step(bench.run, step_result())
    (record,) = bench.sink.records
    names = ("checkpoint/plt_weights", "checkpoint/plt_moments", "checkpoint/plt_if_fault", "checkpoint/experts_per_save")
    assert [record[name] for name in names] == [0.01, 0.02, 0.005, 2]
