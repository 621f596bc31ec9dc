"""The hooks that tell: logs, evaluations, samples, events and profiles; when they act, and that no rank is left out of a collective."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from moetrain.base.log import logger
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.recover import LoadReport
from moetrain.checkpoint.status import Status
from moetrain.telemetry.config import ProfileConfig, TelemetryConfig
from moetrain.telemetry.experts import load_snapshots
from moetrain.train.config import TrainingConfig
from moetrain.train.evaluate import EvaluationResult
from moetrain.train.hooks import EvaluateHook, EventHook, LogHook, ProfileHook, SampleHook, SaveHook
from tests.unit.hook_kit import Bench, step_result

BANKS = ["blocks.0.moe.experts", "blocks.1.moe.experts"]


def test_records_come_every_few_steps_and_at_the_last(tmp_path: Path) -> None:
    bench = Bench(tmp_path).drive(LogHook(TelemetryConfig(log_every=4), BANKS), 10)
    assert bench.steps == [4, 8, 10]
    assert [record["train/tokens"] for record in bench.sink.records] == [400, 800, 1000]
    assert [record["train/loss"] for record in bench.sink.records] == [2.5, 6.5, 9.5]
    assert bench.sink.loads == [(4, [[4, 12], [8, 8]]), (8, [[4, 12], [8, 8]]), (10, [[2, 6], [4, 4]])]


@pytest.mark.parametrize(("log_every", "experts_every"), [(4, 4), (1, 4), (4, 1), (1, 1)])
def test_a_stop_between_two_records_leaves_nothing_unsaid(tmp_path: Path, log_every: int, experts_every: int) -> None:
    config = TelemetryConfig(log_every=log_every, experts_every=experts_every)
    bench = Bench(tmp_path).drive(LogHook(config, BANKS), 6, reason="SIGTERM")
    assert bench.steps[-1] == 6
    assert sum(int(snapshot.load_LE.sum()) for snapshot in load_snapshots(tmp_path)) == 6 * 8
    assert len(bench.steps) == len(set(bench.steps))


def test_time_before_the_first_step_is_no_training_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.clock.time += 500
    bench.drive(LogHook(TelemetryConfig(), BANKS), 1)
    assert bench.sink.records[0]["perf/tokens_per_second"] == 50.0


def test_snapshots_hold_the_load_since_the_one_before(tmp_path: Path) -> None:
    bench = Bench(tmp_path).drive(LogHook(TelemetryConfig(experts_every=4), BANKS), 10)
    snapshots = load_snapshots(tmp_path)
    assert [(snapshot.step, snapshot.load_LE.tolist()) for snapshot in snapshots] == [
        (4, [[4, 12], [8, 8]]),
        (8, [[4, 12], [8, 8]]),
        (10, [[2, 6], [4, 4]]),
    ]
    assert snapshots[0].banks == tuple(BANKS)
    assert bench.sink.images == [("experts/load", step) for step in (4, 8, 10)]


def test_snapshots_can_be_off_and_a_dense_model_has_none(tmp_path: Path) -> None:
    Bench(tmp_path).drive(LogHook(TelemetryConfig(experts_every=0), BANKS), 7, reason="SIGTERM")
    Bench(tmp_path).drive(LogHook(TelemetryConfig(), []), 10)
    assert load_snapshots(tmp_path) == []


def test_evaluation_during_training_and_of_everything_at_the_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    at_end = EvaluationResult(nats=8.0, num_tokens=4, num_bytes=4)
    bench.drive(EvaluateHook(TrainingConfig(evaluate_every=5), lambda: at_end), 10)
    assert bench.num_evaluations == 1
    assert bench.sink.records == [
        {"train/step": 5, "train/tokens": 500, "evaluation/loss": 3.0, "evaluation/bits_per_byte": pytest.approx(30 / np.log(2) / 20)},
        {"train/step": 10, "train/tokens": 1000, "evaluation/loss": 2.0, "evaluation/bits_per_byte": pytest.approx(8 / np.log(2) / 4)},
    ]


def test_a_stopped_run_is_not_evaluated_on_the_way_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.drive(EvaluateHook(TrainingConfig(), bench.evaluate), 4, reason="SIGTERM")
    assert bench.num_evaluations == 0


def test_evaluation_and_samples_do_not_count_as_training_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    log, evaluate = LogHook(TelemetryConfig(log_every=2), BANKS), EvaluateHook(TrainingConfig(evaluate_every=1), bench.evaluate)
    for hook in (log, evaluate):
        hook.on_start(bench.run)
    for _ in range(2):
        bench.clock.time += 2
        bench.progress.advance(step_result(), 1)
        for hook in (log, evaluate):
            hook.on_step(bench.run, step_result())
    assert bench.sink.records[1]["perf/tokens_per_second"] == 50.0


def test_samples_are_generated_for_every_prompt_and_an_empty_one_starts_a_document(tmp_path: Path) -> None:
    config = TrainingConfig(sample_every=5, sample_prompts=["ab", ""], sample_tokens=7)
    bench = Bench(tmp_path).drive(SampleHook(config), 9)
    assert bench.engine.generated == [([97, 98], 7, 5), ([99], 7, 5)]
    assert bench.sink.records[0] == {"train/step": 5, "train/tokens": 500, "sample/prompt": "ab", "sample/text": "5 7"}


def test_samples_are_off_by_default(tmp_path: Path) -> None:
    assert Bench(tmp_path).drive(SampleHook(TrainingConfig()), 10).engine.generated == []


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_takes_part_in_what_all_must_do_and_only_rank_0_speaks(tmp_path: Path, rank: int) -> None:
    bench = Bench(tmp_path, rank=rank)
    config, telemetry = TrainingConfig(evaluate_every=3, sample_every=3), TelemetryConfig(experts_every=3)
    hooks = [
        LogHook(telemetry, BANKS),
        EvaluateHook(config, bench.evaluate),
        SampleHook(config),
        SaveHook(CheckpointConfig(every_steps=3)),
        EventHook(None),
    ]
    for hook in hooks:
        hook.on_start(bench.run)
    for _ in range(3):
        bench.progress.advance(step_result(), 1)
        for hook in hooks:
            hook.on_step(bench.run, step_result())
    for hook in hooks:
        hook.on_finish(bench.run, "done")
    assert (bench.num_evaluations, len(bench.engine.generated), len(bench.checkpoint.saves)) == (2, 1, 1)
    assert bool(bench.sink.records) == bool(list(tmp_path.iterdir())) == (rank == 0)


def test_events_say_how_a_run_began_and_ended(tmp_path: Path) -> None:
    fresh = Bench(tmp_path).drive(EventHook(None), 2, reason="STOP file")
    at = {"train/step": 0, "train/tokens": 0}
    start, stop = fresh.sink.records
    assert start == at | {"event": "start", "parallel/ranks": 1, "train/total_steps": 10}
    assert stop == {"train/step": 2, "train/tokens": 200, "event": "stop", "reason": "STOP file"}
    ages = {("a", 0): 0, ("a", 1): 3, ("b", 0): 3, ("b", 1): 0}
    restored = LoadReport(
        tmp_path, {}, 2, 4, ages, [], ["One was damaged."], is_from_memory=True, read={"disk": 7}, weight_ages=dict.fromkeys(ages, 0)
    )  # fmt: skip
    resumed = Bench(tmp_path, start=4, status=Status(committed_seq=1, committed_step=3)).drive(EventHook(restored), 6)
    first, last = resumed.sink.records
    assert (first["event"], first["checkpoint/seq"], first["checkpoint/step"]) == ("resume", 1, 3)
    assert (first["checkpoint/restored_seq"], first["checkpoint/restored_from"], first["checkpoint/damage"]) == (2, "memory", 1)
    assert json.loads(str(first["checkpoint/expert_ages"])) == [[0, 3], [3, 0]]
    assert json.loads(str(first["checkpoint/weight_ages"])) == [[0, 0], [0, 0]]
    assert json.loads(str(first["checkpoint/bytes_read"])) == {"disk": 7}
    assert first["parallel/ranks"] == 1
    assert last == {"train/step": 10, "train/tokens": 1000, "event": "done"}


@pytest.mark.parametrize("rank", [0, 2])
def test_every_rank_writes_its_profile(tmp_path: Path, rank: int) -> None:
    Bench(tmp_path, rank=rank).drive(ProfileHook(ProfileConfig(start_step=2, num_steps=1)), 4)
    assert [file.name for file in (tmp_path / "trace").iterdir()] == [f"rank{rank}.json"]


def test_profiled_steps_and_no_others_are_observed(tmp_path: Path) -> None:
    trace = Bench(tmp_path).drive(ProfileHook(ProfileConfig(start_step=2, num_steps=3)), 8)
    assert trace.engine.observed == [False] * 3
    comm = Bench(tmp_path).drive(ProfileHook(ProfileConfig(what="comm", start_step=1, num_steps=2)), 8)
    assert comm.engine.observed == [True, False, True, False]


@contextmanager
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logger(), "propagate", True)
    caplog.clear()
    yield


def test_a_profile_that_lies_behind_a_resume_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with told(caplog, monkeypatch):
        Bench(tmp_path, start=5).drive(ProfileHook(ProfileConfig(start_step=5)), 3)
    assert "profile.start_step=5" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["trace", "comm"])
def test_a_run_that_ends_before_its_profile_is_said(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with told(caplog, monkeypatch):
        Bench(tmp_path).drive(ProfileHook(ProfileConfig(what=what, start_step=50)), 3)
    assert "the run ended at step 3, before profile.start_step=50" in caplog.text
    assert not list(tmp_path.iterdir())


def test_no_profile_is_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with told(caplog, monkeypatch):
        Bench(tmp_path).drive(ProfileHook(ProfileConfig()), 3)
    assert not caplog.records
    assert not list(tmp_path.iterdir())
