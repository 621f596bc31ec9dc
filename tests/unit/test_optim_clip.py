"""The gradient norm in one process; over ranks see tests/dist/test_sharded_optim.py."""

from math import inf, isnan, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetrain.dist.mesh import Mesh
from moetrain.dist.world import World
from moetrain.optim.clip import GradientShard, Kind, clip_gradients

ALONE = Mesh(World.single(torch.device("cpu")), 1)


def shards(*values: list[float]) -> list[GradientShard]:
    kinds = list(Kind)
    return [GradientShard(torch.tensor(value, dtype=torch.float64), kinds[i % len(kinds)]) for i, value in enumerate(values)]


def test_norm_counts_every_kind_once_and_survives_empty_shards() -> None:
    gradients = shards([1.0, 2.0], [], [2.0], [4.0])
    assert clip_gradients(gradients, 0.0, ALONE) == pytest.approx(5.0)
    assert gradients[0].tensor.tolist() == [1.0, 2.0]


@given(values=st.lists(st.lists(st.floats(-10, 10), max_size=4), min_size=1, max_size=6), max_norm=st.floats(0.1, 20))
def test_equals_torch_clipping(values: list[list[float]], max_norm: float) -> None:
    gradients = shards(*values)
    parameters = [torch.nn.Parameter(torch.zeros_like(shard.tensor)) for shard in gradients]
    for parameter, shard in zip(parameters, gradients, strict=True):
        parameter.grad = shard.tensor.clone()
    expected = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    assert clip_gradients(gradients, max_norm, ALONE) == pytest.approx(expected, abs=1e-12)
    for parameter, shard in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        # torch divides by norm + 1e-6
        torch.testing.assert_close(shard.tensor, parameter.grad, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("bad", [inf, nan])
def test_a_norm_that_is_not_finite_is_reported_and_nothing_is_scaled(bad: float) -> None:
    gradients = shards([1.0, bad], [3.0])
    norm = clip_gradients(gradients, 1.0, ALONE)
    assert isnan(norm) if isnan(bad) else norm == inf
    assert gradients[1].tensor.tolist() == [3.0]


def test_squares_of_small_float32_gradients_do_not_vanish() -> None:
    gradients = [GradientShard(torch.full((10_000,), 1e-30), Kind.DENSE_REPLICATED)]
    assert clip_gradients(gradients, 1.0, ALONE) == pytest.approx(1e-28, rel=1e-6)
