"""What a start may take over from another, and what it refuses: resumes, changed keys, bundles, and numbers that are not finite.

One rank, in the test's own process: launch/train.py with other arguments, copies of one finished run.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetrain import cli
from tests.e2e.conftest import STEPS
from tests.e2e.jobs import committed_steps, events, losses, records, small_run, train_here

Start = Callable[..., tuple[int, str]]

FULL = ("checkpoint.mode=full", "checkpoint.every_steps=8")


@pytest.fixture
def start(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """start(steps, *overrides): the run `tmp_path/run` on one rank; exit code and what it said."""

    def run(steps: int, *more: str) -> tuple[int, str]:
        code = train_here(small_run(corpus, tmp_path / "run", steps, *FULL, *more), monkeypatch)
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, under the name that `start` starts."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def bundle(finished: Path, tmp_path: Path) -> Path:
    assert cli.main(["export", str(finished), "--out", str(tmp_path / "bundle")]) == 0
    return tmp_path / "bundle"


def test_a_longer_run_goes_on_and_says_so(copy: Path, start: Start) -> None:
    code, said = start(STEPS + 2)
    assert code == 0
    assert events(copy)[-2:] == [("resume", STEPS), ("done", STEPS + 2)]
    assert f"The run is lengthened from {STEPS * 512:,} to {(STEPS + 2) * 512:,} tokens" in said
    assert "It was saved by 2 ranks (ep 2) and is loaded by 1." in said


def test_a_changed_key_of_the_identity_is_refused_by_name_unless_changes_are_allowed(copy: Path, start: Start) -> None:
    before = (copy / "metrics.jsonl").read_bytes()
    code, said = start(STEPS + 2, "optim.lr=0.002")
    assert code == 2
    assert f"The run {copy} was started with other values: optim.lr: 0.001 -> 0.002." in said
    assert "Traceback" not in said
    assert (copy / "metrics.jsonl").read_bytes() == before
    code, said = start(STEPS + 2, "optim.lr=0.002", "checkpoint.allow_changes=true")
    assert code == 0
    assert "Resuming with a changed key: optim.lr: 0.001 -> 0.002." in said
    assert events(copy)[-1] == ("done", STEPS + 2)


def test_resume_must_with_nothing_there_is_a_sentence(start: Start, tmp_path: Path) -> None:
    code, said = start(4, "checkpoint.resume=must")
    assert code == 2
    assert f"There is no checkpoint in {tmp_path / 'run' / 'checkpoint'}." in said
    assert "Traceback" not in said


def test_resume_never_starts_anew(copy: Path, start: Start) -> None:
    assert start(2, "checkpoint.resume=never")[0] == 0
    assert events(copy)[-2:] == [("start", 0), ("done", 2)]


def test_resume_of_another_folder_goes_on_there_in_a_folder_of_its_own(finished: Path, start: Start, tmp_path: Path) -> None:
    before = committed_steps(finished)
    assert start(STEPS + 1, f"checkpoint.resume={finished}")[0] == 0
    assert events(tmp_path / "run") == [("resume", STEPS), ("done", STEPS + 1)]
    assert committed_steps(tmp_path / "run") == [STEPS + 1]
    assert committed_steps(finished) == before


def test_init_from_starts_at_the_evaluation_loss_of_the_bundle(bundle: Path, corpus: Path, start: Start, tmp_path: Path) -> None:
    result = tmp_path / "bundle.json"
    assert cli.main(["evaluate", str(bundle), "--data", str(corpus), "--json", str(result)]) == 0
    expected = json.loads(result.read_text())
    code, said = start(1, f"checkpoint.init_from={bundle}", "optim.lr=1e-12")  # one step that moves nothing
    assert code == 0
    assert f"The weights are those of the bundle {bundle}" in said
    found = [record for record in records(tmp_path / "run") if "evaluation/loss" in record][-1]
    assert found["evaluation/loss"] == pytest.approx(expected["nats_per_token"], rel=1e-6)
    assert found["evaluation/bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)


def test_a_nan_weight_stops_at_step_1_naming_the_rank_and_that_there_is_no_checkpoint(bundle: Path, start: Start, tmp_path: Path) -> None:
    file = next(bundle.glob("model*.safetensors"))
    tensors = load_file(file)
    tensors["final_norm.weight"][3] = torch.nan
    save_file(tensors, file)
    code, said = start(4, f"checkpoint.init_from={bundle}")
    assert code == 2
    assert "Step 1: The loss is not finite on rank 0. Nothing was updated; no checkpoint was committed yet." in said
    assert "Traceback" not in said
    assert committed_steps(tmp_path / "run") == []


def test_a_run_that_explodes_stops_before_it_saves_and_names_the_last_good_checkpoint(copy: Path, start: Start) -> None:
    code, said = start(STEPS + 8, "optim.lr=1e30", "checkpoint.allow_changes=true")
    assert code == 2
    assert re.search(
        rf"Step {STEPS + 2}: The (loss|gradient norm) .* Nothing was updated; the last good checkpoint is of step {STEPS}\.", said
    )
    assert committed_steps(copy)[0] == STEPS
    assert max(losses(copy)) == STEPS + 1
