"""`moetrain generate`: text from a bundle, streamed to standard output. Heavy imports wait until the command runs."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.base.clock import Clock, SystemClock
from moetrain.base.errors import ConfigError
from moetrain.inference.config import SamplingParams

if TYPE_CHECKING:
    from moetrain.inference.generate import Piece

DEFAULT = SamplingParams()
REASONS = {
    "stop": "the text ended",
    "length": "--max-tokens is reached",
    "context": "prompt and completion fill the model's context of {max_position} tokens (model.max_position)",
}


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Registers `generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="complete a prompt with a bundle",
        description="Completes a prompt with the model of a bundle (see moetrain export, moetrain import). The text goes to standard "
        "output as it is made; speed and reason of the end go to standard error.",
        epilog="Example: moetrain generate exports/gpt_moe_8e --prompt 'def main():' --max-tokens 100 --temperature 0",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads standard input; '' begins a new document")
    parser.add_argument("--max-tokens", type=int, default=DEFAULT.max_tokens, help="tokens at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=DEFAULT.temperature, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=DEFAULT.top_p, help="likeliest tokens holding this share (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=DEFAULT.top_k, help="only the k likeliest tokens; 0 = all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=DEFAULT.seed, help="the same seed gives the same text (default: %(default)s)")
    parser.add_argument("--num", type=int, default=1, help="completions, with seeds counting up from --seed (default: %(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    parser.add_argument("--echo", action="store_true", help="show the prompt before each completion")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float64 (default: %(default)s)")
    parser.set_defaults(run=generate_command)


def generate_command(args: argparse.Namespace, clock: Clock | None = None) -> int:
    """Runs `moetrain generate`; raises MoetrainError with one sentence when it cannot."""
    from moetrain.inference.generate import generate, several
    from moetrain.inference.runtime import Runtime

    clock = clock or SystemClock()
    if args.num < 1:
        raise ConfigError.of("num", args.num, "at least one completion must be asked for")
    params = SamplingParams(args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    params.check()
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with Runtime.open(args.bundle, args.device, args.dtype) as runtime:
        params = several(params, args.num, stop=runtime.language.end_ids)
        start = clock.monotonic()
        ends = show(generate(runtime, [prompt] * args.num, params, args.stop), args.num, prompt if args.echo else "", _write)
        seconds = max(clock.monotonic() - start, 1e-9)
        max_position = runtime.config.max_position
    for end in ends:
        reason = REASONS[end.reason or "stop"].format(max_position=max_position)
        name = f"Completion {end.index + 1}" if args.num > 1 else "The completion"
        print(f"{name} has {end.num_tokens} tokens: {reason}.", file=sys.stderr)
    num_tokens = sum(end.num_tokens for end in ends)
    print(f"{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.1f} tokens/s.", file=sys.stderr)
    return 0


def show(pieces: "Iterator[Piece]", num: int, prompt: str, write: Callable[[str], None]) -> "list[Piece]":
    """Writes one completion after the other, each behind `prompt` (empty: not shown): the first unfinished one streams, later ones are
    held until it ends. Several get a headline each. Returns the last piece of each.
    """
    held, shown = [""] * num, 0
    ends: dict[int, Piece] = {}
    _open(shown, num, prompt, write)
    for piece in pieces:
        held[piece.index] += piece.text
        if piece.reason is not None:
            ends[piece.index] = piece
        while shown < num:
            write(held[shown])
            held[shown] = ""
            if shown not in ends:
                break
            write("\n")
            shown += 1
            if shown < num:
                _open(shown, num, prompt, write)
    return [ends[index] for index in range(num)]


def _open(index: int, num: int, prompt: str, write: Callable[[str], None]) -> None:
    if num > 1:
        write(f"--- {index + 1} of {num}\n")
    write(prompt)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
