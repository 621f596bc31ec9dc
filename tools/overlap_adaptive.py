"""The planner's schedule beside the best of all schedules, and a link that changes its rate under a run.

Both use the planner as the engine does: a step is a lap of a unit, every decision comes from steps that the planner measured itself.
"""

import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from moetrain.model.context import Timer
from moetrain.model.schedule import Schedule
from moetrain.parallel.config import OverlapConfig
from moetrain.parallel.observer import StepObserver
from moetrain.parallel.planner import MOST_STEPS, WARM_UP, OverlapPlanner, numbers_of_chunks
from moetrain.parallel.trial import num_steps
from tools.overlap_arms import Arms
from tools.overlap_cases import OVERLAPPED, SCMOE, SHARED, SMALL, Size, num_operators
from tools.overlap_figures import best_over_best
from tools.overlap_unit import Lap, Unit

CONFIG = OverlapConfig(slot=0, chunks=0)
PLAN_STEPS = WARM_UP + MOST_STEPS + num_steps(len(numbers_of_chunks(CONFIG)))  # a measurement, and a trial of every candidate
CASES = (
    (SCMOE, Size(ffn=352)),
    (SCMOE, Size()),
    (SCMOE, Size(ffn=2048)),
    ("ScMoE Pos-1", Size()),
    ("ScMoE Pos-3", Size(ffn=704)),
    (SHARED, Size()),
)
SMALL_CASES = ((SCMOE, SMALL), (SHARED, SMALL))
HEAT_ROUNDS, FINALISTS = 2, 6  # rounds of all schedules, and how many of the fastest go on, beside the chosen one
BEFORE, AFTER = 25, 40  # steps around the change of rate


class Stepper:
    """Laps of one unit under the planner."""

    def __init__(self, model: str, size: Size, arms: Arms, evenly: bool) -> None:
        self.arms, self.unit = arms, Unit(model, size, arms.axis)
        with arms.use(OVERLAPPED):
            self.unit.decide(evenly, arms.axis.index)
        self.ran = self.slots  # in the last step; afterwards the planner may have chosen others
        self.planner = OverlapPlanner(CONFIG, self.unit.routed, arms.axis.world)
        self._observer = StepObserver(self.planner, arms.axis)

    def step(self) -> float:
        """Seconds, of the slower rank. The observer sees the passes alone, as in the engine, not what prepares them."""
        axis, timers = self.arms.axis, list[Timer]()
        with self.arms.use(OVERLAPPED), ExitStack() as passes:

            def start() -> None:
                self.arms.barrier()
                timers.append(passes.enter_context(self._observer.step()))

            lap = self.unit.lap(axis.index, start, timer=lambda name, operator, *inputs: timers[0](name, operator, *inputs))
        self.ran = self.slots
        waited, seconds = axis.sum_(torch.tensor([self._observer.waited_seconds(), lap.seconds], dtype=torch.float64)).tolist()
        self._observer.finish(waited / seconds)
        return self.slower(lap)

    def with_schedule(self, slots: tuple[int, ...]) -> float:
        self.unit.schedule(slots)
        with self.arms.use(OVERLAPPED):
            return self.slower(self.unit.lap(self.arms.axis.index, self.arms.barrier))

    def slower(self, lap: Lap) -> float:
        axis = self.arms.axis
        seconds = torch.zeros(axis.size, dtype=torch.float64)
        seconds[axis.index] = lap.seconds
        return float(axis.sum_(seconds).max())

    @property
    def slots(self) -> tuple[int, ...]:
        return self.unit.routed[0].schedule.slots


def every(model: str) -> list[tuple[int, ...]]:
    """All schedules in as many chunks as the planner may choose, and in fewer."""
    return [schedule.slots for chunks in range(1, CONFIG.max_chunks + 1) for schedule in Schedule.every(num_operators(model), chunks)]


def adaptive(arms: Arms, rounds: int, evenly: bool, small: bool) -> dict[str, object]:
    """Of every case: what the planner chose, seconds of every schedule in a few rounds, and of the fast ones in `rounds` further ones."""
    found = []
    for model, size in SMALL_CASES if small else CASES:
        stepper = Stepper(model, size, arms, evenly)
        for _ in range(PLAN_STEPS):
            stepper.step()
        chosen = stepper.slots
        found.append({"model": model, "size": asdict(size), "chosen": name(chosen)} | raced(stepper, every(model), [chosen], rounds))
    return {"cases": found}


def raced(
    stepper: Stepper, schedules: list[tuple[int, ...]], known: list[tuple[int, ...]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of all schedules in a few rounds (`heats`), and of `known` and the fastest others in `rounds` further ones."""
    heats = interleaved(stepper, schedules, HEAT_ROUNDS)
    fastest = sorted(heats, key=lambda slots: statistics.median(heats[slots]))[:FINALISTS]
    final = interleaved(stepper, list(dict.fromkeys(known + fastest)), rounds)
    named = [{name(slots): its for slots, its in seconds.items()} for seconds in (heats, final)]
    return {"heats": named[0], "seconds": named[1]}


def interleaved(stepper: Stepper, schedules: list[tuple[int, ...]], rounds: int) -> dict[tuple[int, ...], list[float]]:
    """Seconds of every schedule, one lap of each a round, in rotating order."""
    seconds: dict[tuple[int, ...], list[float]] = {slots: [] for slots in schedules}
    for number in range(rounds):
        start = number % len(schedules)
        for slots in schedules[start:] + schedules[:start]:
            seconds[slots].append(stepper.with_schedule(slots))
    return seconds


def name(slots: tuple[int, ...]) -> str:
    return "+".join(map(str, slots))


def regret(case: dict) -> dict[str, float]:
    """Seconds of the chosen schedule over those of the best."""
    return best_over_best({case["chosen"]: case["seconds"][case["chosen"]]}, case["seconds"])


def adaptive_summary(found: list[dict]) -> dict[str, object]:
    rows = {}
    for case in found[0]["cases"]:
        size = case["size"]
        best = min(case["seconds"], key=lambda slots: statistics.median(case["seconds"][slots]))
        heats = [statistics.median(its) for its in case["heats"].values()]
        rows[f"{case['model']}, width {size['hidden']}, FFN {size['ffn']}"] = {
            "chosen": case["chosen"], "best": best, "regret": regret(case),
            "worst_over_best": max(heats) / min(heats), "rounds": len(case["seconds"][best]),
        }  # fmt: skip
    return {"cases": rows}


def change(arms: Arms, rounds: int, evenly: bool, size: Size, folder: Path) -> dict:
    """Steps before and after the link's rate changes, with the schedule of each; then what the fastest schedules take at the new rate.

    Asks for the change by a file; tools/bench_overlap.py makes it and removes the file.
    """
    stepper = Stepper(SCMOE, size, arms, evenly)
    steps = [_noted(stepper) for _ in range(BEFORE)]
    request = folder / "change"
    if arms.axis.index == 0:
        request.touch()
        while request.exists():
            time.sleep(0.01)
    arms.barrier()
    steps += [_noted(stepper) for _ in range(AFTER)]
    known = [tuple(map(int, steps[number]["slots"].split("+"))) for number in (BEFORE - 1, -1)]
    return {"before": BEFORE, "steps": steps} | raced(stepper, every(SCMOE), known, rounds)


def _noted(stepper: Stepper) -> dict:
    seconds = stepper.step()
    return {"slots": name(stepper.ran), "seconds": seconds}


def change_summary(found: list[dict]) -> dict[str, object]:
    """After how many steps the last schedule was there for good, and how it compares with the best at the new rate."""
    steps, before, seconds = found[0]["steps"], found[0]["before"], found[0]["seconds"]
    final = steps[-1]["slots"]
    last_other = max((number for number, step in enumerate(steps) if step["slots"] != final), default=before - 1)
    best = min(seconds, key=lambda slots: statistics.median(seconds[slots]))
    return {
        "before": steps[before - 1]["slots"], "after": final, "best": best, "steps_to_recover": max(0, last_other + 1 - before),
        "over_best": statistics.median(seconds[final]) / statistics.median(seconds[best]),
        "old_over_best": statistics.median(seconds[steps[before - 1]["slots"]]) / statistics.median(seconds[best]),
    }  # fmt: skip
