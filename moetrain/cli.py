"""`moetrain VERB ...`: the one command. Each room brings its verbs in command.py; only the room of the verb that was typed is imported."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from moetrain import __version__
from moetrain.base.errors import MoetrainError, closest

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

ROOMS = {
    "train": "moetrain.config.command",
    "plan": "moetrain.config.command",
    "config": "moetrain.config.command",
    "experiments": "moetrain.config.command",
    "data": "moetrain.data.command",
    "checkpoint": "moetrain.checkpoint.command",
    "evaluate": "moetrain.train.command",
    "plot": "moetrain.telemetry.command",
    "env": "moetrain.telemetry.command",
    "export": "moetrain.convert.command",
    "import": "moetrain.convert.command",
    "generate": "moetrain.inference.command",
}

HELP = f"""\
moetrain {__version__}: train Mixture-of-Experts language models, keep them safe, serve them.

Usage: moetrain COMMAND ...        moetrain COMMAND --help says more about one of them.

Train
  experiments   list the ready-made experiments
                  moetrain experiments
  plan          print what a run costs on any number of ranks: axes, memory, traffic, checkpoint bytes
                  moetrain plan olmoe_1b_7b --world 64
  config        print a composed configuration
                  moetrain config +experiment=gpt_moe_8e optim.lr=2e-3
  train         train; the same command again resumes
                  moetrain train +experiment=gpt_moe_8e --nproc 2
  data prepare  turn text, source trees, JSONL or parquet into a corpus
                  moetrain data prepare my_project/ --out prepared/mine --tokenizer train --vocab-size 8192

Look at a run
  checkpoint    list, show, verify, compare, pin, prune or convert the checkpoints of a run
                  moetrain checkpoint list runs/gpt_moe_8e
  evaluate      loss and bits per byte on held-out text
                  moetrain evaluate runs/gpt_moe_8e --data prepared/mine
  plot          draw loss, throughput, expert load and checkpoint ages
                  moetrain plot runs/gpt_moe_8e
  env           print versions, devices, backends and disk speed
                  moetrain env

Use a model
  export        write a run as a bundle or a Hugging Face folder
                  moetrain export runs/gpt_moe_8e --format bundle --out exports/gpt_moe_8e
  import        turn a Hugging Face folder (Mixtral, Qwen3-MoE, OLMoE) into a bundle
                  moetrain import OLMoE-1B-7B-0924 --out exports/olmoe
  generate      complete a prompt
                  moetrain generate exports/gpt_moe_8e --prompt 'def main():'
"""


class Command(Protocol):
    """What a room's command.py offers."""

    def add_parsers(self, subparsers: "Subparsers") -> None:
        """Registers the room's verbs; each sets `run`, a function from the parsed arguments to an exit code."""
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 2 for a mistake of the user, said in one sentence on standard error, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if words else EXIT_MISTAKE
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    try:
        return dispatch(words)
    except MoetrainError as error:
        print(error, file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough; without this Python complains while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def dispatch(words: Sequence[str]) -> int:
    """Parses with the room of the first word and runs it. Raises MoetrainError for an unknown command."""
    if words[0] not in ROOMS:
        raise MoetrainError(f"There is no command {words[0]}.", f"{closest(words[0], ROOMS)} moetrain --help lists all.")
    parser = argparse.ArgumentParser(prog="moetrain")
    command: Command = import_module(ROOMS[words[0]])  # pyright: ignore[reportAssignmentType]
    command.add_parsers(parser.add_subparsers(metavar="COMMAND", required=True))
    args, rest = parser.parse_known_args(words)
    if "overrides" in args:
        # argparse takes positional words up to the first option only; overrides may stand anywhere
        args.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (moetrain {words[0]} --help lists them)")
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
