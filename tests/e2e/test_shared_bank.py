"""DGMoE-Share, one bank under two pairs, through the commands: trained by two sharded ranks, resumed by one, exported."""

from pathlib import Path

import pytest

from moetrain import cli
from moetrain.model.config import ModelConfig
from moetrain.model.shapes import check_tensors
from moetrain.store.bundle import Bundle
from tests.e2e.jobs import losses, restored_ages, small_run, train_forked, train_here


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_bank_of_two_pairs_is_trained_saved_and_resumed_once(
    corpora: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overrides(name: str) -> list[str]:
        options = ("model=small_dgmoe_share", "engine=recompute", "checkpoint.every_steps=2")
        return small_run(corpora[0], tmp_path / name, 8, *options)

    assert train_here(overrides("whole"), monkeypatch) == 0
    train_forked(2, [*overrides("run"), "parallel=fsdp", "run.stop_after=4"], tmp_path / "log")
    assert train_here(overrides("run"), monkeypatch) == 0
    assert restored_ages(tmp_path / "run") == [[0] * 8], "one bank"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)

    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "bundle")]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    config = ModelConfig.from_dict(bundle.config)
    check_tensors(config, bundle.shapes, "the bundle")
    assert config.banks() == ["blocks.0.moe.experts"]
