"""tools/checkpoint_bytes.py: its narrow shapes stand for the full ones, and its figures meet the targets."""

import json
from pathlib import Path

import pytest

from moetrain.checkpoint.plan import holdings_of, writes
from moetrain.model.count import count_parameters
from tools.bench_step import model_config, tiny
from tools.checkpoint_bytes import (
    AGREE,
    BALANCED,
    MODES,
    OVER_BOUND,
    TARGETS,
    TEN_POINTS,
    balance,
    holdings,
    measured,
    narrower,
    parts_of_rank,
    planned,
    random_state,
    shapes,
)  # fmt: skip

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "checkpoint_bytes.json"


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_narrower_shape_has_the_same_share_of_experts(name: str):
    model = shapes()[name]
    full, narrow = (count_parameters(shape) for shape in (model, narrower(model, 4)))
    assert narrow.expert / narrow.total == pytest.approx(full.expert / full.total, rel=2e-3)
    assert narrow.total == pytest.approx(full.total / 16, rel=5e-3)


@pytest.mark.parametrize("mode", MODES)
def test_what_ranks_hold_adds_up_to_the_plan(mode: str):
    model = tiny(model_config("gpt_125m_8e"))
    for world, ep, sharded in ((4, 4, False), (4, 2, False), (6, 3, True)):
        division = writes(holdings(model, world, ep, sharded, mode), mode, None)
        assert sum(division.loads.values()) == pytest.approx(planned(model, mode).full, abs=64)


def test_the_simulated_rank_holds_what_the_engine_shows():
    from moetrain.checkpoint.copying import parts_of

    model = tiny(model_config("gpt_125m_8e"))
    shown = holdings_of(parts_of(random_state(model)))
    assert set(holdings_of(parts_of_rank(model, 1, 1, False, "experts", 0))) == set(shown)


def test_files_are_measured_save_by_save(tmp_path: Path):
    model = tiny(model_config("gpt_125m_8e"))
    found = measured(random_state(model), "experts", tmp_path / "run")
    assert found.partial < found.full < found.stored
    assert found.stored == pytest.approx(found.full + 9 * found.partial, rel=0.02)
    assert found.full > planned(model, "experts").full


def test_uneven_experts_are_divided_as_well_as_they_can_be():
    full, partial = balance(tiny(model_config("gpt_125m_8e")), 6, 3, False, "experts")
    assert full.ok and partial.ok and full.bound_over_mean >= 1


def test_committed_figures_meet_the_targets():
    found = json.loads(COMMITTED.read_text())
    for name, targets in TARGETS.items():
        for mode, row in found[name]["modes"].items():
            assert abs(row["files_over_plan"] - 1) <= AGREE
            assert max(row["plan_of_14"], row["files_of_14"]) <= targets.get(mode, 1.0)
            assert row["plan_of_14"] == pytest.approx(planned(shapes()[name], mode).partial / 14 / found[name]["parameters"])
        for row in found[name]["divisions"]:
            for one in (row["partial"], row["full"]):
                assert one["over_mean"] <= max(BALANCED, OVER_BOUND * one["bound_over_mean"])
    assert found["gpt_350m_16e"]["modes"]["experts"]["ten_points_of_14_files"] <= TEN_POINTS
