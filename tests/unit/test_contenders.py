"""The benchmark of savers: what is measured, and that a saver that loses a bit is never timed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from zarr.errors import ContainsArrayError

from moetrain.dist.world import World
from tools.bench_checkpoint import Trainer, check_round_trip, train_block
from tools.checkpoint_figures import BASE, paired, summary
from tools.checkpoint_rates import remove_copies, write_raw, write_zarr
from tools.contenders import Live, Nothing, PerRank, Safetensors, Tensors


@pytest.fixture
def live() -> Live:
    tensors = {"a": torch.rand(7, 3), "a.step": torch.tensor(5), "b": torch.rand(4)}
    return Live(World.single(torch.device("cpu")), [], tensors, ["a", "a.step", "b"])


class LosesABit(PerRank):
    def _read(self, path: Path) -> Tensors:
        tensors = super()._read(path)
        tensors["b"][2] += 1e-3
        return tensors


class Forgets(PerRank):
    def load(self) -> list[str]:
        return []


@pytest.mark.parametrize("saver", [PerRank, Safetensors])
def test_a_saver_that_brings_everything_back_is_let_in(saver: type[PerRank], live: Live, tmp_path: Path):
    before = {name: tensor.clone() for name, tensor in live.whole.items()}
    check_round_trip(saver("x", tmp_path, live), live)
    assert all(torch.equal(live.whole[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("saver", [LosesABit, Forgets])
def test_a_saver_that_loses_something_is_not_timed(saver: type[PerRank], live: Live, tmp_path: Path):
    with pytest.raises(RuntimeError, match="x did not bring back"):
        check_round_trip(saver("x", tmp_path, live), live)


def test_older_checkpoints_go_and_newer_ones_stay(live: Live, tmp_path: Path):
    saver = PerRank("x", tmp_path, live)
    for step in (9, 10):
        saver.save(step)
    (tmp_path / "step-11").mkdir()
    saver.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]


def test_no_timed_write_removes_what_an_earlier_one_wrote(tmp_path: Path):
    payload = np.arange(64, dtype=np.uint8)
    for write in (write_raw, write_zarr):
        remove_copies(tmp_path, 0)
        write(tmp_path / "copy-0" / "x", payload)
        with pytest.raises((FileExistsError, ContainsArrayError)):
            write(tmp_path / "copy-0" / "x", payload)
    remove_copies(tmp_path, 0)
    assert not list((tmp_path / "copy-0").iterdir())


class Listed(Nothing):
    """Tells what is called when."""

    def __init__(self, calls: list[str], folder: Path) -> None:
        super().__init__("x", folder)
        self._calls = calls

    def save(self, step: int) -> None:
        self._calls.append("save")

    def tidy(self) -> None:
        self._calls.append("tidy")


def test_no_rank_saves_before_all_have_tidied_up(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = list[str]()
    trainer = Trainer.__new__(Trainer)
    trainer.live = live
    monkeypatch.setattr(Trainer, "step", lambda self, before_update: before_update())
    monkeypatch.setattr(World, "barrier", lambda self, name: calls.append("barrier"))
    train_block(trainer, Listed(calls, tmp_path), 1, 0)
    assert calls == ["save", "tidy", "barrier"] * 2 + ["barrier"]


def test_shares_are_of_the_iteration_without_checkpoints_of_the_same_round():
    def rank(stalls: list[list[float]]) -> dict:
        return {
            "iterations": {
                BASE: {"whole": [[1.0, 1.0], [2.0, 2.0]], "starting": [[0.0, 0.0], [0.0, 0.0]], "waiting": [[0.0, 0.0], [0.0, 0.0]]},
                "x": {"whole": [[1.5, 1.5], [2.2, 2.2]], "starting": [[0.1, 0.1], [0.1, 0.1]], "waiting": stalls},
            },
            "bytes": {"x": 7}, "memory": {BASE: 0, "x": 9},
        }  # fmt: skip

    row = summary([rank([[0.0, 0.0], [0.1, 0.1]]), rank([[0.0, 0.4], [0.1, 0.1]])])["x"]
    assert (row["stall_p50"], row["stall_max"], row["bytes_per_rank"], row["memory"]) == (0.1, 0.5, 7, 9)
    assert row["slow_down"] == pytest.approx((0.5 + 0.1) / 2)


def test_ratios_take_the_slower_rank_of_each_round():
    found = paired([{"x": [1.0, 2.0, 4.0], "y": [2.0, 2.0, 2.0]}, {"x": [2.0, 1.0, 1.0], "y": [8.0, 2.0, 2.0]}], "x", "y")
    assert found["median"] == 1.0
    assert (found["low"], found["high"]) == (0.5, 4.0)
