"""`moetrain train`, `plan`, `config` and `experiments`: the commands that compose a configuration."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moetrain.config import TrainConfig

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

OVERRIDES = "+experiment=NAME, GROUP=OPTION or KEY=VALUE; docs/configuration.md lists them"


def add_parsers(subparsers: "Subparsers") -> None:
    """Registers the four verbs; each sets `run`."""
    train = subparsers.add_parser(
        "train",
        help="train; the same command again resumes",
        description="Checks the configuration, then starts torchrun on this machine with one process per GPU (or more, on CPUs). "
        "Several machines: launch/slurm/train.sbatch, or torchrun launch/train.py on each.",
        epilog="Example: moetrain train +experiment=gpt_moe_8e --nproc 2 optim.lr=2e-3",
    )
    train.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDES)
    train.add_argument("--nproc", type=positive, default=1, metavar="N", help="processes on this machine (default: %(default)s)")
    train.add_argument("--max-restarts", type=int, default=0, metavar="N", help="restart all after a crash, N times at most (default: 0)")
    train.set_defaults(run=run_train)
    plan = subparsers.add_parser(
        "plan",
        help="print what a run costs on any number of ranks",
        description="Prints axes, parameters, memory of a rank, all-to-all bytes per step and checkpoint bytes. Needs no GPU and no data.",
        epilog="Example: moetrain plan qwen3_30b_a3b --world 64 parallel.ep=16",
    )
    plan.add_argument("experiment", metavar="EXPERIMENT", help="name of an experiment, or a first override")
    plan.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDES)
    plan.add_argument("--world", type=positive, metavar="N", help="ranks to plan for (default: debug.world, or 1)")
    plan.set_defaults(run=run_plan)
    config = subparsers.add_parser(
        "config",
        help="print a composed configuration",
        description="Prints the whole configuration that these overrides make, checked key by key, as YAML.",
        epilog="Example: moetrain config +experiment=gpt_moe_8e optim.lr=2e-3",
    )
    config.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=OVERRIDES)
    config.add_argument("--from-bundle", metavar="BUNDLE", help="print the model of a bundle instead, to save as conf/model/NAME.yaml")
    config.set_defaults(run=run_config)
    experiments = subparsers.add_parser("experiments", help="list the ready-made experiments", description="Lists conf/experiment.")
    experiments.set_defaults(run=run_experiments)


def run_train(args: argparse.Namespace) -> int:
    """Composes and checks here, so that a mistake is one sentence and not a failure of N processes; then becomes torchrun."""
    from moetrain.config import check, print_plan

    config = composed(args.overrides)
    if config.debug.plan:
        print_plan(config, config.debug.world or args.nproc)
        return 0
    check(config, args.nproc)
    sys.stdout.flush()
    os.execv(sys.executable, torchrun(args.nproc, args.max_restarts, args.overrides))


def torchrun(num_processes: int, max_restarts: int, overrides: list[str]) -> list[str]:
    """The command line of torchrun on one machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return [*launcher, f"--max-restarts={max_restarts}", "-m", "moetrain.launch", *overrides]


def run_plan(args: argparse.Namespace) -> int:
    from moetrain.config import print_plan

    first = args.experiment if "=" in args.experiment else f"+experiment={args.experiment}"
    config = composed([first, "debug=plan", *args.overrides])
    config.debug.plan = True
    print_plan(config, args.world or config.debug.world or 1)
    return 0


def run_config(args: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    if args.from_bundle:
        print(model_option(args.from_bundle), end="")
        return 0
    print(OmegaConf.to_yaml(OmegaConf.structured(composed(args.overrides))), end="")
    return 0


def model_option(path: str) -> str:
    """A file for conf/model with every key of the bundle's model. Raises BundleError or ConfigError when it cannot be read."""
    from omegaconf import OmegaConf

    from moetrain.model.config import ModelConfig
    from moetrain.store.bundle import Bundle

    bundle = Bundle.open(path)
    model = OmegaConf.structured(ModelConfig.from_dict(bundle.config))
    return f"# The model of the bundle {bundle.folder.name}\n{OmegaConf.to_yaml(model)}"


def run_experiments(args: argparse.Namespace) -> int:
    from moetrain.config import options

    found = options("experiment")
    width = max(map(len, found))
    for name, description in found.items():
        print(f"{name:{width}}  {description}")
    return 0


def composed(overrides: list[str]) -> "TrainConfig":
    """Raises ConfigError for a mistake."""
    from moetrain.config import EXPLAINED, as_config_error, compose, to_config

    try:
        return to_config(compose(overrides))
    except EXPLAINED as error:
        raise as_config_error(error) from error


def positive(text: str) -> int:
    """argparse's type for a count of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not possible: at least 1 is needed")
    return number
