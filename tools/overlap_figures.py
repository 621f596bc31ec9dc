"""What the laps of tools/bench_overlap.py say: ratios round by round, how much of the exchange was hidden, and how much could have been.

`found`: what every rank found: {"laps": {run: {part: [seconds of every round]}}, "window": {model: {part: seconds}}, ...}. The unit lasts
as long as its slower rank. An exchange can be hidden under the window: the main stream's computations and, in c token chunks, the share
(c - 1) / c of the experts' own. What the transport itself takes of the CPU cannot be won, so bounds and ceilings leave it out.

Exchanges take the shorter of two times: back to back, and what the serial arm takes beyond the null one. A link that may send a burst after
a pause carries them faster between computations than back to back, and a bound by the longer time would be too easy to reach.
"""

import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from tools.checkpoint_figures import with_interval
from tools.overlap_cases import EXCHANGE, NULL, OVERLAPPED, REST, SCMOE, SERIAL, SHARED, TOP_1, TOP_2, Run

NOISE = 0.03
PARTS = ("forward", "backward")
CHUNKING = "the best in chunks against the best without"
Figure = dict[str, float]


def series(found: list[dict], run: str, parts: Sequence[str] = PARTS, suffix: str = "") -> list[float]:
    """Seconds of every round, the slower rank's; both parts together unless one is named."""
    of_ranks = [np.sum([rank["laps"][run][part + suffix] for part in parts], axis=0) for rank in found]
    return np.max(of_ranks, axis=0).tolist()


def middle(found: list[dict], run: str, parts: Sequence[str] = PARTS) -> float:
    return statistics.median(series(found, run, parts))


def ratio(found: list[dict], slow: str, fast: str) -> Figure:
    """How many times as fast `fast` is, round by round: the median and its 95 % interval."""
    return with_interval([a / b for a, b in zip(series(found, slow), series(found, fast), strict=True)])


def ratio_of_best(found: list[dict], slow: Sequence[str], fast: Sequence[str]) -> Figure:
    """As `ratio`, of the best run of each."""
    return best_over_best(*({name: series(found, name) for name in names} for names in (slow, fast)))


def best_over_best(slow: dict[str, list[float]], fast: dict[str, list[float]]) -> Figure:
    """Seconds of the best of the one over those of the best of the other, round by round. The best are found in half of the rounds and
    timed in the other half, both ways round: the fastest of many medians of the same rounds would be faster than itself.
    """
    ratios = []
    for half in (0, 1):
        chosen = [min(its, key=lambda name: statistics.median(its[name][half::2])) for its in (slow, fast)]
        pairs = zip(slow[chosen[0]][1 - half :: 2], fast[chosen[1]][1 - half :: 2], strict=True)
        ratios += [a / b for a, b in pairs]
    return with_interval(ratios)


def estimate(numerator: list[float], denominator: list[float]) -> Figure:
    """Median over median, with the 95 % interval that resampling whole rounds gives."""
    generator = np.random.default_rng(0)
    rounds = generator.integers(0, len(numerator), (2000, len(numerator)))
    above, below = np.median(np.array(numerator)[rounds], axis=1), np.median(np.array(denominator)[rounds], axis=1)
    low, high = np.percentile(above / below, [2.5, 97.5])
    return {"median": statistics.median(numerator) / statistics.median(denominator), "low": float(low), "high": float(high)}


def over(figure: Figure, bound: float) -> Figure:
    return {key: value / bound if bound else 0.0 for key, value in figure.items()}


def differences(first: list[float], second: list[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def runs_of(found: list[dict], model: str, arm: str) -> list[str]:
    """The names of this model's runs in this arm."""
    return [name for name in found[0]["laps"] if name.startswith(f"{model} {arm}") and not name.endswith("again")]


def best(found: list[dict], model: str, arm: str = OVERLAPPED) -> str:
    """The fastest of them."""
    return min(runs_of(found, model, arm), key=lambda name: middle(found, name))


def bests(found: list[dict], model: str) -> list[str]:
    """The fastest overlapped run, and the fastest of those in one chunk."""
    plain = [name for name in runs_of(found, model, OVERLAPPED) if "+" not in name]
    return list(dict.fromkeys([best(found, model), min(plain, key=lambda name: middle(found, name))]))


def tax(found: list[dict], overlapped: str, null: str, parts: Sequence[str] = PARTS) -> float:
    """CPU seconds of the transport in one lap: what the overlapped arm takes beyond the null one."""
    cpu = (series(found, run, parts, "_cpu") for run in (overlapped, null))
    return max(0.0, statistics.median(differences(*cpu)))


def window(found: list[dict], model: str, run: str, part: str) -> float:
    """Seconds that the exchanges of this run may hide under, the slower rank's."""
    chunks = 1 + run.count("+")
    return max(its["main"] + its["experts"] * (chunks - 1) / chunks for its in (rank["window"][model][part] for rank in found))


def in_one_slot(found: list[dict], model: str, run: str, part: str, comm: float) -> float:
    """Seconds that a run in one chunk can hide: the way to the experts, half of `comm`, under the computations before its slot, the way
    back under those behind it. Where the two sides differ, that is less than the whole window.
    """
    slot = int(run.rpartition(" ")[2])
    windows = [rank["window"][model][part] for rank in found]
    numbers = range(1, 1 + sum(key.startswith("main ") for key in windows[0]))
    sides = [[number for number in numbers if (number < slot) is before] for before in (True, False)]
    return sum(min(comm / 2, max(sum(its[f"main {number}"] for number in side) for its in windows)) for side in sides)


def hiding(found: list[dict], model: str, overlapped: str, exchange: str) -> dict[str, dict]:
    """By part: what this run hid, what it could, and how near the one comes to the other. `exchange`: the run that is exchange only."""
    serial, null = runs_of(found, model, SERIAL)[0], runs_of(found, model, NULL)[0]
    figures = dict[str, dict]()
    for part in PARTS:
        times = {run: series(found, run, [part]) for run in (serial, null, overlapped)}
        paid = differences(times[serial], times[null])
        hidden = estimate(differences(times[serial], times[overlapped]), paid)
        alone, room = middle(found, exchange, [part]), window(found, model, overlapped, part)
        comm = max(0.0, min(alone, statistics.median(paid)))
        cost = tax(found, overlapped, null, [part])
        bound = max(0.0, min(room, comm) - cost) / comm if comm else 0.0
        figures[part] = {
            "comm": comm, "alone": alone, "window": room, "tax": cost, "fits": comm <= room, "hidden": hidden, "bound": bound,
            "exposed": statistics.median(differences(times[overlapped], times[null])),
            "efficiency": over(hidden, bound),
        }  # fmt: skip
        if "+" not in overlapped:
            slot = max(0.0, in_one_slot(found, model, overlapped, part, comm) - cost) / comm if comm else 0.0
            figures[part]["one_slot"] = {"bound": slot, "efficiency": over(hidden, slot)}
    return figures


def ceiling(found: list[dict], model: str, hidden: dict) -> float:
    """Seconds of the unit were everything hidden that can be, and the transport's CPU paid."""
    exposed = sum(max(0.0, hidden[part]["comm"] - hidden[part]["window"]) + hidden[part]["tax"] for part in PARTS)
    return middle(found, runs_of(found, model, NULL)[0]) + exposed


def share(found: list[dict]) -> float:
    """Exchanges over top-2's MoE time, serial: all but attention and dense MLPs."""
    return middle(found, Run(TOP_2, EXCHANGE).name) / (middle(found, Run(TOP_2, SERIAL).name) - middle(found, Run(TOP_2, REST).name))


def over_window(found: list[dict]) -> float:
    """ScMoE's exchanges over the window of one chunk."""
    null = Run(SCMOE, NULL, (3,)).name
    return middle(found, Run(SCMOE, EXCHANGE).name) / sum(window(found, SCMOE, null, part) for part in PARTS)


def opponents(found: list[dict]) -> dict[str, dict]:
    """Every figure of the group `opponents`."""
    mine, serial = best(found, SCMOE), Run(TOP_2, SERIAL).name
    others = {
        "top-2 serial": [serial],
        "top-2 in chunks, the best": runs_of(found, TOP_2, OVERLAPPED),
        "top-1 serial": [Run(TOP_1, SERIAL).name],
        "shared expert, serial": runs_of(found, SHARED, SERIAL),
        "shared expert, overlapped, the best": runs_of(found, SHARED, OVERLAPPED),
    }
    others = {name: runs for name, runs in others.items() if runs}
    ratios = {"A/A": ratio(found, Run(TOP_2, SERIAL, again=True).name, serial)}
    ratios |= {name: ratio_of_best(found, runs, runs_of(found, SCMOE, OVERLAPPED)) for name, runs in others.items()}
    exchange = Run(SCMOE, EXCHANGE).name
    hidden = {run: hiding(found, model, run, exchange) for model in (SCMOE, SHARED) for run in bests(found, model)}
    lowest = ceiling(found, SCMOE, hidden[mine])
    ceilings = {name: min(middle(found, run) for run in runs) / lowest for name, runs in others.items()}
    reached = ratios["top-2 serial"]
    return {
        "share": {"median": share(found)}, "best": {model: best(found, model) for model in (SHARED, SCMOE)}, "ratios": ratios,
        "ceilings": ceilings, "of_ceiling": {key: value / ceilings["top-2 serial"] for key, value in reached.items()}, "hiding": hidden,
    }  # fmt: skip


def peers(found: list[dict], deepspeed: str, stock: str) -> dict[str, object]:
    """Ours against DeepSpeed's layer, and what the transport alone gives each."""
    mine = runs_of(found, SCMOE, OVERLAPPED)
    pairs = {
        "DeepSpeed, our transport": (deepspeed, mine),
        "DeepSpeed, its transport": (stock, mine),
        "DeepSpeed, our transport, against our top-2": (deepspeed, [Run(TOP_2, SERIAL).name]),
    }
    ratios = {name: ratio_of_best(found, [slow], fast) for name, (slow, fast) in pairs.items() if slow in found[0]["laps"]}
    return {"best": best(found, SCMOE), "ratios": ratios}


def positions(found: list[dict], models: Sequence[str]) -> dict[str, object]:
    serial = Run(TOP_2, SERIAL).name
    bests = {model: ratio_of_best(found, [serial], runs_of(found, model, OVERLAPPED)) for model in models}
    return {"ratios": {f"{model} against top-2 serial": its for model, its in bests.items()}}


def alone(found: list[dict]) -> dict[str, object]:
    """What ScMoE hides: its best schedule, and its best in one chunk."""
    exchange = Run(SCMOE, EXCHANGE).name
    return {"ratios": {}, "hiding": {run: hiding(found, SCMOE, run, exchange) for run in bests(found, SCMOE)}}


def schedules(found: list[dict]) -> dict[str, object]:
    """All schedules of ScMoE against the best without chunks; how long the exchanges are beside the window of one chunk."""
    names = runs_of(found, SCMOE, OVERLAPPED)
    unchunked = [name for name in names if "+" not in name]
    plain = min(unchunked, key=lambda name: middle(found, name))
    order = sorted(names, key=lambda name: middle(found, name))
    ratios = {CHUNKING: ratio_of_best(found, unchunked, [name for name in names if "+" in name])}
    ratios |= {f"{name} against {plain}": ratio(found, plain, name) for name in order}
    return {"best": order[0], "best_unchunked": plain, "ratios": ratios, "comm_over_window": over_window(found)}


def lines(found: list[dict], figures: dict) -> Iterator[str]:
    """The table: all runs, then what follows from them."""
    yield f"{'':34} {'ms':>8} {'low':>8} {'high':>8} {'forward':>8} {'backward':>8}"
    for name in found[0]["laps"]:
        whole = with_interval(series(found, name))
        parts = " ".join(f"{1e3 * middle(found, name, [part]):8.1f}" for part in PARTS)
        yield f"{name:34} " + " ".join(f"{1e3 * whole[key]:8.1f}" for key in ("median", "low", "high")) + f" {parts}"
    if "share" in figures:
        achieved = f"; achieved of the ceiling {interval(figures['of_ceiling'])}" if "of_ceiling" in figures else ""
        yield f"exchange share of top-2's MoE time {figures['share']['median']:.0%}{achieved}"
    if "comm_over_window" in figures:
        yield f"the exchanges take {figures['comm_over_window']:.2f} times the window of one chunk"
    for name, figure in figures["ratios"].items():
        limit = f", ceiling {figures['ceilings'][name]:.2f}" if name in figures.get("ceilings", {}) else ""
        yield f"{name:60} {interval(figure)}{limit}"
    if "A/A" in figures["ratios"] and not is_quiet(figures["ratios"]["A/A"]):
        yield f"A/A is off by more than {NOISE:.0%}: the machine was not quiet, quote nothing of this"
    for run, parts in figures.get("hiding", {}).items():
        for part, one in parts.items():
            times = ", ".join(f"{key} {1e3 * one[key]:.1f} ms" for key in ("comm", "window", "tax", "exposed"))
            yield f"{run} {part}: {times}, hidden {interval(one['hidden'])} of at most {one['bound']:.2f}: {interval(one['efficiency'])}"
            if "one_slot" in one:
                yield f"    in one slot at most {one['one_slot']['bound']:.2f}: {interval(one['one_slot']['efficiency'])}"


def is_quiet(same: Figure) -> bool:
    """Whether a run beside itself differs by no more than NOISE."""
    return abs(same["median"] - 1) <= NOISE


def interval(figure: Figure) -> str:
    return f"{figure['median']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
