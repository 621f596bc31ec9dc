"""tools/bench_peers.py: peers compute what ours computes before they are timed, and figures are of the same rounds."""

from dataclasses import replace

import pytest
import torch

from moetrain.parallel.config import EngineConfig
from tools.bench_peers import (
    FLOOR,
    OURS,
    SMALL,
    check,
    contenders,
    figures,
    lines,
    measure,
    measured_model,
    most,
    products_of,
    profile_lines,
    profiled,
)
from tools.bench_step import random_batch
from tools.peers import Ours, Trained, hugging_face


def test_transformers_models_start_from_our_weights_and_are_timed_beside_ours() -> None:
    config = measured_model(small=True)
    makers = contenders(config)
    names = [name for name in makers if "transformers" in name or name.startswith("moetrain")]
    assert len(names) == 7
    first, seconds = measure({name: makers[name]() for name in names}, config, SMALL, 2)
    assert all(found.loss == pytest.approx(first[OURS].loss, rel=1e-4) for name, found in first.items() if "OLMoE" not in name)
    assert first["moetrain as OLMoE"].loss != first[OURS].loss
    assert all(len(its) == 2 for its in seconds.values())
    table = "\n".join(lines(figures(seconds, 1e6, 1e9, 32), 1e9))
    assert all(name in table for name in names)


def test_peers_learn_as_ours_does() -> None:
    """Same update: after some steps on one batch the losses are still near each other."""
    config = measured_model(small=True)
    ours, theirs = Ours(config, EngineConfig(autocast="off")), hugging_face(config, "eager")
    batch = random_batch(config, SMALL, 0)
    losses = [(ours.step(batch).loss, theirs.step(batch).loss) for _ in range(6)]
    assert losses[-1][0] < losses[0][0]
    assert all(mine == pytest.approx(other, rel=1e-3) for mine, other in losses)


def test_a_peer_that_computes_another_model_is_not_timed() -> None:
    config = measured_model(small=True)
    other = hugging_face(config, "eager")
    with torch.no_grad():
        other.model.get_parameter("model.layers.0.mlp.experts.down_proj").mul_(3)
    batch = random_batch(config, SMALL, 0)
    first = {OURS: Ours(config, EngineConfig(autocast="off")).step(batch), "transformers Mixtral, eager": other.step(batch)}
    with pytest.raises(RuntimeError, match="Mixtral, eager does not compute our model"):
        check(first)
    with pytest.raises(RuntimeError, match="x does not compute"):
        check({OURS: Trained(2.0, 1.0), "x": Trained(2.0, 1.1)})


def test_ratios_are_of_the_same_round() -> None:
    rows = figures({OURS: [1.0, 2.0, 4.0], "x": [2.0, 4.0, 8.0]}, flops=4e9, peak=2e10, tokens=100)
    assert rows["x"]["ours_is_faster"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert rows[OURS]["tokens_per_second"] == 50 and rows[OURS]["of_peak"] == pytest.approx(0.1)


def test_the_profile_says_what_is_no_matrix_product() -> None:
    config = replace(measured_model(small=True), num_layers=1)
    times = profiled(Ours(config, EngineConfig(autocast="off")), config, SMALL)
    assert {"aten::mm", "aten::index_select"} & set(times)
    text = "\n".join(profile_lines({"aten::mm": 0.3, "aten::addmm": 0.1, "aten::copy_": 0.6}))
    assert "40% of it matrix products" in text and "60.0%" in text


def test_the_floor_makes_every_product_of_a_step_again_and_nothing_else() -> None:
    config = replace(measured_model(small=True), num_layers=1)
    batch = random_batch(config, SMALL, 0)
    products = products_of(Ours(config, EngineConfig(autocast="off")), batch)
    made = products_of(products, batch)
    assert len(made.calls) == len(products.calls) > 0
    names = {func.__name__.split(".")[0] for func, _, _ in products.calls}
    assert names == {"mm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}


def test_the_most_that_can_be_gained_is_the_fastest_peer_over_the_floor() -> None:
    seconds = {OURS: [2.0, 2.0], "slow": [9.0, 9.0], "fast": [3.0, 6.0], FLOOR: [1.0, 2.0]}
    assert most(seconds) == {"median": 3.0, "low": 3.0, "high": 3.0}
