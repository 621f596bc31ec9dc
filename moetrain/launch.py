"""The process that torchrun starts: command line to TrainConfig, then the plan or the training. torch is imported to train only."""

import os
import sys
import time
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from moetrain.base.errors import BundleError, ConfigError, MissingExtraError, MoetrainError, PlanError
from moetrain.base.memory import keep_freed_memory
from moetrain.config import EXPLAINED, TrainConfig, as_config_error, check, conf_folder, print_plan, register, to_config

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
GRACE_SECONDS = 2.0
# Every rank meets these alike, so rank 0 alone says them; another error may be known to one rank only.
ALIKE = (ConfigError, PlanError, BundleError, MissingExtraError)


def main() -> int:
    """Runs sys.argv. Returns 2 for a mistake of the user, said in one sentence; any other exception keeps its trace."""
    try:
        config = configured(sys.argv[1:])
        return 0 if config is None else start(config)
    except MoetrainError as error:
        return report(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def configured(arguments: Sequence[str]) -> TrainConfig | None:
    """The composed configuration, or None when Hydra only printed something (--cfg job, --help). Raises ConfigError."""
    if wants_multirun(arguments):
        raise ConfigError(
            "One process group trains one run, so --multirun is not possible here.",
            "Start one job per run: python launch/submit.py -m +experiment=gpt_moe_8e optim.lr=1e-3,2e-3",
        )
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its own shortened trace and exits
    composed: list[DictConfig] = []

    def keep(config: DictConfig) -> None:
        composed.append(config)

    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="train")(keep)()
        return to_config(composed[0]) if composed else None
    except EXPLAINED as error:
        raise as_config_error(error) from error


def start(config: TrainConfig) -> int:
    """Prints the plan without a process group, or trains. Raises ConfigError for a broken rule."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.debug.plan:
        if rank() == 0:
            print_plan(config, config.debug.world or world)
        return 0
    check(config, world)
    keep_freed_memory()
    from torch.distributed.elastic.multiprocessing.errors import record

    from moetrain.build import train

    def train_or_report() -> int:
        try:
            return train(config)
        except MoetrainError as error:
            return report(error)

    # Inside Hydra's reach @record would never see an exception; here torchrun's summary names the first rank that failed, and why.
    return record(train_or_report)() or 0


def report(error: MoetrainError) -> int:
    """The sentence and its hint on standard error, once where every rank knows it.

    torchrun ends all ranks as soon as one has failed, so the others let rank 0 speak first.
    """
    if rank() == 0:
        print(error, file=sys.stderr)
        return EXIT_MISTAKE
    if not isinstance(error, ALIKE):
        print(f"rank {rank()}: {error}", file=sys.stderr, flush=True)
    time.sleep(GRACE_SECONDS)
    return EXIT_MISTAKE


def wants_multirun(arguments: Sequence[str]) -> bool:
    """Whether Hydra would sweep: -m, --multirun and its abbreviations, or hydra.mode."""
    flags = ("-m", *("--multirun"[:length] for length in range(len("--m"), len("--multirun") + 1)))
    return any(argument in flags or argument.lower().lstrip("+") == "hydra.mode=multirun" for argument in arguments)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
