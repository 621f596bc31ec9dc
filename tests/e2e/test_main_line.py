"""Text in, a two-rank MoE trained with partial expert checkpoints, a kill, a resume, an export, and tokens out: the commands as typed."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moetrain import cli
from moetrain.store.bundle import Bundle
from tests.e2e.conftest import STEPS
from tests.e2e.jobs import (
    LIMIT_SECONDS,
    POLL_SECONDS,
    Job,
    committed_steps,
    events,
    last_step,
    losses,
    records,
    restored_ages,
    small_run,
    train_forked,
    train_here,
)

Command = Callable[..., str]

pytestmark = pytest.mark.dist


@pytest.fixture
def moetrain(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process; it must succeed. Returns what it printed."""

    def run(*words: object) -> str:
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_killed_worker_then_the_same_command_on_one_rank_then_every_command(corpus: Path, tmp_path: Path, moetrain: Command) -> None:
    run = tmp_path / "run"
    overrides = small_run(corpus, run, 40, "checkpoint.every_steps=3", "checkpoint.keep=4")
    with Job(2, overrides, tmp_path / "first") as job:
        job.wait_until(
            lambda: len(committed_steps(run)) > 1 and last_step(run) > committed_steps(run)[0], "a step after a partial checkpoint"
        )
        os.kill(job.worker(1), signal.SIGKILL)
        assert job.end() != 0
    moetrain("checkpoint", "agent", "stop", run)  # as if the node were lost: its memory is gone
    committed = committed_steps(run)[0]
    assert 0 < committed < 40

    said = train_forked(1, overrides, tmp_path / "second")
    assert events(run) == [("start", 0), ("resume", committed), ("done", 40)]
    resumed = next(number for number, record in enumerate(records(run)) if record.get("event") == "resume")
    trained = [record["train/step"] for record in records(run)[resumed:] if "train/loss" in record]
    assert trained == list(range(committed + 1, 41))
    ages = restored_ages(run)
    assert [len(row) for row in ages] == [8, 8]
    assert {0} < {age for row in ages for age in row}, "some experts are from this checkpoint, the others from older ones"
    assert f"Resumed from step {committed}" in said
    table = said.split("Age of every expert group in steps:")[1].splitlines()
    for layer, row in enumerate(ages):
        assert any(f"blocks.{layer}.moe.experts" in line and line.split()[-8:] == [str(age) for age in row] for line in table)

    every_command(moetrain, run, tmp_path)


def every_command(moetrain: Command, run: Path, tmp_path: Path) -> None:
    """list, show, verify, evaluate, plot, export and generate on a finished run."""
    assert [line.split()[1] for line in moetrain("checkpoint", "list", run).splitlines()[1:]] == [str(s) for s in committed_steps(run)]
    assert "step 40, full" in moetrain("checkpoint", "show", run)
    assert "DAMAGED" not in moetrain("checkpoint", "verify", run)
    measured = [record for record in records(run) if "evaluation/bits_per_byte" in record][-1]
    assert f"{measured['evaluation/bits_per_byte']:.3f}"[:-1] in moetrain("evaluate", run)
    figures = [Path(line) for line in moetrain("plot", run).splitlines()]
    assert {figure.stem for figure in figures} >= {"loss", "throughput"}
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    moetrain("export", run, "--format", "bundle", "--out", tmp_path / "bundle")
    again = moetrain("generate", tmp_path / "bundle", "--prompt", "def ", "--max-tokens", 20, "--seed", 3)
    assert again.strip()
    assert again == moetrain("generate", tmp_path / "bundle", "--prompt", "def ", "--max-tokens", 20, "--seed", 3)


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_torchrun_restarts_a_killed_worker_and_full_checkpoints_change_no_bit(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = small_run(corpus, run, STEPS, "checkpoint.mode=full", "checkpoint.every_steps=4")
    with Job(2, overrides, tmp_path / "log", max_restarts=3) as job:
        job.wait_until(lambda: bool(committed_steps(run)), "a checkpoint")
        os.kill(job.worker(1), signal.SIGKILL)
        assert job.end() == 0, job.output()
    assert [event for event, _ in events(run)] == ["start", "resume", "done"]
    assert events(run)[1][1] in range(4, STEPS, 4)
    assert losses(run) == losses(finished)
    assert tensors(run, tmp_path / "killed") == tensors(finished, tmp_path / "finished")


@pytest.mark.timeout(300)
def test_a_signal_to_one_rank_a_signal_to_torchrun_and_a_stop_file_each_stop_at_a_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    overrides = small_run(corpus, run, 1000, "checkpoint.every_steps=0")
    with Job(2, overrides, tmp_path / "usr1") as job:
        job.wait_until(lambda: last_step(run) >= 1, "the first step")
        os.kill(job.worker(1), signal.SIGUSR1)
        assert job.end() == 0, job.output()
    first = committed_steps(run)[0]
    with Job(2, overrides, tmp_path / "term") as job:
        job.wait_until(lambda: last_step(run) > first, "a step after the resume")
        job.process.send_signal(signal.SIGTERM)
        job.end()  # torchrun reports its signal, whatever the workers made of it
    second = committed_steps(run)[0]
    with ThreadPoolExecutor(1) as pool:
        touched = pool.submit(touch_after_step, run, second)
        assert train_here(overrides, monkeypatch) == 0
        touched.result()
    third = committed_steps(run)[0]
    assert not (run / "STOP").exists()
    assert train_here([*overrides, f"run.stop_after={third + 2}"], monkeypatch) == 0
    assert 0 < first < second < third
    stops = [("stop", first), ("resume", first), ("stop", second), ("resume", second), ("stop", third), ("resume", third)]
    assert events(run) == [("start", 0), *stops, ("stop", third + 2)]
    reasons = [record["reason"] for record in records(run) if record.get("event") == "stop"]
    assert reasons == ["SIGUSR1", "SIGTERM", "the file STOP", f"run.stop_after={third + 2}"]


def touch_after_step(run: Path, step: int) -> None:
    """Makes the STOP file once the run has trained beyond `step`."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while last_step(run) <= step and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    (run / "STOP").touch()


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overrides(name: str) -> list[str]:
        return small_run(corpus, tmp_path / name, 12, "checkpoint.mode=full", "checkpoint.every_steps=5", "model.routing.top_k=2")

    assert train_here(overrides("whole"), monkeypatch) == 0
    assert train_here([*overrides("halves"), "run.stop_after=6"], monkeypatch) == 0
    assert train_here(overrides("halves"), monkeypatch) == 0
    assert events(tmp_path / "halves") == [("start", 0), ("stop", 6), ("resume", 6), ("done", 12)]
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert tensors(tmp_path / "halves", tmp_path / "a") == tensors(tmp_path / "whole", tmp_path / "b")


def tensors(run: Path, out: Path) -> dict[str, bytes]:
    """Every exported tensor of a run as its bytes."""
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in Bundle.open(out).tensors.items()}
