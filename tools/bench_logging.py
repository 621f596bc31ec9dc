"""What looking at a run costs: seconds of records, expert loads and events, over those of the training steps themselves.

    python -m tools.bench_logging --json benchmarks/logging.json

One process trains +experiment=gpt_moe_8e on the prepared corpus, as a run does, with TensorBoard beside the usual records; a clock stands
around every call of the hooks that log. Once as configured, once with an expert-load snapshot after every step as well as a record.
No evaluation, samples or saves between.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch

from moetrain.build import build
from moetrain.config import check, compose, to_config
from moetrain.data.prepare import ensure_prepared
from moetrain.dist.stop import Stop
from moetrain.dist.world import World
from moetrain.parallel.engine import StepResult
from moetrain.train.hooks import EventHook
from moetrain.train.loop import train
from moetrain.train.run import Run
from tools.small_job import small_job

QUIET = (
    "train.evaluate_every=0",
    "train.sample_every=0",
    "checkpoint.every_steps=0",
    "telemetry.tensorboard=true",
    "telemetry.console=lines",
)
CASES = {"as configured": (), "after every step": ("telemetry.experts_every=1",)}


class Hook(Protocol):
    def on_start(self, run: Run) -> None: ...

    def on_step(self, run: Run, result: StepResult) -> None: ...

    def on_finish(self, run: Run, reason: str) -> None: ...


@dataclass
class Timed:
    """A hook with a clock around every step's call."""

    inner: Hook
    seconds: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # seconds of the training steps

    def on_start(self, run: Run) -> None:
        self.inner.on_start(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        started = time.perf_counter()
        self.inner.on_step(run, result)
        self.seconds.append(time.perf_counter() - started)
        self.steps.append(result.seconds)

    def on_finish(self, run: Run, reason: str) -> None:
        self.inner.on_finish(run, reason)


def measure(overrides: list[str], steps: int, folder: Path) -> dict[str, float]:
    """Of one run: seconds of a step, and the share of all logging in all steps but the first, which imports and compiles."""
    run_for = [f"run.folder={folder.parent}", f"run.name={folder.name}", f"run.stop_after={steps}"]
    folder.mkdir()
    config = to_config(compose(["+experiment=gpt_moe_8e", *QUIET, *run_for, *overrides]))
    check(config, 1)
    ensure_prepared(config.data, show_progress=True)
    with ExitStack() as stack:
        world = World.single(torch.device("cpu"))
        run = build(config, folder, world, stack.enter_context(Stop(world, folder / "STOP")))
        stack.callback(run.sinks.close)
        timed = [Timed(run.records)]
        run.records = timed[0]  # type: ignore[assignment] - of the same shape
        for place, hook in enumerate(run.hooks):
            if isinstance(hook, EventHook):
                timed.append(Timed(hook))
                run.hooks[place] = timed[-1]
        train(run)
    logged = [sum(its) for its in zip(*(hook.seconds[: steps - 1] for hook in timed), strict=True)][1:]
    stepped = timed[0].steps[1 : len(logged) + 1]
    return {"steps": len(logged), "step_seconds": statistics.median(stepped), "share": sum(logged) / sum(stepped),
            "largest_share": max(log / step for log, step in zip(logged, stepped, strict=True))}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--small", action="store_true", help="a size for a test")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    size = [override for override in small_job(width=32, seq_len=32) if not override.startswith("+")] if options.small else []
    found = {}
    for name, own in CASES.items():
        with tempfile.TemporaryDirectory(prefix="logging-") as folder:
            found[name] = measure([*size, *own, *options.overrides], options.steps, Path(folder) / "run")
        row = found[name]
        print(f"logging {name}: {row['share']:.3%} of the steps, at most {row['largest_share']:.2%} of one "
              f"({row['steps']} steps of {row['step_seconds']:.3f} s)")  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"command": ["python", "-m", "tools.bench_logging", *sys.argv[1:]], "cases": found, "threads": torch.get_num_threads(),
                  "versions": {"python": platform.python_version(), "cores": str(os.cpu_count()), "torch": version("torch")}}  # fmt: skip
        options.json.write_text(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
