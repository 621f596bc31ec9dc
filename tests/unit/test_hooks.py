"""The hooks against a run made of fakes: when they act, what they record, and that no rank is left out of a collective."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from moetrain.base.log import logger
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.interval import best_interval
from moetrain.checkpoint.recover import LoadReport
from moetrain.checkpoint.status import Status
from moetrain.checkpoint.turns import Figures
from moetrain.parallel.engine import StepResult
from moetrain.telemetry.config import ProfileConfig, TelemetryConfig
from moetrain.telemetry.experts import load_snapshots
from moetrain.telemetry.meter import Meter
from moetrain.telemetry.record import Record
from moetrain.telemetry.sinks import Sinks
from moetrain.train.config import TrainingConfig
from moetrain.train.evaluate import EvaluationResult
from moetrain.train.hooks import EvaluateHook, EventHook, LogHook, ProfileHook, SampleHook, SaveHook
from moetrain.train.run import Hook, Progress, Run
from tests.clock import FakeClock

BANKS = ["blocks.0.moe.experts", "blocks.1.moe.experts"]


@dataclass
class FakeSink:
    records: list[Record] = field(default_factory=list)
    loads: list[tuple[int, list[list[int]]]] = field(default_factory=list)
    images: list[tuple[str, int]] = field(default_factory=list)

    def log(self, record: Record) -> None:
        self.records.append(record)

    def show_load(self, step: int, load_LE: np.ndarray) -> None:
        self.loads.append((step, load_LE.tolist()))

    def image(self, name: str, draw: object, step: int) -> None:
        self.images.append((name, step))

    def close(self) -> None:
        pass


class FakeCheckpoint:
    """Commits a save when `commit` is called."""

    def __init__(self, status: Status) -> None:
        self.copies = list[int]()  # in memory only
        self.now, self.saves, self.expected_faults = status, list[tuple[object, dict[str, int]]](), list[float]()

    def save(self, state: object, progress: dict[str, int], expected_faults: float = 1.0, persists: bool = True) -> None:
        if not persists:
            self.copies.append(progress["step"])
            return
        self.saves.append((state, progress))
        self.expected_faults.append(expected_faults)
        self.now = Status(self.now.committed_seq, self.now.committed_step, pending_seq=len(self.saves))

    def commit(self, step: int) -> None:
        self.now = Status(len(self.saves), step, None, committed_bytes=500, committed_seconds=0.5, oldest_expert_steps=3)

    def status(self) -> Status:
        return self.now


class FakeEngine:
    def __init__(self) -> None:
        self.generated: list[tuple[list[int], int, int]] = []
        self.observed: list[bool] = []

    def observe(self, serial: bool) -> None:
        self.observed.append(serial)

    def state(self) -> str:
        return "the state"

    def generate(self, prompt: list[int], num_tokens: int, seed: int) -> list[int]:
        self.generated.append((prompt, num_tokens, seed))
        return [seed, num_tokens]


class FakeTokenizer:
    end_id = 99

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Bench:
    """A run of fakes and the loop's own order of calls."""

    def __init__(self, folder: Path, total_steps: int = 10, start: int = 0, rank: int = 0, status: Status | None = None) -> None:
        self.clock, self.sink, self.engine = FakeClock(), FakeSink(), FakeEngine()
        self.checkpoint = FakeCheckpoint(status or Status())
        self.num_evaluations = 0
        self.meter = Meter(self.clock, flops_per_token=1.0, peak_flops=1.0, peak_memory=lambda: 1)
        self.progress = Progress(total_steps, step=start, tokens=100 * start)
        fake = SimpleNamespace(
            world=SimpleNamespace(size=1, rank=rank, is_main=rank == 0),
            sinks=Sinks([self.sink] if rank == 0 else []),
            meter=self.meter,
            progress=self.progress,
            folder=folder,
            engine=self.engine,
            checkpoint=self.checkpoint,
            tokenizer=FakeTokenizer(),
            evaluate=self.evaluate,
        )
        self.run = cast(Run, fake)

    def evaluate(self) -> EvaluationResult:
        self.num_evaluations += 1
        self.clock.time += 1000
        return EvaluationResult(nats=30.0, num_tokens=10, num_bytes=20)

    def drive(self, hook: Hook, num_steps: int, reason: str = "done", commit_after: tuple[int, ...] = ()) -> "Bench":
        hook.on_start(self.run)
        for _ in range(num_steps):
            if self.progress.step in commit_after:
                self.checkpoint.commit(self.progress.step)
            self.clock.time += 2
            self.progress.advance(step_result(loss=float(self.progress.step + 1)), samples=1)
            hook.on_step(self.run, step_result(loss=float(self.progress.step)))
        hook.on_finish(self.run, reason)
        return self

    @property
    def steps(self) -> list[object]:
        return [record["train/step"] for record in self.sink.records]


def step_result(loss: float = 2.0) -> StepResult:
    return StepResult(
        loss=loss, auxiliary_loss=1.0, z_loss=0.0, grad_norm=1.0, lr=0.1, num_tokens=100, load=torch.tensor([[1, 3], [2, 2]]),
        num_dropped=0, num_pairs=8, seconds=1.0,
    )  # fmt: skip


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
    assert start == at | {"event": "start", "parallel/ranks": 1}
    assert stop == {"train/step": 2, "train/tokens": 200, "event": "stop", "reason": "STOP file"}
    ages = {("a", 0): 0, ("a", 1): 3, ("b", 0): 3, ("b", 1): 0}
    restored = LoadReport(tmp_path, {}, 2, 4, ages, [], [], read={"disk": 7}, weight_ages=dict.fromkeys(ages, 0))
    resumed = Bench(tmp_path, start=4, status=Status(committed_seq=2, committed_step=4)).drive(EventHook(restored), 6)
    first, last = resumed.sink.records
    assert (first["event"], first["checkpoint/seq"], first["checkpoint/step"]) == ("resume", 2, 4)
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
