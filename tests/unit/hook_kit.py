"""A run made of fakes, and the loop's own order of calls: what the tests of hooks drive."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch

from moetrain.checkpoint.status import Status
from moetrain.parallel.engine import StepResult
from moetrain.telemetry.meter import Meter
from moetrain.telemetry.record import Record
from moetrain.telemetry.sinks import Sinks
from moetrain.train.evaluate import EvaluationResult
from moetrain.train.run import Hook, Progress, Run
from tests.clock import FakeClock


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
