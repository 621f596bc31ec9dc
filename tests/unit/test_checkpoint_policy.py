"""Ledger, PLT, selection rules, dynamic K and the interval: invariants of the pure parts."""

from collections import Counter
from math import ceil, expm1, floor, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.base.errors import ConfigError
from moetrain.checkpoint.config import SELECTIONS, CheckpointConfig
from moetrain.checkpoint.interval import Costs, best_interval
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.plan import Holding
from moetrain.checkpoint.plt import plt, plt_if_fault, plt_of_moments, plt_of_weights
from moetrain.checkpoint.select import RULES, Waiting, balanced, first_of
from moetrain.checkpoint.turns import Homes, Horizon, Turns, homes_of, max_age
from tests.unit.rotation import rotation

BANKS = {"blocks.0.moe.experts": 4, "blocks.1.moe.experts": 4}
FIRST, SECOND = BANKS


def turns(banks: dict[str, int] = BANKS, assignments: int = 1000, **config: object) -> Turns:
    return Turns(CheckpointConfig(**config), Horizon(banks, assignments))  # type: ignore[arg-type]


# the ledger against a list of every assignment

event = st.one_of(
    st.tuples(st.just("step"), st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=2)),
    st.tuples(st.just("save"), st.dictionaries(st.sampled_from([FIRST, SECOND]), st.lists(st.integers(0, 3), max_size=4), max_size=2)),
    st.tuples(st.just("fault"), st.just(None)),
)


class Witness:
    """Keeps, for every expert, the assignments that its live and its saved state were trained on, one by one."""

    def __init__(self) -> None:
        self.live = {(bank, e): list[int]() for bank, n in BANKS.items() for e in range(n)}
        self.seen = dict.fromkeys(self.live, 0)  # assignments up to now on the line of training that counts
        self.saved = {group: (list(held), 0) for group, held in self.live.items()}
        self.manifest = (dict(self.saved), dict(self.seen))

    def step(self, load: list[list[int]]) -> None:
        for bank, row in zip(BANKS, load, strict=True):
            for expert, count in enumerate(row):
                self.live[bank, expert] += [1] * count
                self.seen[bank, expert] += count

    def save(self, chosen: dict[str, list[int]]) -> None:
        for bank, experts in chosen.items():
            for expert in experts:
                self.saved[bank, expert] = (list(self.live[bank, expert]), 0)
        self.manifest = (dict(self.saved), dict(self.seen))

    def fault(self) -> None:
        saved, seen = self.manifest
        self.saved, self.seen = dict(saved), dict(seen)
        self.live = {group: list(held) for group, (held, _) in saved.items()}


@given(st.lists(event, max_size=30))
def test_total_splits_exactly_into_what_is_held_lost_and_unsaved(events):
    witness, live = Witness(), Ledger.of_banks(BANKS)
    manifest = live
    for kind, value in events:
        if kind == "step":
            witness.step(value)
            live = live.count(value)
        elif kind == "save":
            chosen = {bank: sorted(set(value.get(bank, []))) for bank in BANKS}
            witness.save(chosen)
            manifest = live.after(chosen, "experts")
            live = live.since(manifest)
        else:
            witness.fault()
            live = Ledger.of_json(manifest.to_json(), BANKS).restored()
            assert not any(map(any, live.unsaved().values()))
        for (bank, e), held in witness.live.items():
            assert live.total[bank][e] == witness.seen[bank, e]
            assert len(held) == live.total[bank][e] - live.lost[bank][e]  # what the live expert knows


@pytest.mark.parametrize(("mode", "weights"), [("experts", 12), ("moments", 0), ("weights16", 0), ("full", 0)])
def test_modes_lose_weights_or_moments_or_nothing(mode, weights):
    ledger = Ledger.of_banks(BANKS).count([[3, 0, 4, 1], [2, 2, 2, 2]]).after({FIRST: [0], SECOND: [1, 3]}, mode)
    lost = ledger.restored()
    moments = 0 if mode == "full" else 5 + 4
    weights = 9 if weights else 0
    assert sum(map(sum, lost.lost.values())) == moments
    assert sum(map(sum, lost.lost_weights.values())) == weights
    assert plt_if_fault(ledger, 100) == pytest.approx(moments / 200)
    assert plt_of_moments(lost, 100) == pytest.approx(moments / 200)
    assert plt_of_weights(lost, 100) == pytest.approx(weights / 200)


def test_a_second_recovery_charges_an_expert_only_for_what_came_since():
    first = Ledger.of_banks(BANKS).count([[5] * 4] * 2).after({FIRST: [0], SECOND: [0]}, "experts").restored()
    second = first.count([[1] * 4] * 2).after({FIRST: [1], SECOND: [1]}, "experts").restored()
    assert second.lost == {FIRST: [1, 5, 6, 6], SECOND: [1, 5, 6, 6]}


def test_an_expert_taken_from_an_older_recovery_point_is_charged_for_both():
    old = Ledger.of_banks(BANKS).count([[5] * 4] * 2).after(None, "experts")
    new = (
        old.count([[2] * 4] * 2)
        .after({FIRST: [0], SECOND: [0]}, "experts")
        .count([[1] * 4] * 2)
        .after({FIRST: [1], SECOND: [1]}, "experts")
    )
    repaired = new.with_expert((FIRST, 0), old)
    assert (new.restored().lost[FIRST][0], repaired.restored().lost[FIRST][0]) == (1, 3)
    assert repaired.age[FIRST] == [1, 0, 2, 2]


def test_an_older_expert_is_not_charged_again_for_what_an_earlier_recovery_lost():
    start = Ledger.of_banks(BANKS).count([[5] * 4] * 2).after({FIRST: [], SECOND: []}, "experts").restored()
    old = start.count([[2] * 4] * 2).after(None, "experts")  # knows 2 of 7, 5 are lost
    new = old.count([[4] * 4] * 2).after(None, "experts")
    assert new.with_expert((FIRST, 0), old).restored().lost == {FIRST: [9, 5, 5, 5], SECOND: [5] * 4}
    assert new.with_expert((FIRST, 0), start).restored().lost[FIRST][0] == 11  # all that it was ever given


def test_plt_is_the_mean_over_layers():
    assert plt({FIRST: [10, 0, 0, 0], SECOND: [0, 0, 0, 30]}, 100) == pytest.approx(0.2)
    assert plt({}, 100) == plt({FIRST: [1]}, 0) == 0.0


# rules


@given(num_experts=st.integers(1, 20), layers=st.integers(1, 5), k=st.integers(1, 22), saves=st.integers(1, 40))
def test_sequential_is_the_rotation_of_the_paper(num_experts, layers, k, saves):
    banks = {f"blocks.{i}.moe.experts": num_experts for i in range(layers)}
    policy, ledger = turns(banks, experts_per_save=k), Ledger.of_banks(banks)
    for index in range(1, saves):
        chosen = policy.selection(index, ledger)
        assert chosen == rotation(index, banks, min(k, num_experts))
        ledger = ledger.after(chosen, "experts")


loads = st.lists(st.integers(0, 1000), min_size=1, max_size=24)


@settings(deadline=None, max_examples=60)
@given(load=loads, k=st.integers(1, 24), rule=st.sampled_from(sorted(RULES)), data=st.data())
def test_no_expert_outgrows_the_age_limit(load, k, rule, data):
    """Whatever rule ranks them and however the loads jump."""
    count, num_experts = min(k, len(load)), len(load)
    limit = max_age(num_experts, count, data.draw(st.sampled_from([1.0, 1.5, 2.2])))
    ages, unsaved = [0] * num_experts, [0] * num_experts
    for index in range(6 * ceil(num_experts / count)):
        unsaved = [u + x for u, x in zip(unsaved, load, strict=True)]
        ranking = RULES[rule](Waiting(ages, unsaved, index % num_experts))
        chosen, forced = first_of(ranking, ages, count, limit)
        assert len(chosen) == len(set(chosen)) == count
        assert forced <= set(chosen)
        ages = [0 if e in chosen else age + 1 for e, age in enumerate(ages)]
        unsaved = [0 if e in chosen else u for e, u in enumerate(unsaved)]
        assert max(ages) <= limit
        load = data.draw(st.permutations(load)) if index % 5 == 0 else load


def test_greedy_takes_the_most_unsaved_and_unsaved_age_waits_for_the_cold_ones_too():
    waiting = Waiting(ages=[0, 5, 1, 0], unsaved=[90, 20, 40, 1], first=0)
    assert RULES["greedy"](waiting) == [0, 2, 1, 3]
    assert RULES["unsaved_age"](waiting) == [1, 0, 2, 3]
    assert RULES["sequential"](waiting) == [1, 2, 0, 3]


@pytest.mark.parametrize(("rule", "oldest"), [("unsaved_age", 17), ("greedy", 40)])
def test_an_expert_that_nothing_is_routed_to_is_saved_by_the_age_limit_alone(rule, oldest):
    banks = {"a": 8}
    policy, ledger, ages = turns(banks, selection=rule), Ledger.of_banks(banks), []
    for index in range(1, 41):
        ledger = ledger.count([[0, *range(1, 8)]])
        ledger = ledger.after(policy.selection(index, ledger), "experts")
        ages.append(ledger.age["a"][0])
    assert max(ages) == oldest


@pytest.mark.parametrize(("ranks", "k"), [(6, 3), (6, 4), (7, 2), (7, 4), (3, 2)])
def test_sequential_leaves_its_rotation_where_ranks_hold_uneven_numbers_of_experts(ranks, k):
    """Eight experts on 6 or 7 ranks: one rotation would write twice as much on some of them. On 3, what all share out fills the gaps."""
    banks = {f"layer{i}": 8 for i in range(12)}
    of = {(bank, expert): (expert * ranks // 8,) for bank in banks for expert in range(8)}
    homes = Homes(of, spread=14.0)
    ledger = Ledger.of_banks(banks).after(None, "experts")
    for index in range(1, 40):
        ledger = ledger.count([[7] * 8] * 12)
        selection = turns(banks, experts_per_save=k).selection(index, ledger, homes=homes)
        ledger = ledger.after(selection, "experts")
        mean = (12 * k + homes.spread) / ranks
        assert heaviest(selection, of) <= 1.05 * mean
        assert all(len(experts) == k for experts in selection.values())
        assert max(map(max, ledger.age.values())) <= 2.2 * 8 / k


def test_at_even_loads_unsaved_age_is_sequential():
    banks = {"a": 12, "b": 12}
    by_age, in_turn = turns(banks, selection="unsaved_age", experts_per_save=2), turns(banks, experts_per_save=2)
    ledger = Ledger.of_banks(banks).after(None, "experts")
    for index in range(1, 30):
        ledger = ledger.count([[7] * 12] * 2)
        chosen = by_age.selection(index, ledger)
        assert chosen == in_turn.selection(index, ledger)
        ledger = ledger.after(chosen, "experts")


@given(
    layers=st.integers(1, 6), ranks=st.integers(1, 6), per_rank=st.integers(1, 4), k=st.integers(1, 8), data=st.data(),
)  # fmt: skip
def test_exchanges_never_make_the_heaviest_rank_heavier_nor_touch_a_forced_expert(layers, ranks, per_rank, k, data):
    num_experts = ranks * per_rank
    banks = [f"blocks.{i}.moe.experts" for i in range(layers)]
    rankings = {bank: data.draw(st.permutations(range(num_experts))) for bank in banks}
    selection = {bank: sorted(ranking[: min(k, num_experts)]) for bank, ranking in rankings.items()}
    forced = {bank: set(data.draw(st.lists(st.sampled_from(experts)))) for bank, experts in selection.items()}
    homes = {(bank, e): (e // per_rank,) for bank in banks for e in range(num_experts)}
    found = balanced(selection, forced, rankings, homes)
    before, after = heaviest(selection, homes), heaviest(found, homes)
    assert after <= before
    for bank in banks:
        assert forced[bank] <= set(found[bank])
        assert len(found[bank]) == len(selection[bank])
    mean = sum(map(len, selection.values())) / ranks
    assert after <= 1.05 * mean or not list(exchanges_that_help(found, forced, rankings, homes))


def loads_of(selection, homes) -> Counter:
    return Counter({home: 0 for home in homes.values()}) + Counter(homes[bank, e] for bank, experts in selection.items() for e in experts)


def heaviest(selection, homes) -> int:
    return max(loads_of(selection, homes).values())


def exchanges_that_help(selection, forced, rankings, homes):
    """From the one heaviest rank to one that stays lighter than it was. (Of several heaviest ones, the last is the one to relieve.)"""
    load = loads_of(selection, homes)
    worst = max(load, key=lambda home: (load[home], home))
    for bank, experts in selection.items():
        for heavy in set(experts) - forced[bank]:
            for light in set(rankings[bank]) - set(experts):
                if homes[bank, heavy] == worst and load[homes[bank, light]] + 1 < load[worst]:
                    yield bank, heavy, light


def test_an_exchange_takes_the_next_best_expert_of_a_lighter_rank():
    rankings = {"a": [0, 1, 2, 3], "b": [1, 3, 0, 2]}
    homes = {(bank, e): (e // 2,) for bank in rankings for e in range(4)}
    assert balanced({"a": [0], "b": [1]}, {"a": set(), "b": set()}, rankings, homes) == {"a": [0], "b": [3]}
    assert balanced({"a": [0], "b": [1]}, {"a": set(), "b": {1}}, rankings, homes) == {"a": [2], "b": [1]}
    assert balanced({"a": [0], "b": [1]}, {"a": set(), "b": set()}, rankings, homes, spread=2.0) == {"a": [0], "b": [1]}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_model_without_experts_has_nobody_to_choose(selection):
    turns, dense = Turns(CheckpointConfig(selection=selection), Horizon({}, 100)), homes_of([Holding(None, "master", (0, 1), 100)])
    assert turns.selection(1, Ledger.of_banks({}), homes=dense) == {}


def test_many_experts_on_many_ranks_are_exchanged_until_no_rank_is_heavy():
    banks = [f"blocks.{layer}.moe.experts" for layer in range(12)]
    rankings = {bank: [(expert * 7 + layer) % 64 for expert in range(64)] for layer, bank in enumerate(banks)}
    homes = {(bank, expert): (expert // 2,) for bank in banks for expert in range(64)}
    crowded = {bank: list(range(8)) for bank in banks}
    found = balanced(crowded, {bank: set() for bank in banks}, rankings, homes)
    assert heaviest(crowded, homes) == 24
    assert heaviest(found, homes) == 12 * 8 // 32
    assert all(len(experts) == 8 for experts in found.values())


def test_unsaved_age_prefers_ranks_that_write_little():
    banks = {"a": 4, "b": 4}
    homes = Homes({(bank, e): (e // 2,) for bank in banks for e in range(4)})
    ledger = Ledger.of_banks(banks).count([[9, 8, 7, 6], [8, 9, 6, 7]])
    policy = turns(banks, selection="unsaved_age")
    assert policy.selection(1, ledger) == {"a": [0], "b": [1]}
    assert policy.selection(1, ledger, homes=homes) != policy.selection(1, ledger)


# the number of experts under a budget

fault_run = st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=8, max_size=8), st.integers(0, 3)), min_size=1, max_size=25)


@settings(deadline=None)
@given(run=fault_run, budget=st.sampled_from([0.01, 0.05, 0.2]), faults=st.floats(0.0, 10.0), rule=st.sampled_from(sorted(RULES)))
def test_the_budget_is_never_exceeded_whenever_faults_come(run, budget, faults, rule):
    banks = {"a": 8}
    policy = turns(banks, 4000, plt_budget=budget, selection=rule)
    live = committed = Ledger.of_banks(banks).after(None, "experts")
    for index, (load, what) in enumerate(run, 1):
        live = live.count([load])
        if what == 0:  # a fault before the save: as many as happen, not as many as were expected
            live = committed = committed.restored()
        selection = policy.selection(index, live, faults)
        committed = live.after(selection, "experts")
        live = live.since(committed)
        assert plt_of_moments(committed, 4000) + plt_if_fault(committed, 4000) <= budget + 1e-12


def test_k_rises_when_the_budget_shrinks_and_falls_when_few_faults_remain():
    banks = {"a": 8}
    ledger = Ledger.of_banks(banks).count([[10] * 8])
    counts = [len(turns(banks, 1000, plt_budget=0.06).selection(1, ledger, faults)["a"]) for faults in (1, 2, 6, 50)]
    assert counts == [2, 5, 7, 8]
    spent = ledger.restored().count([[10] * 8])
    assert len(turns(banks, 1000, plt_budget=0.06).selection(1, spent)["a"]) == 8
    assert len(turns(banks, 1000, plt_budget=0.06, experts_per_save=4).selection(1, ledger)["a"]) == 4
    assert len(turns(banks, 1000, experts_per_save=1).selection(1, ledger, 50)["a"]) == 1


def test_figures_are_those_of_the_newest_commit():
    committed = Ledger.of_banks(BANKS).count([[5] * 4] * 2).restored().count([[1] * 4] * 2).after({FIRST: [0], SECOND: [0]}, "moments")
    found = turns(assignments=100).figures(committed, 1)
    assert (found.weights, found.moments, found.if_fault, found.experts_per_save) == (0.2, 0.2, 0.03, 1)


# the interval


@given(cost=st.floats(0.01, 100), mean=st.floats(1000, 1e6))
def test_the_interval_loses_less_than_its_neighbours(cost, mean):
    def lost(interval: float) -> float:
        """Time per useful second (Daly 2006, equation 20, without restart)."""
        return mean * expm1((interval + cost) / mean) / interval

    best = best_interval(cost, mean)
    assert lost(best) <= min(lost(0.8 * best), lost(1.25 * best))
    assert best == pytest.approx(sqrt(2 * cost * mean), rel=0.3)


def test_costs_are_what_steps_take_longer_beside_a_save():
    costs = Costs()
    assert costs.interval(1e4) is None
    for _ in range(3):
        costs = costs.after_step(1.0, is_saving=False)
    costs = costs.after_step(1.3, is_saving=True).after_step(1.2, is_saving=True).after_save(4.0)
    assert costs.save_seconds == pytest.approx(0.5)
    assert costs.interval(1e4) == ceil(best_interval(0.5, 1e4))
    assert costs.interval(10.0) == 4  # no shorter than one save takes


def test_a_save_that_costs_nothing_is_made_as_often_as_it_can_be_persisted():
    costs = Costs().after_step(2.0, False).after_step(1.9, True).after_save(5.0)
    assert (costs.save_seconds, costs.interval(3600.0)) == (0.0, 3)


@pytest.mark.parametrize("first_step_saves", [False, True])
def test_a_slow_first_step_is_forgotten_although_a_save_is_always_under_way(first_step_saves):
    costs = Costs().after_step(30.0, first_step_saves)
    for _ in range(40):
        costs = costs.after_step(1.0, is_saving=True)
    costs = costs.after_save(9.0)
    assert costs.step_seconds == pytest.approx(1.0, rel=0.01)
    assert costs.interval(3600.0) == 9  # no shorter than one save takes


def test_limits_of_ages_count_rounds():
    assert [max_age(16, 1, 2.2), max_age(64, 8, 2.2), max_age(5, 2, 1.0)] == [35, 17, floor(2.5)]


@pytest.mark.parametrize(
    "change",
    [
        {"selection": "random"},
        {"interval": "often"},
        {"mean_hours_between_failures": 0.0},
        {"max_age_rounds": 0.5},
        {"plt_budget": -0.1},
        {"plt_budget": 1.0},
        {"folder": "s3://"},
        {"folder": "s3:/bucket/runs"},
    ],
)
def test_bad_policies_are_named(change):
    (name,) = change
    with pytest.raises(ConfigError, match=f"checkpoint.{name}="):
        CheckpointConfig(**change).check()


def test_an_automatic_interval_needs_a_first_one():
    with pytest.raises(ConfigError, match="every_steps above 0"):
        CheckpointConfig(interval="auto", every_steps=0).check()
