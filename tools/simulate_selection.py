"""What the rules of selection lose per fault and how old experts get, under drifting loads: benchmarks/selection.json.

python -m tools.simulate_selection --json benchmarks/selection.json

Every checkpoint writes K of the N experts of a layer, so all rules write the same bytes. Loads follow a Zipf law over the experts and
drift: now and then two experts change places. A fault may come at any time; what it loses is what the newest checkpoint leaves unsaved,
so the mean over checkpoints of the unsaved assignments is the loss per fault. It is given in units of what one interval routes. The lower
bound is the square-root law for loads that never change: saving expert e at a rate proportional to sqrt(load) loses the least.
The rules are the ones that runs use (`moetrain/checkpoint/select.py`, through `Turns`).
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moetrain.checkpoint.config import SELECTIONS, CheckpointConfig
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.turns import Horizon, Turns

GRID = ((16, 1), (16, 4), (64, 8), (128, 16))
SKEWS = (0.0, 0.5, 1.0)
TOKENS = 100_000  # assignments of one interval
BANK = "layer"


@dataclass(frozen=True)
class Outcome:
    """Of one rule at one N, K and skew. `max_age`: in checkpoints, over the whole simulation."""

    num_experts: int
    experts_per_save: int
    skew: float
    selection: str
    lost_per_fault: float
    max_age: int
    less_than_sequential: float  # share of the loss that the rule avoids
    max_age_rounds: float  # max_age x K / N


def shares(num_experts: int, skew: float) -> np.ndarray:
    """Zipf: the r-th expert gets r^-skew, as shares of 1."""
    weight = np.arange(1, num_experts + 1, dtype=float) ** -skew
    return weight / weight.sum()


def loads(num_experts: int, skew: float, num_saves: int, drift: float, seed: int) -> np.ndarray:
    """Assignments of every expert in every interval, int64 [saves, N]; in each an expert changes places with probability `drift`."""
    random = np.random.default_rng(seed)
    share = random.permutation(shares(num_experts, skew))
    rows = []
    for _ in range(num_saves):
        for expert in np.flatnonzero(random.random(num_experts) < drift):
            other = random.integers(num_experts)
            share[[expert, other]] = share[[other, expert]]
        rows.append(random.multinomial(TOKENS, share))
    return np.array(rows)


def simulate(load: np.ndarray, experts_per_save: int, selection: str) -> tuple[float, int]:
    """Mean unsaved assignments after a checkpoint, in intervals, once three rounds are over; the greatest age ever."""
    num_experts = load.shape[1]
    config = CheckpointConfig(selection=selection, experts_per_save=experts_per_save)
    turns, ledger = Turns(config, Horizon({BANK: num_experts})), Ledger.of_banks({BANK: num_experts})
    start = 3 * num_experts // experts_per_save
    lost, oldest = [], 0
    for index, row in enumerate(load, 1):
        ledger = ledger.count([row.tolist()])
        ledger = ledger.after(turns.selection(index, ledger), "experts")
        oldest = max(oldest, *ledger.age[BANK])
        if index > start:
            lost.append(sum(ledger.unsaved()[BANK]))
    return float(np.mean(lost)) / TOKENS, oldest


def lower_bound(num_experts: int, experts_per_save: int, skew: float) -> float:
    """Intervals lost per fault by the best schedule of constant loads: expert e at intervals T_e >= 1 with sum 1/T_e = K loses
    load_e (T_e - 1) / 2, least for T_e proportional to 1 / sqrt(load_e)."""
    share = shares(num_experts, skew)
    low, high = 0.0, float(num_experts**2)
    for _ in range(100):  # the multiplier with which rates, at most 1, add up to K
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * np.sqrt(share)).sum() < experts_per_save else (low, middle)
    interval = 1 / np.minimum(1, high * np.sqrt(share))
    return float((share * (interval - 1) / 2).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description="Loss per fault and greatest age of the rules of selection.")
    parser.add_argument("--saves", type=int, default=600, help="checkpoints per simulation")
    parser.add_argument("--drift", type=float, default=0.002, help="probability that an expert changes places within an interval")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    outcomes, bounds = [], []
    for num_experts, count in GRID:
        for skew in SKEWS:
            load = loads(num_experts, skew, options.saves, options.drift, options.seed)
            found = {rule: simulate(load, count, rule) for rule in SELECTIONS}
            base = found["sequential"][0]
            bound = lower_bound(num_experts, count, skew)
            bounds.append({"num_experts": num_experts, "experts_per_save": count, "skew": skew, "lost_per_fault": bound})
            for rule, (lost, age) in found.items():
                outcomes.append(Outcome(num_experts, count, skew, rule, lost, age, 1 - lost / base, age * count / num_experts))
                print(
                    f"N {num_experts:3d} K {count:2d} Zipf {skew}: {rule:11s} {lost:6.3f} lost, {1 - lost / base:6.1%} less, age {age:3d}"
                )
            print(f"{'':20s} lower bound {bound:6.3f}", flush=True)
    if options.json:
        settings = f"--saves {options.saves} --drift {options.drift} --seed {options.seed}"
        command = f"python -m tools.simulate_selection {settings} --json {options.json}"
        figures = {"unit": "assignments of one interval", "outcomes": [asdict(one) for one in outcomes], "lower_bounds": bounds}
        record = {"command": command, **figures}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
