"""`moetrain plot` and `moetrain env`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.base.clock import SystemClock
from moetrain.base.errors import MoetrainError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parsers(subparsers: "Subparsers") -> None:
    """Registers both commands; each sets `run`, a function from the parsed arguments to an exit code."""
    plot = subparsers.add_parser(
        "plot",
        help="draw loss, throughput, expert load, checkpoint ages and profiled steps of runs",
        description="Draws PNG figures from the metrics of one or more runs (several are laid over each other) and prints their paths.",
    )
    plot.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder, such as runs/gpt_moe_8e")
    plot.add_argument("--out", metavar="DIR", type=Path, help="folder for the figures (default: plots/ in the first run's folder)")
    plot.set_defaults(run=run_plot)
    env = subparsers.add_parser(
        "env",
        help="print versions, devices, backends and disk speed",
        description="Prints what a bug report needs: versions, devices, backends, CPU features, memory, disk and matrix speed.",
    )
    env.add_argument("--json", action="store_true", help="print JSON instead of text")
    env.add_argument("--folder", metavar="DIR", type=Path, default=Path("."), help="where to measure the disk (default: here)")
    env.set_defaults(run=run_env)


def run_plot(args: argparse.Namespace) -> int:
    from moetrain.telemetry.plots import read_run, write_plots

    runs: list[Path] = args.runs
    for file in write_plots([read_run(run) for run in runs], args.out or runs[0] / "plots"):
        print(file)
    return 0


def run_env(args: argparse.Namespace) -> int:
    import json

    from moetrain.telemetry.env import as_text, collect

    folder: Path = args.folder
    if not folder.is_dir():
        raise MoetrainError(f"{folder} is not a folder.", "Give --folder a folder that exists; 64 MiB are written there and removed.")
    facts = collect(folder, SystemClock(), probe=True)
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0
