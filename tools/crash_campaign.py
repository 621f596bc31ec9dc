"""Tries to lose a checkpoint: power failures, damage, kills and garbage collection, very many times, and the same on other formats.

    python -m tools.crash_campaign --json benchmarks/crash_campaign.json                   all parts, the full campaign
    python -m tools.crash_campaign --parts states damage --scale 0.01                      a hundredth of two parts

Parts: states (power failures simulated by a file system in memory), damage (files changed on purpose), sweeps (schedules of saves, pins,
prunes and crashes), kills, pairs and agents (SIGKILL of one process, of two ranks, of a trainer and its agent), peers (kills and damage
of torch.save, DCP and safetensors).
Every bound is the upper end of the 95 % interval when nothing was seen in n trials: 3 / n. Exit status 1 when anything of ours was lost.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from random import Random
from unittest import mock

from moetrain.base.errors import CheckpointError
from moetrain.store import encode
from tests.unit import crash_damage, crash_states, crash_sweeps
from tests.unit.checkpoint_crash import kill_agents, kill_at_every_hook, kill_at_random_times, kill_pairs

FULL = {"states": 100_000, "damage": 10_500, "sweeps": 100_000, "kills": 1_000, "pairs": 320, "agents": 300, "peers": 210}
Report = dict[str, object]
Say = Callable[[str], None]


def bound(failures: int, trials: int) -> str:
    """The upper end of the 95 % interval of the chance of a failure; only told when there was none (rule of three)."""
    return f"{300 / trials:.3g} %" if failures == 0 else f"none: {failures} failures beside {trials} good trials"


def states(amount: int, seed: int, say: Say) -> Report:
    tally = crash_states.Tally()
    for batch, goal in batches(amount, 5_000):
        part = crash_states.simulate(goal, seed + batch, crash_states.Tally())
        tally.traces, tally.events = tally.traces + part.traces, tally.events + part.events
        tally.drawn, tally.distinct, tally.went_on = tally.drawn + part.drawn, tally.distinct + part.distinct, tally.went_on + part.went_on
        tally.recovered = {key: tally.recovered[key] + part.recovered[key] for key in tally.recovered}
        tally.failures += part.failures
        say(f"{tally.distinct} of {amount} crash states, {len(tally.failures)} failures")
    return {**asdict(tally), "upper_bound_95": bound(len(tally.failures), tally.distinct)}


def damage(amount: int, seed: int, say: Say) -> Report:
    counts: dict[str, Counter[tuple[str, str]]] = {"injected": Counter(), "noticed": Counter(), "right_fallback": Counter()}
    failures: list[str] = []
    for batch, goal in batches(amount, 700):
        with mock.patch.object(encode, "CHUNK_BYTES", 4096):  # several chunks in objects that are small enough for ten thousand trials
            part = crash_damage.simulate(goal, seed + batch)
        for total, found in zip(counts.values(), (part.injected, part.noticed, part.right), strict=True):
            total.update(found)
        failures += part.failures
        say(f"{counts['injected'].total()} of {amount} damages, {len(failures)} failures")
    rows = [
        {"kind": kind, "place": place} | {name: count[kind, place] for name, count in counts.items()}
        for kind in crash_damage.KINDS
        for place in crash_damage.PLACES
    ]
    totals = {name: count.total() for name, count in counts.items()}
    return {**totals, "upper_bound_95": bound(len(failures), totals["injected"]), "failures": failures, "table": rows}


def sweeps(amount: int, seed: int, say: Say) -> Report:
    tally = crash_sweeps.Tally()
    for batch, goal in batches(amount, 5_000):
        crash_sweeps.simulate(goal, seed + batch, tally)
        say(f"{tally.schedules} of {amount} schedules, {len(tally.failures)} failures")
    counts = {"schedules": tally.schedules, "steps": dict(tally.steps), "crashes": dict(tally.crashes), "failures": tally.failures}
    return {**counts, "upper_bound_95": bound(len(tally.failures), tally.schedules)}


def kills(amount: int, seed: int, say: Say) -> Report:
    """Half of them at every numbered operation in turn, the others at random times."""
    failures, at_hooks, at_times = list[str](), list[int](), list[int]()
    for first in (3 + number % 6 for number in count()):  # another choice of experts
        if len(at_hooks) + len(failures) >= amount / 2:
            break
        with scratch() as folder, counted(failures):
            found = kill_at_every_hook(folder / "hooks", first)
            assert found["steps"] == sorted(found["steps"]) and set(found["steps"]) <= {first, first + 1}, f"{found['steps']} came back"
            at_hooks += [step - first for step in found["steps"]]
        say(f"{len(at_hooks)} kills at numbered operations, {len(failures)} failures")
    for batch, goal in batches(amount - amount // 2, 100):
        with scratch() as folder, counted(failures):
            found = kill_at_random_times(folder / "times", goal, Random(seed + batch))
            assert set(found) <= {0, 1}, f"{found} came back"
            at_times += found
        say(f"{len(at_times)} kills at random times, {len(failures)} failures")
    came = {"at_numbered_operations": len(at_hooks), "at_random_times": len(at_times), "recovered_new": sum(at_hooks) + sum(at_times)}
    return {"kills": len(at_hooks) + len(at_times), **came} | verdict(failures, len(at_hooks) + len(at_times))


def pairs(amount: int, seed: int, say: Say) -> Report:
    total, failures = Counter[str](), list[str]()
    for batch, goal in batches(amount, 40):
        with scratch() as folder, counted(failures):
            total.update(kill_pairs(folder, goal, Random(seed + batch)))
        say(f"{total['one'] + total['both']} of {amount} two-rank saves killed, {len(failures)} failures")
    runs = total["one"] + total["both"]
    return {"kills": runs, **total} | verdict(failures, runs)


def agents(amount: int, seed: int, say: Say) -> Report:
    total, failures = Counter[str](), list[str]()
    for batch, goal in batches(amount, 30):
        with scratch() as folder, counted(failures):
            total.update(kill_agents(folder / "checkpoint", goal, Random(seed + batch)))
        say(f"{total['last'] + total['newer']} of {amount} trainers and agents killed, {len(failures)} failures")
    runs = total["last"] + total["newer"]
    return {"kills": runs, **total} | verdict(failures, runs)


@contextmanager
def counted(failures: list[str]) -> Iterator[None]:
    """A batch in which something is lost or wrong ends there: that is one failure, and its kills are not counted."""
    try:
        yield
    except (AssertionError, CheckpointError) as error:
        failures.append(str(error) or traceback.format_exc(limit=-1))


def verdict(failures: list[str], trials: int) -> Report:
    return {"lost_or_wrong": len(failures), "failures": failures, "upper_bound_95": bound(len(failures), trials)}


def peers(amount: int, seed: int, say: Say) -> Report:
    from tools.crash_peers import campaign

    with scratch() as folder:
        return campaign(folder, amount, seed, say)


def batches(amount: int, size: int) -> list[tuple[int, int]]:
    """(number, size) of parts that add up."""
    return [(number, min(size, amount - start)) for number, start in enumerate(range(0, amount, size))]


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory: a kill loses no written page, so the disk adds nothing but time."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="crash-", dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


PARTS = {function.__name__: function for function in (states, damage, sweeps, kills, pairs, agents, peers)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="how much of the full campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the figures; parts that are not run keep theirs")
    chosen = parser.parse_args(arguments)
    if not __debug__:
        parser.error("run it without -O: its checks are assertions")
    report: Report = json.loads(chosen.json.read_text()) if chosen.json and chosen.json.exists() else {}
    for name in chosen.parts:
        amount = max(1, round(FULL[name] * chosen.scale))
        started = time.monotonic()

        def say(text: str, name: str = name, started: float = started) -> None:
            print(f"{name}: {text} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)

        found = PARTS[name](amount, chosen.seed, say)
        about = {"seed": chosen.seed, "seconds": round(time.monotonic() - started), "python": platform.python_version()}
        report[name] = {"command": f"python -m tools.crash_campaign --parts {name} --scale {chosen.scale:g}"} | about | found
        if chosen.json:
            chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 1 if any(isinstance(part, dict) and part.get("failures") for part in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
