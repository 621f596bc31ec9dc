"""What do lost tokens cost? The same small run without faults and under many, for every checkpoint mode and several seeds.

    python -m tools.loss_under_faults --faults 10 --json benchmarks/loss_under_faults.json --png docs/images/loss_under_faults.png

A fault ends the run at a random step and takes the memory of all nodes with it, the worst case: everything comes back from the folder.
Faults are at the same steps for all modes of a seed. Every run ends at the same step and is evaluated on the whole held-out text.
A finished run keeps its figures in the folder: the same command goes on after a stop.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from moetrain.build import build
from moetrain.config import TrainConfig, check, compose, to_config
from moetrain.data.prepare import ensure_prepared
from moetrain.dist.stop import Stop
from moetrain.dist.world import World
from moetrain.parallel.engine import StepResult
from moetrain.telemetry.record import read_records
from moetrain.train.loop import train
from moetrain.train.run import Run
from tools.campaign import Campaign, leave_on_sigterm
from tools.seeds import check_seeds, interval
from tools.small_job import TOKENS_PER_STEP, small_job

MODES = ("none", "full", "moments", "weights16", "experts")
SMALL = (
    *small_job(width=96, seq_len=128), "train.evaluate_every=0", "telemetry.console=off", "telemetry.experts_every=0",
    "checkpoint.experts_per_save=1",
)  # fmt: skip
PAUSE_SECONDS = 0.005  # between looks at a save


class Fault(Exception):
    """The run ends here, as if the power went."""


class PaceHook:
    """Waits after every step until no save is under way, so that what is committed does not depend on the rate of the disk; then raises
    after the given one (None: never), before any other hook."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_start(self, run: Run) -> None:
        pass

    def on_step(self, run: Run, result: StepResult) -> None:
        while run.checkpoint.status().pending:
            time.sleep(PAUSE_SECONDS)
        if run.progress.step == self.step:
            raise Fault

    def on_finish(self, run: Run, reason: str) -> None:
        pass


@dataclass
class Result:
    mode: str
    seed: int
    faults: int
    bits_per_byte: float
    loss: float
    plt_weights: float
    plt_moments: float
    replayed_steps: int
    seconds: float


def life(config: TrainConfig, folder: Path, fault: int | None) -> bool:
    """Trains from where the folder stands to the fault or the end; whether it came to the end."""
    with ExitStack() as stack:
        world = World.single(torch.device("cpu"))
        stop = stack.enter_context(Stop(world, folder / "STOP"))
        run = build(config, folder, world, stop)
        stack.callback(run.sinks.close)
        run.hooks.insert(0, PaceHook(fault))
        try:
            train(run)
        except Fault:
            run.checkpoint.finish()  # ends the agent: what was in memory is lost
            return False
    return True


def result(folder: Path, mode: str, seed: int, faults: list[int], seconds: float) -> Result:
    records = read_records(folder)
    measured = [record for record in records if "evaluation/bits_per_byte" in record][-1]
    resumes = [record for record in records if record.get("event") == "resume"]
    last = resumes[-1] if resumes else {}
    replayed = sum(fault - int(record["train/step"]) for fault, record in zip(faults, resumes, strict=True)) if resumes else 0
    return Result(
        mode, seed, len(faults), float(measured["evaluation/bits_per_byte"]), float(measured["evaluation/loss"]),
        float(last.get("checkpoint/plt_weights", 0.0)), float(last.get("checkpoint/plt_moments", 0.0)), replayed, seconds,
    )  # fmt: skip


def run_to_the_end(case: tuple[str, int, list[int], list[str]], folder: Path) -> dict:
    """One mode with one seed in this process, in an empty folder, through all its `faults` (steps)."""
    mode, seed, faults, shared = case
    own = [f"run.folder={folder.parent}", f"run.name={folder.name}", f"run.seed={seed}", f"data.seed={seed}"]
    config = to_config(compose([*shared, *own, f"checkpoint.mode={'full' if mode == 'none' else mode}"]))
    check(config, 1)
    faults = [] if mode == "none" else faults
    started = time.monotonic()
    for fault in [*faults, None]:
        life(config, folder, fault)
    return asdict(result(folder, mode, seed, faults, round(time.monotonic() - started, 1)))


def fault_steps(seed: int, options: argparse.Namespace) -> list[int]:
    """At random, one in each of equal parts of the run after its first checkpoint."""
    choose = random.Random(seed)
    first = options.every + 1
    edges = [first + (options.steps - first) * i // options.faults for i in range(options.faults + 1)]
    return [choose.randrange(low, high) for low, high in pairwise(edges)]


def summary(results: list[Result]) -> dict[str, dict]:
    """By mode: means and their intervals over seeds, and the difference to the same seed without faults."""
    calm = {found.seed: found.bits_per_byte for found in results if found.mode == "none"}
    rows = {}
    for mode in dict.fromkeys(found.mode for found in results):
        of_mode = [found for found in results if found.mode == mode]
        rows[mode] = {
            "bits_per_byte": interval([found.bits_per_byte for found in of_mode]),
            "more_than_without_faults": interval([found.bits_per_byte - calm[found.seed] for found in of_mode]),
            "plt_weights": statistics.mean(found.plt_weights for found in of_mode),
            "plt_moments": statistics.mean(found.plt_moments for found in of_mode),
        }
    return rows


def table(rows: dict[str, dict]) -> str:
    lines = [f"{'mode':10} {'bits/byte':>10} {'95 %':>16} {'vs no fault':>12} {'95 %':>18} {'PLT weights':>12} {'PLT moments':>12}"]
    for mode, row in rows.items():
        loss, more = row["bits_per_byte"], row["more_than_without_faults"]
        lines.append(
            f"{mode:10} {loss['mean']:10.4f} {loss['low']:7.4f}..{loss['high']:7.4f} {more['mean']:+12.4f} "
            f"{more['low']:+8.4f}..{more['high']:+8.4f} {row['plt_weights']:12.2%} {row['plt_moments']:12.2%}"
        )
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    """Every run as a dot: bits per byte beyond the same seed without faults, against PLT of the moments."""
    from matplotlib.figure import Figure

    calm = {found.seed: found.bits_per_byte for found in results if found.mode == "none"}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for mode in MODES[1:]:
        of_mode = [found for found in results if found.mode == mode]
        apart = [found.bits_per_byte - calm[found.seed] for found in of_mode]
        axes.plot([100 * found.plt_moments for found in of_mode], apart, "o", label=mode)
    axes.axhline(0, color="0.7", linewidth=1, zorder=0)
    axes.set_xlabel("PLT of the moments, %")
    axes.set_ylabel("bits per byte more than without faults")
    axes.legend(title="checkpoint.mode")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="run beside `none`, which has no faults")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--folder", type=Path, default=Path("runs/loss_under_faults"), help="where results are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("overrides", nargs="*", help="of launch/train.py, after --")
    options = parser.parse_args(arguments)
    try:
        check_seeds(options.seeds)
    except ValueError as error:
        parser.error(str(error))
    shared = [*SMALL, f"train.tokens={TOKENS_PER_STEP * options.steps}", f"checkpoint.every_steps={options.every}", *options.overrides]
    ensure_prepared(to_config(compose(shared)).data, show_progress=True)
    modes = list(dict.fromkeys(["none", *options.modes]))
    faults = {seed: fault_steps(seed, options) for seed in options.seeds}
    cases = {f"{mode}-{seed}": (mode, seed, faults[seed], shared) for seed in options.seeds for mode in modes}
    results: list[Result] = []
    for found in Campaign(options.folder, [*shared, f"faults={options.faults}"], options.jobs).run(run_to_the_end, cases):
        results.append(Result(**found))
        print(json.dumps(found), flush=True)
    results.sort(key=lambda one: (one.seed, modes.index(one.mode)))
    rows = summary(results)
    print(table(rows))
    if options.json:
        command = shlex.join(["python", "-m", "tools.loss_under_faults", *arguments])
        found = {"command": command, "steps": options.steps, "every": options.every, "modes": rows, "runs": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.png:
        draw(results, options.png)
    return 0


if __name__ == "__main__":
    leave_on_sigterm()
    sys.exit(main(sys.argv[1:]))
