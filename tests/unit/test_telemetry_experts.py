"""Expert load: balance and snapshots."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from moetrain.telemetry.experts import Snapshot, balance, layer_labels, load_snapshots, relative_load, save_snapshot

loads = arrays(np.int64, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9), elements=st.integers(0, 10**6))


@given(loads)
def test_balance_stays_in_its_bounds(load_LE: np.ndarray) -> None:
    even, num_experts = balance(load_LE), load_LE.shape[1]
    assert 1 - 1e-9 <= even.max_over_mean <= num_experts + 1e-9
    assert -1e-9 <= even.entropy <= 1 + 1e-9
    assert even.dead == int((load_LE == 0).sum())


@given(loads)
def test_relative_load_averages_to_one_in_every_layer(load_LE: np.ndarray) -> None:
    np.testing.assert_allclose(relative_load(load_LE).mean(axis=1), 1)


def test_an_even_load_is_one_one_zero() -> None:
    even = balance(np.full((3, 8), 7))
    assert (even.max_over_mean, even.dead) == (1.0, 0)
    assert even.entropy == pytest.approx(1.0)


def test_one_expert_that_takes_all_is_worst() -> None:
    load_LE = np.zeros((2, 4), dtype=np.int64)
    load_LE[:, 1] = 10
    worst = balance(load_LE)
    assert (worst.max_over_mean, worst.entropy, worst.dead) == (4.0, 0.0, 6)


def test_balance_is_the_mean_of_its_layers() -> None:
    assert balance(np.array([[4, 4], [8, 0]])).max_over_mean == pytest.approx((1 + 2) / 2)


def test_snapshots_come_back_by_step_and_a_second_try_replaces_the_first(tmp_path: Path) -> None:
    banks = ("blocks.0.moe.experts", "blocks.2.moe.experts")
    for step, value in ((100, 1), (20, 2), (100, 3)):
        save_snapshot(tmp_path, Snapshot(step, np.full((2, 4), value), banks))
    found = load_snapshots(tmp_path)
    assert [(snapshot.step, int(snapshot.load_LE[0, 0]), snapshot.banks) for snapshot in found] == [(20, 2, banks), (100, 3, banks)]
    assert found[0].load_LE.dtype == np.int64
    with np.load(tmp_path / "experts" / "step-00000020.npz") as arrays_:
        assert set(arrays_) == {"load", "step", "banks"}
    assert not list(tmp_path.glob("experts/*.tmp"))


def test_layers_are_labelled_by_their_block() -> None:
    assert layer_labels(("blocks.3.moe.experts", "head.experts")) == ["block 3", "head.experts"]


def test_a_snapshot_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "experts").touch()  # a file where the folder should be fails like a full disk
    save_snapshot(tmp_path, Snapshot(1, np.ones((1, 2)), ("blocks.0.moe.experts",)))
    assert (tmp_path / "experts").read_bytes() == b""
