"""Tokens that real recoveries lost, counted from the logs of every step, against what the run predicted."""

import json
import time
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import yaml

from moetrain import cli
from moetrain.parallel.native import TorchEngine
from moetrain.telemetry.experts import Snapshot, load_snapshots, save_snapshot
from tests.e2e.jobs import committed_steps, records, small_run, train_forked, train_here
from tools.realised_plt import Recovery, count, lost, main, read, recoveries

STEPS = 20
EVERY = 3
FAULTS = (8, 14)  # the step during which the power goes: the second after a save


class PowerCut(Exception):
    pass


def train_with_faults(corpus: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *more: str, survivals: tuple[int, ...] = ()) -> None:
    """One run in this process whose engine fails in the steps of FAULTS; started until it is done. The node is lost with each fault but
    those of `survivals`, after which its agent still has the copies in memory.

    The step before waits for the save, so that the run has said what the fault will cost.
    """
    real_step = TorchEngine.step
    faults = list(FAULTS)

    def step(self: TorchEngine, batches, lr, before_update):
        result = real_step(self, batches, lr, before_update)
        coming = 1 + max((int(record["train/step"]) for record in records(run)[-1:]), default=0)
        if faults and coming == faults[0] - 1:
            while before_update.__self__.status().pending:
                time.sleep(0.01)
        if faults and coming == faults[0]:
            faults.pop(0)
            raise PowerCut
        return result

    monkeypatch.setattr(TorchEngine, "step", step)
    overrides = small_run(corpus, run, STEPS, f"checkpoint.every_steps={EVERY}", "telemetry.experts_every=1", "checkpoint.keep=20", *more)
    for fault in FAULTS:
        with pytest.raises(PowerCut):
            train_here(overrides, monkeypatch)
        if fault not in survivals:
            assert cli.main(["checkpoint", "agent", "stop", str(run)]) == 0
    assert train_here(overrides, monkeypatch) == 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("mode", "model"), [("experts", "small_scmoe"), ("weights16", "small_dgmoe")])
def test_predicted_and_realised_plt_agree(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, mode: str, model: str
) -> None:
    run = tmp_path / "run"
    options = (f"model={model}", f"checkpoint.mode={mode}", "checkpoint.selection=unsaved_age", "checkpoint.experts_per_save=2")
    train_with_faults(corpus, run, monkeypatch, *options)
    rows = count(*read(run))
    assert len(rows) == len(FAULTS)
    assert all(row.agrees for row in rows)
    assert all(row.alone > 0 and row.predicted > 0 for row in rows)
    assert [row.weights > 0 for row in rows] == [mode == "experts"] * len(rows)
    assert main([str(run)]) == 0
    assert "NOT WITHIN" not in capsys.readouterr().out
    assert committed_steps(run)[0] == STEPS


@pytest.mark.timeout(120)
def test_a_recovery_from_memory_costs_nothing_and_is_not_held_against_the_commit(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    train_with_faults(corpus, run, monkeypatch, survivals=FAULTS[:1])
    first, second = rows = count(*read(run))
    assert all(row.agrees for row in rows)
    assert (first.alone, isnan(first.predicted)) == (0, True)
    assert second.alone > 0 and second.predicted > 0
    assert main([str(run)]) == 0


@pytest.mark.timeout(120)
def test_a_budget_holds_in_a_run_with_faults_and_k_follows_it(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, budget = tmp_path / "run", 0.1
    train_with_faults(corpus, run, monkeypatch, "checkpoint.selection=unsaved_age", f"checkpoint.plt_budget={budget}")
    rows = count(*read(run))
    assert all(row.agrees for row in rows)
    assert 0 < rows[-1].moments <= budget
    experts = [int(record["checkpoint/experts_per_save"]) for record in records(run) if "checkpoint/experts_per_save" in record]
    assert any(1 < count < 8 for count in experts), "more than one expert is needed, fewer than all are enough"


@pytest.mark.parametrize(("pair", "load"), [("scmoe", [10, 30]), ("dgmoe", [20, 60])])  # dgmoe: every token chooses twice
def test_what_a_run_says_wrongly_is_noticed(tmp_path: Path, capsys, pair: str, load: list[int]) -> None:
    model = {"num_layers": 2, "pattern": [pair], "routing": {"num_experts": 2, "top_k": 1}}
    config = {"telemetry": {"experts_every": 1}, "train": {"tokens": 400, "global_batch_tokens": 40}, "model": model}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for step in range(1, 5):
        save_snapshot(tmp_path, Snapshot(step, np.array([load]), ("a",)))
    said = {
        "train/step": 4,
        "event": "resume",
        "checkpoint/restored_seq": 2,
        "checkpoint/restored_from": "folder",
        "checkpoint/damage": 0,
        "checkpoint/expert_ages": "[[0, 2]]",
        "checkpoint/weight_ages": "[[0, 0]]",
    }
    for moments, status in ((0.15, 0), (0.14, 1)):
        lines = [
            {"train/step": 4, "checkpoint/seq": 2, "checkpoint/plt_if_fault": 0.15},
            said | {"checkpoint/plt_moments": moments, "checkpoint/plt_weights": 0.0},
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert main([str(tmp_path)]) == status
    (tmp_path / "experts" / "step-00000003.npz").unlink()
    assert len(load_snapshots(tmp_path)) == 3
    assert main([str(tmp_path)]) == 2
    assert "telemetry.experts_every=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("origin", "damage", "compared"),
    [("folder", 0, True), ("folder", 1, False), ("memory", 0, False)],
    ids=["commit", "repaired", "memory"],
)
def test_only_a_commit_that_is_what_was_restored_says_what_the_recovery_costs(origin: str, damage: int, compared: bool) -> None:
    commit = {"train/step": 4, "checkpoint/seq": 2, "checkpoint/plt_if_fault": 0.15}
    resume = {
        "train/step": 4, "event": "resume", "checkpoint/restored_seq": 2, "checkpoint/restored_from": origin, "checkpoint/damage": damage,
        "checkpoint/expert_ages": "[[0]]", "checkpoint/weight_ages": "[[0]]",
    }  # fmt: skip
    (found,) = recoveries([commit, resume])
    assert isnan(found.predicted) != compared


def test_a_run_without_experts_loses_nothing_and_what_is_no_run_is_a_sentence(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"num_layers": 2, "pattern": ["dense"]}}))
    assert main([str(tmp_path)]) == 0
    assert "has no experts" in capsys.readouterr().out
    assert main([str(tmp_path / "none")]) == 2
    assert "is no run" in capsys.readouterr().err


def recovery(step: int, ages: list[int]) -> Recovery:
    age_LE = np.array([ages])
    return Recovery(step, age_LE, age_LE, 0.0, 0.0, 0.0)


def test_every_lost_step_counts_once_and_recoveries_that_were_undone_do_not() -> None:
    load_SLE = np.ones((10, 1, 2), int)
    assert lost(load_SLE, [(4, np.array([[3, 0]])), (8, np.array([[7, 1]]))]) == 7 + 1
    rows = count(load_SLE, [recovery(4, [3, 0]), recovery(8, [7, 1]), recovery(8, [7, 1]), recovery(6, [0, 2])], 1, 10)
    assert [row.moments for row in rows] == [0.3, 0.8, 0.8, 0.5]
    assert [row.alone for row in rows] == pytest.approx([0.3, 0.5, 0.5, 0.2])


def test_a_run_that_was_lengthened_is_counted_by_the_length_it_had_at_each_resume() -> None:
    def resume(num_steps: int, moments: float) -> dict:
        return {
            "train/step": 4, "event": "resume", "train/total_steps": num_steps, "checkpoint/restored_seq": 2,
            "checkpoint/restored_from": "folder", "checkpoint/damage": 0, "checkpoint/expert_ages": "[[3, 0]]",
            "checkpoint/weight_ages": "[[0, 0]]", "checkpoint/plt_moments": moments, "checkpoint/plt_weights": 0.0,
        }  # fmt: skip

    start = {"train/step": 0, "event": "start", "train/total_steps": 10}
    commit = {"train/step": 4, "checkpoint/seq": 2, "checkpoint/plt_if_fault": 0.3}
    rows = count(np.ones((10, 1, 2), int), recoveries([start, commit, resume(10, 0.3), resume(20, 0.15)]), 1, 20)
    assert [row.moments for row in rows] == [0.3, 0.15]
    assert [row.predicted for row in rows] == [0.3, 0.15]
    assert all(row.agrees for row in rows)


@pytest.mark.dist
@pytest.mark.timeout(200)
def test_two_ranks_save_as_often_and_as_much_as_measured_costs_and_a_budget_ask_for(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    often = ("checkpoint.every_steps=3", "checkpoint.mean_hours_between_failures=0.01")
    train_forked(2, small_run(corpus, run, 24, "checkpoint=plt_budget", *often), tmp_path / "log")
    commits = [record for record in records(run) if "checkpoint/plt_if_fault" in record]
    assert len(commits) > 2
    assert all(record["checkpoint/failures"] == 0 for record in records(run) if "checkpoint/failures" in record)
    assert all(float(record["checkpoint/plt_if_fault"]) <= 0.0375 for record in commits)
    assert committed_steps(run)[0] == 24
