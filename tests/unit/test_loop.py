"""The loop against a run made of fakes: when it asks for a reason to stop, and what it does first when there is one."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from moetrain.optim.config import OptimConfig
from moetrain.parallel.engine import NonFiniteError
from moetrain.train.config import RunConfig
from moetrain.train.loop import train
from moetrain.train.run import Progress, Run


class Scene:
    """Notes every call in order; `stop_at` is the step at which a signal has come."""

    def __init__(self, total_steps: int = 3, start: int = 0, stop_after: int = 0, stop_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.stop_at = stop_at
        self.progress = Progress(total_steps, step=start)
        self.fails = False
        fake = SimpleNamespace(
            config=SimpleNamespace(run=RunConfig(stop_after=stop_after), optim=OptimConfig()),
            progress=self.progress,
            samples_per_step=1,
            loader=iter(lambda: [], None),
            stop=SimpleNamespace(agreed=lambda: "SIGTERM" if self.progress.step == self.stop_at else None),
            engine=SimpleNamespace(step=self.step, state=lambda: "state"),
            checkpoint=SimpleNamespace(
                save=lambda state, progress, full, hurried: self.calls.append(f"save {progress['step']}{' in a hurry' * hurried}"),
                count=lambda load: self.calls.append(f"count {load[0][0]}"),
                finish=lambda: self.calls.append("finish"),
                wait_copied=lambda: None,
                status=lambda: SimpleNamespace(committed_step=None),
            ),
            records=self.hook("record"),
            hooks=[self.hook("evaluate")],
        )
        self.run = cast(Run, fake)

    def hook(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            on_start=lambda run: None,
            on_step=lambda run, result: self.calls.append(f"{name} {run.progress.step}"),
            on_finish=lambda run, reason: self.calls.append(f"{name} ends: {reason}"),
        )

    def step(self, batches: object, lr: float, before_update: object) -> SimpleNamespace:
        if self.fails:
            raise NonFiniteError("The loss is not finite on rank 0.")
        return SimpleNamespace(num_tokens=10, load=torch.tensor([[self.progress.step + 1]]))


def test_a_signal_saves_before_what_takes_long_and_passes_it_over() -> None:
    scene = Scene(stop_at=2)
    assert train(scene.run) == "SIGTERM"
    assert scene.calls == [
        "count 1", "record 1", "evaluate 1", "count 2", "record 2", "save 2 in a hurry", "finish",
        "record ends: SIGTERM", "evaluate ends: SIGTERM",
    ]  # fmt: skip


def test_the_end_saves_first_and_leaves_nothing_out() -> None:
    scene = Scene(total_steps=1)
    assert train(scene.run) == "done"
    calls = ["count 1", "record 1", "save 1", "finish", "evaluate 1", "record ends: done", "evaluate ends: done"]
    assert scene.calls == calls  # a step is counted before the save that holds it


@pytest.mark.parametrize(
    ("scene", "reason"),
    [(Scene(start=2, stop_after=2), "run.stop_after=2"), (Scene(stop_at=0), "SIGTERM"), (Scene(start=3), "done")],
    ids=["stop_after", "a STOP file", "finished"],
)
def test_a_reason_that_is_there_already_trains_no_step(scene: Scene, reason: str) -> None:
    before = scene.progress.step
    assert train(scene.run) == reason
    assert scene.progress.step == before
    assert scene.calls == [f"record ends: {reason}", f"evaluate ends: {reason}"]


def test_the_way_out_of_a_loss_that_is_not_finite_names_every_key_it_needs() -> None:
    scene = Scene()
    scene.fails = True
    with pytest.raises(NonFiniteError) as error:
        train(scene.run)
    assert "Step 1: " in error.value.message
    assert "optim.lr" in error.value.hint and "checkpoint.allow_changes=true" in error.value.hint
