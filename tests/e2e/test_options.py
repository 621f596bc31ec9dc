"""One run with many options switched on at once: each leaves the trace that it promises."""

import json
from pathlib import Path

import pytest

from tests.e2e.jobs import events, records, restored_ages, small_run, train_forked, train_here


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_blend_with_boundaries_fsdp_recomputation_and_every_sink(
    corpora: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    blend = ",".join(f"{{path: {path}, weight: {weight}}}" for path, weight in zip(corpora, (3, 1), strict=True))
    overrides = [word for word in small_run(corpora[0], run, 10) if not word.startswith("data.corpora")]
    overrides += [
        f"data.corpora=[{blend}]", "data.document_boundaries=true", "parallel=fsdp", "parallel.placement_seed=5", "engine=recompute",
        "routing=bias", "optim=wsd", "train.micro_batch_size=2", "train.sample_every=4", "train.sample_prompts=[def]",
        "train.sample_tokens=5", "train.evaluate_every=4", "train.evaluate_batches=2", "checkpoint.every_steps=2",
        "checkpoint.full_every=3", "telemetry.wandb=offline", "telemetry.tensorboard=true", "telemetry.experts_every=3",
        "profile.start_step=2", "profile.num_steps=1",
    ]  # fmt: skip
    said = train_forked(2, [*overrides, "run.stop_after=6"], tmp_path / "log")
    assert events(run) == [("start", 0), ("stop", 6)]
    identity = (run / "wandb_id").read_text()
    assert len(offline_runs(run, identity)) == 1
    assert train_here(overrides, monkeypatch) == 0  # on one rank, without shards
    assert events(run) == [("start", 0), ("stop", 6), ("resume", 6), ("done", 10)]
    assert restored_ages(run) == [[0] * 8, [0] * 8], "the checkpoint of a stop is full"

    assert (run / "wandb_id").read_text() == identity
    assert len(offline_runs(run, identity)) == 2
    assert len(list(run.rglob("events.out.tfevents.*"))) == 2
    traces = sorted(path.name for path in (run / "trace").iterdir())
    assert any("rank0" in name for name in traces) and any("rank1" in name for name in traces)
    assert [path.stem for path in sorted((run / "experts").iterdir())] == [
        "step-00000003",
        "step-00000006",
        "step-00000009",
        "step-00000010",
    ]
    samples = [record["train/step"] for record in records(run) if "sample/text" in record]
    assert samples == [4, 8, 10]
    evaluated = [record["train/step"] for record in records(run) if "evaluation/loss" in record]
    assert evaluated == [4, 8, 10]
    tokens = [record["train/tokens"] for record in records(run) if "train/loss" in record]
    assert tokens == [512 * step for step in range(1, 11)]
    assert "Traceback" not in said
    assert json.loads((run / "env.json").read_text())
    assert "data.document_boundaries=true" in (run / "overrides.txt").read_text()


def offline_runs(run: Path, identity: str) -> list[Path]:
    """One folder per start, each with one file of the run's id."""
    return [path for path in run.rglob("run-*.wandb") if identity.strip() in path.name]
