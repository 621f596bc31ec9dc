"""The figures of tools/bench_overlap.py from times that are known: what was hidden, what could be, who is how much faster."""

import pytest

from moetrain.config import compose, to_config
from moetrain.model.config import ModelConfig
from moetrain.model.count import active_matmul_parameters
from tools import overlap_figures
from tools.bench_step import model_config
from tools.overlap_adaptive import change_summary, regret
from tools.overlap_cases import (
    DEEPSPEED,
    EXCHANGE,
    GROUPS,
    NULL,
    OVERLAPPED,
    POSITIONS,
    REST,
    SCMOE,
    SERIAL,
    SHARED,
    TOP_1,
    TOP_2,
    Run,
    Size,
    model_of,
    num_operators,
)  # fmt: skip
from tools.overlap_figures import best, differences, estimate, hiding, in_one_slot, ratio, series, share, window
from tools.overlap_plot import bars

ROUNDS = 5
# Seconds of forward and backward by run; backward computes twice as long, exchanges of both take as long.
TIMES = {
    Run(TOP_2, SERIAL).name: (3.0, 4.0),
    Run(TOP_2, SERIAL, again=True).name: (3.0, 4.0),
    Run(TOP_2, NULL).name: (1.0, 2.0),
    Run(TOP_2, EXCHANGE).name: (2.0, 2.0),
    Run(TOP_2, REST).name: (0.4, 0.6),
    Run(TOP_2, OVERLAPPED, (1, 1)).name: (2.5, 3.0),
    Run(TOP_1, SERIAL).name: (1.7, 2.5),
    Run(TOP_1, NULL).name: (0.8, 1.6),
    Run(SHARED, SERIAL, (2,)).name: (2.0, 3.0),
    Run(SHARED, NULL, (2,)).name: (1.0, 2.0),
    Run(SHARED, OVERLAPPED, (2,)).name: (1.8, 2.6),
    Run(SCMOE, SERIAL, (3,)).name: (2.0, 3.0),
    Run(SCMOE, NULL, (3,)).name: (1.0, 2.0),
    Run(SCMOE, EXCHANGE).name: (1.0, 1.0),
    Run(SCMOE, OVERLAPPED, (2,)).name: (1.9, 2.9),
    Run(SCMOE, OVERLAPPED, (3,)).name: (1.5, 2.1),
}


def rank(slower: float = 1.0) -> dict:
    """What a rank finds; every round is slower than the one before, for all runs alike."""
    laps = {}
    for name, (forward, backward) in TIMES.items():
        weights = [slower * (1 + 0.1 * number) for number in range(ROUNDS)]
        cpu = 0.05 if f" {OVERLAPPED} " in name else 0.0
        parts = {"forward": forward, "backward": backward, "forward_cpu": 1.0 + cpu, "backward_cpu": 2.0 + cpu}
        laps[name] = {part: [seconds * weight for weight in weights] for part, seconds in parts.items()}
    numbers = {"main 1": 0.1, "main 2": 0.3, "main 3": 0.2}
    forward = {"main": 0.6, "experts": 0.5} | numbers
    backward = {"main": 1.2, "experts": 1.0} | {key: 2 * seconds for key, seconds in numbers.items()}
    return {"laps": laps, "window": {model: {"forward": forward, "backward": backward} for model in (SCMOE, SHARED)}}


@pytest.fixture
def found() -> list[dict]:
    return [rank(), rank(slower=0.5)]


def test_the_slower_rank_counts_in_every_round() -> None:
    one, other = rank(), rank()
    one["laps"]["top-2 C"]["forward"], other["laps"]["top-2 C"]["forward"] = [1.0, 5.0], [4.0, 2.0]
    assert series([one, other], "top-2 C", ["forward"]) == [4.0, 5.0]


def test_ratios_are_of_the_same_round_so_that_a_drift_cancels(found: list[dict]) -> None:
    reached = ratio(found, Run(TOP_2, SERIAL).name, Run(SCMOE, OVERLAPPED, (3,)).name)
    assert reached == pytest.approx({"median": 7 / 3.6, "low": 7 / 3.6, "high": 7 / 3.6})


def test_the_best_schedule_is_the_fastest_and_never_the_repeated_run(found: list[dict]) -> None:
    assert best(found, SCMOE) == Run(SCMOE, OVERLAPPED, (3,)).name
    assert best(found, TOP_2, SERIAL) == Run(TOP_2, SERIAL).name


def test_hidden_is_the_part_of_the_exchange_that_overlap_saved(found: list[dict]) -> None:
    figures = hiding(found, SCMOE, Run(SCMOE, OVERLAPPED, (3,)).name, Run(SCMOE, EXCHANGE).name)
    middle = 1.2  # the median round
    forward, backward = figures["forward"], figures["backward"]
    assert forward["hidden"]["median"] == pytest.approx(0.5) and backward["hidden"]["median"] == pytest.approx(0.9)
    assert forward["exposed"] == pytest.approx(0.5 * middle) and backward["exposed"] == pytest.approx(0.1 * middle)
    assert forward["tax"] == pytest.approx(0.05 * middle)
    # an exchange of 1.2 s under a window of 0.6 s, of which the transport takes 0.06 s
    assert forward["bound"] == pytest.approx((0.6 - 0.06) / 1.2) and not forward["fits"]
    assert backward["bound"] == pytest.approx((1.2 - 0.06) / 1.2) and backward["fits"]
    assert backward["efficiency"]["median"] == pytest.approx(0.9 / 0.95)


def test_a_burst_after_a_pause_makes_no_bound_easier(found: list[dict]) -> None:
    """Back to back the exchanges take longer than what the serial arm pays for them: that is what can be hidden."""
    for one in found:
        one["laps"][Run(SCMOE, EXCHANGE).name]["forward"] = [1.5 * seconds for seconds in one["laps"][Run(SCMOE, EXCHANGE).name]["forward"]]
    figures = hiding(found, SCMOE, Run(SCMOE, OVERLAPPED, (3,)).name, Run(SCMOE, EXCHANGE).name)["forward"]
    assert figures["alone"] == pytest.approx(1.5 * 1.2) and figures["comm"] == pytest.approx(1.2)
    assert figures["bound"] == pytest.approx((0.6 - 0.06) / 1.2)


def test_a_single_slot_hides_each_way_on_its_own_side_only(found: list[dict]) -> None:
    """Backward in slot 3: 0.8 s before it and 0.4 s behind it, for 0.6 s each way."""
    exchange = Run(SCMOE, EXCHANGE).name
    backward = hiding(found, SCMOE, Run(SCMOE, OVERLAPPED, (3,)).name, exchange)["backward"]
    assert backward["one_slot"]["bound"] == pytest.approx((0.6 + 0.4 - 0.06) / 1.2) and backward["bound"] == pytest.approx(
        (1.2 - 0.06) / 1.2
    )
    assert backward["one_slot"]["efficiency"]["median"] == pytest.approx(0.9 * 1.2 / 0.94)
    assert in_one_slot(found, SCMOE, Run(SCMOE, OVERLAPPED, (1,)).name, "backward", 1.2) == pytest.approx(0.6)
    assert in_one_slot(found, SCMOE, Run(SCMOE, OVERLAPPED, (2,)).name, "forward", 1.2) == pytest.approx(0.1 + 0.5)
    assert in_one_slot(found, SCMOE, Run(SCMOE, OVERLAPPED, (4,)).name, "forward", 0.4) == pytest.approx(0.2)
    for one in found:
        one["laps"][Run(SCMOE, OVERLAPPED, (2, 3)).name] = one["laps"][Run(SCMOE, OVERLAPPED, (3,)).name]
    assert all("one_slot" not in one for one in hiding(found, SCMOE, Run(SCMOE, OVERLAPPED, (2, 3)).name, exchange).values())


def test_chunks_hide_under_each_others_experts_too(found: list[dict]) -> None:
    assert window(found, SCMOE, Run(SCMOE, OVERLAPPED, (3,)).name, "forward") == 0.6
    assert window(found, SCMOE, Run(SCMOE, OVERLAPPED, (2, 3)).name, "forward") == pytest.approx(0.6 + 0.5 / 2)
    assert window(found, SCMOE, Run(SCMOE, OVERLAPPED, (2, 2, 3, 3)).name, "backward") == pytest.approx(1.2 + 1.0 * 3 / 4)


def test_the_share_of_the_exchange_is_of_the_time_that_is_no_attention_and_no_dense_mlp(found: list[dict]) -> None:
    assert share(found) == pytest.approx(4 / (7 - 1))


def test_the_ceiling_pays_for_what_no_window_covers_and_for_the_transport(found: list[dict]) -> None:
    figures = overlap_figures.opponents(found)
    lowest = 1.2 * 3.0 + (1.2 - 0.6) + 2 * 0.06
    assert figures["ceilings"]["top-2 serial"] == pytest.approx(1.2 * 7 / lowest)
    assert figures["of_ceiling"]["median"] == pytest.approx(7 / 3.6 / (1.2 * 7 / lowest))
    assert figures["ratios"]["A/A"]["median"] == pytest.approx(1.0)
    table = "\n".join(overlap_figures.lines(found, figures))
    assert all(name in table for name in TIMES) and "ceiling 1.94" in table


def test_a_machine_that_was_not_quiet_is_named() -> None:
    noisy = rank()
    noisy["laps"][Run(TOP_2, SERIAL, again=True).name]["forward"] = [3.3] * ROUNDS
    tables = ["\n".join(overlap_figures.lines([found], overlap_figures.opponents([found]))) for found in (rank(), noisy)]
    assert ["quote nothing" in table for table in tables] == [False, True]


def test_an_interval_grows_with_the_noise() -> None:
    quiet, noisy = estimate([2.0, 2.1, 1.9, 2.0], [1.0] * 4), estimate([2.0, 4.0, 0.5, 2.0], [1.0] * 4)
    assert quiet["median"] == noisy["median"] == 2.0
    assert noisy["high"] - noisy["low"] > 5 * (quiet["high"] - quiet["low"])
    assert differences([3.0, 2.0], [1.0, 3.0]) == [2.0, -1.0]


def test_the_plot_shows_computation_and_what_came_on_top(found: list[dict]) -> None:
    rows = bars(found)
    assert rows["top-2, serial"] == pytest.approx((1200 * 3, 1200 * 4))
    assert rows["top-1, serial"] == pytest.approx((1200 * 2.4, 1200 * 1.8))
    assert [sum(row) for row in rows.values()] == sorted((sum(row) for row in rows.values()), reverse=True)


@pytest.mark.parametrize("group", GROUPS)
def test_every_run_names_a_schedule_its_model_has(group: str) -> None:
    runs = GROUPS[group]()
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        assert run.slots[-1] <= num_operators(TOP_2 if run.model == DEEPSPEED else run.model) + 1


def test_all_but_top_1_compute_as_much_for_a_token() -> None:
    def active(config: ModelConfig) -> int:
        gate = config.hidden_size if "dense" not in config.blocks() or "shared" in config.blocks() else 0  # one row of the shared gate
        return active_matmul_parameters(config) - gate

    wanted = active(model_of(TOP_2, Size()))
    assert [active(model_of(model, Size())) for model in (SHARED, *POSITIONS)] == [wanted] * 4
    assert active(model_of(TOP_1, Size())) < wanted


def test_regret_is_judged_in_rounds_that_did_not_choose_the_best() -> None:
    """Schedules that are all alike differ by luck in every half; the lucky one of one half is not lucky in the other."""
    seconds = {"1": [1.0, 2.0] * 4, "2": [2.0, 1.0] * 4, "3": [1.5, 1.5] * 4}
    assert regret({"chosen": "3", "seconds": seconds})["median"] == pytest.approx(0.75)
    slow = {"1": [1.0] * 8, "2": [1.1] * 8}
    assert regret({"chosen": "2", "seconds": slow})["median"] == pytest.approx(1.1)
    assert regret({"chosen": "1", "seconds": slow})["median"] == 1.0


def test_recovery_counts_steps_until_the_last_schedule_was_there() -> None:
    steps = [{"slots": "3", "seconds": 1.0}] * 4 + [{"slots": "3", "seconds": 3.0}] * 2 + [{"slots": "2", "seconds": 2.0}] * 5
    figures = change_summary([{"before": 4, "steps": steps, "seconds": {"2": [2.0], "3": [3.0]}}])
    assert figures == {"before": "3", "after": "2", "best": "2", "steps_to_recover": 2, "over_best": 1.0, "old_over_best": 1.5}
    same = change_summary([{"before": 4, "steps": steps[:6], "seconds": {"2": [2.0], "3": [3.0]}}])
    assert (same["steps_to_recover"], same["over_best"]) == (0, 1.5)


def test_the_model_of_bench_peers_is_the_experiments() -> None:
    assert model_config("gpt_moe_8e_top2") == to_config(compose(["+experiment=gpt_moe_8e_top2"])).model
