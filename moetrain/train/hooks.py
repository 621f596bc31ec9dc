"""What happens beside the steps: records, evaluation, samples, saving, profiles, events.

Every rank calls every hook. Collectives (evaluation, samples, saving) run on all ranks; only what shows something asks for rank 0.
The order that reads well: LogHook, EvaluateHook, SampleHook, SaveHook, ProfileHook, EventHook.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from moetrain.base.log import logger
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.interval import Costs
from moetrain.checkpoint.recover import LoadReport
from moetrain.checkpoint.status import Status
from moetrain.parallel.engine import StepResult
from moetrain.telemetry.comm import CommProfiler
from moetrain.telemetry.config import ProfileConfig, TelemetryConfig
from moetrain.telemetry.experts import Snapshot, save_snapshot
from moetrain.telemetry.profile import Profiler
from moetrain.telemetry.record import Record
from moetrain.train.config import TrainingConfig
from moetrain.train.evaluate import EvaluationResult
from moetrain.train.loop import DONE
from moetrain.train.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LogHook:
    """A record every `log_every` steps and at the last, an expert-load snapshot every `experts_every` steps and at the last.

    `banks` names the expert bank of each MoE layer, as ModelConfig.banks() lists them.
    """

    def __init__(self, config: TelemetryConfig, banks: list[str]) -> None:
        self.config, self.banks = config, tuple(banks)
        self._load_LE: np.ndarray | None = None  # since the last snapshot

    def on_start(self, run: Run) -> None:
        run.meter.restart()  # building and loading are no training time

    def on_step(self, run: Run, result: StepResult) -> None:
        if not run.world.is_main:
            return
        run.meter.add(result)
        if self.banks and self.config.experts_every:
            load_LE = result.load.numpy()
            self._load_LE = load_LE.copy() if self._load_LE is None else self._load_LE + load_LE
        if _is_due(run, self.config.log_every):
            self._record(run)
        if _is_due(run, self.config.experts_every):
            self._snapshot(run)

    def on_finish(self, run: Run, reason: str) -> None:
        if run.meter.num_steps:  # stopped between two records
            self._record(run)
        self._snapshot(run)

    def _record(self, run: Run) -> None:
        step = run.progress.step
        record, load_LE = run.meter.record(step, run.progress.tokens)
        run.sinks.log(record)
        if load_LE.size:
            run.sinks.show_load(step, load_LE)

    def _snapshot(self, run: Run) -> None:
        if self._load_LE is None:
            return
        snapshot, self._load_LE = Snapshot(run.progress.step, self._load_LE, self.banks), None
        save_snapshot(run.folder, snapshot)
        run.sinks.image("experts/load", lambda: _heat_map(snapshot), snapshot.step)


class EvaluateHook:
    """Validation every `evaluate_every` steps, and `at_end` (all held-out text) once the run is done, not when it is stopped."""

    def __init__(self, config: TrainingConfig, at_end: Callable[[], EvaluationResult]) -> None:
        self.every, self.at_end = config.evaluate_every, at_end

    def on_start(self, run: Run) -> None:
        pass

    def on_step(self, run: Run, result: StepResult) -> None:
        if _is_due(run, self.every) and not run.progress.finished:
            self._evaluate(run, run.evaluate)

    def on_finish(self, run: Run, reason: str) -> None:
        if reason == DONE:
            self._evaluate(run, self.at_end)

    def _evaluate(self, run: Run, evaluate: Callable[[], EvaluationResult]) -> None:
        with run.meter.paused():
            result = evaluate()
        run.sinks.log(_at(run) | {"evaluation/loss": result.loss, "evaluation/bits_per_byte": result.bits_per_byte})


class SampleHook:
    """Completions of the configured prompts every `sample_every` steps; the seed is the step, so a rerun says the same."""

    def __init__(self, config: TrainingConfig) -> None:
        self.every, self.prompts, self.num_tokens = config.sample_every, list(config.sample_prompts), config.sample_tokens

    def on_start(self, run: Run) -> None:
        pass

    def on_step(self, run: Run, result: StepResult) -> None:
        if not _is_due(run, self.every):
            return
        with run.meter.paused():
            for prompt in self.prompts:
                ids = run.tokenizer.encode(prompt) or [run.tokenizer.end_id]
                text = run.tokenizer.decode(run.engine.generate(ids, self.num_tokens, run.progress.step))
                run.sinks.log(_at(run) | {"sample/prompt": prompt, "sample/text": text})

    def on_finish(self, run: Run, reason: str) -> None:
        pass


class SaveHook:
    """A checkpoint every `every_steps` (0 = never; the loop itself saves the last step) or as often as measured costs advise, copies in
    memory every `snapshot_every` besides, and a record whenever its state changes.

    What rank 0 measured decides for all: they hear of it at every save.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.mean_seconds = 3600 * config.mean_hours_between_failures
        self.costs = Costs()
        self._next: int | None = None  # the step of the next save, once the interval follows from costs
        self._was_saving = False  # when the step began
        self._said = Status()

    def on_start(self, run: Run) -> None:
        self._said = run.checkpoint.status()  # what was committed before this start is no news

    def on_step(self, run: Run, result: StepResult) -> None:
        self.costs = self.costs.after_step(result.seconds, self._was_saving)
        self._report(run)
        is_due = _is_due(run, self.config.every_steps) if self._next is None else run.progress.step >= self._next
        if is_due and not run.progress.finished:
            self._save(run)
            self._report(run)
        elif _is_due(run, self.config.snapshot_every) and not run.progress.finished:
            run.checkpoint.save(run.engine.state(), run.progress.as_dict(), persists=False)
        self._was_saving = run.checkpoint.status().pending

    def on_finish(self, run: Run, reason: str) -> None:
        self._report(run)

    def _save(self, run: Run) -> None:
        expected_faults = 1.0
        if self.config.interval == "auto" or self.config.plt_budget:
            own = [float(self.costs.interval(self.mean_seconds) or 0), self.costs.step_seconds]  # 0: not measured yet
            interval, step_seconds = run.world.agree(own, "agreeing on the interval between checkpoints")
            if self.config.interval == "auto" and interval:
                self._next = run.progress.step + int(interval)
            expected_faults = (run.progress.total_steps - run.progress.step) * step_seconds / self.mean_seconds
        run.checkpoint.save(run.engine.state(), run.progress.as_dict(), expected_faults=expected_faults)

    def _report(self, run: Run) -> None:
        status = run.checkpoint.status()
        if status == self._said:
            return
        if status.committed_seq != self._said.committed_seq:
            self.costs = self.costs.after_save(status.committed_seconds)
        elif status.failures != self._said.failures:
            self.costs = self.costs.after_failure()
        if run.world.is_main:
            run.sinks.log(_at(run) | checkpoint_news(self._said, status))
        self._said = status


class ProfileHook:
    """A profile of the configured steps on every rank: torch.profiler with lanes, or what exchanges cost (`profile.what`)."""

    def __init__(self, config: ProfileConfig) -> None:
        self.config = config
        self._profiler: Profiler | CommProfiler | None = None

    def on_start(self, run: Run) -> None:
        if self.config.start_step < 1:
            return
        if run.progress.step >= self.config.start_step:
            sentence = "profile.start_step=%d lies before step %d, with which this run goes on: nothing is profiled."
            logger("train").warning(sentence, self.config.start_step, run.progress.step + 1)
            return
        kind = CommProfiler if self.config.what == "comm" else Profiler
        self._profiler = kind(self.config, run.folder, run.world.rank)
        self._profiler.after(run.progress.step)
        self._ask(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        if self._profiler is not None:
            self._profiler.after(run.progress.step, result.seconds, result.lanes)
            self._ask(run)

    def on_finish(self, run: Run, reason: str) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            if run.progress.step < self.config.start_step:
                sentence = "Nothing was profiled: the run ended at step %d, before profile.start_step=%d."
                logger("train").warning(sentence, run.progress.step, self.config.start_step)

    def _ask(self, run: Run) -> None:
        assert self._profiler is not None
        serial = self._profiler.asks(run.progress.step + 1)
        if serial is not None:
            run.engine.observe(serial)


class EventHook:
    """Says when a run starts, resumes (from what and on how many ranks), stops and is done. `restored`: None for a fresh start."""

    def __init__(self, restored: LoadReport | None = None) -> None:
        self.restored = restored

    def on_start(self, run: Run) -> None:
        kind = "resume" if run.progress.step else "start"
        event: Record = {"event": kind, "parallel/ranks": run.world.size, "train/total_steps": run.progress.total_steps}
        status = run.checkpoint.status()
        if self.restored is not None:
            event |= _origin(self.restored) | _lost(status)
        if status.committed_seq is not None and status.committed_step is not None:
            event |= {"checkpoint/seq": status.committed_seq, "checkpoint/step": status.committed_step}
        run.sinks.log(_at(run) | event)

    def on_step(self, run: Run, result: StepResult) -> None:
        pass

    def on_finish(self, run: Run, reason: str) -> None:
        run.sinks.log(_at(run) | ({"event": "done"} if reason == DONE else {"event": "stop", "reason": reason}))


def checkpoint_news(before: Status, now: Status) -> Record:
    """What the checkpointer is doing, as metrics; the facts of a commit only when there is a new one."""
    record: Record = {"checkpoint/pending": int(now.pending), "checkpoint/failures": now.failures}
    if now.committed_seq is not None and now.committed_step is not None and now.committed_seq != before.committed_seq:
        record |= {
            "checkpoint/seq": now.committed_seq,
            "checkpoint/step": now.committed_step,
            "checkpoint/bytes": now.committed_bytes,
            "checkpoint/seconds": now.committed_seconds,
            "checkpoint/oldest_expert_steps": now.oldest_expert_steps,
        }
        if now.figures.experts_per_save:
            facts = {"checkpoint/plt_if_fault": now.figures.if_fault, "checkpoint/experts_per_save": now.figures.experts_per_save}
            record |= _lost(now) | facts
    return record


def _origin(restored: LoadReport) -> Record:
    """What a start went on from, as metrics."""
    return {
        "checkpoint/restored_seq": restored.seq,
        "checkpoint/restored_from": "memory" if restored.is_from_memory else "folder",
        "checkpoint/damage": len(restored.damaged),
        "checkpoint/expert_ages": json.dumps(restored.age_rows()),
        "checkpoint/weight_ages": json.dumps(restored.weight_age_rows()),
        "checkpoint/bytes_read": json.dumps(restored.read),
    }


def _lost(status: Status) -> Record:
    return {"checkpoint/plt_weights": status.figures.weights, "checkpoint/plt_moments": status.figures.moments}


def _is_due(run: Run, every: int) -> bool:
    """Whether something that happens every so many steps happens now; at the last step too, never with `every` 0."""
    return every > 0 and (run.progress.step % every == 0 or run.progress.finished)


def _at(run: Run) -> Record:
    return {"train/step": run.progress.step, "train/tokens": run.progress.tokens}


def _heat_map(snapshot: Snapshot) -> "Figure":
    from moetrain.telemetry.plots import heat_map

    return heat_map(snapshot)
