"""One rank of tools/bench_overlap.py: checks what it is about to time, times it, and writes down what it found.

python -m tools.overlap_rank JOB.json RANK      (both started by tools/bench_overlap.py, each on a host of its own)
"""

import gc
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from moetrain.base.memory import keep_freed_memory
from moetrain.dist.mesh import Mesh
from moetrain.dist.transport import Null
from moetrain.dist.world import World
from tools.gpu_null import compared
from tools.gpu_unit import REFERENCE
from tools.overlap_adaptive import adaptive, change
from tools.overlap_arms import Added, Arms, Shipment, counted
from tools.overlap_cases import DEEPSPEED, EXCHANGE, GROUPS, MODELS, NULL, OVERLAPPED, SERIAL, SMALL, Run, Size
from tools.overlap_deepspeed import DeepSpeedUnit, difference
from tools.overlap_step import steps
from tools.overlap_transport import transport
from tools.overlap_unit import Lap, Unit, reference_error
from tools.overlap_window import Stopwatch

ERROR = 2e-5  # relative to float64: float32 rounding through two blocks
WORLD = 2
NULL_SECONDS = 300.0  # of the part `null` at most


@dataclass
class Job:
    """What a rank is to do. `part`: a group of runs, or one of PARTS."""

    part: str
    folder: str
    rounds: int
    evenly: bool
    size: Size
    small: bool  # a test
    accumulation: int = 1  # micro-batches of a whole step

    @classmethod
    def read(cls, path: Path) -> "Job":
        values = json.loads(path.read_text())
        return cls(**values | {"size": Size(**values["size"])})


class Laps:
    """The units of one group of runs, on one rank."""

    def __init__(self, job: Job, arms: Arms, runs: list[Run]) -> None:
        self.job, self.arms, self.runs = job, arms, runs
        self.rank = arms.axis.index
        self.units = {model: self._unit(model) for model in dict.fromkeys(run.model for run in runs)}
        self._shipments = dict[str, tuple[list[Shipment], list[Shipment]]]()

    def _unit(self, model: str) -> Unit:
        if model == DEEPSPEED:
            return DeepSpeedUnit(self.job.size, self.arms.axis, self.job.evenly)
        unit = Unit(model, self.job.size, self.arms.axis)
        with self.arms.use(OVERLAPPED):
            unit.decide(self.job.evenly, self.rank)
        return unit

    def lap(self, run: Run) -> Lap:
        if run.arm == EXCHANGE:
            return self.arms.exchange_only(*self.shipments(run.model))
        unit = self.units[run.model]
        if isinstance(unit, DeepSpeedUnit):
            with self.arms.use(run.arm), unit.carried_by(run.arm):
                return unit.lap(self.rank, self.arms.barrier)
        unit.schedule(run.slots)
        with self.arms.use(run.arm):
            return unit.lap(self.rank, self.arms.barrier, run.arm)

    def shipments(self, model: str) -> tuple[list[Shipment], list[Shipment]]:
        if model not in self._shipments:
            self.units[model].schedule((1,))
            self._shipments[model] = self.arms.shipments(self.units[model])
        return self._shipments[model]

    def check(self) -> dict[str, object]:
        """Raises RuntimeError when a unit computes something else than it should, or two schedules do not agree to the bit."""
        axis, errors, digests = self.arms.axis, dict[str, float](), dict[str, dict[str, str]]()
        for run in self.runs:
            if run.model in MODELS and run.arm in (SERIAL, OVERLAPPED):
                with self.arms.use(run.arm):
                    errors[run.name] = reference_error(run.model, self.job.size, axis, self.job.evenly, run.slots)
                self.lap(run)
                digests.setdefault(f"{run.model}, chunks {len(run.slots)}", {})[run.name] = digest(self.units[run.model])
        if DEEPSPEED in self.units:
            for run in self.runs:
                if run.model == DEEPSPEED or run == Run("top-2", SERIAL):
                    self.lap(run)
            unit = self.units[DEEPSPEED]
            assert isinstance(unit, DeepSpeedUnit)
            errors[DEEPSPEED] = difference(unit, self.units["top-2"], self.rank)
        wrong = {name: error for name, error in errors.items() if not error < ERROR}
        apart = [names for names in digests.values() if len(set(names.values())) > 1]
        if wrong or apart:
            raise RuntimeError(f"rank {self.rank}: off by {wrong}; gradients that should be equal to the bit: {apart}")
        return {"errors": errors, "equal": {key: list(names) for key, names in digests.items()}}

    def rounds(self) -> dict[str, dict[str, list[float]]]:
        """Interleaved: every round all runs, each time beginning with the next one. The first round is not counted."""
        laps: dict[str, list[Lap]] = {run.name: [] for run in self.runs}
        for number in range(self.job.rounds + 1):
            start = number % len(self.runs)
            for run in self.runs[start:] + self.runs[:start]:
                lap = self.lap(run)
                if number:
                    laps[run.name].append(lap)
        return {name: {part: [asdict(lap)[part] for lap in its] for part in asdict(its[0])} for name, its in laps.items()}

    def windows(self) -> dict[str, dict[str, dict[str, float]]]:
        """By model and pass: seconds of the computations that exchanges may hide under, and of the experts; no exchange beside them."""
        found = {}
        for run in (run for run in self.runs if run.arm == NULL):
            unit, laps = self.units[run.model], []
            unit.schedule(run.slots)
            for _ in range(5):
                watch = Stopwatch()
                with self.arms.use(NULL):
                    unit.lap(self.rank, self.arms.barrier, timer=watch)
                laps.append(watch.window(unit.window_names()))
            found[run.model] = {
                part: {kind: statistics.median(lap[part][kind] for lap in laps) for kind in its} for part, its in laps[0].items()
            }
        return found

    def null_overhead(self) -> dict[str, float]:
        """By model: what the code around exchanges takes of a lap without any, its copies included."""
        found = {}
        for run in (run for run in self.runs if run.arm == NULL):
            unit, shares = self.units[run.model], []
            unit.schedule(run.slots)
            for _ in range(5):
                added = Added()
                with self.arms.carrying(Null()), added.counting():
                    seconds = unit.lap(self.rank, self.arms.barrier).seconds
                shares.append(added.seconds / seconds)
            found[run.model] = statistics.median(shares)
        return found

    def bytes_on_wire(self, interface: str) -> dict[str, dict[str, int]]:
        """Of one lap, expected and as the kernel counts them; for each run over the link."""
        found = {}
        for run in (run for run in self.runs if run.arm in (OVERLAPPED, SERIAL) and run.model in MODELS):
            expected = sum(one.bytes_out(self.rank) for part in self.shipments(run.model) for one in part)
            found[run.name] = {"expected": expected, "counted": counted(interface, lambda run=run: self.lap(run))}
        return found


def digest(unit: Unit) -> str:
    """Of all gradients."""
    hasher = hashlib.sha256()
    for name, gradient in unit.gradients().items():
        hasher.update(name.encode() + gradient.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def laps(job: Job, arms: Arms, interface: str) -> dict[str, object]:
    """Everything about one group of runs."""
    runs = [run for run in GROUPS[job.part]() if run.model != DEEPSPEED or find_spec("deepspeed")]
    group = Laps(job, arms, runs)
    checked = group.check()
    wire = group.bytes_on_wire(interface)
    busiest = {model: unit.busiest() for model, unit in group.units.items() if model in MODELS}
    overhead = group.null_overhead()
    return checked | {"bytes": wire, "busiest": busiest, "null_overhead": overhead, "window": group.windows(), "laps": group.rounds()}


def null(job: Job, arms: Arms) -> dict[str, object]:
    """No exchange, and none of the code around it, beside what the code costs: both ranks at the same time, each for itself."""
    arms.barrier()
    return compared(job.size, SMALL if job.small else REFERENCE, arms.axis.world.device, job.rounds, job.rounds, NULL_SECONDS)


PARTS: dict[str, Callable[[Job, Arms], dict[str, object]]] = {
    "transport": lambda job, arms: transport(arms, job.rounds),
    "adaptive": lambda job, arms: adaptive(arms, job.rounds, job.evenly, job.small),
    "steps": lambda job, arms: steps(arms, job.rounds, job.size, job.accumulation),
    "null": lambda job, arms: null(job, arms),
    "change": lambda job, arms: change(arms, job.rounds, job.evenly, job.size, Path(job.folder)),
}


def main(job: Job, rank: int) -> None:
    keep_freed_memory()  # as every rank does, see moetrain/launch.py
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})
    folder, interface = Path(job.folder), os.environ.get("OVERLAP_INTERFACE", "")
    with World.from_file(folder / "meeting", rank, WORLD, 300.0) as world:
        arms = Arms(Mesh(world, WORLD))
        gc.freeze()  # a collection before every lap looks at few objects
        found = PARTS[job.part](job, arms) if job.part in PARTS else laps(job, arms, interface)
        (folder / f"found-{rank}.json").write_text(json.dumps(found))
        world.barrier("the end")


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])), int(sys.argv[2]))
