"""The simulation of selection rules: what benchmarks/selection.json promises, at a smaller size, and the bound it is held against."""

import json
from pathlib import Path

import numpy as np
import pytest

from tools.simulate_selection import TOKENS, loads, lower_bound, main, shares, simulate

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "selection.json"


@pytest.mark.parametrize(("num_experts", "count"), [(16, 1), (16, 4), (64, 8)])
def test_unsaved_age_loses_less_than_sequential_at_zipf_loads_and_keeps_the_age_limit(num_experts, count):
    load = loads(num_experts, 1.0, 8 * num_experts // count + 40, drift=0.002, seed=1)
    (in_turn, _), (by_age, oldest) = (simulate(load, count, rule) for rule in ("sequential", "unsaved_age"))
    assert by_age <= 0.85 * in_turn
    assert oldest <= 2.2 * num_experts / count
    assert by_age >= 0.98 * lower_bound(num_experts, count, 1.0)


def test_unsaved_age_is_no_worse_at_even_loads():
    load = loads(16, 0.0, 120, drift=0.002, seed=1)
    assert simulate(load, 2, "unsaved_age")[0] <= 1.005 * simulate(load, 2, "sequential")[0]


def test_sequential_loses_what_the_closed_form_says():
    """(N / K - 1) / 2 intervals, research on partial checkpoints (arXiv 2408.04307, balanced load)."""
    assert simulate(loads(16, 0.0, 400, 0.0, 0), 2, "sequential")[0] == pytest.approx(3.5, rel=0.01)
    assert lower_bound(16, 2, 0.0) == pytest.approx(3.5)


def test_no_schedule_found_by_chance_beats_the_lower_bound():
    random = np.random.default_rng(3)
    share, bound = shares(12, 1.0), lower_bound(12, 2, 1.0)
    for _ in range(2000):
        rate = np.minimum(1, random.dirichlet(np.ones(12)) * 2)
        assert (share * (1 / np.maximum(rate, 1e-9) - 1) / 2).sum() >= bound


def test_loads_are_those_of_the_law_and_drift():
    still, drifting = loads(8, 1.0, 50, 0.0, 0), loads(8, 1.0, 50, 0.2, 0)
    assert (still.sum(axis=1) == TOKENS).all()
    assert np.allclose(np.sort(still.mean(axis=0))[::-1] / TOKENS, shares(8, 1.0), atol=0.01)
    assert len({int(row.argmax()) for row in still}) == 1 < len({int(row.argmax()) for row in drifting})


def test_committed_figures_meet_the_targets(monkeypatch, tmp_path):
    record = json.loads(BENCHMARK.read_text())
    for one in record["outcomes"]:
        if one["selection"] == "unsaved_age":
            assert one["max_age_rounds"] <= 2.2
            assert one["less_than_sequential"] >= (0.15 if one["skew"] == 1.0 else -0.001)
    words = record["command"].split()
    monkeypatch.setattr("sys.argv", [*words[2:-1], str(tmp_path / "again.json")])
    assert main() == 0
    again = json.loads((tmp_path / "again.json").read_text())["outcomes"]
    for one, other in zip(record["outcomes"], again, strict=True):
        assert other["lost_per_fault"] == pytest.approx(one["lost_per_fault"], rel=0.02)  # another numpy may draw other numbers
